"""Descriptions of the norms in a model, in training and at inference."""
from typing import Any, List, NamedTuple, Optional, Sequence

from mmengine.registry import MODELS
from mmengine.utils.dl_utils import is_norm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd

from ..hooks import BurnInHook, ExampleWeightHook, FreezeStatisticsHook
from ..layers import BRN, MABN, CmBN, SmallBatchNorm, is_under
from ..words import counted

RUNNING = 'running averages'
OWN = "each example's own"
UNKNOWN = '?'
_UNITS = dict(epochs='epoch', iters='iteration')
# mmengine replaces SyncBatchNorm by this class in a single process.
_REVERTED = '_BatchNormXd'
# Parts of a RoI head whose input is whole feature maps, not regions.
_WHOLE_IMAGES = ('semantic_head', 'fused_semantic_head', 'glbctx_head')


class Norm(NamedTuple):
    """Description of a norm in words.

    Attributes:
        name (str): Name of the module in the model.
        kind (str): Class of the norm, by its name in configs.
        after (str): Class of the convolution that is registered before the
            norm in the same module, by its name in configs; ``'?'`` if there
            is none.
        mode (str): ``'train'`` or ``'eval'``: the mode in a training step.
        affine (str): ``'trained'``, ``'frozen'`` or ``'none'``: the state of
            scale and shift.
        statistics (str): Statistics used in a training step.
        burn_in (str): Length of the burn-in.
        inference (str): Statistics used at inference.
    """
    name: str
    kind: str
    after: str
    mode: str
    affine: str
    statistics: str
    burn_in: str
    inference: str


def describe_norms(model: nn.Module,
                   images: Optional[int] = None,
                   processes: Optional[int] = None,
                   hooks: Sequence[Any] = ()) -> List[Norm]:
    """Describe every norm of a model.

    Args:
        model (nn.Module): The model. It is set to training mode, as a
            training loop does.
        images (int, optional): Images per GPU. None: unknown.
        processes (int, optional): Number of GPUs. None: unknown.
        hooks (Sequence[Hook]): Hooks of the training.

    Returns:
        list[Norm]: Norms in the order of the model. A norm that is
        registered in several places is listed once, at the first place.
    """
    model.train()
    before = _convolutions_before(model)
    return [
        Norm(
            name, registered_name(norm), before.get(norm, UNKNOWN),
            'train' if norm.training else 'eval', _affine(norm),
            _statistics(name, norm, images, processes)
            + _later(name, norm, hooks), _burn_in(name, norm, hooks),
            _inference(name, norm, hooks))
        for name, norm in model.named_modules() if is_norm(norm)
    ]


def _convolutions_before(model: nn.Module) -> dict:
    """Map each norm to the kind of the convolution registered before it."""
    found = {}
    for parent in model.modules():
        last = None
        for child in parent.children():
            if is_norm(child):
                if last is not None:
                    found.setdefault(child, registered_name(last))
                last = None
            elif isinstance(child, _ConvNd) or hasattr(
                    child, 'deform_groups'):
                last = child
    return found


def registered_name(module: nn.Module) -> str:
    """Return the name of a module's class in configs."""
    names = [
        key for key, cls in MODELS.module_dict.items() if cls is type(module)
    ]
    if names:
        return names[0]
    name = type(module).__name__
    return 'BN (was SyncBN)' if name == _REVERTED else name


def _affine(norm: nn.Module) -> str:
    parameters = list(norm.parameters(recurse=False))
    if not parameters:
        return 'none'
    return 'trained' if any(p.requires_grad for p in parameters) else 'frozen'


def _keeps_averages(norm: nn.Module) -> bool:
    return isinstance(norm, _NormBase) and norm.running_mean is not None


def _statistics(name: str, norm: nn.Module, images: Optional[int],
                processes: Optional[int]) -> str:
    if not norm.training and _keeps_averages(norm):
        # Hooks that act in validation are ignored: they undo their changes.
        own = _inference(name, norm)
        return f'{own}, fixed' if own == RUNNING else own
    parts = name.split('.')
    regions = 'roi_head' in parts and not set(parts) & set(_WHOLE_IMAGES)
    examples = counted(images or 'all', 'image')
    if regions:
        examples = f'regions of {examples}'
    if isinstance(norm, SmallBatchNorm):
        return _small_batch(norm, examples, images, regions, processes)
    if isinstance(norm, nn.SyncBatchNorm):
        return _over_processes(examples, processes)
    if isinstance(norm, _BatchNorm):
        return examples
    return _of_one_example(norm)


def _later(name: str, norm: nn.Module, hooks: Sequence[Any]) -> str:
    """Describe the statistics after a hook freezes the norm, if one does."""
    if not norm.training or not _keeps_averages(norm):
        return ''
    return ''.join(
        f', from {_UNITS[hook.unit]} {hook.begin} on '
        f'{_inference(name, norm)}' for hook in hooks
        if isinstance(hook, FreezeStatisticsHook) and hook.covers(name))


def _over_processes(examples: str, processes: Optional[int]) -> str:
    if processes is None:
        return f'{examples} x all GPUs'
    return f'{examples} x {counted(processes, "GPU")}'


def _small_batch(norm: SmallBatchNorm, text: str, images: Optional[int],
                 regions: bool, processes: Optional[int]) -> str:
    group = getattr(norm, 'examples_per_group', None)
    if group is not None:
        text = f'groups of {counted(group, "region" if regions else "image")}'
        if norm.sync:
            text += ' over all GPUs'
    elif norm.sync:
        text = _over_processes(text, processes)
    groups = norm.num_groups
    if groups is not None and groups != norm.num_features:
        text += f', {counted(groups, "group")} of channels'
    if isinstance(norm, MABN):
        text += (f', {norm.forward_statistics} forward, '
                 f'{norm.backward_statistics} backward')
    iterations = norm.averaged_iterations
    if iterations > 1:
        text = f'{iterations} iterations x {text}'
        if images and not (regions or norm.sync or isinstance(norm, MABN)):
            text += f' = {iterations * images}'
    if isinstance(norm, CmBN):
        text += ' and the earlier batches of the optimizer step'
    if isinstance(norm, BRN):
        text += f', renormalised to the {RUNNING}'
    return text


def _of_one_example(norm: nn.Module) -> str:
    if isinstance(norm, nn.GroupNorm):
        return f'1 example, {counted(norm.num_groups, "group")} of channels'
    if isinstance(norm, nn.LayerNorm):
        return '1 position'
    return '1 example'


def _burn_in(name: str, norm: nn.Module, hooks: Sequence[Any]) -> str:
    if not getattr(norm, 'burns_in', False) or not norm.training:
        return '-'
    lengths = [
        f'{hook.length} {hook.unit}' for hook in hooks
        if isinstance(hook, BurnInHook) and hook.covers(name) and hook.length
    ]
    return ' and '.join(lengths) or 'none'


def _inference(name: str,
               norm: nn.Module,
               hooks: Sequence[Any] = ()) -> str:
    weight = getattr(norm, 'example_weight', 0.)
    if not _keeps_averages(norm):
        weight = 1.
    if isinstance(norm, (_BatchNorm, nn.GroupNorm)):
        for hook in hooks:
            if isinstance(hook, ExampleWeightHook) and not any(
                    is_under(name, p) for p in hook.excluded):
                weight = hook.weight
    if weight in (0, 1):
        return OWN if weight else RUNNING
    return f'{RUNNING}, {weight:g} of {OWN}'
