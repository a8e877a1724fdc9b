"""Conversion of trained models to stock BatchNorm and convolutions."""
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
# Keys of a norm_cfg that BatchNorm supports, too.
_KEPT = ('eps', 'momentum', 'affine', 'requires_grad', '_scope_')


def stock_config(cfg: Config) -> Tuple[Config, List[str]]:
    """Return a config with stock norms and convolutions.

    Norms of this package become ``dict(type='BN')`` and keep the keys that
    BatchNorm supports, such as ``eps``. Centred convolutions become plain
    convolutions. Hooks and imports of this package are removed.

    Args:
        cfg (Config): Config of the trained model. It does not change.

    Returns:
        tuple: The stock config, and one line per change.

    Raises:
        SetupError: If the config sets an example weight for evaluation, or
            uses another class of this package.
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
            raise SetupError(f'{path}: {kind} is a class of {_PACKAGE} '
                             'without a stock replacement. Remove it')
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
                    f'{cls.__name__} sets the example weight '
                    f'{hook["weight"]} in evaluation, which BatchNorm does '
                    f'not support. Remove it from {key}, and evaluate the '
                    'model without it first')
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
    for key, value in values.items():  # update() would merge dicts
        part[key] = value


@torch.no_grad()
def stock_state(model: nn.Module) -> Dict[str, Tensor]:
    """Return the state dict for a stock model with the same evaluation.

    Its running statistics are those of evaluation: BGN's are averaged over
    groups, MABN's are a mean of 0 and the mean square. Filters of centred
    convolutions are centred.

    Args:
        model (nn.Module): Model with trained norms.

    Raises:
        SetupError: If a norm normalises each image with its own statistics.
            The error names the norm.
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
    """Compare each layer of this package with its stock replacement.

    The comparison runs in evaluation mode on random feature maps.

    Args:
        model, stock (nn.Module): Models with the same structure.
        tolerance (float): Largest difference, relative to the largest output.

    Returns:
        int: Number of compared layers.

    Raises:
        SetupError: If two layers differ. The error names them.
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
                f'{type(module).__name__} {name!r} and its stock replacement '
                f'differ by {error:.1e} of the largest output')
        count += 1
    return count


def to_stock(cfg: Config, state: Dict[str, Tensor],
             example_weight: Optional[float] = None
             ) -> Tuple[Config, Dict[str, Tensor], List[str]]:
    """Convert config and state dict to those of an equal stock model.

    Args:
        cfg (Config): Config of the trained model.
        state (dict[str, Tensor]): State dict of the trained model.
        example_weight (float, optional): Example weight to set on the norms
            of this package before the conversion. 0 makes BGN an affine map.
            None: the weights of the config.

    Returns:
        tuple: Stock config, stock state dict, and one line per change.

    Raises:
        SetupError: If something cannot be converted, if a state dict does not
            fit its model, or if a converted layer gives another output.
    """
    stock_cfg, changes = stock_config(cfg)
    if not changes:
        raise SetupError('there is nothing to convert: the config uses '
                         f'nothing of {_PACKAGE}')
    model = MODELS.build(copy.deepcopy(cfg.model))
    load_strictly(model, state, "the checkpoint does not fit the config's "
                  'model')
    if example_weight is not None:
        for module in model.modules():
            if isinstance(module, SmallBatchNorm):
                module.example_weight = example_weight
    converted = stock_state(model)
    stock = MODELS.build(copy.deepcopy(stock_cfg.model))
    load_strictly(stock, converted, 'the converted state dict does not fit '
                  "the stock config's model")
    left = [
        name for name, module in stock.named_modules()
        if _is_of_package(type(module).__module__)
    ]
    if left:
        raise SetupError(f'{left[0]} of the stock model is still a layer of '
                         f'{_PACKAGE}. The model builds it without an entry '
                         'in the config, so it cannot be converted')
    count = check_same(model, stock)
    changes.append(f'{count} layers compared on random maps: equal')
    return stock_cfg, converted, changes
