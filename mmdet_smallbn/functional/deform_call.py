"""Calls of mmcv's deformable convolutions."""
from typing import NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor

from .calls import ConvCall, Filters, as_patches
from .positions import output_positions


class DeformCall(NamedTuple):
    """One call of mmcv's deformable convolutions.

    Its sampling locations, and in version 2 their weights, are constants.
    With them the output is linear in the filters.

    Attributes:
        filters (Filters): Filters of the convolution.
        input (Tensor): Detached input, shape (N, C_in, H_in, W_in).
        offset (Tensor): Offsets of the sampling locations, row and column, in
            pixels of the input, shape (N, 2 * deform_groups * kh * kw, H, W).
        mask (Tensor, optional): Weights of the sampling locations, shape (N,
            deform_groups * kh * kw, H, W). None: 1.
        stride, padding, dilation (tuple[int, int]): As in ``nn.Conv2d``.
        deform_groups (int): Groups of channels that have their own offsets.
    """
    filters: Filters
    input: Tensor
    offset: Tensor
    mask: Optional[Tensor]
    stride: Tuple[int, int]
    padding: Tuple[int, int]
    dilation: Tuple[int, int]
    deform_groups: int

    def sample(self,
               x: Tensor,
               size: Optional[int],
               turn: int,
               out: Optional[Tensor] = None) -> Tensor:
        """Return input patches, as :meth:`ConvCall.sample`."""
        n, _, height, width = self.input.shape
        examples, rows, columns = output_positions(x, size, turn)
        count, places = len(examples), (self.deform_groups, -1)
        # Sampling location of each tap, shape (P, deform_groups, kh * kw).
        offset = self.offset[examples, :, rows, columns].view(
            count, *places, 2)
        grid = torch.broadcast_tensors(
            self._taps(rows, 0).unsqueeze(2),
            self._taps(columns, 1).unsqueeze(1))
        y, x = (
            offset[..., axis] + grid[axis].flatten(1).unsqueeze(1)
            for axis in (0, 1))
        by_place = self.input.view(n, self.deform_groups, -1, height, width)
        group = torch.arange(self.deform_groups, device=y.device)
        patches = 0.
        for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
            row, column = y.floor() + down, x.floor() + right
            weight = (1 - (y - row).abs()) * (1 - (x - column).abs())
            inside = (row >= 0) & (row < height) & (column >= 0) & (
                column < width)
            values = by_place[examples[:, None, None], group[:, None], :,
                              row.clamp(0, height - 1).long(),
                              column.clamp(0, width - 1).long()]
            patches = patches + values * (weight * inside).unsqueeze(-1)
        if self.mask is not None:
            mask = self.mask[examples, :, rows, columns].view(count, *places)
            patches = patches * mask.unsqueeze(-1)
        # The shape is (P, deform_groups, kh * kw, C_in / deform_groups).
        patches = patches.transpose(2, 3).flatten(1, 2)
        return as_patches(patches, self.filters, out)

    def _taps(self, lines: Tensor, axis: int) -> Tensor:
        """Return the input rows or columns of the regular taps, (P, k)."""
        taps = torch.arange(
            self.filters.weight.size(axis + 2), device=lines.device)
        return lines.unsqueeze(1) * self.stride[axis] + (
            taps * self.dilation[axis] - self.padding[axis])


LinearCall = Union[ConvCall, DeformCall]
