"""Inference example weighting, on any model that is trained.

Paper: Four Things Everyone Should Know to Improve Batch Normalization,
Summers and Dinneen, ICLR 2020, arXiv:1906.03548, Sec. 3.1, Eq. (3).
"""
from functools import lru_cache
from typing import Dict, List, Optional, Sequence, Set, Union

from torch import Tensor, nn

from ..functional import normalize_for_inference
from .base import SmallBatchNorm
from .checks import (check_example_weight, fits_none, is_batch_norm,
                     is_under)


class _WeighsExamples:
    """What a stock norm becomes while its examples have a weight.

    The module stays, with its parameters, buffers and hooks; only its class
    changes, so that going back leaves no trace.
    """
    stock_class: type
    example_weight: float

    def forward(self, input: Tensor) -> Tensor:
        if self.training or input.dim() != 4:
            return super().forward(input)
        return normalize_for_inference(input, self.running_mean,
                                       self.running_var, self.weight,
                                       self.bias, self.eps,
                                       self.example_weight,
                                       getattr(self, 'num_groups', None))

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, example_weight={self.example_weight}'

    def __reduce_ex__(self, protocol):
        # Classes that are made at run time are not found by their names.
        return _new, (self.stock_class, ), self.__dict__


@lru_cache(maxsize=None)
def _weighing(stock_class: type) -> type:
    return type(f'ExampleWeighted{stock_class.__name__}',
                (_WeighsExamples, stock_class), dict(stock_class=stock_class))


def _new(stock_class: type) -> nn.Module:
    cls = _weighing(stock_class)
    return cls.__new__(cls)


def _stock(module: nn.Module) -> type:
    return getattr(module, 'stock_class', type(module))


def _norms(model: nn.Module) -> Dict[str, nn.Module]:
    """The norms of feature maps that have a BatchNorm's or GN's form."""
    return {
        name: module
        for name, module in model.named_modules()
        if is_batch_norm(module) or isinstance(module, nn.GroupNorm)
    }


def _set(module: nn.Module, weight: Optional[float]) -> None:
    if isinstance(module, SmallBatchNorm):
        module.example_weight = (
            _as_trained(module) if weight is None else weight)
        return
    if weight is None or weight == _as_trained(module):
        module.__class__ = _stock(module)
        module.__dict__.pop('example_weight', None)
    else:
        module.__class__ = _weighing(_stock(module))
        module.example_weight = float(weight)


def set_example_weight(
        model: nn.Module,
        weight: Optional[float],
        exclude: Union[str, Sequence[str]] = ()) -> List[str]:
    r"""Let each example take part in its own normalisation at inference.

    In training an example is among those that it is normalised with, at
    inference it is not. With a weight :math:`\alpha` the moving averages and
    the example's own moments are mixed (arXiv:1906.03548, Eq. 3):

    .. math::
        \mu = (1 - \alpha)\,m_x + \alpha\,E[x], \qquad
        \sigma^2 = (1 - \alpha)\,m_{x^2} + \alpha\,E[x^2] - \mu^2.

    It works on any trained model: stock BatchNorm and SyncBatchNorm, this
    package's norms, and GroupNorm after :func:`calibrate_group_norms`. The
    best weight is found on validation data (``tools/
    sweep_example_weight.py``), and is mostly small. A weight above 0 costs a
    pass over the features, and does not fold into a convolution: mmcv's
    ``fuse_conv_bn`` would silently drop it.

    Each call says all there is: norms that it excludes go back to what they
    were built with. Parameters and buffers are not touched. Convert models
    (``revert_sync_batchnorm``) before, not after.

    Example:
        >>> set_example_weight(model, 0.05, exclude='backbone')
        >>> set_example_weight(model, None)  # as trained, bit for bit

    Args:
        model (nn.Module): The model, or a part of it.
        weight (float, optional): :math:`\alpha`, from 0 to 1. BatchNorm has
            0, GroupNorm 1, BGN what it was built with: None gives each its
            own back. 0 takes GroupNorm and BGN to an affine map.
        exclude (str | Sequence[str]): Prefixes of modules to leave as
            trained, such as ``'backbone'`` for its frozen norms.

    Returns:
        list[str]: Names of the norms that have the weight now.

    Raises:
        ValueError: If the weight is out of range, a prefix is none of a norm,
            no norm is left, or a norm has no moving averages.
    """
    if weight is not None:
        check_example_weight(weight)
    norms = _norms(model)
    chosen = _not_excluded(norms, exclude)
    if weight is not None:
        if not chosen:
            raise ValueError('no norm of the model can weigh examples: it has '
                             f'{len(norms)} norms, and {len(norms)} of them '
                             'are excluded')
        for name in chosen:
            if _lacks_averages(norms[name], weight):
                raise ValueError(_without_averages(name, norms[name]))
    for name, module in norms.items():
        _set(module, weight if name in chosen else None)
    return chosen


def _not_excluded(norms: Dict[str, nn.Module],
                  exclude: Union[str, Sequence[str]]) -> List[str]:
    exclude = (exclude, ) if isinstance(exclude, str) else tuple(exclude)
    for prefix in exclude:
        if not any(is_under(name, prefix) for name in norms):
            raise ValueError(fits_none('exclude', prefix, 'norm', norms))
    return [
        name for name in norms
        if not any(is_under(name, prefix) for prefix in exclude)
    ]


def _as_trained(module: nn.Module) -> float:
    """The weight that the module has without any setting of it."""
    if isinstance(module, SmallBatchNorm):
        return module.built_example_weight
    return 1. if isinstance(module, nn.GroupNorm) else 0.


def _lacks_averages(module: nn.Module, weight: float) -> bool:
    # GroupNorm at 1 is GroupNorm.
    return getattr(module, 'running_mean', None) is None and not (
        isinstance(module, nn.GroupNorm) and weight == 1)


def weights_as_trained(model: nn.Module,
                       exclude: Union[str, Sequence[str]] = ()) -> Set[float]:
    """The weights of examples in the model's norms as they were trained.

    Args:
        model, exclude: As of :func:`set_example_weight`.

    Returns:
        set[float]: One, unless kinds of norms are mixed.
    """
    norms = _norms(model)
    return {_as_trained(norms[name]) for name in _not_excluded(norms, exclude)}


def lacks_averages(model: nn.Module,
                   weight: float,
                   exclude: Union[str, Sequence[str]] = ()) -> bool:
    """Whether a GroupNorm has to be calibrated before it takes the weight.

    Args:
        model, weight, exclude: As of :func:`set_example_weight`.
    """
    norms = _norms(model)
    return any(
        isinstance(norms[name], nn.GroupNorm)
        and _lacks_averages(norms[name], weight)
        for name in _not_excluded(norms, exclude))


def _without_averages(name: str, module: nn.Module) -> str:
    kind = _stock(module).__name__
    message = f'{kind} {name!r} has no moving averages. '
    if isinstance(module, nn.GroupNorm):
        message += ('Gather them with calibrate_group_norms(model), as '
                    'tools/sweep_example_weight.py does, or exclude it')
    else:
        message += 'It was built with track_running_stats=False: exclude it'
    return message
