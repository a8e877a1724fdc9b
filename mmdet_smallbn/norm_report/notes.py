"""Notes about settings of norms that look like mistakes."""
from typing import Any, Iterator, List, Optional, Sequence, Tuple

from torch import nn

from ..hooks import SmallBatchNormHook, asleep_note, kept_asleep
from ..layers import CBN, MABN, CenConv2d, SmallBatchNorm, is_under
from ..words import counted
from .describe import UNKNOWN, Norm

# A longer window never helped, in the paper or in our measurements.
_LONGEST_WINDOW = 16


def norm_cfgs(node: Any, path: str,
              kind: str = 'norm_cfg') -> Iterator[Tuple[str, dict]]:
    """Yield path and value of every ``norm_cfg`` in a part of a config.

    With ``kind='conv_cfg'``, yield every ``conv_cfg`` instead.
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
    """List settings that look like mistakes.

    Args:
        model (nn.Module): The model.
        norms (Sequence[Norm]): Its norms, from :func:`describe_norms`.
        hooks (Sequence[Hook]): Hooks of the training.
        cfg (dict, optional): The whole config.

    Returns:
        list[str]: One text per finding, without the final full stop.
    """
    modules = dict(model.named_modules())
    return [
        *_asleep(modules, norms),
        *_uncentred(modules, norms),
        *_without_convolution(modules, norms),
        *_without_hook(norms, hooks),
        *_too_long(modules, norms),
        *_ignored(modules, norms, (cfg or {}).get('model')),
        *_unused(cfg or {}),
    ]


def _count_and_first(names: Sequence[str], kind: str) -> str:
    return f'{counted(len(names), kind)} (first: {names[0]})'


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
        yield ('the convolution before '
               f'{_count_and_first(names, "MABN layer")} does not centre its '
               "weights. Set conv_cfg=dict(type='CenConv') in this part of "
               'the model')


def _without_convolution(modules, norms) -> Iterator[str]:
    names = [
        n.name for n in norms
        if isinstance(modules[n.name], CBN) and modules[n.name].compensate
        and n.mode == 'train' and modules[n.name].window_size > 1
        and n.after == UNKNOWN
    ]
    if names:
        yield (f'no convolution found before '
               f'{_count_and_first(names, "CBN layer")}. After any other '
               'operation (sum, concatenation, pooling) CBN works as '
               'BatchNorm and warns in the first iteration after burn-in. '
               "type='NaiveCBN' needs no convolution")


def _without_hook(norms, hooks) -> Iterator[str]:
    if any(isinstance(hook, SmallBatchNormHook) for hook in hooks):
        return
    if any(n.burn_in == 'none' for n in norms):
        yield ('there is no BurnInHook in custom_hooks. The norms then use '
               'past iterations from the first iteration on, and count two '
               'calls in one iteration as two iterations')
    if any(n.kind == 'CmBN' and n.mode == 'train' for n in norms):
        yield ('there is no SmallBatchNormHook in custom_hooks. CmBN then '
               'notices an optimizer step only by the change of its own '
               'scale, and counts two calls in one iteration as two batches '
               'of the step')


def _ignored(modules, norms, model_cfg) -> Iterator[str]:
    """Find norms that a config asks for but a part does not build."""
    for path, cfg in norm_cfgs(model_cfg, 'model'):
        part = '.'.join(path.split('.')[1:-1])
        if part in modules and not any(is_under(n.name, part) for n in norms):
            yield (f'{path} asks for {_name(cfg["type"])}, but '
                   f'{type(modules[part]).__name__} has no norm. It does not '
                   'support norms, or it has no convolution. Among the box '
                   'heads, Shared4Conv1FCBBoxHead has convolutions')


def _too_long(modules, norms) -> Iterator[str]:
    names = [
        n.name for n in norms if isinstance(modules[n.name], CBN)
        and modules[n.name].window_size > _LONGEST_WINDOW
    ]
    if names:
        yield (f'window_size={modules[names[0]].window_size} in '
               f'{_count_and_first(names, "CBN layer")} is too large: no '
               f'window above {_LONGEST_WINDOW} has helped so far. The CBN '
               'paper suggests min(16 / images, 8)')


def _unused(cfg) -> Iterator[str]:
    """Find a top-level norm_cfg or conv_cfg that no part of the model uses."""
    for kind in ('norm_cfg', 'conv_cfg'):
        top = cfg.get(kind)
        if not isinstance(top, dict) or top.get('type') is None:
            continue
        used = {_name(found['type'])
                for _, found in norm_cfgs(cfg.get('model'), 'model', kind)}
        if _name(top['type']) not in used:
            yield (f'{kind} at the top of the config asks for '
                   f'{_name(top["type"])}, but no part of the model uses it. '
                   'A top-level name alone changes nothing. Pass it to the '
                   f'parts, for example model=dict(neck=dict({kind}={kind}))')


def _name(kind: Any) -> str:
    return getattr(kind, '__name__', kind)
