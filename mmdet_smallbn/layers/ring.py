"""The last iterations of a layer, and the past of all layers at once."""
from collections import defaultdict
from typing import Any, Dict, Iterable, List, Optional

import torch
from torch import Tensor


class Ring:
    """The latest iteration of a layer, and the ``size - 1`` before it.

    When the next iteration begins, :func:`advance` moves the latest one into
    the past, where it takes the place of the oldest. So nothing writes to the
    past between a forward pass and its backward pass.

    Args:
        size (int): Iterations that are held.

    Attributes:
        turn (int): Index of the latest iteration, -1 if there was none.
        past (dict[str, Tensor]): Past iterations, one in each row.
        latest (dict[str, Tensor]): The latest iteration. Empty as soon as it
            is in the past.
        prepared (optional): The result of :meth:`prepare`; None if the past
            has changed since.
    """

    # The dimension of the rows of each tensor in ``past``.
    row_dims: Dict[str, int] = {}

    def __init__(self, size: int) -> None:
        self.size = size
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.turn = -1
        self.past: Dict[str, Tensor] = {}
        self.latest: Dict[str, Tensor] = {}
        self.prepared: Any = None

    @property
    def filled(self) -> int:
        """Iterations that are held."""
        return min(self.turn + 1, self.size)

    @property
    def rows(self) -> int:
        """Iterations in the past: one less than are held, or all of them."""
        return min(self.turn + (not self.latest), self.size - 1)

    @property
    def can_prepare(self) -> bool:
        """Whether the layer's next forward pass will use the past as it is."""
        return self.turn >= 0

    @property
    def kind(self) -> tuple:
        """Equal for rings that can be prepared together.

        It must be the same in all processes that share a batch: each kind
        has a collective of its own.
        """
        raise NotImplementedError

    @staticmethod
    def prepare(rings: List['Ring']) -> None:
        """Set ``prepared`` of rings of one kind."""
        raise NotImplementedError

    def before_write(self) -> None:
        """Called before the past is overwritten."""

    @property
    def rings(self) -> Dict[str, 'Ring']:
        """The rings of a layer's state, by name; here there is one."""
        return {'window': self}

    def source_names(self, names: Dict[Tensor, str]) -> Optional[tuple]:
        """The names of parameters that the past depends on; here none."""

    def state_dict(self) -> Dict[str, Any]:
        """Everything that is held, for a checkpoint."""
        return dict(
            turn=self.turn, past=dict(self.past), latest=dict(self.latest))

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Hold what :meth:`state_dict` of a ring of the same size gave."""
        self.turn, self.prepared = state['turn'], None
        self.past, self.latest = dict(state['past']), dict(state['latest'])

    def __getstate__(self) -> Dict[str, Any]:
        return dict(self.__dict__, prepared=None)

    def to(self, device: torch.device) -> None:
        """Move to a device. The dtype stays: statistics are not halved."""
        for held in (self.past, self.latest):
            held.update({name: t.to(device) for name, t in held.items()})
        self.prepared = None


@torch.no_grad()
def advance(rings: Iterable[Ring]) -> None:
    """Move the latest iteration of each ring into its past.

    One operator, however many rings there are.
    """
    rows, values, rings = [], [], list(rings)
    for ring in rings:
        if ring.size == 1 or not ring.latest:
            continue
        ring.before_write()
        for name, value in ring.latest.items():
            rows.append(ring.past[name].select(ring.row_dims[name],
                                               ring.turn % (ring.size - 1)))
            values.append(value)
    if rows:
        torch._foreach_copy_(rows, values)
    for ring in rings:
        if ring.latest:
            ring.latest, ring.prepared = {}, None


class PastBank:
    """Prepares the past of all layers before the forward pass.

    The past at today's weights depends on the weights alone, and these are
    known. A layer takes its past from here if nothing has changed since.
    Otherwise it computes it by itself, with the same function.
    """

    def __init__(self) -> None:
        self._checked: set = set()

    def prepare(self, rings: Dict[str, Ring]) -> None:
        """Prepare the next forward pass of each layer.

        Args:
            rings (dict[str, Ring]): By names, for messages.

        Raises:
            RuntimeError: If processes that share a batch do not remember the
                same iterations.
        """
        ready = {n: ring for n, ring in rings.items() if ring.can_prepare}
        self._check_processes(ready)
        advance(ready.values())
        kinds: Dict[tuple, List[Ring]] = defaultdict(list)
        for ring in ready.values():
            if ring.rows:
                kinds[ring.kind].append(ring)
        for group in kinds.values():
            group[0].prepare(group)

    def _check_processes(self, rings: Dict[str, Ring]) -> None:
        """Compare with other processes, whenever the rings are others."""
        shared = {name: ring for name, ring in rings.items()
                  if getattr(ring, 'processes', None) is not None}
        if shared and set(shared) != self._checked:
            next(iter(shared.values())).processes.check_alike(
                {name: ring.turn + 1 for name, ring in shared.items()},
                'iterations that norms with sync=True remember')
            self._checked = set(shared)
