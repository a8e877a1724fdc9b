"""What CBN remembers of a layer's last iterations."""
from functools import partial
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ..functional import (LinearCall, Memory, Pooled, Replay, apply_filters,
                          follow_filters, pool, replay)
from .moving_average import alike
from .statistics import Batch


# Sums of products of two such numbers are finite in float32.
_LARGE = 1e18


class Window(NamedTuple):
    """The moments of a window, and how today's filters enter them.

    Attributes:
        memory (Memory): What is remembered of the iterations.
        past (Replay): Their moments at today's weight.
        pooled (Pooled): The moments of all of them together.
        place (int): Which of them is the present one.
        done (callable): To be called when the backward pass is over.
    """
    memory: Memory
    past: Replay
    pooled: Pooled
    place: int
    done: Callable[[], None]

    def follow(self, filters: Tensor) -> Tuple[Tensor, Tensor]:
        """Pooled mean and variance, differentiable by today's filters."""
        return follow_filters(filters, *self)


class MomentWindow:
    """Ring of the last ``size`` iterations of one layer.

    Its tensors are detached. They are made when the first iteration comes in,
    and made anew, empty, when filters have another shape. The present
    iteration overwrites the oldest one. If a backward pass still needs the
    patches, it keeps them, and the ring goes on with a copy.

    Args:
        size (int): Iterations, the present one included.
        positions (int, optional): Positions of each iteration whose patches
            are remembered. None: all.
    """

    def __init__(self, size: int, positions: Optional[int] = None) -> None:
        self.size = size
        self.positions = positions
        self.turn = -1
        self._rings: Dict[str, Tensor] = {}
        # The iteration whose backward pass still needs the patches.
        self._lent: Optional[int] = None
        # Positions of each iteration, and whether they are all it had.
        self._counts: List[Optional[Tuple[int, bool]]] = [None] * size

    @property
    def filled(self) -> int:
        """Iterations that are held."""
        return min(self.turn + 1, self.size)

    @torch.no_grad()
    def enter(self,
              batch: Batch,
              call: Optional[LinearCall],
              lend: bool = False) -> Window:
        """Enter the present iteration, and bring all to today's weight.

        Args:
            batch (Batch): The layer's input and its moments.
            call (LinearCall, optional): The convolution that made it. None:
                past moments are used as they are.
            lend (bool): Whether a backward pass will need the patches.

        Returns:
            Window: Moments of the iterations.
        """
        x, own, moments, processes = batch
        filters = None if call is None else call.filters
        found = x.numel() // x.size(1)
        # A few positions are all taken. An empty batch has none.
        positions = self.positions
        if positions is not None and 0 < found <= positions:
            positions = None
        count = positions or found
        self._make_room(moments.mean, call, filters,
                        max(count, self.positions or 0))
        self.turn += 1
        place, rings = self.turn % self.size, self._rings
        torch.stack(moments[:2], out=rings['moments'][:, place])
        if call is None:
            memory = Memory(rings['moments'][:, :self.filled])
            past = replay(memory)
        else:
            if processes is not None:
                rings['part'][place] = own.count / moments.count
                rings['offset'][place] = own.mean - moments.mean
            if self._lent is not None:
                rings['patches'] = rings['patches'].clone()
            # Other positions in each iteration, the same after a resume.
            row = rings['patches'][place]
            call.sample(x, positions, self.turn, row[:count])
            if count < len(row):
                row[count:] = 0
            self._set_scales(place, count, exact=positions is None)
            memory = self._memory(processes is not None)
            now = apply_filters(memory.patches, filters)
            # What overflows is not used, and 0 times its sums is to be 0.
            torch.nan_to_num(
                now[place], 0., _LARGE, -_LARGE, out=memory.outputs[place])
            memory.outputs[place].clamp_(-_LARGE, _LARGE)
            past = replay(memory, now, processes)
            self._lent = self.turn if lend and self.turn else None
        # Under ``sync`` a batch may be empty in all processes.
        is_there = True if processes is None else moments.count > 0
        return Window(memory, past, pool(past, place, is_there), place,
                      partial(self._take_back, self.turn))

    def _set_scales(self, place: int, count: int, exact: bool) -> None:
        """Those of Eq. (7), (8); where they change, and not in place."""
        if self._counts[place] != (count, exact):
            self._counts[place] = (count, exact)
            scales = self._rings['scales'].clone()
            scales[0, place] = 1 / max(count, 1)
            scales[1, place] = 2. if exact else 2 * count / (count - 1)
            self._rings['scales'] = scales

    def _memory(self, parted: bool) -> Memory:
        """What is held, once the present patches are in."""
        rings, filled = self._rings, self.filled
        memory = Memory(rings['moments'][:, :filled],
                        rings['patches'][:filled], rings['outputs'][:filled],
                        *rings['scales'][:, :filled])
        if parted:  # for the backward pass, as they are now
            memory = memory._replace(
                part=rings['part'][:filled].clone(),
                offset=rings['offset'][:filled].clone())
        return memory

    def _take_back(self, turn: int) -> None:
        if self._lent == turn:
            self._lent = None

    def _make_room(self, mean: Tensor, call: Optional[LinearCall],
                   filters: Optional[Tensor], count: int) -> None:
        rings, size = self._rings, self.size
        held = rings.get('patches')
        shape = () if call is None else (call.groups, filters.size(1))
        if not (rings and alike(rings['moments'][0, 0], mean)
                and (() if held is None else held.shape[2:]) == shape):
            self.turn, self._lent, held = -1, None, None
            rings = {
                name: mean.new_zeros(shape_)
                for name, shape_ in dict(
                    moments=(2, size, len(mean)),
                    offset=(size, len(mean)),
                    part=(size, 1),
                    scales=(2, size, 1)).items()
            }
            self._counts = [None] * size
        if call is not None and (held is None or held.size(1) < count):
            # Some batches have more positions than others.
            for name, shape_ in dict(
                    patches=shape, outputs=mean.shape).items():
                room = mean.new_zeros((size, count, *shape_))
                if held is not None:
                    room[:, :held.size(1)] = rings[name]
                rings[name] = room
            self._lent = None
        self._rings = rings

    def state_dict(self) -> Dict[str, Any]:
        """What is held, for a checkpoint."""
        return dict(turn=self.turn, rings=dict(self._rings))

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Hold what :meth:`state_dict` of one of the same size gave."""
        self.turn, self._rings = state['turn'], dict(state['rings'])
        self._counts = [None] * self.size

    def to(self, device: torch.device) -> None:
        """Move to a device. The dtype stays: statistics are not halved."""
        self._rings = {k: v.to(device) for k, v in self._rings.items()}
