"""What the layers ask of arguments and names."""
from typing import Any

from torch import nn
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
