"""What looks unintended in a model's norms."""
from typing import Any, Iterator, List, Optional, Sequence, Tuple

from torch import nn

from ..hooks import SmallBatchNormHook, asleep_note, kept_asleep
from ..layers import CBN, MABN, CenConv2d, SmallBatchNorm, is_under
from ..words import counted
from .describe import UNKNOWN, Norm


# No longer window was ever of use, in the paper or in our measurements.
_LONGEST_WINDOW = 16


def norm_cfgs(node: Any, path: str,
              kind: str = 'norm_cfg') -> Iterator[Tuple[str, dict]]:
    """Path and value of every ``norm_cfg`` in a part of a config.

    ``kind='conv_cfg'``: of every ``conv_cfg``.
    """
    if isinstance(node, (list, tuple)):
        node = dict(enumerate(node))
    if isinstance(node, dict):
        if path.endswith(kind) and node.get('type') is not None:
            yield path, node
        for key, value in node.items():
            yield from norm_cfgs(value, f'{path}.{key}', kind)


def notes(model: nn.Module,
          norms: Sequence[Norm],
          hooks: Sequence[Any] = (),
          cfg: Optional[dict] = None) -> List[str]:
    """What looks unintended.

    Args:
        model (nn.Module): The model.
        norms (Sequence[Norm]): What :func:`describe_norms` found in it.
        hooks (Sequence[Hook]): The training's hooks.
        cfg (dict, optional): The whole config.

    Returns:
        list[str]: A sentence each.
    """
    modules = dict(model.named_modules())
    return [
        *_asleep(modules, norms),
        *_uncentred(modules, norms),
        *_not_followed(modules, norms),
        *_without_hook(norms, hooks),
        *_too_long(modules, norms),
        *_ignored(modules, norms, (cfg or {}).get('model')),
        *_unused(cfg or {}),
    ]


def _first_of(names: Sequence[str], kind: str) -> str:
    return f'{counted(len(names), kind)}, {names[0]} the first of them,'


def _asleep(modules, norms) -> Iterator[str]:
    names = kept_asleep({
        n.name: modules[n.name]
        for n in norms if isinstance(modules[n.name], SmallBatchNorm)
    })
    if names:
        yield asleep_note(names)


def _uncentred(modules, norms) -> Iterator[str]:
    names = [
        n.name for n in norms
        if isinstance(modules[n.name], MABN) and not modules[n.name].centered
        and n.after not in (UNKNOWN, CenConv2d.__name__)
    ]
    if names:
        yield (f'{_first_of(names, "MABN layer")} without centred weights '
               "before it: give the part conv_cfg=dict(type='CenConv')")


def _not_followed(modules, norms) -> Iterator[str]:
    names = [
        n.name for n in norms
        if isinstance(modules[n.name], CBN) and modules[n.name].compensate
        and n.mode == 'train' and modules[n.name].window_size > 1
        and n.after == UNKNOWN
    ]
    if names:
        yield (f'{_first_of(names, "CBN layer")} with no convolution before '
               'it that can be seen here. Behind anything else (a sum, a '
               'concatenation, a pooling) it is BatchNorm, and warns in the '
               "first iteration after burn-in: type='NaiveCBN' needs none")


def _without_hook(norms, hooks) -> Iterator[str]:
    if any(isinstance(hook, SmallBatchNormHook) for hook in hooks):
        return
    if any(n.burn_in == 'none' for n in norms):
        yield ('there is no BurnInHook in custom_hooks: past iterations count '
               'from the first, and norms cannot tell two calls of an '
               'iteration from two iterations')
    if any(n.kind == 'CmBN' and n.mode == 'train' for n in norms):
        yield ('there is no SmallBatchNormHook in custom_hooks: CmBN sees the '
               "optimizer's steps by its own scale alone, and cannot tell two "
               'calls of an iteration from two parts of a step')


def _ignored(modules, norms, model_cfg) -> Iterator[str]:
    """Norms that a config asks for and a part does not build."""
    for path, cfg in norm_cfgs(model_cfg, 'model'):
        part = '.'.join(path.split('.')[1:-1])
        if part in modules and not any(is_under(n.name, part) for n in norms):
            yield (f'{path} asks for {_name(cfg["type"])}, but '
                   f'{type(modules[part]).__name__} has no norm: it takes '
                   'none, or has no convolutions to put one behind (for a box '
                   'head, Shared4Conv1FCBBoxHead has)')


def _too_long(modules, norms) -> Iterator[str]:
    names = [
        n.name for n in norms if isinstance(modules[n.name], CBN)
        and modules[n.name].window_size > _LONGEST_WINDOW
    ]
    if names:
        yield (f'{_first_of(names, "CBN layer")} with '
               f'window_size={modules[names[0]].window_size}: no window over '
               f'{_LONGEST_WINDOW} was ever of use. The CBN paper suggests '
               'min(16 / images, 8)')


def _unused(cfg) -> Iterator[str]:
    """What stands at the top of a config and reaches no part of the model."""
    for kind in ('norm_cfg', 'conv_cfg'):
        top = cfg.get(kind)
        if not isinstance(top, dict) or top.get('type') is None:
            continue
        used = {_name(found['type'])
                for _, found in norm_cfgs(cfg.get('model'), 'model', kind)}
        if _name(top['type']) not in used:
            yield (f'{kind} at the top of the config asks for '
                   f'{_name(top["type"])}, but no part of the model has it: '
                   'a name at the top changes nothing by itself. Give it to '
                   f'the parts, as in model=dict(neck=dict({kind}={kind}))')


def _name(kind: Any) -> str:
    return getattr(kind, '__name__', kind)
