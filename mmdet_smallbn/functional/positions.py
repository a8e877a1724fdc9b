"""Remembered positions of feature maps, and their places in the input."""
import math
from typing import Any, Callable, Dict, Optional, Tuple

import torch
from torch import Tensor

# Index tables, cached by their arguments. A table of all positions of a large
# map is not cached.
_TABLES: Dict[tuple, Any] = {}
_MOST_TABLES = 4096
_MOST_POSITIONS = 1024


def _table(like: Tensor, make: Callable, *sizes) -> Any:
    """Return ``make`` of these sizes, cached for each device."""
    if type(like) is not Tensor:  # a proxy tensor in tracing
        return make(*sizes, like.device)
    key = (make, like.device, *sizes)
    table = _TABLES.get(key)
    if table is None:
        if len(_TABLES) == _MOST_TABLES:
            _TABLES.clear()
        table = _TABLES[key] = make(*sizes, like.device)
    return table


_TURNS = 8
# Steps for examples, rows and columns: powers of 1 / r, with r^4 = r + 1.
# Multiples of these steps, modulo 1, fill the unit cube evenly.
_STEPS = tuple(round(1.2207440846057596**-i * 2**24) for i in (3, 1, 2))


def output_positions(x: Tensor, size: Optional[int],
                     turn: int) -> Tuple[Tensor, Tensor, Tensor]:
    """Return the remembered positions of a feature map.

    Args:
        x (Tensor): Feature map, shape (N, C, H, W).
        size (int, optional): Number of positions P. None: all.
        turn (int): Index of the iteration. The positions repeat after eight
            turns.

    Returns:
        tuple[Tensor, Tensor, Tensor]: Indices of examples, rows and columns,
        shape (P,).
    """
    shape = (x.size(0), *x.shape[2:])
    return tuple(
        _all(axis, shape, x.device) if size is None else
        _table(x, _spread, axis, shape[axis], size, turn % _TURNS)
        for axis in range(3))


def input_positions(x: Tensor, size: Optional[int], turn: int,
                    rows: tuple, columns: tuple
                    ) -> Tuple[Tensor, Tensor, Tensor, Optional[Tensor]]:
    """Return the input indices of the patches of :func:`output_positions`.

    Args:
        x, size, turn: As in :func:`output_positions`.
        rows, columns (tuple): For each axis: size of the input, size of the
            kernel, stride, padding, dilation, True if transposed.

    Returns:
        tuple: Indices of examples, rows and columns, which broadcast to
        (P, kh, kw), and a mask of shape (P, kh, kw, 1) that is False in the
        padding. The mask is None if there is no padding.
    """
    shape = (x.size(0), *x.shape[2:])
    if size is None:
        if math.prod(shape) > _MOST_POSITIONS:
            return _all_patches(shape, rows, columns, x.device)
        return _table(x, _all_patches, shape, rows, columns)
    turn %= _TURNS
    examples = _table(x, _spread, 0, shape[0], size, turn)
    lines = [
        _table(x, _sampled_lines, axis, geometry, shape[axis + 1], size, turn)
        for axis, geometry in enumerate((rows, columns))
    ]
    met = None
    if any(padding or transposed
           for *_, padding, _, transposed in (rows, columns)):
        met = _table(x, _both_met, size, turn, rows, columns, *shape[1:])
    return examples.view(-1, 1, 1), lines[0][0], lines[1][0], met


def _all(axis: int, shape: Tuple[int, ...], device: torch.device) -> Tensor:
    """Return an axis's index at all positions of a map, shape (P,)."""
    index = torch.arange(math.prod(shape), device=device)
    return index // math.prod(shape[axis + 1:]) % shape[axis]


def _spread(axis: int, size: int, count: int, turn: int,
            device: torch.device) -> Tensor:
    """Return an axis's index at the positions of a turn, shape (count,)."""
    first = turn * count
    point = torch.arange(first, first + count, device=device) * _STEPS[axis]
    return (point + 2**23) % 2**24 * size // 2**24


def _all_patches(shape: Tuple[int, ...], row_geometry: tuple,
                 column_geometry: tuple, device: torch.device) -> tuple:
    """Return :func:`input_positions` for all positions."""
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
    """Return the mask of :func:`input_positions`, (count, kh, kw, 1)."""
    (_, rows), (_, columns) = (
        _sampled_lines(axis, geometry, out, count, turn, device)
        for axis, geometry, out in ((0, row_geometry, height),
                                    (1, column_geometry, width)))
    return (rows & columns).unsqueeze(-1)


def _input_lines(axis: int, output: Tensor, size: int, kernel: int,
                 stride: int, padding: int, dilation: int,
                 transposed: bool) -> Tuple[Tensor, Tensor]:
    """Return an axis's input indices for output indices, and their mask.

    The mask is False outside the input. Both broadcast to (P, kh, kw).
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
