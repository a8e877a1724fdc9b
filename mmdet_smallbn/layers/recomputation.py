"""Search for the forward pass that activation checkpointing repeats."""
from typing import Callable, List, Optional

import torch
from torch import Tensor

from ..functional import Moments
from .statistics import Batch, Statistics


class FirstPass:
    """Statistics of a forward pass in activation checkpointing."""

    def __init__(self, batch: Batch, statistics: Statistics) -> None:
        self.batch = batch._replace(x=None)
        self.statistics = statistics
        self.shape = batch.x.shape
        self.recomputed = 0

    def distance(self, own: Moments) -> Tensor:
        """Return the distance to another input's moments, about 0 if equal."""
        mine = self.batch.own
        away = (mine.mean - own.mean).abs() + (mine.var - own.var).abs()
        return away.sum().nan_to_num(nan=torch.inf)


class FirstPasses:
    """Forward passes of a layer that may be recomputed.

    A copy or pickle of the layer starts without them, because they wait for a
    backward pass in this process and may hold functions.

    Args:
        size (int): Largest number of forward passes that are kept.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._held: List[FirstPass] = []

    def __len__(self) -> int:
        return len(self._held)

    def __reduce__(self):
        return type(self), (self._size, )

    def clear(self) -> None:
        """Forget all forward passes at the end of their iteration."""
        self._held = []

    def add(self, batch: Batch, statistics: Statistics) -> None:
        """Keep the statistics of a forward pass."""
        self._held.append(FirstPass(batch, statistics))
        del self._held[:-self._size]

    def find(self, x: Tensor,
             measure: Callable[[Tensor], Moments]) -> Optional[FirstPass]:
        """Find the forward pass that is being recomputed, or return None.

        Args:
            x (Tensor): The recomputed input.
            measure (callable): Function from an input to its moments.
        """
        alike = [p for p in self._held if p.shape == x.shape]
        if len(alike) > 1:
            # The calls of a shared head, or iterations that are not numbered.
            # The recomputed input equals the first one, or nearly so.
            own = measure(x)
            distances = torch.stack([p.distance(own) for p in alike]).tolist()
            least = min(distances)
            alike = [
                p for p, d in zip(alike, distances) if d <= 1.01 * least
            ]
            # Several equal inputs: the backward pass runs in reverse order, so
            # take the last one with the fewest recomputations.
            waiting = min(p.recomputed for p in alike)
            alike = [p for p in alike if p.recomputed == waiting]
        if not alike:
            return None
        alike[-1].recomputed += 1
        return alike[-1]
