"""Moments and positions of a layer's last iterations, for CBN."""
import weakref
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import (Filters, LinearCall, Loan, Memory, Past, Replay,
                          apply_filters, follow_filters, pool, replay)
from .ring import Ring, advance
from .source import Source
from .statistics import Batch


class MomentWindow(Ring):
    """Window of moments and remembered positions of ``size`` iterations.

    The past has two tensors. ``record``, of shape (C, size - 1, 4 + P), holds
    the mean, the variance, the two scales of Eq. (7), (8) and the outputs at
    P positions. If processes share a batch, the part of this process and its
    offset come before the outputs, and the last dimension is 6 + P.
    ``patches``, of shape (size - 1, P, groups, F), holds the input at these
    positions. Without compensation only the mean and the variance are held.

    If a backward pass still needs the patches when the past is overwritten,
    it keeps them, and the window continues with a copy. If the shape of the
    filters changes, the window becomes empty.

    Args:
        size (int): Iterations, the present one included.
        positions (int, optional): Number of positions of each iteration whose
            patches are remembered. None: all.
    """

    row_dims = dict(record=1, patches=0)

    def __init__(self, size: int, positions: Optional[int] = None) -> None:
        super().__init__(size)
        self.positions = positions
        # Channels, shape of a patch, whether patches are centred, whether
        # processes share a batch.
        self._kind: Optional[tuple] = None
        self._source: Optional[Source] = None
        self._loan: Any = None  # a weak reference: the graph owns the loan

    @property
    def processes(self) -> Any:
        """The processes that shared the last batch."""
        return self._source and self._source.processes

    @property
    def can_prepare(self) -> bool:
        return super().can_prepare and self._source is not None and (
            self._source.is_known_before)

    @property
    def kind(self) -> tuple:
        record = self.past['record']
        return (type(self), record.shape[2], record.dtype, record.device,
                self._kind[3], self._source.follows, self.rows,
                # Processes may hold different numbers of all positions.
                self if self._kind[3] and self.positions is None else None)

    @torch.no_grad()
    def enter(self, batch: Batch, call: Optional[LinearCall], whole: bool,
              alone: bool) -> Tuple[Optional[Past], Tensor]:
        """Compute the past at the current weights, and add the present.

        Args:
            batch (Batch): The layer's input and its moments.
            call (LinearCall, optional): The convolution that made the input.
                None: past moments are used without compensation.
            whole (bool): If True, the gradient flows through the past moments
                to the filters.
            alone (bool): True if the layer has its own backward pass, as in
                re-entrant checkpointing. Then the prepared past is not used,
                because its graph connects to other layers.

        Returns:
            tuple: The past, or None if there is none, and the present
            moments, shape (2, C).
        """
        filters, count, exact = None, 0, False
        if call is not None:
            filters, found = call.filters, batch.x.numel() // batch.x.size(1)
            exact = self.positions is None or found <= self.positions
            count = found if exact else self.positions
        self._make_room(batch, filters, max(count, self.positions or 0))
        if self.latest:
            advance([self])
        past = self._bring_past(Source(filters, whole, batch.processes), alone)

        held = self.past['record']
        record = held.new_empty((held.size(0), held.size(2)))
        latest = dict(record=record)
        moments = torch.stack(batch.moments[:2])
        record[:, :2] = moments.t()
        if self._kind[3]:
            record[:, 4] = batch.part
            record[:, 5] = batch.own.mean - batch.moments.mean
        if call is not None:
            record[:, 2] = 1 / max(count, 1)
            record[:, 3] = 2 / max(count - (not exact), 1)
            latest['patches'] = self._remember_positions(
                batch.x, call, record, count, exact)
        self.latest = latest
        self.turn += 1
        self._loan = past and past.loan and weakref.ref(past.loan)
        return past, moments

    def _bring_past(self, source: Source, alone: bool) -> Optional[Past]:
        prepared, self.prepared = self.prepared, None
        self._source = source
        if self.rows == 0:
            return None
        if prepared is None or alone or prepared[1] != source.key():
            self.prepare([self])
            prepared, self.prepared = self.prepared, None
        return prepared[0]

    def _remember_positions(self, x: Tensor, call: LinearCall, record: Tensor,
                            count: int, exact: bool) -> Tensor:
        held = self.past['patches']
        patches = held.new_empty(held.shape[1:])
        outputs = record[:, record.size(1) - len(patches):]
        if count < len(patches):
            patches[count:] = 0
            outputs[:, count:] = 0
        if count:
            # The turn selects the positions: they differ from iteration to
            # iteration, and a resume repeats them.
            call.sample(x, None if exact else count, self.turn + 1,
                        patches[:count])
            apply_filters(call.filters.rows, patches[:count],
                          outputs[:, :count])
        return patches

    def before_write(self) -> None:
        loan = self._loan and self._loan()
        if loan is not None and loan.is_open:
            self.past['patches'] = self.past['patches'].clone()

    def _make_room(self, batch: Batch, filters: Optional[Filters],
                   count: int) -> None:
        mean, shape = batch.moments.mean, ()
        if filters is not None:
            shape = (filters.groups, filters.length)
        shared = filters is not None and batch.processes is not None
        kind = (len(mean), shape, filters is not None and filters.centred,
                shared)
        held, rows = self.past.get('record', mean), self.size - 1
        if kind != self._kind or (held.dtype, held.device) != (mean.dtype,
                                                               mean.device):
            self.clear()
            self._kind = kind
            width = 2 + (2 + 2 * shared + count if shape else 0)
            self.past['record'] = mean.new_zeros((len(mean), rows, width))
            if shape:
                self.past['patches'] = mean.new_zeros((rows, count, *shape))
        elif shape and self.past['patches'].size(1) < count:
            # This batch has more positions than the earlier ones.
            advance([self])
            more = count - self.past['patches'].size(1)
            self.past = dict(
                record=F.pad(self.past['record'], (0, more)),
                patches=F.pad(self.past['patches'], (0, 0) * 2 + (0, more)))
            self.prepared = None

    def _memory(self, rings: List['MomentWindow']) -> Memory:
        """Join the past of rings of one kind along the channels."""
        record = torch.cat(
            [r.past['record'][:, :self.rows] for r in rings])
        start = 2 + 2 * bool(self._kind[1]) + 2 * self._kind[3]
        values, outputs = record[..., :start], record[..., start:]
        if start == 2:  # no compensation, so no scales
            return Memory(*values.unbind(2), outputs, 0., 0.)
        return Memory(values[..., 0], values[..., 1], outputs,
                      *values[..., 2:].unbind(2))

    @staticmethod
    @torch.no_grad()
    def prepare(rings: List['MomentWindow']) -> None:
        """Compute the layers' past at the current weights, Eq. (7)-(11)."""
        first = rings[0]
        memory = first._memory(rings)
        past, *lent = first._replay(rings, memory)
        sizes = [len(ring.past['record']) for ring in rings]
        pasts = follow_filters(memory, past, pool(past), sizes, *lent)
        for ring, own in zip(rings, pasts):
            ring.prepared = own, ring._source.key()

    def _replay(self, rings: List['MomentWindow'], memory: Memory
                ) -> Tuple[Replay, List[Tensor], List[Loan]]:
        """Apply the current filters to the remembered positions."""
        now = memory.outputs.new_empty(memory.outputs.shape)
        filters: List[Tensor] = []
        loans: List[Loan] = []
        start = 0
        for ring in rings:
            stop = start + len(ring.past['record'])
            if ring._source.filters is not None:
                with torch.enable_grad():
                    filters.append(ring._source.filters.rows)
                loans.append(
                    Loan(ring.past['patches'][:ring.rows].flatten(0, 1)))
                apply_filters(filters[-1], loans[-1].patches,
                              now[start:stop].flatten(1))
            start = stop
        past = replay(memory, now, self.processes if self._kind[3] else None)
        return past, filters, loans if self._source.follows else []

    def replayed(self) -> Replay:
        """Return the moments of each iteration, newest first.

        It is for one process. It moves the latest iteration into the past.
        """
        advance([self])
        past, *_ = self._replay([self], self._memory([self]))
        rows = [(self.turn - back) % (self.size - 1)
                for back in range(self.rows)]
        return Replay(*(values[:, rows] for values in past))

    def source_names(self, names: Dict[Tensor, str]) -> Optional[tuple]:
        """Return the names of the filters that the past depends on.

        Args:
            names (dict[Tensor, str]): Names of the model's parameters.
        """
        return self._source.named(names) if self.can_prepare else None

    def follow(self, named: tuple, parameters: Dict[str, Tensor]) -> None:
        """Set the filters before the first forward pass, for a resume."""
        self._source = Source.of_names(named, parameters)

    def state_dict(self) -> Dict[str, Any]:
        return dict(super().state_dict(), kind=self._kind)

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._kind = state['kind']
        self._source = self._loan = None

    def __getstate__(self) -> Dict[str, Any]:
        # A copy of the layer depends on its own filters.
        return dict(super().__getstate__(), _source=None, _loan=None)
