"""Averages of a statistic over a layer's last iterations or backwards."""
from typing import Any, Dict, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .ring import Ring, past_places


def alike(held: Tensor, value: Tensor) -> bool:
    """Whether a value has the shape, dtype and device of one that is held."""
    return (held.shape == value.shape and held.dtype == value.dtype
            and held.device == value.device)


class SimpleMovingAverage(Ring):
    """Mean of the last ``size`` values, of those at hand while fewer.

    A past value that is not finite does not count. The present one always
    does: the loss shows what is wrong with it. The ring begins again, empty,
    if the shape or dtype of the values changes.

    Args:
        size (int): Values, the present one included.
    """

    channel_dims = dict(values=1)  # of shape (S, C, k) for values (S, C)

    def __init__(self, size: int) -> None:
        super().__init__(size)
        # Mean of the other values, and the weight of the latest beside it.
        self._others: Optional[Tuple[Tensor, Tensor]] = None
        self._latest = 0

    @torch.no_grad()
    def push(self, value: Tensor, turn: Optional[int] = None) -> int:
        """Enter a value.

        Args:
            value (Tensor): Shape (S, C).
            turn (int, optional): What an earlier push gave: the value
                replaces that one's, unless it is among the last no more.

        Returns:
            int: The turn of the value.
        """
        values = self.tensors.get('values')
        if values is None or not alike(values[:, :, 0], value):
            values = value.new_zeros((*value.shape, self.size))
            self.tensors = dict(values=values)
            self.turn, self.prepared, turn = -1, None, None
        if turn is None or turn <= self.turn - self.size:
            self._others, self.prepared = self.prepared, None
            self.turn += 1
            turn = self.turn
        else:
            self._others = None
        self._latest = turn % self.size
        values[:, :, self._latest] = value
        return turn

    @torch.no_grad()
    def mean(self) -> Tensor:
        """The average after the last push, in the shape of a value."""
        values = self.tensors['values']
        if self._others is None:
            places = torch.arange(self.size, device=values.device)
            self._others = _mean_of_finite(
                values, (places < self.filled) & (places != self._latest))
        others, weight = self._others
        return torch.lerp(others, values[:, :, self._latest], weight)

    @staticmethod
    @torch.no_grad()
    def prepare(rings: Sequence['SimpleMovingAverage'],
                tensors: Dict[str, Tensor]) -> None:
        """Average the past values of all layers."""
        values = tensors['values']
        both = _mean_of_finite(values, past_places(rings, values))
        sizes = [ring.channels for ring in rings]
        for ring, *own in zip(rings, *(v.split(sizes, 1) for v in both)):
            ring.prepared = tuple(own)

    def __getstate__(self) -> Dict[str, Any]:
        return dict(super().__getstate__(), _others=None)

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._others, self._latest = None, max(self.turn, 0) % self.size


def _mean_of_finite(values: Tensor, counted: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean of values that count and are finite; 1 / (their number + 1)."""
    counted = (values - values).eq(0).logical_and_(counted)
    total = values.masked_fill(counted.logical_not(), 0).sum(2)
    count = counted.sum(2, dtype=values.dtype)
    return (total.div_(count.clamp(min=1)), count.add_(1).reciprocal_())


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
        if self._average is None or not alike(self._average, value):
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
