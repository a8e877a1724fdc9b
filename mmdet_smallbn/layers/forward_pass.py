"""What a forward pass belongs to: a training step, a recomputation."""
import enum
import sys

import torch
from torch.utils.checkpoint import CheckpointFunction

_REENTRANT_FORWARD = CheckpointFunction.forward.__code__


class ForwardPass(enum.Enum):
    """Kinds of forward passes that a layer in training mode may be in.

    Attributes:
        PLAIN: Of a training step; the autograd graph can be read.
        CHECKPOINTED: Of a training step, where there is no graph to be read:
            in activation checkpointing, whose re-entrant kind records none,
            or under other hooks on saved tensors, which reading would undo.
        RECOMPUTED: Activation checkpointing's repetition in the backward
            pass.
        UNTRACKED: Under ``no_grad``: no training step.
    """
    PLAIN = 'plain'
    CHECKPOINTED = 'checkpointed'
    RECOMPUTED = 'recomputed'
    UNTRACKED = 'untracked'


def current_pass() -> ForwardPass:
    """The kind of pass that this is called in."""
    if in_backward():
        return ForwardPass.RECOMPUTED
    if torch.is_grad_enabled():
        return (
            ForwardPass.CHECKPOINTED
            if _saved_tensors_are_packed() else ForwardPass.PLAIN)
    return (
        ForwardPass.CHECKPOINTED
        if _in_reentrant_checkpoint() else ForwardPass.UNTRACKED)


def in_backward() -> bool:
    """Whether a backward pass is running: the forward is a recomputation."""
    return torch._C._current_graph_task_id() != -1


_top_hooks = getattr(torch._C._autograd, '_top_saved_tensors_default_hooks',
                     None)


def _saved_tensors_are_packed() -> bool:
    if _top_hooks is not None:
        return _top_hooks(False) is not None
    # Disabling the hooks is refused while there are some: the one test that
    # every supported torch has.
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(''):
            return False
    except RuntimeError:
        return True


def _in_reentrant_checkpoint() -> bool:
    # To autograd it is a pass under no_grad as any other; it says nowhere
    # what it is but on the stack.
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _REENTRANT_FORWARD:
            return True
        frame = frame.f_back
    return False
