"""Kinds of forward passes, such as a training step or a recomputation."""
import enum
import sys

import torch
from torch.utils.checkpoint import CheckpointFunction

_REENTRANT_FORWARD = CheckpointFunction.forward.__code__


class ForwardPass(enum.Enum):
    """Kind of a forward pass of a layer in training mode.

    Attributes:
        PLAIN: A training step whose autograd graph can be read.
        CHECKPOINTED: A training step whose autograd graph cannot be read. It
            is in activation checkpointing, whose re-entrant variant records
            no graph, or under other hooks on saved tensors, which reading
            would unpack.
        RECOMPUTED: The repetition in the backward pass, by activation
            checkpointing.
        UNTRACKED: A pass under ``no_grad``, which is no training step.
    """
    PLAIN = 'plain'
    CHECKPOINTED = 'checkpointed'
    RECOMPUTED = 'recomputed'
    UNTRACKED = 'untracked'


def current_pass() -> ForwardPass:
    """Return the kind of the forward pass that is running."""
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
    """Return True in a backward pass: then a forward is a recomputation."""
    return torch._C._current_graph_task_id() != -1


_top_hooks = getattr(torch._C._autograd, '_top_saved_tensors_default_hooks',
                     None)


def _saved_tensors_are_packed() -> bool:
    if _top_hooks is not None:
        return _top_hooks(False) is not None
    # torch refuses to disable the hooks while there are some. Every supported
    # torch version has this test.
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(''):
            return False
    except RuntimeError:
        return True


def _in_reentrant_checkpoint() -> bool:
    # For autograd this is a pass under no_grad like any other. Only the call
    # stack shows that it is a checkpoint.
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _REENTRANT_FORWARD:
            return True
        frame = frame.f_back
    return False
