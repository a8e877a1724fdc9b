"""Record the statistics that norms see in training."""
import json
import math
from collections import defaultdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Union

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import SetupError, did_you_mean
from ..functional import Moments, batch_moments, pool_moments
from ..layers import SmallBatchNorm, check_positive_int, in_backward
from .model import bare_model, gradient_scale


class _Seen(NamedTuple):
    """One batch, or several pooled. Tensors of shape (C,).

    ``gradient`` and ``psi`` are the means of g and of g * y; None if there
    was no backward to the layer's scale.
    """
    moments: Moments
    gradient: Optional[Tensor]
    psi: Optional[Tensor]

    def norms(self) -> Dict[str, float]:
        """L2 norm over the channels of each statistic."""
        named = dict(
            mean=self.moments.mean,
            var=self.moments.var,
            mean_square=self.moments.mean_square(),
            gradient=self.gradient,
            psi=self.psi)
        norms = {k: v.norm().item() for k, v in named.items()
                 if v is not None}
        return {k: v for k, v in norms.items() if math.isfinite(v)}

    def is_finite(self) -> bool:
        """Whether all values are."""
        values = (*self.moments[:2], self.gradient, self.psi)
        return all(v is None or bool(v.isfinite().all()) for v in values)


def _pool(batches: Sequence[_Seen]) -> _Seen:
    """Statistics of the batches as one, as if at the same weights."""
    counts = torch.tensor([[b.moments.count] for b in batches])
    first = batches[0].moments.mean
    weights = counts.to(first) / counts.sum()
    moments = Moments(
        *pool_moments(
            torch.stack([b.moments.mean for b in batches]),
            torch.stack([b.moments.var for b in batches]), weights),
        int(counts.sum()))
    gradients = [
        None if any(getattr(b, key) is None for b in batches) else
        (torch.stack([getattr(b, key) for b in batches]) * weights).sum(0)
        for key in ('gradient', 'psi')
    ]
    return _Seen(moments, *gradients)


@HOOKS.register_module()
class StatisticsHook(Hook):
    r"""Record the statistics of chosen norms, small batch beside large.

    What the MABN paper (arXiv:2001.06838) plots in Fig. 2-4, of any norm with
    a scale: the L2 norms over the channels of

    - ``mean`` :math:`\mu`, ``var`` :math:`\sigma^2` and ``mean_square``
      :math:`\chi^2` of the input,
    - ``gradient`` :math:`g = \text{mean}(\partial L/\partial y)` and ``psi``
      :math:`\Psi = \text{mean}(y\,\partial L/\partial y)` for the normalised
      features y before the affine parameters. They come from the gradients of
      scale and shift, :math:`\Psi = \gamma\,\partial L/\partial\gamma / m`,
      and cost no activation,

    for the batch, for every ``regular`` batches pooled, and for the layer's
    moving averages (``ema_mean`` and ``ema_var``; MABN's ``ema_mean_square``,
    ``sma_mean_square`` and ``sma_psi``). With
    ``optim_wrapper.accumulative_counts=regular`` the batches behind a large
    one are of the same weights, as in the paper; otherwise the weights move a
    little meanwhile. A large batch's g and :math:`\Psi` are averages of its
    batches', each normalised as it was trained. Gradients are those of the
    loss itself, neither scaled nor divided for accumulation. A batch that is
    not finite is in no large one.

    Each rank sees its own batches; the main process records. Values go to
    mmengine's visualisation backends as ``statistics/LAYER/NAME`` and to
    ``statistics.jsonl`` in the log folder, a line for a layer and iteration,
    which ``tools/plot_statistics.py`` draws.

    Example:
        >>> custom_hooks = [
        ...     dict(type='StatisticsHook', layers=['neck.fpn_convs.*.bn'])]

    Args:
        layers (str | Sequence[str]): Names of norms in the model, with
            wildcards as in ``'neck.*.bn'``.
        interval (int): Iterations from one record to the next. Each is a
            pass over the layer's input, and the host waits for it.
        regular (int): Recorded batches in a large batch.

    Raises:
        ValueError: If an argument is out of range.
        SetupError: At the start of training, if a name fits no norm, and
            after the first iteration, if none of the norms trains.
    """

    def __init__(self,
                 layers: Union[str, Sequence[str]],
                 interval: int = 1,
                 regular: int = 16) -> None:
        check_positive_int('StatisticsHook: interval', interval)
        check_positive_int('StatisticsHook: regular', regular)
        self.patterns = [layers] if isinstance(layers, str) else list(layers)
        self.interval = interval
        self.regular = regular
        self._layers: Dict[str, nn.Module] = {}
        self._handles: list = []
        self._moments: Dict[str, List[Moments]] = defaultdict(list)
        self._gradients: Dict[str, Dict[str, Tensor]] = defaultdict(dict)
        self._blocks: Dict[str, List[_Seen]] = defaultdict(list)
        self._active = False
        self._checked = False
        self._scale: Union[float, Tensor] = 1.

    def before_train(self, runner) -> None:
        """Find the layers and listen to them."""
        norms = {
            name: module
            for name, module in bare_model(runner).named_modules()
            if isinstance(module, (_BatchNorm, nn.GroupNorm))
        }
        for pattern in self.patterns:
            found = {n: m for n, m in norms.items() if fnmatch(n, pattern)}
            if not found:
                raise SetupError(
                    f'StatisticsHook: layers={pattern!r} fits no norm of the '
                    f'model. {did_you_mean(pattern, list(norms))}')
            self._layers.update(found)
        for name, layer in self._layers.items():
            self._listen(name, layer)
        self._path = Path(runner.log_dir) / 'statistics.jsonl'

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Forget the last iteration."""
        self._moments.clear()
        self._gradients.clear()
        self._active = runner.iter % self.interval == 0
        if self._active:
            self._scale = gradient_scale(runner)

    def after_train_iter(self, runner, *args, **kwargs) -> None:
        """Write down what was seen in this one."""
        if not self._active:
            return
        self._active = False
        if not self._checked:
            self._check_modes(runner)
        for name, layer in self._layers.items():
            if self._moments[name]:
                self._record(runner, name, layer, self._seen(name))

    def after_train(self, runner) -> None:
        """Leave the layers alone."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._layers.clear()
        self._blocks.clear()

    def _check_modes(self, runner) -> None:
        """Say which layers there is nothing to record of."""
        self._checked = True
        silent = [name for name in self._layers if not self._moments[name]]
        if not silent:
            return
        message = (
            f'StatisticsHook: {len(silent)} of {len(self._layers)} norms, '
            f'{silent[0]!r} the first of them, had no training forward: they '
            'are frozen or kept in evaluation mode (norm_eval), not used, or '
            'run inside activation checkpointing')
        if len(silent) == len(self._layers):
            raise SetupError(message)
        runner.logger.warning(message)

    def _listen(self, name: str, layer: nn.Module) -> None:

        def keep_moments(module, inputs, _):
            x = inputs[0]
            if (self._active and module.training and torch.is_grad_enabled()
                    and not in_backward() and x.numel()):
                self._moments[name].append(batch_moments(x))

        self._handles.append(layer.register_forward_hook(keep_moments))
        for key in ('weight', 'bias'):
            parameter = getattr(layer, key, None)
            if parameter is None or not parameter.requires_grad:
                continue

            def keep_gradient(grad, key=key):
                if self._active:
                    # By the normalised values, at today's scale.
                    grad = grad.detach().float() * layer.weight.detach()
                    held = self._gradients[name].get(key, 0)
                    self._gradients[name][key] = held + grad

            self._handles.append(parameter.register_hook(keep_gradient))

    def _seen(self, name: str) -> _Seen:
        moments = _pool([_Seen(m, None, None)
                         for m in self._moments[name]]).moments
        found, count = self._gradients[name], moments.count * self._scale
        return _Seen(moments, *(found[key] / count if key in found else None
                                for key in ('bias', 'weight')))

    def _record(self, runner, name: str, layer: nn.Module,
                seen: _Seen) -> None:
        row = dict(iter=runner.iter, layer=name, batch=seen.norms())
        block = self._blocks[name]
        if seen.is_finite():
            block.append(seen)
        if len(block) == self.regular:
            row['regular'] = _pool(block).norms()
            block.clear()
        if isinstance(layer, SmallBatchNorm):
            moving = layer.moving_averages()
        else:
            moving = dict(
                ema_mean=getattr(layer, 'running_mean', None),
                ema_var=getattr(layer, 'running_var', None))
        row['moving'] = {
            key: value.norm().item()
            for key, value in moving.items() if value is not None
        }
        if not is_main_process():
            return
        with self._path.open('a') as file:
            file.write(json.dumps(row) + '\n')
        scalars = {
            f'statistics/{name}/{kind}_{key}': value
            for kind in ('batch', 'regular', 'moving')
            for key, value in row.get(kind, {}).items()
        }
        runner.visualizer.add_scalars(scalars, step=runner.iter + 1)
