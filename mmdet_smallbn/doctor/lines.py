"""What to paste into a config, to take an advice."""
from inspect import signature
from typing import Any, Dict, Iterator, List, Optional, Tuple

from mmengine.config import Config
from mmengine.registry import MODELS
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import is_under
from ..norm_report import norm_cfgs
from .advice import Advice
from .diagnosis import Diagnosis

# Hooks that an advice replaces.
_OURS = ('BurnInHook', 'SmallBatchNormHook', 'FreezeStatisticsHook')


def config_lines(advice: Advice, diagnosis: Diagnosis, cfg: Config) -> str:
    """Lines for a config whose ``_base_`` is the one that was diagnosed.

    Args:
        advice (Advice): What to do.
        diagnosis (Diagnosis): It says which parts have norms that train.
        cfg (Config): The diagnosed config.

    Returns:
        str: Python; empty if nothing changes. Norms inside a list of heads,
        which a config cannot reach, are flags for ``tools/train.py`` in a
        comment.
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
    """The model's entries, and flags for what is in lists."""
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
                # Beside settings of the old kind it would be refused.
                more = dict(_delete_=True) if old.get(key) else {}
                node[key] = dict(**more, **new)
        if old.get('norm_eval'):
            node['norm_eval'] = False
    return nested, flags


def _places(diagnosis: Diagnosis, cfg: Config) -> Iterator[Tuple[str, ...]]:
    """Parts of the model's config with a norm_cfg of watched norms."""
    left = [layer.name for layer in diagnosis.layers]
    for path, norm_cfg in norm_cfgs(cfg.model, 'model'):
        parts = tuple(path.split('.')[1:-1])
        if path.endswith('.norm_cfg') and issubclass(
                _class_of(norm_cfg, cfg) or object, _BatchNorm) and any(
                    is_under(name, '.'.join(parts)) for name in left):
            left = [name for name in left
                    if not is_under(name, '.'.join(parts))]
            yield parts
    # What a part builds without being asked.
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
    """The class that a part of a config names; None if it is unknown."""
    kind = part.get('type')
    if isinstance(kind, str):
        scope = cfg.get('default_scope') or 'mmdet'
        with MODELS.switch_scope_and_registry(scope) as registry:
            kind = registry.get(kind)
    return kind


def _takes(kind: Optional[type], key: str) -> bool:
    """Whether a class has an argument, or passes it on."""
    if kind is None:
        return True  # building it will tell
    parameters = signature(kind.__init__).parameters.values()
    return any(p.name == key or p.kind is p.VAR_KEYWORD for p in parameters)


def _hook(name: str, cfg: Config) -> Dict[str, Any]:
    """A burn-in of a tenth of the training; frozen for its last quarter."""
    loop = cfg.get('train_cfg') or {}
    unit = 'epochs' if loop.get('max_epochs') else 'iters'
    length = loop.get(f'max_{unit}') or 0
    part = 0.1 if name == 'BurnInHook' else 0.75
    return dict(type=name, **{unit: max(1, round(part * length))})
