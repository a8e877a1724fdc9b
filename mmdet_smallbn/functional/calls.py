"""Calls of convolutions, and the input patches behind their outputs."""
import math
from typing import (Any, Callable, Dict, List, NamedTuple, Optional, Tuple,
                    Union)

import torch
from torch import Tensor


class ConvCall(NamedTuple):
    """One call x = conv(input; weight) + bias.

    Attributes:
        input (Tensor): Detached, shape (N, C_in, H_in, W_in).
        weight (Tensor): The weight as used (after centralisation, in the
            autocast dtype), live to autograd, shape (C, C_in / groups, kh,
            kw); transposed (C_in, C / groups, kh, kw).
        bias (Tensor, optional): The bias if it trains, live to autograd,
            shape (C,).
        stride, padding, dilation (tuple[int, int]): As in ``nn.Conv2d``.
        groups (int): As in ``nn.Conv2d``.
        transposed (bool): Whether it is ``nn.ConvTranspose2d``'s.
    """
    input: Tensor
    weight: Tensor
    bias: Optional[Tensor]
    stride: Tuple[int, int]
    padding: Tuple[int, int]
    dilation: Tuple[int, int]
    groups: int
    transposed: bool = False

    @property
    def filters(self) -> Tensor:
        """One row for each output channel, shape (C, F), live to autograd.

        F = C_in / groups * kh * kw, and one more for a bias.
        """
        weight = self.weight
        if self.transposed:
            by_group = weight.unflatten(0, (self.groups, -1))
            weight = by_group.transpose(1, 2).flatten(0, 1)
        return _with_bias(weight.flatten(1), self.bias)

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
        examples, rows, columns = self._positions(x, size, turn)
        patches = torch.ops.aten.index(
            self.input, [examples.input, None, rows.input, columns.input])
        for lines in (rows, columns):
            if lines.met is not None:
                patches.mul_(lines.met)
        # From (P, kh, kw, C_in).
        return _as_patches(patches.permute(0, 3, 1, 2), self, out)

    def _positions(self, x: Tensor, size: Optional[int],
                   turn: int) -> List['_Lines']:
        """Those of a turn, on the axes of examples, rows and columns."""
        examples = _output_lines(x, 0, size, turn)
        positions = [_Lines(examples, examples.view(-1, 1, 1))]
        shape = (x.size(0), *x.shape[2:])
        for axis in (0, 1):
            geometry = (self.input.size(axis + 2), self.weight.size(axis + 2),
                        self.stride[axis], self.padding[axis],
                        self.dilation[axis], self.transposed)
            if size is None:
                positions.append(
                    _table_of_all(x, _all_lines, axis, geometry, shape))
            else:
                positions.append(
                    _table(x, _sampled_lines, axis, geometry,
                           x.size(axis + 2), size, turn % _TURNS))
        return positions


def _with_bias(filters: Tensor, bias: Optional[Tensor]) -> Tensor:
    if bias is None:
        return filters
    return torch.cat([filters, bias.to(filters.dtype).unsqueeze(1)], 1)


def _as_patches(patches: Tensor, call: 'LinearCall',
                out: Optional[Tensor]) -> Tensor:
    """From (P, C_in, ...) to (P, groups, F), with an input for a bias."""
    patches = patches.unflatten(1, (call.groups, -1))
    length = math.prod(patches.shape[2:])
    if out is None:
        out = patches.new_empty(
            (*patches.shape[:2], length + (call.bias is not None)))
    of_weight = out[..., :length].unflatten(-1, patches.shape[2:])
    torch.nan_to_num(patches.to(out.dtype), 0., 0., 0., out=of_weight)
    if call.bias is not None:
        out[..., length:] = 1
    return out


def _empty_patches(call: 'LinearCall', x: Tensor, size: Optional[int],
                   out: Optional[Tensor]) -> Tensor:
    if out is None:
        out = x.new_empty((size or 0, call.groups, call.filters.size(1)))
    return out.zero_()


# Index tables, cached by the sizes of an axis.
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


class _Lines(NamedTuple):
    """Where a sample's positions are on one axis.

    Attributes:
        output (Tensor): Lines of the output, shape (P,).
        input (Tensor): Lines of the input behind them, (P, kernel), in a
            shape that broadcasts with those of the other axes.
        met (Tensor, optional): Whether there is such a line, and no padding.
    """
    output: Tensor
    input: Tensor
    met: Optional[Tensor] = None


_TURNS = 8
# Powers of the inverse of the root of x^4 = x + 1: points at multiples of
# them, modulo 1, fill the cube evenly. For examples, rows and columns.
_STEPS = tuple(round(1.2207440846057596**-i * 2**24) for i in (3, 1, 2))


def _output_lines(x: Tensor, dim: int, size: Optional[int],
                  turn: int) -> Tensor:
    """Lines of the output on dimension 0, 2 or 3 at each position, (P,)."""
    axis = max(dim - 1, 0)
    if size is not None:
        return _table(x, _spread, axis, x.size(dim), size, turn % _TURNS)
    return _table_of_all(x, _all, axis, (x.size(0), *x.shape[2:]))


def _table_of_all(like: Tensor, make: Callable, *sizes) -> Any:
    """A table of all positions of a map; large ones are not kept."""
    if math.prod(sizes[-1]) > _MOST_POSITIONS:
        return make(*sizes, like.device)
    return _table(like, make, *sizes)


def _all(axis: int, shape: Tuple[int, ...], device: torch.device) -> Tensor:
    """Lines of an axis at all positions of a map, shape (P,)."""
    index = torch.arange(math.prod(shape), device=device)
    return index // math.prod(shape[axis + 1:]) % shape[axis]


def _all_lines(axis: int, geometry: tuple, shape: Tuple[int, ...],
               device: torch.device) -> _Lines:
    return _input_lines(axis, _all(axis + 1, shape, device), *geometry)


def _spread(axis: int, size: int, count: int, turn: int,
            device: torch.device) -> Tensor:
    """Lines of an axis at a turn's positions, shape (count,)."""
    first = turn * count
    point = torch.arange(first, first + count, device=device) * _STEPS[axis]
    return (point + 2**23) % 2**24 * size // 2**24


def _sampled_lines(axis: int, geometry: tuple, out: int, count: int,
                   turn: int, device: torch.device) -> _Lines:
    lines = _spread(axis + 1, out, count, turn, device)
    return _input_lines(axis, lines, *geometry)


def _input_lines(axis: int, output: Tensor, size: int, kernel: int,
                 stride: int, padding: int, dilation: int,
                 transposed: bool) -> _Lines:
    """Lines of the input behind lines of the output."""
    taps = torch.arange(kernel, device=output.device) * dilation - padding
    lines = output.unsqueeze(1)
    lines = lines - taps if transposed else lines * stride + taps
    met = (lines >= 0) & (lines < (size * stride if transposed else size))
    if transposed:
        met &= lines % stride == 0
        lines = lines // stride
    shape = (len(output), *((-1, 1) if axis == 0 else (1, -1)))
    lines = lines.clamp(0, size - 1).view(shape)
    met = met.view(*shape, 1) if padding or transposed else None
    return _Lines(output, lines, met)


class DeformCall(NamedTuple):
    """One call of mmcv's deformable convolutions.

    Where it looks (and how much it weighs there, in version 2) is taken as it
    was: it is linear in its filters.

    Attributes:
        input (Tensor): Detached, shape (N, C_in, H_in, W_in).
        offset (Tensor): Steps of the places, row and column, shape (N,
            2 * deform_groups * kh * kw, H, W).
        mask (Tensor, optional): Weights of the places, shape (N,
            deform_groups * kh * kw, H, W). None: 1.
        weight (Tensor): Live to autograd, shape (C, C_in / groups, kh, kw).
        bias (Tensor, optional): As of :class:`ConvCall`.
        stride, padding, dilation (tuple[int, int]): As in ``nn.Conv2d``.
        groups, deform_groups (int): Groups of channels with filters, and with
            places, of their own.
    """
    input: Tensor
    offset: Tensor
    mask: Optional[Tensor]
    weight: Tensor
    bias: Optional[Tensor]
    stride: Tuple[int, int]
    padding: Tuple[int, int]
    dilation: Tuple[int, int]
    groups: int
    deform_groups: int

    @property
    def filters(self) -> Tensor:
        """As :attr:`ConvCall.filters`."""
        return _with_bias(self.weight.flatten(1), self.bias)

    def sample(self,
               x: Tensor,
               size: Optional[int],
               turn: int,
               out: Optional[Tensor] = None) -> Tensor:
        """As :meth:`ConvCall.sample`."""
        if x.numel() == 0:
            return _empty_patches(self, x, size, out)
        n, _, height, width = self.input.shape
        examples, rows, columns = (
            _output_lines(x, dim, size, turn) for dim in (0, 2, 3))
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
        return _as_patches(patches, self, out)

    def _taps(self, lines: Tensor, axis: int) -> Tensor:
        """Lines of the input that undeformed taps meet, (P, kernel)."""
        taps = torch.arange(self.weight.size(axis + 2), device=lines.device)
        return lines.unsqueeze(1) * self.stride[axis] + (
            taps * self.dilation[axis] - self.padding[axis])


LinearCall = Union[ConvCall, DeformCall]
