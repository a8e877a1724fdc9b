"""Config lines that apply an advice."""
from inspect import signature
from typing import Any, Dict, Iterator, List, Optional, Tuple

from mmengine.config import Config
from mmengine.registry import MODELS
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import is_under
from ..norm_report import norm_cfgs
from .advice import Advice
from .diagnosis import Diagnosis

# Hooks that an advice removes or replaces.
_OURS = ('BurnInHook', 'SmallBatchNormHook', 'FreezeStatisticsHook')


def config_lines(advice: Advice, diagnosis: Diagnosis, cfg: Config) -> str:
    """Return lines for a config whose ``_base_`` is the diagnosed config.

    Args:
        advice (Advice): The change.
        diagnosis (Diagnosis): Names the norms that the change affects.
        cfg (Config): The diagnosed config.

    Returns:
        str: Python code; empty if nothing changes. A config cannot change
        norms inside a list of heads. Their changes are a comment with flags
        for ``tools/train.py``.
    """
    if advice.norm_cfg is None and advice.hook is None:
        return ''
    found: Dict[str, Any] = {}
    imports = cfg.get('custom_imports') or {}
    names = imports.get('imports', [])
    names = [names] if isinstance(names, str) else list(names)
    if 'mmdet_smallbn' not in names:
        found['custom_imports'] = dict(
            imports=[*names, 'mmdet_smallbn'], allow_failed_imports=False)
    hooks = [hook for hook in cfg.get('custom_hooks') or []
             if getattr(hook.get('type'), '__name__', hook.get('type'))
             not in _OURS]
    if advice.hook:
        hooks.append(_hook(advice.hook, cfg))
    if hooks != (cfg.get('custom_hooks') or []):
        found['custom_hooks'] = hooks
    flags: List[str] = []
    if advice.norm_cfg:
        model, flags = _norms(advice, diagnosis, cfg)
        if model:
            found['model'] = model
    text = Config(found).pretty_text.strip() if found else ''
    if flags:
        text += f'\n# --cfg-options {" ".join(flags)}'
    return text.strip()


def _norms(advice: Advice, diagnosis: Diagnosis,
           cfg: Config) -> Tuple[Dict[str, Any], List[str]]:
    """Return the changes of the model, and flags for norms inside lists."""
    nested: Dict[str, Any] = {}
    flags = []
    for parts in _places(diagnosis, cfg):
        if any(part.isdigit() for part in parts):
            for key, value in advice.norm_cfg.items():
                flags.append('.'.join(
                    ('model', *parts, 'norm_cfg', key)) + f'={value}')
            if advice.conv_cfg:
                flags.append('.'.join(('model', *parts, 'conv_cfg', 'type')) +
                             f'={advice.conv_cfg["type"]}')
            continue
        node, old = nested, cfg.model
        for part in parts:
            node = node.setdefault(part, {})
            old = old.get(part) or {}
        for key in ('norm_cfg', 'conv_cfg'):
            new = getattr(advice, key)
            if new and _takes(_class_of(old, cfg), key):
                # Without _delete_, settings of the old norm would remain.
                more = dict(_delete_=True) if old.get(key) else {}
                node[key] = dict(**more, **new)
        if old.get('norm_eval'):
            node['norm_eval'] = False
    return nested, flags


def _places(diagnosis: Diagnosis, cfg: Config) -> Iterator[Tuple[str, ...]]:
    """Yield the parts of the model's config that have measured norms."""
    left = [layer.name for layer in diagnosis.layers]
    for path, norm_cfg in norm_cfgs(cfg.model, 'model'):
        parts = tuple(path.split('.')[1:-1])
        if path.endswith('.norm_cfg') and issubclass(
                _class_of(norm_cfg, cfg) or object, _BatchNorm) and any(
                    is_under(name, '.'.join(parts)) for name in left):
            left = [name for name in left
                    if not is_under(name, '.'.join(parts))]
            yield parts
    # Some parts build norms without a norm_cfg in the config.
    found = {}
    for name in left:
        node, parts = cfg.model, []
        for part in name.split('.'):
            if not isinstance(node.get(part), dict) or (
                    'type' not in node[part]):
                break
            node = node[part]
            parts.append(part)
        if parts:
            found[tuple(parts)] = None
    yield from found


def _class_of(part: dict, cfg: Config) -> Optional[type]:
    """Return the class that a part of a config names; None if unknown."""
    kind = part.get('type')
    if isinstance(kind, str):
        scope = cfg.get('default_scope') or 'mmdet'
        with MODELS.switch_scope_and_registry(scope) as registry:
            kind = registry.get(kind)
    return kind


def _takes(kind: Optional[type], key: str) -> bool:
    """Return True if a class accepts an argument, also through **kwargs."""
    if kind is None:
        return True  # building the model reports an unknown class
    parameters = signature(kind.__init__).parameters.values()
    return any(p.name == key or p.kind is p.VAR_KEYWORD for p in parameters)


def _hook(name: str, cfg: Config) -> Dict[str, Any]:
    """Return a hook: burn-in for 10%, or frozen for the last 25%."""
    loop = cfg.get('train_cfg') or {}
    unit = 'epochs' if loop.get('max_epochs') else 'iters'
    length = loop.get(f'max_{unit}') or 0
    part = 0.1 if name == 'BurnInHook' else 0.75
    return dict(type=name, **{unit: max(1, round(part * length))})
