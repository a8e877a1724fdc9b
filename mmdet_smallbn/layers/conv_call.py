"""The one place that learns which convolution made a layer's input."""
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from ..functional import ConvCall


class Producer(NamedTuple):
    """What is known of the operation that made a tensor.

    Attributes:
        known (bool): False: nothing that the layer can compensate for.
        call (ConvCall, optional): The convolution, if it is one whose weight
            or bias trains. None with ``known``: nothing before the tensor moves its
            statistics by a weight of its own, so they stay valid.
    """
    known: bool
    call: Optional[ConvCall] = None


UNKNOWN = Producer(known=False)
FROZEN = Producer(known=True)


def in_backward() -> bool:
    """Whether a backward pass is running: the forward is a recomputation."""
    return torch._C._current_graph_task_id() != -1


def graph_is_recorded() -> bool:
    """Whether this forward is a plain one, whose autograd graph can be read.

    It is not under ``no_grad`` (re-entrant checkpointing's first pass, a pass
    that re-estimates statistics), in a recomputation, nor where hooks pack
    the saved tensors (non-re-entrant checkpointing: reading one would
    recompute the region).
    """
    return (torch.is_grad_enabled() and not in_backward()
            and not _saved_tensors_are_packed())


def _saved_tensors_are_packed() -> bool:
    # Disabling the hooks is refused while there are some: the one test that
    # every supported torch has.
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(''):
            return False
    except RuntimeError:
        return True


def find_producer(x: Tensor) -> Producer:
    """Read from the autograd graph which convolution made ``x``.

    The graph needs no wiring, and its node holds the weight as the kernel saw
    it: centralised, standardised, in the autocast dtype. Only a plain
    two-dimensional convolution is accepted. A transposed one, a deformable
    one (whose node leads to its *offset* convolution), a sum, a pooling and
    everything else are unknown.

    Args:
        x (Tensor): Input of a norm, shape (N, C, H, W), while
            :func:`graph_is_recorded`.

    Returns:
        Producer: The convolution, ``FROZEN`` or ``UNKNOWN``.
    """
    if not x.requires_grad:
        return FROZEN
    node = x.grad_fn
    if node is None or node.name() != 'ConvolutionBackward0':
        return UNKNOWN
    if node._saved_transposed:
        return UNKNOWN
    weight_trains, bias_trains = (
        edge is not None for edge, _ in node.next_functions[1:])
    if not weight_trains and not bias_trains:
        return FROZEN
    return Producer(
        known=True,
        call=ConvCall(
            input=node._saved_input.detach(),
            weight=node._saved_weight.detach(),
            bias_trains=bias_trains,
            stride=node._saved_stride,
            padding=node._saved_padding,
            dilation=node._saved_dilation,
            groups=node._saved_groups))
