"""Calls of convolutions, and the input patches of their outputs."""
import math
from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from .positions import input_positions


class Filters(NamedTuple):
    """The filters of a convolution.

    Attributes:
        weight (Tensor): Weight in the autograd graph, shape (C, C_in /
            groups, kh, kw); if transposed, (C_in, C / groups, kh, kw).
        bias (Tensor, optional): Bias in the autograd graph, shape (C,). None
            if there is no bias, or if it does not train.
        groups (int): As in ``nn.Conv2d``.
        transposed (bool): True for ``nn.ConvTranspose2d``.
        centred (bool): True if the convolution subtracts each filter's mean
            from the filter (:class:`mmdet_smallbn.CenConv2d`). To subtract
            each patch's mean from the patch gives the same outputs.
    """
    weight: Tensor
    bias: Optional[Tensor] = None
    groups: int = 1
    transposed: bool = False
    centred: bool = False

    @property
    def rows(self) -> Tensor:
        """Filters as rows, one for each output channel, shape (C, F).

        They are part of the autograd graph. F = C_in / groups * kh * kw, plus
        1 for a bias.
        """
        weight = self.weight
        if self.transposed:
            by_group = weight.unflatten(0, (self.groups, -1))
            weight = by_group.transpose(1, 2).flatten(0, 1)
        rows = weight.flatten(1)
        if self.bias is None:
            return rows
        return torch.cat([rows, self.bias.to(rows.dtype).unsqueeze(1)], 1)

    @property
    def are_freed(self) -> bool:
        """True if FSDP has freed the weight after its unit's forward pass."""
        return self.weight.dim() != 4 or (
            self.weight.untyped_storage().nbytes() == 0)

    @property
    def are_parameters(self) -> bool:
        """True if they are in memory and known before the forward pass."""
        return self.weight.is_leaf and not self.are_freed

    @property
    def length(self) -> int:
        """Length F of a row."""
        first, second, *kernel = self.weight.shape
        channels = first // self.groups if self.transposed else second
        return channels * math.prod(kernel) + (self.bias is not None)


class ConvCall(NamedTuple):
    """One call of a convolution.

    Attributes:
        filters (Filters): Filters of the convolution.
        input (Tensor): Detached input, shape (N, C_in, H_in, W_in).
        stride, padding, dilation (tuple[int, int]): As in ``nn.Conv2d``.
    """
    filters: Filters
    input: Tensor
    stride: Tuple[int, int]
    padding: Tuple[int, int]
    dilation: Tuple[int, int]

    def sample(self,
               x: Tensor,
               size: Optional[int],
               turn: int,
               out: Optional[Tensor] = None) -> Tensor:
        """Return the input patches of some positions of the output.

        The positions are spread evenly over examples, rows and columns. If
        the output has fewer than ``size`` positions, some occur several
        times. Non-finite values become 0.

        Args:
            x (Tensor): Output of the call, shape (N, C, H, W), not empty.
            size (int, optional): Number of positions P. None: all.
            turn (int): Index of the iteration. The positions repeat after
                eight turns.
            out (Tensor, optional): Tensor for the result.

        Returns:
            Tensor: Patches, shape (P, groups, F).
        """
        geometry = ((self.input.size(axis), self.filters.weight.size(axis),
                     self.stride[axis - 2], self.padding[axis - 2],
                     self.dilation[axis - 2], self.filters.transposed)
                    for axis in (2, 3))
        *where, met = input_positions(x, size, turn, *geometry)
        patches = torch.ops.aten.index(
            self.input, [where[0], None, *where[1:]])
        if met is not None:
            patches.mul_(met)
        # The shape is (P, kh, kw, C_in).
        return as_patches(patches.permute(0, 3, 1, 2), self.filters, out)


def as_patches(patches: Tensor, filters: Filters,
               out: Optional[Tensor]) -> Tensor:
    """Reshape (P, C_in, ...) to (P, groups, F); a bias has the input 1."""
    patches = patches.unflatten(1, (filters.groups, -1))
    if out is None:
        out = patches.new_empty((*patches.shape[:2], filters.length))
    of_weight = out if filters.bias is None else out[..., :-1]
    if patches.dtype != out.dtype:
        patches = patches.to(out.dtype)
    torch.nan_to_num(
        patches, 0., 0., 0.,
        out=of_weight.unflatten(-1, patches.shape[2:]))
    if filters.centred:
        of_weight.sub_(of_weight.mean(2, keepdim=True))
    if filters.bias is not None:
        out[..., -1] = 1
    return out
