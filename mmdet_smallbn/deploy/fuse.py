"""Folding of norms into the convolutions before them."""
import warnings
from collections import defaultdict
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Set, Tuple

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from ..errors import SetupError
from ..layers import is_batch_norm
from ..layers.cen_conv import CenConv2d, effective_weight
from ..layers.conv_call import remember_call
from .difference import difference
from .example_run import Inputs, copies, example_run
from .statistics import fixed_statistics

# Largest allowed difference between a folded convolution and the original
# pair, relative to the largest output of a channel.
_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 0.02,
    torch.bfloat16: 0.1
}


def fuse_norm(model: nn.Module,
              inputs: Optional[Inputs] = None,
              strict: bool = True) -> nn.Module:
    r"""Fold the batch norms of a model into its convolutions, in place.

    In evaluation such a norm is an affine map of each channel. The
    convolution before it can include this map:

    .. math::
        w'_c = \frac{\gamma_c}{\sqrt{\sigma_c^2 + \epsilon}}\, w_c, \qquad
        b'_c = (b_c - \mu_c)\,\frac{\gamma_c}{\sqrt{\sigma_c^2 + \epsilon}}
            + \beta_c.

    The function folds CBN, MABN, BRN, stock BatchNorm and SyncBatchNorm, and
    BGN and GhostBN with an example weight of 0. It centres the filters of
    CenConv2d permanently. The result has plain convolutions with a bias, and
    ``nn.Identity`` in place of the norms. GroupNorm stays.

    A forward pass shows which convolution is before which norm; the order of
    attributes does not matter. A norm is folded only if all its inputs are
    outputs of one convolution, and nothing else uses these outputs. The
    function compares each folded convolution with the original pair. It also
    compares the output of the whole model, unless the model has a RoI head.

    Args:
        model (nn.Module): A detector or a part of one, with trained norms. It
            is set to evaluation mode.
        inputs (Tensor | Sequence, optional): Inputs for a forward pass that
            reaches all norms. None: a random image; see :func:`example_run`.
        strict (bool): Raise an error if a norm cannot be folded. False: this
            norm stays, and a warning gives the reason.

    Returns:
        nn.Module: The model.

    Raises:
        SetupError: If the model cannot run on the inputs, or if a norm cannot
            be folded. The reasons are: it does not follow a convolution; it
            shares the convolution with another norm or layer; the convolution
            computes its weight (weight standardisation) or is deformable; the
            forward pass does not reach the norm; the norm normalises each
            image with its own statistics. The model does not change then.

    Example:
        >>> model = init_detector(config, checkpoint, device='cpu')
        >>> fuse_norm(model)
    """
    modes = {module: module.training for module in model.modules()}
    try:
        _fuse(model, example_run(model, inputs), strict)
    except BaseException:
        for module, training in modes.items():
            module.training = training
        raise
    return model


def _fuse(model: nn.Module, run: Callable[[], Any], strict: bool) -> None:
    watch = _Watch(model)
    before = watch.look(run)
    new: Dict[nn.Module, nn.Module] = {}
    reasons: List[str] = []
    for name, norm in watch.norms.items():
        try:
            conv_name = watch.conv_before(name)
            conv = watch.convs[conv_name]
            folded = _fold(name, norm, conv, conv_name)
            watch.check(name, folded)
        except SetupError as error:
            reasons.append(str(error))
        else:
            new.update({conv: folded, norm: nn.Identity()})
    if reasons:
        told = '; '.join(reasons)
        if strict:
            raise SetupError(f'{told}. fuse_norm(model, strict=False) folds '
                             f'the other {len(new) // 2} norms')
        warnings.warn(f'not folded: {told}')
    _replace(model, new)
    if getattr(model, 'with_roi_head', False):
        return  # the order of regions with equal scores may change
    try:
        _compare_all(before, run())
    except Exception:
        _replace(model, {module: old for old, module in new.items()})
        raise


def _compare_all(before: Any, after: Any) -> None:
    """Compare the outputs of the whole model before and after folding.

    This finds operations that the watch cannot see, such as those of scripted
    functions, or of modules that are not registered.

    Raises:
        SetupError: If the outputs differ.
    """
    for old, new in zip(*(tree_flatten(v)[0] for v in (before, after))):
        if not isinstance(old, Tensor) or not old.is_floating_point():
            continue
        # Rounding errors add up over the layers.
        if difference(new, old) > 10 * _TOLERANCE[old.dtype]:
            raise SetupError(
                'the folded model has another output, although each folded '
                'convolution has the same. Its forward pass uses a '
                'convolution or norm in a way that cannot be traced. The '
                'model was not changed')


# Functions that do not read the values of a tensor.
_HARMLESS = ('__get__', 'size', 'dim', 'ndimension', 'numel', 'stride',
             'is_contiguous', 'is_floating_point', 'is_complex',
             'element_size', '__len__', 'get_device')


class _Made(NamedTuple):
    """Output of a convolution.

    It is kept alive so that no other tensor gets the same id.
    """
    out: Tensor
    conv: str
    x: Optional[Tensor]  # the input; None: there were further arguments


class _Watch(TorchFunctionMode):
    """Recorder of which operations use the outputs of convolutions.

    Args:
        model (nn.Module): The model to record.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.norms: Dict[str, nn.Module] = {}
        self.convs: Dict[str, nn.Module] = {}
        for name, module in model.named_modules():
            if is_batch_norm(module):
                self.norms[name] = module
            elif _is_conv(module):
                self.convs[name] = module
        self._watched = {**self.norms, **self.convs}
        self._made: Dict[int, _Made] = {}
        # Names of the modules, by id of their parameters and buffers.
        self._owners: Dict[int, str] = {
            id(tensor): name
            for name, module in self._watched.items()
            for tensor in (*module.parameters(), *module.buffers())
        }
        # Modules whose own hooks or forward would be lost. remember_call, a
        # remainder of the training loop, is not needed any more.
        self._hooked = {
            name
            for name, module in self._watched.items()
            if any(hook is not remember_call
                   for hook in module._forward_hooks.values())
            or module._forward_pre_hooks or 'forward' in vars(module)
        }
        self._inside: List[str] = []
        self._before: Dict[str, Set[Optional[str]]] = defaultdict(set)
        self._others: Dict[str, Set[str]] = defaultdict(set)
        self._calls: Dict[str, int] = defaultdict(int)
        # By norm: input of the convolution before it, output of the norm.
        self._passes: Dict[str, Tuple[Tensor, Tensor]] = {}

    def look(self, run: Callable[[], Any]) -> Any:
        """Record one forward pass, and return a copy of its output."""
        handles = []
        for name, module in self._watched.items():
            after = self._after_norm if name in self.norms else (
                self._after_conv)
            handles += [
                module.register_forward_pre_hook(self._enter(name)),
                module.register_forward_hook(after(name), with_kwargs=True)
            ]
        try:
            with self:
                result = run()
            for leaf in tree_flatten(result)[0]:
                if id(leaf) in self._made:
                    self._others[self._made[id(leaf)].conv].add('the caller')
            return copies(result)
        finally:
            for handle in handles:
                handle.remove()
            self._made.clear()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        used = getattr(func, '__name__', str(func))
        if used in _HARMLESS and not isinstance(result, Tensor):
            return result
        inside = self._inside[-1] if self._inside else None
        for leaf in tree_flatten((args, kwargs))[0]:
            if inside not in self.norms and id(leaf) in self._made:
                self._others[self._made[id(leaf)].conv].add(used)
            owner = self._owners.get(id(leaf))
            # Within its own call a module may use its parameters.
            if owner is not None and owner != inside and not any(
                    name.startswith(f'{owner}.') for name in self._inside):
                self._others[owner].add(f'{used} (its weight)')
        return result

    def _enter(self, name: str):

        def hook(module, inputs) -> None:
            self._inside.append(name)

        return hook

    def _after_conv(self, name: str):

        def hook(conv, inputs, kwargs, out) -> None:
            self._inside.pop()
            self._calls[name] += 1
            if isinstance(out, Tensor):
                # A later operation may change the input in place.
                x = None if kwargs or len(inputs) != 1 else inputs[0].clone()
                self._made[id(out)] = _Made(out, name, x)

        return hook

    def _after_norm(self, name: str):

        def hook(norm, inputs, kwargs, out) -> None:
            self._inside.pop()
            given = inputs[0] if inputs else kwargs.get('input')
            made = self._made.get(id(given))
            self._before[name].add(made and made.conv)
            if made is not None:
                self._calls[made.conv] -= 1
                self._others[made.conv].add(name)
                if made.x is None:
                    self._others[made.conv].add(
                        'a call with further arguments')
                elif made.x.numel():
                    self._passes[name] = made.x, out.clone()

        return hook

    def conv_before(self, name: str) -> str:
        """Return the name of the convolution that a norm can be folded into.

        Raises:
            SetupError: If there is none.
        """
        who = f'{type(self.norms[name]).__name__} {name!r}'
        before = self._before.get(name)
        if before is None:
            raise SetupError(
                f'{who} was not reached by the forward pass. Give fuse_norm '
                'inputs that reach it')
        if before == {None}:
            raise SetupError(f'{who} follows no convolution')
        if len(before) > 1:
            raise SetupError(
                f'{who} follows more than one operation ('
                f'{", ".join(sorted(map(str, before)))}), so it cannot be '
                'folded')
        conv, = before
        others = self._others[conv] | self._others[name]
        others -= {name}
        if others:
            raise SetupError(
                f'{who} follows {conv!r}, whose output or weight is also used '
                f'by {", ".join(sorted(others))}')
        if self._calls[conv]:
            raise SetupError(f'{who} and {conv!r} before it were not called '
                             'equally often')
        hooked = self._hooked & {name, conv}
        if hooked:
            raise SetupError(f'{who} follows {conv!r}, and {hooked.pop()!r} '
                             'has a hook or a forward of its own, which '
                             'folding would remove')
        if name not in self._passes:
            raise SetupError(f'{who} received only empty inputs. Give '
                             'fuse_norm inputs with values for it')
        return conv

    def check(self, name: str, folded: nn.Module) -> None:
        """Compare a folded convolution with the original pair.

        Raises:
            SetupError: If their outputs differ.
        """
        x, out = self._passes[name]
        with torch.no_grad():
            error = difference(folded(x), out, by_channel=True)
        if error <= _TOLERANCE[x.dtype]:
            return
        raise SetupError(
            f'{type(self.norms[name]).__name__} {name!r} after its '
            'convolution and the folded convolution have different outputs')


def _is_conv(module: nn.Module) -> bool:
    """Return True for a convolution, also for kinds that cannot be folded."""
    weight = getattr(module, 'weight', None)
    return isinstance(weight, Tensor) and weight.dim() == 4


def _fold(name: str, norm: nn.Module, conv: nn.Module,
          conv_name: str) -> nn.Module:
    who = f'{type(norm).__name__} {name!r}'
    mean, var = fixed_statistics(name, norm)
    if not _is_plain(conv):
        raise SetupError(
            f'{who} follows {conv_name!r}, a {type(conv).__name__}. It does '
            'more than a convolution with its weight, so a scaled weight does '
            'not scale its output')
    with torch.no_grad():
        scale = torch.rsqrt(var + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        weight = effective_weight(conv).double()
        bias = 0. if conv.bias is None else conv.bias.double()
        bias = (bias - mean) * scale
        if norm.bias is not None:
            bias = bias + norm.bias.double()
        shape = (-1, 1, 1, 1)
        if isinstance(conv, nn.ConvTranspose2d):
            # The weight is (C_in, C / groups, kh, kw): each input channel
            # needs the scales of its group's output channels.
            scale = scale.view(conv.groups, -1).repeat_interleave(
                conv.in_channels // conv.groups, 0)
            shape = (*scale.shape, 1, 1)
        return _plain(conv, weight * scale.view(shape), bias)


def _is_plain(conv: nn.Module) -> bool:
    if 'weight' not in conv._parameters:  # computed, as by weight norm
        return False
    kind = type(conv)
    stock = nn.ConvTranspose2d if isinstance(
        conv, nn.ConvTranspose2d) else nn.Conv2d
    if kind in (stock, CenConv2d):
        return True
    # mmcv's subclasses differ only for empty inputs in old versions of torch.
    return issubclass(kind, stock) and (
        kind.__module__ == 'mmcv.cnn.bricks.wrappers')


def _plain(conv: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    """Return a stock convolution with the settings of ``conv``."""
    kind, settings = nn.Conv2d, {}
    if isinstance(conv, nn.ConvTranspose2d):
        kind = nn.ConvTranspose2d
        settings = dict(output_padding=conv.output_padding)
    plain = skip_init(
        kind,
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        padding_mode=conv.padding_mode,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
        **settings)
    plain.weight.copy_(weight)
    plain.bias.copy_(bias)
    plain.requires_grad_(conv.weight.requires_grad)
    return plain.train(conv.training)


def _replace(model: nn.Module, new: Dict[nn.Module, nn.Module]) -> None:
    """Replace modules in all places where the model registers them."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]
