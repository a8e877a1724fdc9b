"""Hook that writes checkpoints for torch's safe loader."""
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.registry import HOOKS

# Checkpoint key of the log's history.
_HISTORY = 'smallbn_log_history'


@HOOKS.register_module()
class PlainCheckpointHook(Hook):
    """Hook that makes checkpoints load with ``weights_only=True``.

    From version 2.6 on this is the default of ``torch.load``. Checkpoints of
    mmengine 0.10 do not load with it: the history of the log consists of
    mmengine's own objects, and other entries may be numpy numbers. The hook
    stores the history as tensors under a separate key, and converts numpy
    numbers to Python numbers. Stock mmdet can then test, serve and resume the
    checkpoint with any version of torch. If the hook is missing in a resumed
    training, the log's averages start again at that point.

    The tools of this package add the hook, and
    :class:`mmdet_smallbn.SmallBatchNormHook` does the same.

    Example:
        >>> custom_hooks = [dict(type='PlainCheckpointHook')]
    """
    priority = 'LOWEST'

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Convert the checkpoint, after all other hooks."""
        make_plain(checkpoint)

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Restore the history of the log."""
        restore_history(checkpoint)


def make_plain(checkpoint: dict) -> None:
    """Convert a checkpoint to tensors, numbers, strings and containers."""
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
    """Restore the history of the log that :func:`make_plain` converted."""
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
        if value.dtype.kind not in 'biufc':  # torch has no strings
            return value.tolist()
        return torch.from_numpy(value)
    if type(value) in (list, tuple):
        return type(value)(_plain(v) for v in value)
    # A module's state dict has an attribute with versions: keep the object.
    if isinstance(value, dict) and not hasattr(value, '_metadata'):
        return {key: _plain(v) for key, v in value.items()}
    return value
