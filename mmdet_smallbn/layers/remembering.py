"""Base class of the norms that remember past iterations."""
import warnings
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from .base import SmallBatchNorm
from .checks import name_of
from .ring import Ring


# Version of the states' format in checkpoints.
_VERSION = 3


class RememberingNorm(SmallBatchNorm):
    """Base class of the norms that remember past iterations.

    A model may call a layer several times in an iteration, as in a head that
    all pyramid levels share. Each of these calls has its own state. A
    subclass creates it in :meth:`new_state` and gets it from
    :meth:`state_of_call`. If no hook numbers the iterations, every training
    forward pass counts as an iteration.

    States are in no buffer and no state dict. Copies of the layer have a copy
    of them, and ``.to(device)`` moves them. Loading a state dict empties
    them.

    Args:
        *args: Arguments of :class:`SmallBatchNorm`.
        **kwargs: Arguments of :class:`SmallBatchNorm`.
    """

    keeps_states = True

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.states: List[Any] = []
        self._made_with: Dict[str, Any] = {}
        self._last_seen: Optional[Tuple[int, torch.Size]] = None
        self._warned_of_levels = False

    # Settings that a state depends on.
    state_settings: Tuple[str, ...] = ()

    def new_state(self) -> Any:
        """Return an empty state for one of the layer's calls."""
        raise NotImplementedError

    def state_of_call(self) -> Any:
        """Return the state of the present call in this iteration.

        If a setting that the states depend on has changed, all states are
        emptied first.
        """
        if self._made_with != self._settings():
            self._made_with = self._settings()
            self.reset_state()
        while len(self.states) <= self._call:
            self.states.append(self.new_state())
        return self.states[self._call]

    @property
    def held_iterations(self) -> List[int]:
        return [state.filled for state in self.states]

    @property
    def rings(self) -> Dict[str, Ring]:
        """The rings of all calls, which :class:`PastBank` prepares."""
        return {
            f'{call}.{name}': ring
            for call, state in enumerate(self.states)
            for name, ring in state.rings.items()
        }

    def reset_state(self) -> None:
        """Forget the past iterations."""
        self.states = []

    def export_states(
            self,
            names: Optional[Dict[Tensor, str]] = None) -> List[Dict[str, Any]]:
        """Return the states of past iterations, for a checkpoint.

        Args:
            names (dict[Tensor, str], optional): Names of the model's
                parameters.

        Returns:
            list[dict]: One dict for each call in an iteration. It holds
            tensors and numbers, copied to the CPU, and the layer's settings.
            The list is empty if there are no states.
        """
        if self._made_with != self._settings():
            return []
        return [
            dict(
                version=_VERSION,
                settings=self._settings(),
                follows={
                    name: ring.source_names(names or {})
                    for name, ring in state.rings.items()
                },
                state=_on(state.state_dict(), 'cpu')) for state in self.states
        ]

    def _settings(self) -> Dict[str, Any]:
        return dict(
            type=type(self).__name__,
            **{name: getattr(self, name) for name in self.state_settings})

    def restore_states(
            self,
            exported: List[Dict[str, Any]],
            parameters: Optional[Dict[str, Tensor]] = None) -> None:
        """Load a result of :meth:`export_states`.

        Args:
            exported (list[dict]): The exported states.
            parameters (dict[str, Tensor], optional): Parameters of the model,
                by name.

        Raises:
            ValueError: If the states are from a layer with other settings, or
                from a version of this package with another format.
        """
        states = []
        for values in exported:
            if values.get('version') != _VERSION:
                raise ValueError(
                    f'{name_of(self)}: it is in the format '
                    f'{values.get("version", 1)}, and this version of '
                    f'mmdet_smallbn reads {_VERSION}')
            mine, theirs = self._settings(), values['settings']
            for name in mine:
                if mine[name] != theirs.get(name):
                    raise ValueError(
                        f'{name_of(self)}: it was gathered with '
                        f'{name}={theirs.get(name)!r}, and the layer has '
                        f'{mine[name]!r}')
            state = self.new_state()
            state.load_state_dict(_on(values['state'], self._device()))
            for name, ring in state.rings.items():
                if values['follows'][name] is not None:
                    ring.follow(values['follows'][name], parameters or {})
            states.append(state)
        self.states, self._made_with = states, self._settings()

    def _device(self) -> Optional[torch.device]:
        anchor = self.weight if self.weight is not None else self.running_mean
        return None if anchor is None else anchor.device

    def count_call(self, x: Tensor) -> None:
        """Count the layer's forward passes in this iteration."""
        super().count_call(x)
        if self.iteration is None:
            self._watch_for_levels(x)
        self.check_calls(x)

    def _watch_for_levels(self, x: Tensor) -> None:
        """Warn if the calls for pyramid levels count as iterations.

        If the iteration is not known, the sign is a map of another size while
        the weights have not changed.
        """
        if self._warned_of_levels or self.weight is None or (
                not self.weight.requires_grad):
            return
        seen = (self.weight._version, x.shape[2:])
        last, self._last_seen = self._last_seen, seen
        if last is not None and last[0] == seen[0] and last[1] != seen[1]:
            self._warned_of_levels = True
            warnings.warn(
                f'{name_of(self)} is called with maps of several sizes '
                'between two steps, and counts every call as an iteration. If '
                'pyramid levels share this head, use a head with a norm for '
                'each level (RetinaSepBNHead), or add SmallBatchNormHook, or '
                'use TrainingLoop(model) in your own training loop')

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # The past is not valid for the loaded weights.
        self.reset_state()

    def _apply(self, fn, *args, **kwargs):
        super()._apply(fn, *args, **kwargs)
        device = self._device()
        if device is not None:
            for state in self.states:
                state.to(device)
        return self


def _on(values: Dict[str, Any], device) -> Dict[str, Any]:
    """Copy a nested dict with its tensors to a device."""
    return {
        key: _on(value, device) if isinstance(value, dict) else
        value.detach().to(device, copy=True)
        if isinstance(value, Tensor) else value
        for key, value in values.items()
    }
