"""Checks of arguments, inputs and names of layers."""
from inspect import signature
from typing import Any, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import did_you_mean


def check_positive_int(name: str, value: Any) -> None:
    """Raise ValueError if the argument is not an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f'{name} must be an integer of at least 1, but got {value!r}')


def check_at_least(name: str, value: Any, least: float) -> None:
    """Raise ValueError if the argument is not a number >= ``least``."""
    if not isinstance(value, (int, float)) or isinstance(
            value, bool) or not value >= least:
        raise ValueError(
            f'{name} must be a number of at least {least}, but got {value!r}')


def check_example_weight(value: Any) -> None:
    """Raise ValueError if the value is not a number from 0 to 1."""
    if not isinstance(value, (int, float)) or isinstance(
            value, bool) or not 0 <= value <= 1:
        raise ValueError('the example weight must be a number from 0 to 1, '
                         f'but got {value!r}')


def check_settings(cls: type, settings: Iterable[str]) -> None:
    """Raise ValueError if a norm's class has no argument of that name."""
    parameters = signature(cls).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return  # its constructor knows
    known = list(parameters)[1:]  # without num_features
    for name in settings:
        if name not in known:
            raise ValueError(f'{cls.__name__} takes no {name!r}. '
                             f'{did_you_mean(name, known)}')


def is_batch_norm(module: nn.Module) -> bool:
    """Return True for a BatchNorm of (N, C, H, W), this package's too."""
    return isinstance(module, _BatchNorm) and not isinstance(
        module, (nn.BatchNorm1d, nn.BatchNorm3d))


def is_under(name: str, prefix: str) -> bool:
    """Return True if the name is the prefix or a submodule of the prefix."""
    return name == prefix or name.startswith(f'{prefix}.')


def matches_none(setting: str, prefix: str, kind: str,
                 names: Iterable[str]) -> str:
    """Return the message about a prefix that matches no module of a kind.

    Args:
        setting (str): Name of the argument that holds the prefix.
        prefix (str): The prefix.
        kind (str): Kind of the modules, such as ``'norm'``.
        names (Iterable[str]): Names of all such modules of the model.
    """
    parts = sorted({name.split('.')[0] for name in names})
    return (f'{setting}={prefix!r} matches no {kind} of the model. Parts with '
            f'a {kind}: {", ".join(parts) or "none"}')


def name_of(layer: nn.Module) -> str:
    """Return a norm's type and its name in the model, for messages.

    If the name is not known, the number of channels stands in its place.
    """
    kind = type(layer).__name__
    if layer.layer_name:
        return f'{kind} {layer.layer_name!r}'
    return f'{kind}({layer.num_features})'


def check_input(layer: nn.Module, x: Tensor) -> None:
    """Check that a norm can handle its input.

    Raises:
        TypeError: If the layer is traced symbolically.
        RuntimeError: If it is a copy that DataParallel made.
        ValueError: If the input's shape is not (N, C, H, W), or if it has
            another number of channels than the layer.
    """
    if isinstance(x, torch.fx.Proxy):
        raise TypeError(
            f'{name_of(layer)} cannot be traced symbolically, because the '
            'trace would keep only one branch of its forward pass. Remove '
            'efficient_conv_bn_eval from the config')
    if layer.training and layer.__dict__.get('_is_replica'):
        raise RuntimeError(
            f'{name_of(layer)} was copied for one forward pass by '
            'DataParallel, so its statistics would be lost. Use '
            'DistributedDataParallel')
    if x.dim() != 4:
        raise ValueError(
            f'{name_of(layer)} takes feature maps of shape (N, C, H, W), but '
            f'got an input of shape {tuple(x.shape)}. Give it 4D inputs, '
            'such as the output of a convolution')
    if x.size(1) != layer.num_features:
        raise ValueError(
            f'{name_of(layer)} was built for {layer.num_features} channels, '
            f'but got an input of shape {tuple(x.shape)}. Build it with '
            f'num_features={x.size(1)}, or give it an input with '
            f'{layer.num_features} channels')


def check_no_capture(layer: nn.Module, x: Tensor) -> None:
    """Raise RuntimeError if the layer is being captured in a CUDA graph."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f'{name_of(layer)} cannot be captured in a CUDA graph in '
            'training: it writes each iteration to another address, and a '
            'graph always writes to the same one. Train without the graph, or '
            'use BRN, BGN or GhostBN')


def check_count(layer: nn.Module, count: Any) -> None:
    """Raise ValueError if a channel has one value: it has no variance."""
    if isinstance(count, int) and count == 1:
        raise ValueError(
            f'{name_of(layer)} got one value per channel, which has no '
            'variance. Use more images or a larger feature map, or remove '
            'this norm')
