"""Trained models as stock ones: BatchNorm and plain convolutions."""
import copy
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS
from torch import Tensor, nn

from ..errors import SetupError
from ..hooks import (ExampleWeightHook, FreezeStatisticsHook,
                     SmallBatchNormHook, StatisticsHook)
from ..layers import SmallBatchNorm
from ..layers.cen_conv import CenConv2d, effective_weight
from .difference import difference
from .state_dict import load_strictly
from .statistics import fixed_statistics

_PACKAGE = __name__.split('.')[0]
# Of a norm_cfg, what BatchNorm knows, too.
_KEPT = ('eps', 'momentum', 'affine', 'requires_grad', '_scope_')


def stock_config(cfg: Config) -> Tuple[Config, List[str]]:
    """A config as this one, of stock norms and convolutions.

    Norms of this package become ``dict(type='BN')`` with the ``eps`` and
    ``momentum`` that are stated, centred convolutions plain ones; its hooks
    and imports go.

    Args:
        cfg (Config): Is left as it is.

    Returns:
        tuple: The config, and a line for each change.

    Raises:
        SetupError: If the config weighs examples in evaluation, or needs
            something else of this package.
    """
    cfg = copy.deepcopy(cfg)
    changes = []
    _drop_hooks(cfg, changes)
    _drop_imports(cfg, changes)
    for path, part in _dicts(cfg._cfg_dict, ''):
        kind = part.get('type')
        cls = _registered(kind)
        kind = kind if isinstance(kind, str) else getattr(cls, '__name__', '')
        if _is(cls, SmallBatchNorm):
            kept = {key: part[key] for key in _KEPT if key in part}
            changes.append(f'{path}: {kind} -> BN')
            _refill(part, dict(type='BN', **kept))
        elif _is(cls, CenConv2d):
            changes.append(f'{path}: {kind} -> Conv2d')
            part['type'] = 'Conv2d'
        elif _is_of_package(getattr(cls, '__module__', '')):
            raise SetupError(f'{path}: {kind} is of {_PACKAGE}, and '
                             'nothing stock stands for it')
    return cfg, changes


def _is_of_package(module: str) -> bool:
    return module.split('.')[0] == _PACKAGE


def _drop_imports(cfg: Config, changes: List[str]) -> None:
    found = (cfg.get('custom_imports') or {}).get('imports') or []
    found = [found] if isinstance(found, str) else list(found)
    kept = [name for name in found if not _is_of_package(name)]
    if len(kept) == len(found):
        return
    changes.append(f'custom_imports: without {_PACKAGE}')
    if kept:
        cfg.custom_imports.imports = kept
    else:
        cfg.pop('custom_imports')


def _drop_hooks(cfg: Config, changes: List[str]) -> None:
    for key in ('custom_hooks', 'default_hooks'):
        hooks = cfg.get(key) or []
        named = hooks if isinstance(hooks, dict) else dict(enumerate(hooks))
        kept = {}
        for name, hook in named.items():
            kind = hook.get('type') if isinstance(hook, dict) else None
            cls = HOOKS.get(kind) if isinstance(kind, str) else kind
            if _is(cls, ExampleWeightHook) and hook.get('weight'):
                raise SetupError(
                    f'{cls.__name__} gives examples the weight '
                    f'{hook["weight"]} in evaluation, which no BatchNorm can '
                    f'do. Remove it from {key}, and evaluate without it first')
            if _is(cls, (ExampleWeightHook, FreezeStatisticsHook,
                         SmallBatchNormHook, StatisticsHook)):
                changes.append(f'{key}: without {cls.__name__}')
            else:
                kept[name] = hook
        if len(kept) < len(named):
            cfg[key] = kept if isinstance(hooks, dict) else list(kept.values())


def _dicts(value: Any, path: str) -> Iterator[Tuple[str, dict]]:
    if isinstance(value, dict):
        if 'type' in value:
            yield path, value
        for key, part in list(value.items()):
            yield from _dicts(part, f'{path}.{key}' if path else str(key))
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from _dicts(part, f'{path}[{i}]')


def _registered(kind: Any) -> Optional[type]:
    if not isinstance(kind, str):
        return kind
    name = kind.split('.')[-1]
    return MODELS.module_dict.get(name) or HOOKS.module_dict.get(name)


def _is(cls: Any, kinds: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, kinds)


def _refill(part: dict, values: dict) -> None:
    part.clear()
    for key, value in values.items():  # update() would merge
        part[key] = value


@torch.no_grad()
def stock_state(model: nn.Module) -> Dict[str, Tensor]:
    """The state dict that a stock model needs to be the same in evaluation.

    Running statistics are those that evaluation normalises with: BGN's are
    averaged over groups, MABN's are a mean of 0 and the mean square. Filters
    of centred convolutions are centred.

    Args:
        model (nn.Module): With trained norms.

    Raises:
        SetupError: If a norm normalises each image in its own way; names it.
    """
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    # A shared module has several names.
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f'{name}.' if name else ''
        if isinstance(module, SmallBatchNorm):
            mean, var = fixed_statistics(name, module)
            state[f'{prefix}running_mean'].copy_(mean)
            state[f'{prefix}running_var'].copy_(var)
        elif isinstance(module, CenConv2d):
            state[f'{prefix}weight'].copy_(effective_weight(module))
    return state


@torch.no_grad()
def check_same(model: nn.Module,
               stock: nn.Module,
               tolerance: float = 1e-4) -> int:
    """Compare each layer of this package with what stands for it.

    On random maps of its own, in evaluation.

    Args:
        model, stock (nn.Module): Of the same structure.
        tolerance (float): Relative to the largest output.

    Returns:
        int: How many layers were compared.

    Raises:
        SetupError: If one differs; names it.
    """
    parts = dict(stock.eval().named_modules())
    generator = torch.Generator().manual_seed(0)
    count = 0
    for name, module in model.eval().named_modules():
        if isinstance(module, SmallBatchNorm):
            shape = (2, module.num_features, 5, 5)
        elif isinstance(module, CenConv2d):
            side = max(d * (k - 1) + 3 for d, k in zip(module.dilation,
                                                       module.kernel_size))
            shape = (2, module.in_channels, side, side)
        else:
            continue
        x = torch.randn(shape, generator=generator)
        x = x.to(module.weight if module.weight is not None else
                 module.running_var)
        error = difference(parts[name](x), module(x))
        if error > tolerance:
            raise SetupError(
                f'{type(module).__name__} {name!r} and what stands for it '
                f'differ by {error:.1e} of the largest output')
        count += 1
    return count


def to_stock(cfg: Config, state: Dict[str, Tensor],
             example_weight: Optional[float] = None
             ) -> Tuple[Config, Dict[str, Tensor], List[str]]:
    """Config and state dict of a stock model that does the same.

    Args:
        cfg (Config): Of the trained model.
        state (dict[str, Tensor]): Its state dict.
        example_weight (float, optional): Set on this package's norms before;
            0 for a BGN that is to be evaluated as an affine map. None: as
            built.

    Returns:
        tuple: Config, state dict, and a line for each change.

    Raises:
        SetupError: If something cannot be converted, does not load, or is
            not the same afterwards.
    """
    stock_cfg, changes = stock_config(cfg)
    if not changes:
        raise SetupError('there is nothing to convert: the config has no norm '
                         f'or convolution of {_PACKAGE}')
    model = MODELS.build(copy.deepcopy(cfg.model))
    load_strictly(model, state, "the checkpoint does not fit the config's "
                  'model')
    if example_weight is not None:
        for module in model.modules():
            if isinstance(module, SmallBatchNorm):
                module.example_weight = example_weight
    converted = stock_state(model)
    stock = MODELS.build(copy.deepcopy(stock_cfg.model))
    load_strictly(stock, converted, 'what was converted does not fit the '
                  "stock config's model")
    left = [
        name for name, module in stock.named_modules()
        if _is_of_package(type(module).__module__)
    ]
    if left:
        raise SetupError(f'{left[0]} of the stock model is still a '
                         f'{_PACKAGE} layer: its model builds it by itself')
    count = check_same(model, stock)
    changes.append(f'{count} layers compared on random maps: the same')
    return stock_cfg, converted, changes
