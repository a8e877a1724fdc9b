"""What the layers ask of arguments and names."""
from typing import Any, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def check_positive_int(name: str, value: Any) -> None:
    """Refuse what is not an integer of at least 1, by name."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f'{name} must be an integer of at least 1, but got {value!r}')


def check_at_least(name: str, value: Any, least: float) -> None:
    """Refuse what is not a number of at least ``least``, by name."""
    if not isinstance(value, (int, float)) or isinstance(
            value, bool) or not value >= least:
        raise ValueError(
            f'{name} must be a number of at least {least}, but got {value!r}')


def check_example_weight(value: Any) -> None:
    """Refuse what is not a number from 0 to 1."""
    if not isinstance(value, (int, float)) or isinstance(
            value, bool) or not 0 <= value <= 1:
        raise ValueError('the weight of an example must be a number from 0 to '
                         f'1, but got {value!r}')


def is_batch_norm(module: nn.Module) -> bool:
    """Whether it is a norm of feature maps of BatchNorm's form, ours too."""
    return isinstance(module, _BatchNorm) and not isinstance(
        module, (nn.BatchNorm1d, nn.BatchNorm3d))


def is_under(name: str, prefix: str) -> bool:
    """Whether a module's name is the prefix, or of a part of that module."""
    return name == prefix or name.startswith(f'{prefix}.')


def fits_none(setting: str, prefix: str, kind: str,
              names: Iterable[str]) -> str:
    """What to say of a prefix that no module of a kind is under.

    Args:
        setting (str): The argument that holds the prefix.
        prefix (str): The prefix.
        kind (str): What is looked for under it, such as ``'norm'``.
        names (Iterable[str]): Where there are such modules.
    """
    parts = sorted({name.split('.')[0] for name in names})
    return (f'{setting}={prefix!r} fits no {kind}; such are in '
            f'{", ".join(parts) or "no part of the model"}')


def name_of(layer: nn.Module) -> str:
    """A norm as messages call it: by its place in the model, if known."""
    kind = type(layer).__name__
    if layer.layer_name:
        return f'{kind} {layer.layer_name!r}'
    return f'{kind}({layer.num_features})'


def check_input(layer: nn.Module, x: Tensor) -> None:
    """Refuse what a norm would get wrong.

    Raises:
        TypeError: If the layer is traced symbolically.
        RuntimeError: If it is a copy that DataParallel made.
        ValueError: If the input has another shape than (N, C, H, W).
    """
    if isinstance(x, torch.fx.Proxy):
        raise TypeError(
            f'{name_of(layer)} cannot be traced symbolically, which would '
            'make one of its branches the only one. Remove '
            'efficient_conv_bn_eval from the config')
    if layer.training and layer.__dict__.get('_is_replica'):
        raise RuntimeError(
            f'{name_of(layer)} was copied for one forward by DataParallel, '
            'and what it gathers would be lost. Use DistributedDataParallel')
    if x.dim() != 4:
        raise ValueError(
            f'{name_of(layer)} takes feature maps of shape (N, C, H, W), but '
            f'got an input of shape {tuple(x.shape)}. Give it 4D inputs, '
            'such as the output of a convolution')
    if x.size(1) != layer.num_features:
        raise ValueError(
            f'{name_of(layer)} was built for {layer.num_features} channels, '
            f'but got an input of shape {tuple(x.shape)}. Build it with '
            f'num_features={x.size(1)}, or give it the output that it was '
            'built for')


def check_count(layer: nn.Module, count: Any) -> None:
    """Refuse one value a channel, of which there is no variance."""
    if isinstance(count, int) and count == 1:
        raise ValueError(
            f'{name_of(layer)} got one value per channel, which has no '
            'variance. Give it more images, a larger feature map, or put no '
            'norm there')
