"""Calls of convolutions, and the input patches behind their outputs."""
import math
from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from .positions import input_positions


class Filters(NamedTuple):
    """The filters of a convolution.

    Attributes:
        weight (Tensor): Live to autograd, shape (C, C_in / groups, kh, kw);
            transposed (C_in, C / groups, kh, kw).
        bias (Tensor, optional): The bias if it trains, live to autograd,
            shape (C,).
        groups (int): As in ``nn.Conv2d``.
        transposed (bool): Whether it is ``nn.ConvTranspose2d``'s.
        centred (bool): Whether the convolution uses each filter less its mean
            (:class:`mmdet_smallbn.CenConv2d`). That is the same as to use the
            filter on patches less their means.
    """
    weight: Tensor
    bias: Optional[Tensor] = None
    groups: int = 1
    transposed: bool = False
    centred: bool = False

    @property
    def rows(self) -> Tensor:
        """One row for each output channel, shape (C, F), live to autograd.

        F = C_in / groups * kh * kw, and one more for a bias.
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
        """Whether they are gone, as after their unit's forward in FSDP."""
        return self.weight.dim() != 4 or (
            self.weight.untyped_storage().nbytes() == 0)

    @property
    def are_parameters(self) -> bool:
        """Whether they are known before the forward pass, and in memory."""
        return self.weight.is_leaf and not self.are_freed

    @property
    def length(self) -> int:
        """F."""
        first, second, *kernel = self.weight.shape
        channels = first // self.groups if self.transposed else second
        return channels * math.prod(kernel) + (self.bias is not None)


class ConvCall(NamedTuple):
    """One call of a convolution.

    Attributes:
        filters (Filters): With which.
        input (Tensor): Detached, shape (N, C_in, H_in, W_in).
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
        """Patches of the input behind some positions of the output.

        They are spread evenly over examples, rows and columns. If the output
        has fewer than ``size`` positions, some come several times. Values
        that are not finite become 0.

        Args:
            x (Tensor): Output of the call, shape (N, C, H, W), not empty.
            size (int, optional): How many positions P. None: all.
            turn (int): The positions differ in each of eight turns.
            out (Tensor, optional): Where to write them.

        Returns:
            Tensor: Shape (P, groups, F).
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
        # From (P, kh, kw, C_in).
        return as_patches(patches.permute(0, 3, 1, 2), self.filters, out)


def as_patches(patches: Tensor, filters: Filters,
               out: Optional[Tensor]) -> Tensor:
    """From (P, C_in, ...) to (P, groups, F), with an input for a bias."""
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
