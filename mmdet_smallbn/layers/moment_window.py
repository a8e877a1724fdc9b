"""What CBN remembers of a layer's last iterations."""
import weakref
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import (Filters, Follower, LinearCall, Memory, Past, Replay,
                          apply_filters, follow_filters, pool, replay)
from .ring import Ring, past_places
from .source import Source
from .statistics import Batch


class MomentWindow(Ring):
    """Moments, and remembered positions, of the last ``size`` iterations.

    If a backward pass still needs the patches when the ring is written to,
    it keeps them, and the ring goes on with a copy. The ring begins again,
    empty, if the filters have another shape.

    Args:
        size (int): Iterations, the present one included.
        positions (int, optional): Positions of each iteration whose patches
            are remembered. None: all.
    """

    # Beside the patches, (k, P, groups, F): Memory says what they are.
    channel_dims = dict(outputs=0, moments=1, scales=1, parts=1)

    def __init__(self, size: int, positions: Optional[int] = None) -> None:
        super().__init__(size)
        self.positions = positions
        # Positions of each iteration, and whether they are all it had.
        self._counts: List[Optional[Tuple[int, bool]]] = [None] * size
        # What the tensors are made for: channels, shape of a patch, whether
        # patches are centred, whether processes share a batch.
        self._kind: Optional[tuple] = None
        self._source: Optional[Source] = None
        self._loan: Any = None  # weak: it ends with the graph

    @property
    def processes(self) -> Any:
        """Who shared the last batch."""
        return self._source and self._source.processes

    @property
    def can_prepare(self) -> bool:
        source = self._source
        if source is None or not super().can_prepare:
            return False
        return source.filters is None or source.filters.are_parameters

    @torch.no_grad()
    def enter(self, batch: Batch, call: Optional[LinearCall], whole: bool,
              alone: bool) -> Tuple[Optional[Past], Tensor]:
        """Bring the past to today's weight, and enter the present.

        Args:
            batch (Batch): The layer's input and its moments.
            call (LinearCall, optional): The convolution that made it. None:
                past moments are used as they are.
            whole (bool): Whether the gradient flows through the past's
                moments to the filters.
            alone (bool): Whether the layer has a backward pass of its own, as
                in re-entrant checkpointing: what is prepared leads to the
                filters of others, too, and is not used.

        Returns:
            tuple: The past, None if there is none; and the present moments,
            shape (2, C).
        """
        filters = None if call is None else call.filters
        count = exact = 0
        if call is not None:
            found = batch.x.numel() // batch.x.size(1)
            # An empty batch has no positions.
            exact = self.positions is None or 0 < found <= self.positions
            count = found if exact else self.positions
        self._make_room(batch, filters, max(count, self.positions or 0))
        past = self._bring_past(
            Source(filters, whole, batch.processes), alone)
        place, tensors = self.place, self.tensors
        present = tensors['moments'][:, :, place]
        torch.stack(batch.moments[:2], out=present)
        if call is not None:
            self._remember_positions(batch.x, call, count, exact)
        if 'parts' in tensors:
            tensors['parts'][0, :, place] = batch.part
            tensors['parts'][1, :, place] = batch.own.mean - batch.moments.mean
        self.turn += 1
        self._loan = None
        if past is not None and past.loan is not None:
            past.loan.seal()
            self._loan = weakref.ref(past.loan)
        return past, present

    def _bring_past(self, source: Source, alone: bool) -> Optional[Past]:
        prepared, self.prepared = self.prepared, None
        then, self._source = self._source, source
        if self.filled == 0:
            return None
        if prepared is None or alone or not then.is_of(*source[:2]) or (
                prepared[1] != source.version()):
            self.prepare([self], self.tensors)
            prepared, self.prepared = self.prepared, None
        return prepared[0]

    def _remember_positions(self, x: Tensor, call: LinearCall, count: int,
                            exact: bool) -> None:
        place, tensors = self.place, self.tensors
        loan = self._loan and self._loan()
        if loan is not None and loan.is_open:
            tensors['patches'] = tensors['patches'].clone()
        row, outputs = tensors['patches'][place], tensors['outputs'][:, place]
        if count < len(row):
            row[count:] = 0
            outputs[:, count:] = 0
            row, outputs = row[:count], outputs[:, :count]
        # Other positions in each iteration, the same after a resume.
        call.sample(x, None if exact else count, self.turn + 1, row)
        apply_filters(call.filters.rows, row, outputs)
        if self._counts[place] != (count, exact):
            self._counts[place] = (count, exact)
            tensors['scales'][0, :, place] = 1 / max(count, 1)
            tensors['scales'][1, :, place] = 2 / max(count - (not exact), 1)

    def _make_room(self, batch: Batch, filters: Optional[Filters],
                   count: int) -> None:
        mean, size, shape = batch.moments.mean, self.size, ()
        if filters is not None:
            shape = (filters.groups, filters.length)
        kind = (len(mean), shape, filters is not None and filters.centred,
                filters is not None and batch.processes is not None)
        held = self.tensors.get('moments', mean)
        if kind != self._kind or (held.dtype != mean.dtype
                                  or held.device != mean.device):
            self._kind, c = kind, len(mean)
            self.turn, self._counts = -1, [None] * size
            tensors = dict(
                moments=mean.new_zeros((2, c, size)),
                outputs=mean.new_zeros((c, size, count if shape else 0)),
                scales=mean.new_zeros((2, c, size)))
            if shape:
                tensors['patches'] = mean.new_zeros((size, count, *shape))
            if kind[-1]:
                tensors['parts'] = mean.new_zeros((2, c, size))
        elif shape and self.tensors['patches'].size(1) < count:
            # Some batches have more positions than others.
            held = self.tensors['patches']
            more = count - held.size(1)
            tensors = dict(
                self.tensors,
                outputs=F.pad(self.tensors['outputs'], (0, more)),
                patches=torch.cat(
                    [held, held.new_zeros((size, more, *shape))], 1))
        else:
            return
        self.tensors, self.prepared, self._loan = tensors, None, None

    @staticmethod
    @torch.no_grad()
    def prepare(rings: Sequence['MomentWindow'],
                tensors: Dict[str, Tensor]) -> None:
        """Bring the past of layers to today's weight, Eq. (7)-(11)."""
        memory = Memory(tensors['moments'], tensors['outputs'],
                        tensors['scales'],
                        past_places(rings, tensors['outputs']),
                        tensors.get('parts'))
        channels, start = [], 0
        for ring in rings:
            channels.append(slice(start, start + ring.channels))
            start += ring.channels
        now = torch.empty_like(memory.outputs)
        followers = [
            ring.show_positions(now[own])
            for ring, own in zip(rings, channels)
        ]
        processes = None if memory.parts is None else rings[0].processes
        past = replay(memory, now, processes)
        pasts = follow_filters(memory, past, pool(past, memory.is_past),
                               channels, followers)
        for ring, own in zip(rings, pasts):
            ring.prepared = own, ring._source.version()

    def show_positions(self, out: Tensor) -> Optional[Follower]:
        """Show the remembered positions to today's filters.

        Args:
            out (Tensor): Where to write what they make of them, shape
                (C, k, P).

        Returns:
            Follower, optional: If the gradient is to flow to the filters.
        """
        filters, whole, _ = self._source
        if filters is None:
            return None
        with torch.enable_grad():
            rows = filters.rows
        patches = self.tensors['patches'].flatten(0, 1)
        apply_filters(rows, patches, out.flatten(1))
        return Follower(rows, patches) if whole and rows.requires_grad else (
            None)

    def replayed(self) -> Replay:
        """The moments of each iteration, for one process; newest first."""
        tensors = self.tensors
        now = torch.empty_like(tensors['outputs'])
        self.show_positions(now)
        found = replay(
            Memory(*(tensors[name] for name in ('moments', 'outputs',
                                                'scales')),
                   past_places([self], now)), now)
        order = [(self.turn - back) % self.size for back in range(self.filled)]
        return Replay(*(values[:, order] for values in found))

    def source_names(self, names: Dict[Tensor, str]) -> Optional[tuple]:
        """What :meth:`follow` needs to know the filters again.

        Args:
            names (dict[Tensor, str]): Of the model's parameters.
        """
        if not self.can_prepare or self._source.filters is None:
            return None
        weight, bias, *rest = self._source.filters
        if weight not in names:
            return None
        return (names[weight], names.get(bias), *rest, self._source.whole)

    def follow(self, named: tuple, parameters: Dict[str, Tensor]) -> None:
        """Know the filters before the first forward pass, as if resumed."""
        weight, bias, *rest, whole = named
        if weight in parameters and (bias is None or bias in parameters):
            filters = Filters(parameters[weight], parameters.get(bias), *rest)
            self._source = Source(filters, whole, None)

    def state_dict(self) -> Dict[str, Any]:
        return dict(super().state_dict(), kind=self._kind)

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._kind = state['kind']
        self._counts = [None] * self.size
        self._source = self._loan = None

    def __getstate__(self) -> Dict[str, Any]:
        # Copies follow filters of their own.
        return dict(super().__getstate__(), _source=None, _loan=None)
