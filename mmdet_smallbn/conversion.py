"""Conversion of a model's BatchNorms into norms of this package."""
from typing import (Any, Dict, NamedTuple, Optional, Sequence, Set, Tuple,
                    Union)

from mmengine.registry import MODELS
from mmengine.utils.dl_utils import is_norm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from .deploy.example_run import Inputs, example_run
from .errors import SetupError, did_you_mean
from .layers import CenConv2d, SmallBatchNorm, check_settings, is_under
from .words import some

# Settings that the BatchNorm's own parameters and buffers determine.
_GIVEN = ('affine', 'track_running_stats', 'device', 'dtype')
# Default of nn.BatchNorm2d. A norm with another default keeps its own.
_MOMENTUM = 0.1

Names = Set[Optional[str]]


class NormConversion(NamedTuple):
    """Result of :func:`convert_norms`; it prints as a table.

    Attributes:
        converted (dict[str, str]): The old and new type of each converted
            module, by name.
        left (dict[str, str]): The reasons for each norm that was not
            converted and each convolution that was not centred, by name.
    """
    converted: Dict[str, str]
    left: Dict[str, str]

    def __str__(self) -> str:
        rows = [*self.converted.items(), *(
            (name, f'left: {reason}') for name, reason in self.left.items())]
        width = max(len(name) for name, _ in rows)
        return '\n'.join(f'{name:{width}}  {text}' for name, text in rows)


def convert_norms(model: nn.Module,
                  norm: str,
                  *,
                  where: Union[str, Sequence[str], None] = None,
                  inputs: Optional[Inputs] = None,
                  **settings: Any) -> NormConversion:
    """Convert the BatchNorms of a model to a norm of this package, in place.

    The modules stay the same objects, and so do their parameters and buffers,
    so existing optimizers and hooks continue to work. Copies of the model,
    such as an average of its weights, are not converted. A converted norm
    keeps its ``eps``, training or evaluation mode, ``requires_grad``, dtype
    and device. It keeps its ``momentum``, unless ``momentum`` is given here
    or the new norm has another default (MABN, BRN, BGN).

    ``nn.BatchNorm2d`` and ``nn.SyncBatchNorm`` are converted; the second gets
    ``sync=True``. Subclasses of them are not converted, because they may do
    more. Before training, the evaluation of CBN, NaiveCBN, CmBN, BRN and
    GhostBN is the same as before the conversion. MABN and BGN change it.

    MABN does not subtract means, so the convolutions before it become
    :class:`CenConv2d`. A forward pass in evaluation mode and without
    gradients finds them, as in :func:`fuse_norm`.

    Args:
        model (nn.Module): The model, or a part of it.
        norm (str): Name of the norm, such as ``'CBN'``.
        where (str | Sequence[str], optional): Names of the modules whose
            norms are converted, such as ``'neck'`` or ``('neck', 'head')``.
            None: the whole model.
        inputs (Tensor | Sequence, optional): Only for MABN: inputs for the
            forward pass, which must reach all of these norms. None: random
            images of 128 x 128 pixels.
        **settings: Arguments of the norm, such as ``window_size=8``.

    Returns:
        NormConversion: The converted modules, and the others with the reason.

    Raises:
        SetupError: If the norm or a setting is unknown or does not fit a
            BatchNorm, if ``where`` or the model holds nothing to convert, or
            if the forward pass fails or does not reach a norm. In each case
            the model is unchanged.

    Example:
        >>> print(convert_norms(model, 'CBN', where='neck', window_size=8))
    """
    cls = _class_of(norm, settings)
    norms, left = _find(model, where)
    new = {name: _new(name, old, cls, settings)
           for name, old in norms.items()}
    before: Dict[str, Names] = {}
    if not next(iter(new.values())).centered:
        before = _convolutions_before(model, norms, inputs)
    elif inputs is not None:
        raise SetupError('inputs are for norms that do not subtract means, '
                         f'such as MABN. {norm} needs none: remove inputs')

    converted = {}
    for name, old in norms.items():
        converted[name] = f'{type(old).__name__} -> {norm}'
        _become(old, new[name])
        # On loading, MABN computes a mean square from BatchNorm's statistics.
        old.load_state_dict(old.state_dict())
        old.layer_name = name
        if None in before.get(name, ()):
            converted[name] += ', whose input does not come from a convolution'
    modules = dict(model.named_modules())
    for name in {name for names in before.values() for name in names} - {None}:
        conv = modules[name]
        if isinstance(conv, CenConv2d):
            continue
        reason = _why_not_centred(conv)
        if reason is None:
            conv.__class__ = CenConv2d
            converted[name] = 'Conv2d -> CenConv2d'
        else:
            left[name] = f'{type(conv).__name__} {reason}'
    return NormConversion(*({name: found[name] for name in modules
                             if name in found} for found in (converted, left)))


def _class_of(norm: str, settings: Dict[str, Any]) -> type:
    known = {
        name: cls
        for name, cls in MODELS.module_dict.items()
        if isinstance(cls, type) and issubclass(cls, SmallBatchNorm)
    }
    if norm not in known:
        raise SetupError(f'{norm!r} is not a known norm. '
                         f'{did_you_mean(str(norm), list(known))}')
    for name in _GIVEN:
        if name in settings:
            raise SetupError(f'{name} cannot be given: each norm keeps that '
                             f'of its BatchNorm. Remove {name}')
    try:
        check_settings(known[norm], settings)
    except ValueError as error:
        raise SetupError(str(error)) from error
    return known[norm]


def _find(model: nn.Module, where: Union[str, Sequence[str], None]
          ) -> Tuple[Dict[str, nn.Module], Dict[str, str]]:
    """Return the norms to convert, and why others are left, by name."""
    norms: Dict[str, nn.Module] = {}
    left: Dict[str, str] = {}
    for name, module in model.named_modules():
        # Frozen norms are not subclasses of torch's norms.
        if is_norm(module) or hasattr(module, 'running_var'):
            reason = _why_left(module)
            if reason is None:
                norms[name] = module
            else:
                left[name] = f'{type(module).__name__} {reason}'
    if where is None:
        if not norms:
            raise SetupError('the model holds no BatchNorm2d to convert'
                             f'{_reasons(left)}')
        return norms, left
    prefixes = (where, ) if isinstance(where, str) else where
    if not isinstance(prefixes, (tuple, list)) or not prefixes:
        raise SetupError('where must be the name of a module or a list of '
                         f'names, but got {where!r}')
    for prefix in prefixes:
        if not any(is_under(name, prefix) for name in norms):
            raise SetupError(
                f'where={prefix!r} holds no BatchNorm2d to convert' +
                (_reasons(_under(left, [prefix])) or '. Parts with one: ' +
                 some(sorted({name.split('.')[0] for name in norms}), 9)))
    return _under(norms, prefixes), _under(left, prefixes)


def _under(named: Dict[str, Any], prefixes: Sequence[str]) -> Dict[str, Any]:
    return {
        name: value
        for name, value in named.items()
        if any(is_under(name, prefix) for prefix in prefixes)
    }


def _reasons(left: Dict[str, str]) -> str:
    if not left:
        return ''
    return f': {some([f"{name!r}: {why}" for name, why in left.items()])}'


def _why_left(norm: nn.Module) -> Optional[str]:
    """Return why a norm is not converted; None if it can be."""
    if isinstance(norm, SmallBatchNorm):
        return 'is of this package already'
    if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm3d)):
        return 'does not take feature maps of shape (N, C, H, W)'
    if isinstance(norm, nn.LazyBatchNorm2d):
        return 'does not know its channels before the first forward pass'
    if type(norm) is nn.SyncBatchNorm and norm.process_group is not None:
        return 'has a process group, but sync=True is for all processes'
    if type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return None
    if is_norm(norm) and not isinstance(norm, _BatchNorm):
        return 'does not depend on the batch'
    return 'is another class, which may compute something else'


def _why_not_centred(conv: nn.Module) -> Optional[str]:
    if type(conv) is not nn.Conv2d:
        return 'is not centred: only nn.Conv2d itself can be'
    if conv.weight[0].numel() == 1:
        return 'has only one weight per filter, which centring would make 0'
    return None


def _new(name: str, old: nn.Module, cls: type,
         settings: Dict[str, Any]) -> SmallBatchNorm:
    """Build the norm that replaces a BatchNorm, with tensors of its own."""
    own = dict(
        eps=old.eps,
        affine=old.affine,
        track_running_stats=old.track_running_stats,
        sync=isinstance(old, nn.SyncBatchNorm))
    try:
        new = cls(old.num_features, **{**own, **settings})
    except (TypeError, ValueError) as error:
        raise SetupError(f'{name!r}: {error}') from error
    if 'momentum' not in settings and new.momentum == _MOMENTUM:
        new.momentum = old.momentum
    return new


def _become(old: nn.Module, new: nn.Module) -> None:
    """Give a module the class and settings of another module."""
    vars(old).pop('process_group', None)
    torchs = vars(nn.Module())  # parameters, buffers, hooks, mode
    vars(old).update({k: v for k, v in vars(new).items() if k not in torchs})
    old.__class__ = type(new)


def _convolutions_before(model: nn.Module, norms: Dict[str, nn.Module],
                         inputs: Optional[Inputs]) -> Dict[str, Names]:
    """Return the names of the convolutions before each norm, by norm.

    A name is None if an input does not come from a convolution.
    """
    names = {module: name for name, module in model.named_modules()}
    found: Dict[str, Names] = {name: set() for name in norms}
    made: Dict[int, tuple] = {}  # it keeps the outputs, so ids stay unique

    def after_convolution(conv, args, out) -> None:
        made[id(out)] = out, out._version, names[conv]

    def before_norm(norm, args, kwargs) -> None:
        x = args[0] if args else kwargs['input']
        _, version, conv = made.get(id(x), (None, None, None))
        # An in-place operation does not change the id, but the version.
        found[names[norm]].add(conv if version == x._version else None)

    handles = [
        *(module.register_forward_hook(after_convolution)
          for module in names if isinstance(module, _ConvNd)),
        *(module.register_forward_pre_hook(before_norm, with_kwargs=True)
          for module in norms.values())
    ]
    modes = {module: module.training for module in names}
    try:
        example_run(model, inputs)()
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    missed = [repr(name) for name, convs in found.items() if not convs]
    if missed:
        raise SetupError(f'{some(missed)} was not reached by the forward '
                         'pass. Give inputs that reach it, or name only other '
                         'parts in where')
    return found
