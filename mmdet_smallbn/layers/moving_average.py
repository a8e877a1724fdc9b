"""Averages of a statistic over a layer's last iterations or backwards."""
from typing import Any, Dict, Optional

import torch
from torch import Tensor


def alike(held: Tensor, value: Tensor) -> bool:
    """Whether a value has the shape, dtype and device of one that is held."""
    return (held.shape == value.shape and held.dtype == value.dtype
            and held.device == value.device)


class SimpleMovingAverage:
    """Mean of the last ``size`` values, of those at hand while fewer.

    Values that are not finite count for nothing. Holds two detached tensors,
    made when the first value comes in and emptied when the shape or dtype
    changes.

    Args:
        size (int): Values, the present one included.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.pushes = 0
        # The values, 0 where they are not finite; and 1 where they are.
        self._ring: Optional[Tensor] = None
        self._counts: Optional[Tensor] = None

    @torch.no_grad()
    def push(self, value: Tensor, place: Optional[int] = None) -> int:
        """Enter a value.

        Args:
            value (Tensor): Of one shape in all calls.
            place (int, optional): What an earlier push gave: the value
                replaces that one's, unless it is among the last no more.

        Returns:
            int: The place of the value.
        """
        if self._ring is None or not alike(self._ring[0], value):
            self._ring = value.new_zeros((self.size, *value.shape))
            self._counts = torch.zeros_like(self._ring)
            self.pushes = 0
            place = None
        if place is None or not (
                self.pushes - self.size <= place < self.pushes):
            place = self.pushes
            self.pushes += 1
        slot = place % self.size
        torch.nan_to_num(value, 0., 0., 0., out=self._ring[slot])
        torch.eq(value - value, 0, out=self._counts[slot])  # finite
        return place

    def mean(self) -> Tensor:
        """The average, in the shape of a value; NaN if nothing is in it."""
        return self._ring.sum(0) / self._counts.sum(0)

    def state_dict(self) -> Dict[str, Any]:
        """What is held, for a checkpoint."""
        return dict(
            pushes=self.pushes, ring=self._ring, counts=self._counts)

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Hold what :meth:`state_dict` of one of the same size gave."""
        self.pushes = state['pushes']
        self._ring, self._counts = state['ring'], state['counts']

    def to(self, device: torch.device) -> None:
        """Move to a device. The dtype stays: statistics are not halved."""
        if self._ring is not None:
            self._ring = self._ring.to(device)
            self._counts = self._counts.to(device)


class ExponentialMovingAverage:
    """(1 - momentum) * average + momentum * value, from 0.

    The present value is in the average. Values that are not finite leave it
    where it is.

    Args:
        momentum (float): Weight of the present value.
    """

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.pushes = 0
        self._average: Optional[Tensor] = None
        self._before: Optional[Tensor] = None

    @torch.no_grad()
    def push(self, value: Tensor, place: Optional[int] = None) -> int:
        """Enter a value; as :meth:`SimpleMovingAverage.push`.

        Only the last value can be replaced.
        """
        if self._average is None or not alike(self._average, value):
            self._average = torch.zeros_like(value)
            self.pushes = 0
            place = None
        if place is None or place != self.pushes - 1:
            place = self.pushes
            self.pushes += 1
            self._before = self._average
        moved = torch.lerp(self._before, value, self.momentum)
        self._average = torch.where(value.isfinite(), moved, self._before)
        return place

    def mean(self) -> Tensor:
        """The average, in the shape of a value."""
        return self._average

    def state_dict(self) -> Dict[str, Any]:
        """What is held, for a checkpoint."""
        return dict(
            pushes=self.pushes, average=self._average, before=self._before)

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Hold what :meth:`state_dict` gave."""
        self.pushes = state['pushes']
        self._average, self._before = state['average'], state['before']

    def to(self, device: torch.device) -> None:
        """Move to a device. The dtype stays: statistics are not halved."""
        if self._average is not None:
            self._average = self._average.to(device)
            self._before = self._before.to(device)
