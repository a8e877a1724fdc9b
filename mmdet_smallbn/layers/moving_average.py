"""Moving averages over a layer's last forward or backward passes."""
from typing import Any, Dict, List, Optional

import torch
from torch import Tensor

from .ring import Ring, advance


def _alike(held: Tensor, value: Tensor) -> bool:
    """Return True if shape, dtype and device are those of the held values."""
    return (held.shape[:2] == value.shape and held.dtype == value.dtype
            and held.device == value.device)


class SimpleMovingAverage(Ring):
    """Mean of the last ``size`` values, or of fewer until they are there.

    Past values that are not finite are left out. The present value always
    counts, so that a bad value shows in the loss. If the shape, dtype or
    device of the values changes, the ring becomes empty.

    Args:
        size (int): Number of values, the present one included.
    """

    row_dims = dict(value=2)  # (S, C, size - 1) for values (S, C)

    @property
    def kind(self) -> tuple:
        values = self.past['value']
        return (type(self), self.size, self.rows, len(values), values.dtype,
                values.device)

    @torch.no_grad()
    def push(self, value: Tensor, turn: Optional[int] = None) -> int:
        """Add a value.

        Args:
            value (Tensor): Shape (S, C). It must not change afterwards.
            turn (int, optional): Index that an earlier push returned. The
                value replaces the one of that push, if it is still held.

        Returns:
            int: Index of the value.
        """
        past = self.past.get('value')
        if past is None or not _alike(past, value):
            self.clear()
            past = value.new_zeros((*value.shape, self.size - 1))
            self.past, turn = dict(value=past), None
        first = self.turn + 1 - self.rows - bool(self.latest)
        if turn is None or turn < first:
            if self.latest:
                advance([self])
            self.turn += 1
            turn = self.turn
        elif turn < first + self.rows:
            past[:, :, turn % (self.size - 1)] = value
            self.prepared = None
            return turn
        self.latest = dict(value=value)
        return turn

    @torch.no_grad()
    def mean(self) -> Tensor:
        """Return the average after the last push, in the shape of a value."""
        if self.prepared is None:
            self.prepare([self])
        others, weight = self.prepared
        if not self.latest:
            return others
        return torch.lerp(others, self.latest['value'], weight)

    @staticmethod
    @torch.no_grad()
    def prepare(rings: List['SimpleMovingAverage']) -> None:
        """Average the past values of each ring.

        Each ring gets this mean and the weight of its latest value.
        """
        rows = rings[0].rows
        values = torch.cat([r.past['value'][..., :rows] for r in rings], 1)
        unused = (values - values).ne(0)  # not finite
        mean = values.masked_fill_(unused, 0).sum(2)
        count = unused.logical_not_().sum(2, dtype=values.dtype)
        mean.div_(count.clamp(min=1))
        weight = count.add_(1).reciprocal_()
        sizes = [ring.past['value'].size(1) for ring in rings]
        for ring, *own in zip(rings, mean.split(sizes, 1),
                              weight.split(sizes, 1)):
            ring.prepared = tuple(own)


class ExponentialMovingAverage:
    """Exponential moving average that starts at 0.

    A push sets it to (1 - momentum) * average + momentum * value, so it
    includes the present value. Values that are not finite do not change it.

    Args:
        momentum (float): Weight of the present value.
    """

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.turn = -1
        self._average: Optional[Tensor] = None
        self._before: Optional[Tensor] = None

    @torch.no_grad()
    def push(self, value: Tensor, turn: Optional[int] = None) -> int:
        """Add a value, as :meth:`SimpleMovingAverage.push`.

        Only the last value can be replaced.
        """
        if self._average is None or not _alike(self._average, value):
            self._average = torch.zeros_like(value)
            self.turn = -1
            turn = None
        if turn is None or turn != self.turn:
            self.turn += 1
            self._before = self._average
        moved = torch.lerp(self._before, value, self.momentum)
        self._average = torch.where(value.isfinite(), moved, self._before)
        return self.turn

    def mean(self) -> Tensor:
        """Return the average, in the shape of a value."""
        return self._average

    def state_dict(self) -> Dict[str, Any]:
        """Return the state, for a checkpoint."""
        return dict(
            turn=self.turn, average=self._average, before=self._before)

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Load a result of :meth:`state_dict`."""
        self.turn = state['turn']
        self._average, self._before = state['average'], state['before']

    def to(self, device: torch.device) -> None:
        """Move to a device. Statistics keep their dtype in model.half()."""
        if self._average is not None:
            self._average = self._average.to(device)
            self._before = self._before.to(device)
