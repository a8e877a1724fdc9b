"""Tensors of a layer's last iterations, and all layers' at once."""
from collections import defaultdict
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import torch
from torch import Tensor


class Ring:
    """The last ``size`` iterations of one layer.

    The present iteration overwrites the oldest one. Before that, what the
    past says may be prepared, for many layers at once: their tensors then lie
    side by side, and each layer has slices of them.

    Args:
        size (int): Iterations, the present one included.
    """

    # On which dimension each tensor has its channels; others stay apart.
    channel_dims: Dict[str, int] = {}

    def __init__(self, size: int) -> None:
        self.size = size
        self.turn = -1
        self.tensors: Dict[str, Tensor] = {}
        self.prepared: Any = None

    @property
    def filled(self) -> int:
        """Iterations that are held."""
        return min(self.turn + 1, self.size)

    @property
    def place(self) -> int:
        """Where the next iteration goes."""
        return (self.turn + 1) % self.size

    @property
    def channels(self) -> int:
        """C."""
        name, dim = next(iter(self.channel_dims.items()))
        return self.tensors[name].size(dim)

    @property
    def can_prepare(self) -> bool:
        """Whether all is known that the next forward pass will ask for."""
        return self.turn >= 0

    @property
    def kind(self) -> tuple:
        """What rings have in common that can be prepared together."""
        return (type(self), self.size) + tuple(
            (name, t.dtype, t.device, t.shape[:dim], t.shape[dim + 1:])
            for name, t in self.tensors.items()
            for dim in [self.channel_dims.get(name)] if dim is not None)

    @staticmethod
    def prepare(rings: Sequence['Ring'], tensors: Dict[str, Tensor]) -> None:
        """Set ``prepared`` of each ring.

        Args:
            rings (Sequence[Ring]): Of one kind.
            tensors (dict[str, Tensor]): Those of all, side by side.
        """
        raise NotImplementedError

    @property
    def rings(self) -> Dict[str, 'Ring']:
        """As of a state that holds several."""
        return {'window': self}

    def source_names(self, names: Dict[Tensor, str]) -> Optional[tuple]:
        """What else a ring depends on, by name; nothing."""

    def state_dict(self) -> Dict[str, Any]:
        """What is held, for a checkpoint."""
        # Copies: tensors may be slices of larger ones.
        return dict(
            turn=self.turn,
            tensors={name: t.clone() for name, t in self.tensors.items()})

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Hold what :meth:`state_dict` of one of the same size gave."""
        self.turn, self.tensors = state['turn'], dict(state['tensors'])
        self.prepared = None

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, **Ring.state_dict(self), 'prepared': None}

    def to(self, device: torch.device) -> None:
        """Move to a device. The dtype stays: statistics are not halved."""
        self.tensors = {k: v.to(device) for k, v in self.tensors.items()}
        self.prepared = None


# Masks of past iterations, by the rings that they are of.
_MASKS: Dict[tuple, Tensor] = {}


def past_places(rings: Sequence[Ring], like: Tensor) -> Tensor:
    """Which places hold a past iteration, shape (C, k), C of all rings."""
    key = (like.device, *((r.channels, r.size, r.filled, r.place)
                          for r in rings))
    mask = _MASKS.get(key)
    if mask is None or type(like) is not Tensor:  # a stand-in, in tracing
        mask = torch.cat([
            torch.tensor(
                [p < r.filled and p != r.place for p in range(r.size)],
                device=like.device).expand(r.channels, -1) for r in rings
        ])
        if type(like) is Tensor:
            if len(_MASKS) == 256:
                _MASKS.clear()
            _MASKS[key] = mask
    return mask


class _Group(NamedTuple):
    """Rings whose tensors lie side by side."""
    rings: List[Ring]
    slices: List[Dict[str, Tensor]]
    tensors: Dict[str, Tensor]

    def is_of(self, rings: List[Ring]) -> bool:
        """Whether it is these, and they still have their tensors here."""
        return len(rings) == len(self.rings) and all(
            ring is held and ring.tensors is own
            for ring, held, own in zip(rings, *self[:2]))


class PastBank:
    """Prepares the past of all layers at once, before the forward pass.

    What the past says depends on today's weights alone, and these are known.
    A layer takes what is prepared if it still holds. Otherwise it computes
    the same by itself, with the same function.
    """

    def __init__(self) -> None:
        self._groups: Dict[tuple, _Group] = {}

    def prepare(self, rings: Dict[str, Ring]) -> None:
        """Prepare the next forward pass of each layer.

        Args:
            rings (dict[str, Ring]): By names, for messages.

        Raises:
            RuntimeError: If processes that share a batch do not remember the
                same iterations.
        """
        kinds: Dict[tuple, Dict[str, Ring]] = defaultdict(dict)
        for name, ring in rings.items():
            if ring.can_prepare:
                kinds[ring.kind][name] = ring
        self._groups = {
            kind: self._group(kind, members)
            for kind, members in kinds.items()
        }
        for kind, group in self._groups.items():
            kind[0].prepare(group.rings, group.tensors)

    def _group(self, kind: tuple, members: Dict[str, Ring]) -> _Group:
        rings = list(members.values())
        held = self._groups.get(kind)
        if held is not None and held.is_of(rings):
            return held
        processes = getattr(rings[0], 'processes', None)
        if processes is not None:
            processes.check_alike(
                {name: ring.turn + 1 for name, ring in members.items()},
                'iterations that norms with sync=True remember')
        tensors = _join(rings) if len(rings) > 1 else rings[0].tensors
        return _Group(rings, [ring.tensors for ring in rings], tensors)


@torch.no_grad()
def _join(rings: List[Ring]) -> Dict[str, Tensor]:
    """Put tensors side by side; the rings go on with their slices."""
    joined, sizes = {}, [ring.channels for ring in rings]
    apart = [dict(ring.tensors) for ring in rings]
    for name, dim in rings[0].channel_dims.items():
        if name in apart[0]:
            joined[name] = torch.cat([own[name] for own in apart], dim)
            for own, part in zip(apart, joined[name].split(sizes, dim)):
                own[name] = part
    for ring, own in zip(rings, apart):
        ring.tensors = own
    return joined
