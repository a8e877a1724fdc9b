"""Inference example weighting for any trained model.

Paper: Four Things Everyone Should Know to Improve Batch Normalization,
Summers and Dinneen, ICLR 2020, arXiv:1906.03548, Sec. 3.1, Eq. (3).
"""
from functools import lru_cache
from typing import Dict, List, Optional, Sequence, Set, Union

from torch import Tensor, nn

from ..functional import normalize_for_inference
from .base import SmallBatchNorm
from .checks import (check_example_weight, is_batch_norm, matches_none,
                     is_under)


class _WeighsExamples:
    """Mixin that gives a stock norm inference example weighting.

    Only the module's class changes. Its parameters, buffers and hooks stay,
    so the change can be undone completely.
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
        # pickle cannot find a class by its name if it was made at run time.
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
    """Return the BatchNorms of feature maps and the GroupNorms, by name."""
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
    r"""Give each example a weight in its own normalisation at inference.

    In training, an example is part of the batch that it is normalised with.
    At inference it is not. With a weight :math:`\alpha` the moving averages
    and the example's own moments are mixed (arXiv:1906.03548, Eq. 3):

    .. math::
        \mu = (1 - \alpha)\,m_x + \alpha\,E[x], \qquad
        \sigma^2 = (1 - \alpha)\,m_{x^2} + \alpha\,E[x^2] - \mu^2.

    It works on any trained model: stock BatchNorm and SyncBatchNorm, this
    package's norms, and GroupNorm after :func:`calibrate_group_norms`. Find
    the best weight on validation data (``tools/sweep_example_weight.py``); it
    is usually small. A weight above 0 costs a pass over the features and does
    not fold into a convolution: mmcv's ``fuse_conv_bn`` drops it without a
    warning.

    Each call sets all norms of the model: excluded norms get the weight that
    they were built with. Parameters and buffers do not change. Convert the
    model (``revert_sync_batchnorm``) before this call, not after it.

    Example:
        >>> set_example_weight(model, 0.05, exclude='backbone')
        >>> set_example_weight(model, None)  # as trained, bit for bit

    Args:
        model (nn.Module): The model, or a part of it.
        weight (float, optional): :math:`\alpha`, from 0 to 1. None: the
            weight as trained, which is 0 for BatchNorm, 1 for GroupNorm, and
            the one that BGN was built with. 0 makes GroupNorm and BGN an
            affine map.
        exclude (str | Sequence[str]): Prefixes of modules that keep the
            weight as trained, such as ``'backbone'`` if its norms are frozen.

    Returns:
        list[str]: Names of the norms that now have the weight.

    Raises:
        ValueError: If the weight is out of range, a prefix matches no norm,
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
                             'are excluded. Give a model with norms, or '
                             'exclude fewer modules')
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
            raise ValueError(matches_none('exclude', prefix, 'norm', norms))
    return [
        name for name in norms
        if not any(is_under(name, prefix) for prefix in exclude)
    ]


def _as_trained(module: nn.Module) -> float:
    """Return the example weight that the module was built with."""
    if isinstance(module, SmallBatchNorm):
        return module.built_example_weight
    return 1. if isinstance(module, nn.GroupNorm) else 0.


def _lacks_averages(module: nn.Module, weight: float) -> bool:
    # With the weight 1 a GroupNorm needs no averages.
    return getattr(module, 'running_mean', None) is None and not (
        isinstance(module, nn.GroupNorm) and weight == 1)


def weights_as_trained(model: nn.Module,
                       exclude: Union[str, Sequence[str]] = ()) -> Set[float]:
    """Return the example weights with which the model's norms were trained.

    Args:
        model, exclude: As in :func:`set_example_weight`.

    Returns:
        set[float]: One weight, or several if the model mixes types of norms.
    """
    norms = _norms(model)
    return {_as_trained(norms[name]) for name in _not_excluded(norms, exclude)}


def lacks_averages(model: nn.Module,
                   weight: float,
                   exclude: Union[str, Sequence[str]] = ()) -> bool:
    """Return True if a GroupNorm must be calibrated for this weight.

    Args:
        model, weight, exclude: As in :func:`set_example_weight`.
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
                    'tools/sweep_example_weight.py does, or exclude this norm')
    else:
        message += ('It was built with track_running_stats=False. Exclude '
                    'this norm')
    return message
