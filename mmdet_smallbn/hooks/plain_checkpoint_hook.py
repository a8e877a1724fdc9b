"""Checkpoints that torch's safe loader takes."""
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.registry import HOOKS

# The key of a checkpoint that holds the history of the log.
_HISTORY = 'smallbn_log_history'


@HOOKS.register_module()
class PlainCheckpointHook(Hook):
    """Write checkpoints that ``torch.load(..., weights_only=True)`` takes.

    That is torch's default from version 2.6 on, and mmengine 0.10 does not
    meet it: the history of the log is kept as objects of its own, and other
    entries may hold numbers of numpy. The hook puts the history into plain
    tensors, under a key of its own, and makes numbers of numpy plain. Stock
    mmdet then tests, serves and resumes the checkpoint on any torch. Resumed
    without this hook, the log averages from there on.

    The tools of this package add the hook, and
    :class:`mmdet_smallbn.SmallBatchNormHook` does the same.

    Example:
        >>> custom_hooks = [dict(type='PlainCheckpointHook')]
    """
    priority = 'LOWEST'

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Make what is no tensor plain, after all hooks."""
        make_plain(checkpoint)

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Take the history of the log up again."""
        restore_history(checkpoint)


def make_plain(checkpoint: dict) -> None:
    """Let a checkpoint hold tensors, numbers, strings and what groups them."""
    hub = checkpoint.get('message_hub') or {}
    history = {
        name: dict(
            values=torch.from_numpy(np.array(buffer.data[0])),
            counts=torch.from_numpy(np.array(buffer.data[1])),
            max_length=buffer.max_length)
        for name, buffer in hub.get('log_scalars', {}).items()
        if isinstance(buffer, HistoryBuffer)
    }
    if history:
        checkpoint[_HISTORY] = history
        hub['log_scalars'] = {}
    for key, value in checkpoint.items():
        checkpoint[key] = _plain(value)


def restore_history(checkpoint: dict) -> None:
    """Undo what :func:`make_plain` did to the history of the log."""
    if 'message_hub' not in checkpoint:
        return
    for name, buffer in checkpoint.get(_HISTORY, {}).items():
        checkpoint['message_hub']['log_scalars'][name] = HistoryBuffer(
            buffer['values'].cpu().numpy(), buffer['counts'].cpu().numpy(),
            buffer['max_length'])


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if type(value) in (list, tuple):
        return type(value)(_plain(v) for v in value)
    # A module's state dict knows versions besides.
    if isinstance(value, dict) and not hasattr(value, '_metadata'):
        return {key: _plain(v) for key, v in value.items()}
    return value
