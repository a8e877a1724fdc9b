"""What norm each part of a model really carries, as a table to read."""
import io
from itertools import groupby
from typing import Any, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from mmcv.cnn import is_norm
from mmengine.registry import MODELS
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from .hooks import BurnInHook, kept_asleep
from .layers import BRN, MABN, CenConv2d, SmallBatchNorm, is_under

_COLUMNS = ('part', 'norms', 'kind', 'after', 'mode', 'scale, shift',
            'statistics in training', 'burn-in', 'at inference')
_RUNNING = 'running averages'
_OWN = "each example's own"


class Norm(NamedTuple):
    """A norm, and what it does, in words.

    Attributes:
        name (str): The module's name in the model.
        kind (str): Its class, by the name that configs give it.
        after (str): The convolution beside it, likewise; ``'-'`` if none.
        mode (str): ``'train'`` or ``'eval'``, in a training step.
        affine (str): ``'trained'``, ``'frozen'`` or ``'none'``.
        statistics (str): What it normalises with in a training step.
        burn_in (str): Length of its burn-in.
        inference (str): What it normalises with in evaluation.
    """
    name: str
    kind: str
    after: str
    mode: str
    affine: str
    statistics: str
    burn_in: str
    inference: str


def norm_types(node: Any, path: str) -> Iterator[Tuple[str, str]]:
    """Path and type of every ``norm_cfg`` in a part of a config."""
    if isinstance(node, (list, tuple)):
        node = dict(enumerate(node))
    if isinstance(node, dict):
        if path.endswith('norm_cfg') and isinstance(node.get('type'), str):
            yield path, node['type']
        for key, value in node.items():
            yield from norm_types(value, f'{path}.{key}')


def describe_norms(model: nn.Module,
                   images: Optional[int] = None,
                   processes: Optional[int] = None,
                   hooks: Sequence[Any] = ()) -> List[Norm]:
    """Describe every norm of a model in training.

    Args:
        model (nn.Module): Is set to training mode, as a training loop does.
        images (int, optional): Images a GPU. None: unknown.
        processes (int, optional): GPUs. None: unknown.
        hooks (Sequence[Hook]): The training's hooks.

    Returns:
        list[Norm]: In the order of the model.
    """
    model.train()
    burn_ins = [hook for hook in hooks if isinstance(hook, BurnInHook)]
    found = []
    for parent_name, parent in model.named_modules():
        convolution = '-'
        for child_name, module in parent.named_children():
            if isinstance(module, _ConvNd):
                convolution = _registered(module)
            if not is_norm(module):
                continue
            name = f'{parent_name}.{child_name}'.lstrip('.')
            found.append(
                Norm(name, _registered(module), convolution,
                     'train' if module.training else 'eval', _affine(module),
                     _statistics(module, _batch(name, images), processes),
                     _burn_in(name, module, burn_ins), _inference(module)))
            convolution = '-'
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(found, key=lambda norm: order[norm.name])


def _registered(module: nn.Module) -> str:
    """The name that a config gives a module's class."""
    names = [
        key for key, cls in MODELS.module_dict.items() if cls is type(module)
    ]
    return names[0] if names else type(module).__name__


def _affine(norm: nn.Module) -> str:
    parameters = list(norm.parameters(recurse=False))
    if not parameters:
        return 'none'
    return 'trained' if any(p.requires_grad for p in parameters) else 'frozen'


class _Batch(NamedTuple):
    """Images a GPU, and whether examples are regions of them."""
    images: Optional[int]
    regions: bool


def _batch(name: str, images: Optional[int]) -> _Batch:
    return _Batch(images, 'roi_head' in name.split('.'))


def _statistics(norm: nn.Module, batch: _Batch,
                processes: Optional[int]) -> str:
    if isinstance(norm, _BatchNorm) and not norm.training and (
            norm.running_mean is not None):
        own = _inference(norm)
        return f'{own}, fixed' if own == _RUNNING else own
    if isinstance(norm, SmallBatchNorm):
        return _small_batch_statistics(norm, batch, processes)
    if isinstance(norm, nn.SyncBatchNorm):
        return _of_processes(_examples(batch), processes)
    if isinstance(norm, _BatchNorm):
        return _examples(batch)
    return _of_one_example(norm)


def _examples(batch: _Batch) -> str:
    images = _count(batch.images or 'all', 'image')
    return f'regions of {images}' if batch.regions else images


def _of_processes(examples: str, processes: Optional[int]) -> str:
    if processes is None:
        return f'{examples} x all GPUs'
    return f'{examples} x {_count(processes, "GPU")}'


def _count(number: Any, unit: str) -> str:
    return f'{number} {unit}{"" if number == 1 else "s"}'


def _small_batch_statistics(norm: SmallBatchNorm, batch: _Batch,
                            processes: Optional[int]) -> str:
    group = getattr(norm, 'examples_per_group', None)
    if group is None:
        text = _examples(batch)
        if norm.sync:
            text = _of_processes(text, processes)
    else:
        unit = 'region' if batch.regions else 'image'
        text = f'groups of {_count(group, unit)}'
        if norm.sync:
            text += ', of all GPUs'
    groups = norm.num_groups
    if groups is not None and groups != norm.num_features:
        text += f', {_count(groups, "group")} of channels'
    iterations = norm.averaged_iterations
    if isinstance(norm, MABN):
        kinds = (norm.forward_statistics, norm.backward_statistics)
        text = f'{text}, {kinds[0]} forward, {kinds[1]} backward'
        if iterations > 1:
            text = f'{iterations} iterations x {text}'
    elif iterations > 1:
        text = f'{iterations} iterations x {text}'
        if batch.images and not batch.regions and not norm.sync:
            text += f' = {iterations * batch.images}'
    if isinstance(norm, BRN):
        text += f', moved to the {_RUNNING}'
    return text


def _of_one_example(norm: nn.Module) -> str:
    if isinstance(norm, nn.GroupNorm):
        return f'1 example, {_count(norm.num_groups, "group")} of channels'
    if isinstance(norm, _InstanceNorm):
        return '1 example'
    if isinstance(norm, nn.LayerNorm):
        return '1 position'
    return '-'


def _burn_in(name: str, norm: nn.Module, hooks: Sequence[BurnInHook]) -> str:
    if not getattr(norm, 'burns_in', False) or not norm.training:
        return '-'
    lengths = [
        f'{hook.length} {hook.unit}' for hook in hooks
        if hook.covers(name) and hook.length
    ]
    return ' and '.join(lengths) or 'none'


def _inference(norm: nn.Module) -> str:
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None:
        return _OWN
    weight = getattr(norm, 'example_weight', 0)
    if weight == 0:
        return _RUNNING
    return _OWN if weight == 1 else f'{_RUNNING}, {weight:g} of {_OWN}'


def notes(model: nn.Module,
          norms: Sequence[Norm],
          hooks: Sequence[Any] = (),
          model_cfg: Optional[dict] = None) -> List[str]:
    """What looks unintended.

    Args:
        model (nn.Module): The model.
        norms (Sequence[Norm]): What :func:`describe_norms` found in it.
        hooks (Sequence[Hook]): The training's hooks.
        model_cfg (dict, optional): The config that the model was built from.

    Returns:
        list[str]: A sentence each.
    """
    modules = dict(model.named_modules())
    said = []
    asleep = kept_asleep({
        n.name: modules[n.name]
        for n in norms if isinstance(modules[n.name], SmallBatchNorm)
    })
    if asleep:
        said.append(
            f'{_count(len(asleep), "norm")}, {asleep[0]} the first of them, '
            'would train but stay in evaluation mode: set norm_eval=False in '
            'the backbone')
    uncentred = [
        n.name for n in norms
        if isinstance(modules[n.name], MABN) and not modules[n.name].centered
        and n.after not in ('-', CenConv2d.__name__)
    ]
    if uncentred:
        said.append(
            f'{_count(len(uncentred), "MABN layer")}, {uncentred[0]} the '
            'first of them, without centred weights before it: give the part '
            "conv_cfg=dict(type='CenConv')")
    if any(n.burn_in == 'none' for n in norms) and not any(
            isinstance(hook, BurnInHook) for hook in hooks):
        said.append(
            'there is no BurnInHook in custom_hooks: past iterations count '
            'from the first, and norms cannot tell two calls of an iteration '
            'from two iterations')
    for path, kind in norm_types(model_cfg, 'model'):
        part = '.'.join(path.split('.')[1:-1])
        if part in modules and not any(is_under(n.name, part) for n in norms):
            said.append(
                f'{path} asks for {kind}, but {type(modules[part]).__name__} '
                'has no norm: it takes none, or has no convolutions to put '
                'one behind (for a box head, Shared4Conv1FCBBoxHead has)')
    return said


def _rows(norms: Sequence[Norm]) -> Iterator[Tuple[str, int, Norm]]:
    """Label, number and first of the norms of a part that are alike."""

    def part(norm: Norm) -> str:
        names = norm.name.split('.')
        return '.'.join(names[:2 if names[0] == 'roi_head' else 1])

    for name, group in groupby(norms, part):
        members = list(group)
        alike: dict = {}
        for norm in members:
            alike.setdefault(norm[1:], []).append(norm)
        for same in alike.values():
            label = name
            if len(alike) > 1:
                inner = dict.fromkeys(
                    n.name[len(name) + 1:].split('.')[0] for n in same)
                label = f'{name}.{", ".join(inner)}'.rstrip('.')
            yield label, len(same), same[0]


def norm_table(norms: Sequence[Norm], each: bool = False) -> str:
    """A table of norms, those of a part that are alike in one row.

    Args:
        norms (Sequence[Norm]): What :func:`describe_norms` found.
        each (bool): A row for each norm.

    Returns:
        str: Lines of text.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in _COLUMNS:
        table.add_column(
            column,
            no_wrap=True,
            justify='right' if column == 'norms' else 'left')
    rows = ((norm.name, 1, norm) for norm in norms) if each else _rows(norms)
    for label, count, norm in rows:
        table.add_row(label, str(count), *norm[1:])
    text = io.StringIO()
    Console(file=text, width=1000, color_system=None).print(
        table, highlight=False)
    lines = text.getvalue().splitlines()
    return '\n'.join(line.rstrip() for line in lines)


def norm_summary(model: nn.Module,
                 images: Optional[int] = None,
                 processes: Optional[int] = None,
                 hooks: Sequence[Any] = (),
                 model_cfg: Optional[dict] = None,
                 each: bool = False) -> str:
    """The table, the parts without a norm, and what looks unintended.

    Arguments are those of :func:`describe_norms`, :func:`notes` and
    :func:`norm_table`.
    """
    norms = describe_norms(model, images, processes, hooks)
    lines = [norm_table(norms, each) if norms else 'no norms']
    bare = _parts_without(model, norms)
    if norms and bare:
        lines.append(f'No norm in {", ".join(bare)}.')
    lines += [
        f'Note: {note}.' for note in notes(model, norms, hooks, model_cfg)
    ]
    return '\n'.join(lines)


def _parts_without(model: nn.Module, norms: Sequence[Norm]) -> List[str]:
    parts = []
    for name, module in model.named_children():
        children = [(f'{name}.{n}', m) for n, m in module.named_children()]
        inner = children if name == 'roi_head' else [(name, module)]
        parts += [
            n for n, m in inner
            if any(isinstance(layer, _ConvNd) for layer in m.modules())
            and not any(is_under(norm.name, n) for norm in norms)
        ]
    return parts
