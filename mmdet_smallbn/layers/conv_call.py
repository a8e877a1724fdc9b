"""Search for the convolution that made a layer's input."""
from typing import Callable, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..functional import (ConvCall, DeformCall, Filters, LinearCall,
                          run_eagerly)
from .cen_conv import CenConv2d
from .forward_pass import ForwardPass, current_pass

# Number of arguments before the weight, by the name of the autograd node.
_DEFORMABLE = {
    'DeformConv2dFunctionBackward': 2,
    'ModulatedDeformConv2dFunctionBackward': 3
}
# Attribute of a convolution's output that holds its _Call.
_CALL = '_smallbn_call'


class Producer(NamedTuple):
    """The operation that made a tensor, as far as it is known.

    Attributes:
        known (bool): False if the layer cannot compensate for the operation.
        call (LinearCall, optional): The convolution, if its weight or bias
            trains. If ``known`` is True and this is None, no weight of the
            operation changes the tensor's statistics, so past statistics stay
            valid.
    """
    known: bool
    call: Optional[LinearCall] = None


UNKNOWN = Producer(known=False)
FROZEN = Producer(known=True)


def find_producer(x: Tensor, step: ForwardPass) -> Producer:
    """Find the convolution that made ``x`` in a training step.

    The autograd graph shows it without any registration. Its node holds the
    weight as the kernel used it: centred, standardised, in the autocast
    dtype. Two-dimensional convolutions are accepted, also transposed ones and
    mmcv's deformable ones. A sum, a pooling and all other operations are
    unknown.

    A record that :func:`remember_calls` left on ``x`` has priority. In
    activation checkpointing and behind torch.compile the graph does not show
    the convolution, or reading the graph would start a recomputation.

    Args:
        x (Tensor): Input of a norm, shape (N, C, H, W).
        step (ForwardPass): Kind of the forward pass.

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
    """Return the producer of a node whose argument ``place`` is the weight."""
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
    """Return the parameter of a node; None if the value was computed."""
    if node.name() == 'ToCopyBackward0':  # autocast's cast
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
    # By its name, because the layers work without mmcv.
    return cls.__module__.startswith('mmcv.')


def _deformable(node: torch.autograd.graph.Node, weight: Optional[Tensor],
                bias: Optional[Tensor]) -> DeformCall:
    """Read what mmcv's function has saved for its backward pass."""
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
    """Add hooks that record, on each convolution's output, how it was made.

    Activation checkpointing and torch.compile need these records, because CBN
    cannot read the autograd graph there. So does CenConv, because the graph
    does not show its parameter. A convolution with its own ``forward`` or a
    computed weight (weight standardisation, spectral norm) is not recorded,
    because its effective weight is not known.

    Args:
        model (nn.Module): The model. The convolutions in blocks that hold a
            CBN get a forward hook.

    Returns:
        list[RemovableHandle]: Handles that remove the hooks.
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
    """Return True if a block, or a list in it, has a CBN as a child."""
    lists = [
        child for child in block.children()
        if isinstance(child, (nn.ModuleList, nn.Sequential))
    ]
    return any(
        getattr(child, 'compensate', False) for holder in (block, *lists)
        for child in holder.children())


class _Call(NamedTuple):
    """Record of a convolution on its output."""
    conv: nn.Module
    input: Optional[Tensor]  # None: the convolution does not train
    version: int  # of the output; an in-place operation makes the record void


@run_eagerly
def remember_call(conv: nn.Module, inputs: Tuple[Tensor],
                  output: Tensor) -> None:
    """Record the call; the forward hook of :func:`remember_calls`."""
    if (inputs  # the toolboxes pass the input by position
            and current_pass() in (ForwardPass.PLAIN, ForwardPass.CHECKPOINTED)
            and _has_stock_forward(conv)
            # A weight that is no parameter is computed. Under no_grad it does
            # not show whether it trains.
            and 'weight' in conv._parameters):
        trains = any(p.requires_grad for p in conv.parameters())
        # A frozen convolution's input is not needed.
        x = inputs[0].detach() if trains else None
        setattr(output, _CALL, _Call(conv, x, output._version))


def _has_stock_forward(conv: nn.Module) -> bool:
    kind = type(conv)
    # mmcv's wrappers differ only for empty inputs in old versions of torch.
    if kind.forward not in (
            nn.Conv2d.forward,
            nn.ConvTranspose2d.forward) and not _is_mmcvs_wrapper(kind):
        return False
    return isinstance(conv, nn.ConvTranspose2d) or kind._conv_forward in (
        nn.Conv2d._conv_forward, CenConv2d._conv_forward)


def _is_mmcvs_wrapper(kind: type) -> bool:
    return kind.__module__ == 'mmcv.cnn.bricks.wrappers'


def is_compiled(x: Tensor) -> bool:
    """Return True if a node of torch.compile made the tensor."""
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
