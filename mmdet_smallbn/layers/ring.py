"""Ring buffer of a layer's last iterations, and their joint preparation."""
from collections import defaultdict
from typing import Any, Dict, Iterable, List, Optional

import torch
from torch import Tensor


class Ring:
    """Ring buffer of a layer's latest iteration and ``size - 1`` past ones.

    When the next iteration begins, :func:`advance` moves the latest one into
    the past, where it replaces the oldest. So nothing writes to the past
    between a forward pass and its backward pass.

    Args:
        size (int): Number of iterations that are held.

    Attributes:
        turn (int): Index of the latest iteration, -1 if there was none.
        past (dict[str, Tensor]): Past iterations, one in each row.
        latest (dict[str, Tensor]): The latest iteration. Empty when it has
            moved into the past.
        prepared (optional): Result of :meth:`prepare`; None if the past has
            changed since.
    """

    # Dimension of the rows of each tensor in ``past``.
    row_dims: Dict[str, int] = {}

    def __init__(self, size: int) -> None:
        self.size = size
        self.clear()

    def clear(self) -> None:
        """Forget all iterations."""
        self.turn = -1
        self.past: Dict[str, Tensor] = {}
        self.latest: Dict[str, Tensor] = {}
        self.prepared: Any = None

    @property
    def filled(self) -> int:
        """Number of iterations that are held."""
        return min(self.turn + 1, self.size)

    @property
    def rows(self) -> int:
        """Number of iterations in the past, without the latest one."""
        return min(self.turn + (not self.latest), self.size - 1)

    @property
    def can_prepare(self) -> bool:
        """True if the past can be prepared before the next forward pass."""
        return self.turn >= 0

    @property
    def kind(self) -> tuple:
        """Key of the rings that can be prepared together.

        It must be the same in all processes that share a batch, because each
        kind has its own collective.
        """
        raise NotImplementedError

    @staticmethod
    def prepare(rings: List['Ring']) -> None:
        """Set ``prepared`` of all rings of one kind."""
        raise NotImplementedError

    def before_write(self) -> None:
        """Run before the past is overwritten."""

    @property
    def rings(self) -> Dict[str, 'Ring']:
        """The rings of a layer's state by name; this ring is the only one."""
        return {'window': self}

    def source_names(self, names: Dict[Tensor, str]) -> Optional[tuple]:
        """Return the names of parameters that the past depends on, if any."""

    def state_dict(self) -> Dict[str, Any]:
        """Return all that the ring holds, for a checkpoint."""
        return dict(
            turn=self.turn, past=dict(self.past), latest=dict(self.latest))

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Load a result of :meth:`state_dict` of a ring of the same size."""
        self.turn, self.prepared = state['turn'], None
        self.past, self.latest = dict(state['past']), dict(state['latest'])

    def __getstate__(self) -> Dict[str, Any]:
        return dict(self.__dict__, prepared=None)

    def to(self, device: torch.device) -> None:
        """Move to a device. Statistics keep their dtype in model.half()."""
        for held in (self.past, self.latest):
            held.update({name: t.to(device) for name, t in held.items()})
        self.prepared = None


@torch.no_grad()
def advance(rings: Iterable[Ring]) -> None:
    """Move the latest iteration of each ring into its past.

    One operator serves all rings.
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
    """Preparation of the past of all layers before the forward pass.

    The past at the current weights depends on the weights alone, which are
    known before the forward pass. A layer uses the prepared past if nothing
    has changed since. Otherwise it computes the past with the same function.
    """

    def __init__(self) -> None:
        self._checked: set = set()

    def prepare(self, rings: Dict[str, Ring]) -> None:
        """Prepare the next forward pass of each layer.

        Args:
            rings (dict[str, Ring]): Rings by name; messages use the names.

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
        """Compare with the other processes if the set of rings changed."""
        shared = {name: ring for name, ring in rings.items()
                  if getattr(ring, 'processes', None) is not None}
        if shared and set(shared) != self._checked:
            next(iter(shared.values())).processes.check_alike(
                {name: ring.turn + 1 for name, ring in shared.items()},
                'iterations that norms with sync=True remember')
            self._checked = set(shared)
