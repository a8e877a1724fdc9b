"""Calls of convolutions, and the input patches behind their outputs."""
import math
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor


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
    def are_parameters(self) -> bool:
        """Whether they are known before the forward pass, and in memory."""
        weight = self.weight
        return weight.is_leaf and weight.untyped_storage().nbytes() > 0

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
            x (Tensor): Output of the call, shape (N, C, H, W). The patches of
                an empty one are 0.
            size (int, optional): How many positions P. None: all.
            turn (int): The positions differ in each of eight turns.
            out (Tensor, optional): Where to write them.

        Returns:
            Tensor: Shape (P, groups, F).
        """
        if x.numel() == 0:
            return _empty_patches(self, x, size, out)
        if size is None and not self.filters.transposed:
            kernel = self.filters.weight.shape[2:]
            patches = F.unfold(self.input, kernel, self.dilation, self.padding,
                               self.stride)
            patches = patches.transpose(1, 2).flatten(0, 1).unflatten(
                1, (-1, *kernel))
            return _as_patches(patches, self.filters, out)
        examples, rows, columns, met = self._positions(x, size, turn)
        patches = torch.ops.aten.index(self.input,
                                       [examples, None, rows, columns])
        if met is not None:
            patches.mul_(met)
        # From (P, kh, kw, C_in).
        return _as_patches(patches.permute(0, 3, 1, 2), self.filters, out)

    def _positions(self, x: Tensor, size: Optional[int],
                   turn: int) -> Tuple[Tensor, Tensor, Tensor,
                                       Optional[Tensor]]:
        """Where a turn's patches are in the input.

        Returns:
            tuple: Indices of examples, rows and columns, which broadcast to
            (P, kh, kw); and which of these are no padding, (P, kh, kw, 1).
        """
        shape = (x.size(0), *x.shape[2:])
        geometry = [(self.input.size(axis + 2),
                     self.filters.weight.size(axis + 2), self.stride[axis],
                     self.padding[axis], self.dilation[axis],
                     self.filters.transposed) for axis in (0, 1)]
        if size is None:
            if math.prod(shape) > _MOST_POSITIONS:
                return _all_patches(shape, *geometry, x.device)
            return _table(x, _all_patches, shape, *geometry)
        turn %= _TURNS
        examples = _table(x, _spread, 0, shape[0], size, turn)
        rows, columns = (
            _table(x, _sampled_lines, axis, geometry[axis], shape[axis + 1],
                   size, turn) for axis in (0, 1))
        met = None
        if self.filters.transposed or any(self.padding):
            met = _table(x, _both_met, size, turn, *geometry, *shape[1:])
        return examples.view(-1, 1, 1), rows[0], columns[0], met


def _as_patches(patches: Tensor, filters: Filters,
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


def _empty_patches(call: 'LinearCall', x: Tensor, size: Optional[int],
                   out: Optional[Tensor]) -> Tensor:
    if out is None:
        filters = call.filters
        out = x.new_empty((size or 0, filters.groups, filters.length))
    return out.zero_()


# Index tables, cached by what they depend on. Those of all positions of a
# large map are made anew.
_TABLES: Dict[tuple, Any] = {}
_MOST_TABLES = 4096
_MOST_POSITIONS = 1024


def _table(like: Tensor, make: Callable, *sizes) -> Any:
    """The table that ``make`` gives for these sizes, made once a device."""
    if type(like) is not Tensor:  # a stand-in, in tracing
        return make(*sizes, like.device)
    key = (make, like.device, *sizes)
    table = _TABLES.get(key)
    if table is None:
        if len(_TABLES) == _MOST_TABLES:
            _TABLES.clear()
        table = _TABLES[key] = make(*sizes, like.device)
    return table


_TURNS = 8
# Powers of the inverse of the root of x^4 = x + 1: points at multiples of
# them, modulo 1, fill the cube evenly. For examples, rows and columns.
_STEPS = tuple(round(1.2207440846057596**-i * 2**24) for i in (3, 1, 2))


def _all(axis: int, shape: Tuple[int, ...], device: torch.device) -> Tensor:
    """Lines of an axis at all positions of a map, shape (P,)."""
    index = torch.arange(math.prod(shape), device=device)
    return index // math.prod(shape[axis + 1:]) % shape[axis]


def _spread(axis: int, size: int, count: int, turn: int,
            device: torch.device) -> Tensor:
    """Lines of an axis at a turn's positions, shape (count,)."""
    first = turn * count
    point = torch.arange(first, first + count, device=device) * _STEPS[axis]
    return (point + 2**23) % 2**24 * size // 2**24


def _all_patches(shape: Tuple[int, ...], row_geometry: tuple,
                 column_geometry: tuple, device: torch.device) -> tuple:
    """What :meth:`ConvCall._positions` gives, of all positions."""
    examples, *lines = (_all(axis, shape, device) for axis in range(3))
    rows, columns = (
        _input_lines(axis, lines[axis], *geometry)
        for axis, geometry in enumerate((row_geometry, column_geometry)))
    return (examples.view(-1, 1, 1), rows[0], columns[0],
            (rows[1] & columns[1]).unsqueeze(-1))


def _sampled_lines(axis: int, geometry: tuple, out: int, count: int,
                   turn: int, device: torch.device) -> tuple:
    lines = _spread(axis + 1, out, count, turn, device)
    return _input_lines(axis, lines, *geometry)


def _both_met(count: int, turn: int, row_geometry: tuple,
              column_geometry: tuple, height: int, width: int,
              device: torch.device) -> Tensor:
    """Where a sample's patches meet the input, shape (count, kh, kw, 1)."""
    (_, rows), (_, columns) = (
        _sampled_lines(axis, geometry, out, count, turn, device)
        for axis, geometry, out in ((0, row_geometry, height),
                                    (1, column_geometry, width)))
    return (rows & columns).unsqueeze(-1)


def _input_lines(axis: int, output: Tensor, size: int, kernel: int,
                 stride: int, padding: int, dilation: int,
                 transposed: bool) -> Tuple[Tensor, Tensor]:
    """Lines of the input behind lines of the output, and which there are.

    Both broadcast to (P, kh, kw).
    """
    taps = torch.arange(kernel, device=output.device) * dilation - padding
    lines = output.unsqueeze(1)
    lines = lines - taps if transposed else lines * stride + taps
    met = (lines >= 0) & (lines < (size * stride if transposed else size))
    if transposed:
        met &= lines % stride == 0
        lines = lines // stride
    shape = (len(output), *((-1, 1) if axis == 0 else (1, -1)))
    return lines.clamp(0, size - 1).view(shape), met.view(shape)


class DeformCall(NamedTuple):
    """One call of mmcv's deformable convolutions.

    Where it looks (and how much it weighs there, in version 2) is taken as it
    was: it is linear in its filters.

    Attributes:
        filters (Filters): With which.
        input (Tensor): Detached, shape (N, C_in, H_in, W_in).
        offset (Tensor): Steps of the places, row and column, shape (N,
            2 * deform_groups * kh * kw, H, W).
        mask (Tensor, optional): Weights of the places, shape (N,
            deform_groups * kh * kw, H, W). None: 1.
        stride, padding, dilation (tuple[int, int]): As in ``nn.Conv2d``.
        deform_groups (int): Groups of channels with places of their own.
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
        """As :meth:`ConvCall.sample`."""
        if x.numel() == 0:
            return _empty_patches(self, x, size, out)
        n, _, height, width = self.input.shape
        shape = (x.size(0), *x.shape[2:])
        examples, rows, columns = (
            _all(axis, shape, x.device) if size is None else
            _table(x, _spread, axis, shape[axis], size, turn % _TURNS)
            for axis in range(3))
        count, places = len(examples), (self.deform_groups, -1)
        # Where each tap looks, shape (P, deform_groups, kh * kw).
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
        # From (P, deform_groups, kh * kw, C_in / deform_groups).
        patches = patches.transpose(2, 3).flatten(1, 2)
        return _as_patches(patches, self.filters, out)

    def _taps(self, lines: Tensor, axis: int) -> Tensor:
        """Lines of the input that undeformed taps meet, (P, kernel)."""
        taps = torch.arange(
            self.filters.weight.size(axis + 2), device=lines.device)
        return lines.unsqueeze(1) * self.stride[axis] + (
            taps * self.dilation[axis] - self.padding[axis])


LinearCall = Union[ConvCall, DeformCall]
