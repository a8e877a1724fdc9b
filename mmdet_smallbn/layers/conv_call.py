"""The one place that learns which convolution made a layer's input."""
from typing import Callable, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..functional import (ConvCall, DeformCall, Filters, LinearCall,
                          run_eagerly)
from .cen_conv import CenConv2d
from .forward_pass import ForwardPass, current_pass

# Arguments before the weight, by the name of the node in the graph.
_DEFORMABLE = {
    'DeformConv2dFunctionBackward': 2,
    'ModulatedDeformConv2dFunctionBackward': 3
}
# Attribute of a convolution's output: how it was made.
_CALL = '_smallbn_call'


class Producer(NamedTuple):
    """What is known of the operation that made a tensor.

    Attributes:
        known (bool): False: nothing that the layer can compensate for.
        call (LinearCall, optional): The convolution, if it is one whose
            weight or bias trains. None with ``known``: nothing before the
            tensor moves its statistics by a weight of its own, so they stay
            valid.
    """
    known: bool
    call: Optional[LinearCall] = None


UNKNOWN = Producer(known=False)
FROZEN = Producer(known=True)


def find_producer(x: Tensor, step: ForwardPass) -> Producer:
    """Which convolution made ``x``, in a forward pass of a training step.

    The autograd graph tells without any wiring, and its node holds the weight
    as the kernel saw it: centralised, standardised, in the autocast dtype.
    Two-dimensional convolutions are accepted, transposed and mmcv's
    deformable ones among them. A sum, a pooling and everything else are
    unknown.

    What :func:`remember_calls` has left with ``x`` comes first: in activation
    checkpointing and behind torch.compile the graph does not tell, or reading
    it would recompute a region.

    Args:
        x (Tensor): Input of a norm, shape (N, C, H, W).
        step (ForwardPass): What the forward pass belongs to.

    Returns:
        Producer: The convolution, ``FROZEN`` or ``UNKNOWN``.
    """
    call = getattr(x, _CALL, None)
    if call is not None and call.version == x._version:
        return _producer(call.conv, call.input)
    if torch.is_grad_enabled() and not x.requires_grad:
        return FROZEN
    if step is not ForwardPass.PLAIN:
        return UNKNOWN
    node = x.grad_fn
    if node is None:
        return UNKNOWN
    if node.name() in _DEFORMABLE and _is_mmcvs(type(node)._forward_cls):
        return _of_node(node, _DEFORMABLE[node.name()], _deformable)
    if node.name() == 'ConvolutionBackward0':
        return _of_node(node, 1, _convolution)
    return UNKNOWN


def _of_node(node: torch.autograd.graph.Node, place: int,
             read: Callable[..., LinearCall]) -> Producer:
    """The call behind a node whose weight is its argument at ``place``."""
    weight, bias = (edge for edge, _ in (
        *node.next_functions[place:place + 2], (None, None))[:2])
    if weight is None and bias is None:
        return FROZEN
    if bias is not None:
        bias = _leaf(bias)
        if bias is None:
            return UNKNOWN
    call = read(node, None if weight is None else _leaf(weight), bias)
    return _known(call)


def _known(call: LinearCall) -> Producer:
    return UNKNOWN if call.filters.are_freed else Producer(True, call)


def _leaf(node: torch.autograd.graph.Node) -> Optional[Tensor]:
    """The parameter behind a node; None if it is a computed value's."""
    if node.name() == 'ToCopyBackward0':  # of autocast
        node = node.next_functions[0][0]
    return getattr(node, 'variable', None)


def _convolution(node: torch.autograd.graph.Node, weight: Optional[Tensor],
                 bias: Optional[Tensor]) -> ConvCall:
    return ConvCall(
        Filters(
            node._saved_weight if weight is None else weight, bias,
            node._saved_groups, node._saved_transposed),
        input=node._saved_input.detach(),
        stride=node._saved_stride,
        padding=node._saved_padding,
        dilation=node._saved_dilation)


def _is_mmcvs(cls: type) -> bool:
    # The layers work without mmcv.
    return cls.__module__.startswith('mmcv.')


def _deformable(node: torch.autograd.graph.Node, weight: Optional[Tensor],
                bias: Optional[Tensor]) -> DeformCall:
    """What mmcv's function keeps for its backward pass."""
    input, offset, *mask, used = node.saved_tensors[:_DEFORMABLE[
        node.name()] + 1]
    return DeformCall(
        Filters(used if weight is None else weight, bias, node.groups),
        input=input.detach(),
        offset=offset.detach(),
        mask=mask[0].detach() if mask else None,
        stride=node.stride,
        padding=node.padding,
        dilation=node.dilation,
        deform_groups=node.deform_groups)


def remember_calls(model: nn.Module) -> List[RemovableHandle]:
    """Let convolutions beside CBN leave with an output how it was made.

    It is for activation checkpointing and torch.compile, where CBN cannot
    read it from the autograd graph, and for CenConv, whose parameter the graph
    does not show. Convolutions with a forward or a computed
    weight of their own, which would have to be guessed, are left unknown:
    weight standardisation, spectral norm.

    Args:
        model (nn.Module): Whose convolutions get a forward hook: those in the
            blocks that hold a CBN.

    Returns:
        list[RemovableHandle]: To remove the hooks with.
    """
    convolutions = {
        module: None
        for block in model.modules() if _holds_cbn(block)
        for module in block.modules()
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))
    }
    return [
        conv.register_forward_hook(remember_call) for conv in convolutions
        if remember_call not in conv._forward_hooks.values()
    ]


def _holds_cbn(block: nn.Module) -> bool:
    """Whether a CBN is among a block's children, or in one of its lists."""
    lists = [
        child for child in block.children()
        if isinstance(child, (nn.ModuleList, nn.Sequential))
    ]
    return any(
        getattr(child, 'compensate', False) for holder in (block, *lists)
        for child in holder.children())


class _Call(NamedTuple):
    """What a convolution leaves with its output."""
    conv: nn.Module
    input: Optional[Tensor]  # None: nothing of the convolution trains
    version: int  # of the output: what works in place on it ends its validity


@run_eagerly
def remember_call(conv: nn.Module, inputs: Tuple[Tensor],
                  output: Tensor) -> None:
    """The hook that :func:`remember_calls` gives to a convolution."""
    if (inputs  # by their position, as everywhere in the toolboxes
            and current_pass() in (ForwardPass.PLAIN, ForwardPass.CHECKPOINTED)
            and _has_stock_forward(conv)
            # Another weight than a parameter is computed, and under no_grad
            # it does not tell whether it trains.
            and 'weight' in conv._parameters):
        trains = any(p.requires_grad for p in conv.parameters())
        # Of what is frozen nobody keeps the input.
        x = inputs[0].detach() if trains else None
        setattr(output, _CALL, _Call(conv, x, output._version))


def _has_stock_forward(conv: nn.Module) -> bool:
    kind = type(conv)
    # mmcv's have one for empty inputs of old versions of torch.
    if kind.forward not in (
            nn.Conv2d.forward,
            nn.ConvTranspose2d.forward) and not _is_mmcvs_wrapper(kind):
        return False
    return isinstance(conv, nn.ConvTranspose2d) or kind._conv_forward in (
        nn.Conv2d._conv_forward, CenConv2d._conv_forward)


def _is_mmcvs_wrapper(kind: type) -> bool:
    return kind.__module__ == 'mmcv.cnn.bricks.wrappers'


def is_compiled(x: Tensor) -> bool:
    """Whether torch.compile hides in one node what made a tensor."""
    return x.grad_fn is not None and x.grad_fn.name().startswith('Compiled')


def _producer(conv: nn.Module, x: Optional[Tensor]) -> Producer:
    if x is None:
        return FROZEN
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    padding = (top, left)
    if conv.padding_mode != 'zeros' or (left, top) != (right, bottom):
        mode = (
            'constant' if conv.padding_mode == 'zeros' else conv.padding_mode)
        x, padding = F.pad(x, (left, right, top, bottom), mode=mode), (0, 0)
    bias = conv.bias
    if bias is not None and not bias.requires_grad:
        bias = None
    filters = Filters(
        conv.weight,
        bias,
        conv.groups,
        transposed=isinstance(conv, nn.ConvTranspose2d),
        centred=isinstance(conv, CenConv2d))
    return _known(
        ConvCall(filters, x, conv.stride, padding, conv.dilation))
