"""Averages of a statistic over a layer's last iterations or backwards."""
from typing import Any, Dict, List, Optional

import torch
from torch import Tensor

from .ring import Ring, advance


def _alike(held: Tensor, value: Tensor) -> bool:
    """Whether a value has the shape, dtype and device of those held."""
    return (held.shape[:2] == value.shape and held.dtype == value.dtype
            and held.device == value.device)


class SimpleMovingAverage(Ring):
    """Mean of the last ``size`` values, of those at hand while fewer.

    A past value that is not finite does not count. The present one always
    does: the loss shows what is wrong with it. The ring begins again, empty,
    if the shape or dtype of the values changes.

    Args:
        size (int): Values, the present one included.
    """

    row_dims = dict(value=2)  # (S, C, size - 1) for values (S, C)

    @property
    def kind(self) -> tuple:
        values = self.past['value']
        return (type(self), self.size, self.rows, len(values), values.dtype,
                values.device)

    @torch.no_grad()
    def push(self, value: Tensor, turn: Optional[int] = None) -> int:
        """Enter a value.

        Args:
            value (Tensor): Shape (S, C). It must not change afterwards.
            turn (int, optional): The result of an earlier push: the value
                replaces that one's, if it is still held.

        Returns:
            int: The turn of the value.
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
        """The average after the last push, in the shape of a value."""
        if self.prepared is None:
            self.prepare([self])
        others, weight = self.prepared
        if not self.latest:
            return others
        return torch.lerp(others, self.latest['value'], weight)

    @staticmethod
    @torch.no_grad()
    def prepare(rings: List['SimpleMovingAverage']) -> None:
        """Average the past values of all layers.

        Each gets their mean, and the weight of the latest value beside it.
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
    """(1 - momentum) * average + momentum * value, from 0.

    The present value is in the average. Values that are not finite leave it
    where it is.

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
        """Enter a value; as :meth:`SimpleMovingAverage.push`.

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
        """The average, in the shape of a value."""
        return self._average

    def state_dict(self) -> Dict[str, Any]:
        """What is held, for a checkpoint."""
        return dict(
            turn=self.turn, average=self._average, before=self._before)

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Hold what :meth:`state_dict` gave."""
        self.turn = state['turn']
        self._average, self._before = state['average'], state['before']

    def to(self, device: torch.device) -> None:
        """Move to a device. The dtype stays: statistics are not halved."""
        if self._average is not None:
            self._average = self._average.to(device)
            self._before = self._before.to(device)
