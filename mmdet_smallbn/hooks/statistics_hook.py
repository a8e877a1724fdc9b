"""Hook that records the statistics of norms in training."""
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
    """Statistics of one batch, or of several pooled, with shape (C,).

    ``gradient`` and ``psi`` are the means of g and of g * y. They are None if
    no gradient reached the layer's shift or scale.
    """
    moments: Moments
    gradient: Optional[Tensor]
    psi: Optional[Tensor]

    def norms(self) -> Dict[str, float]:
        """Return the L2 norm of each statistic over the channels."""
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
        """Return True if all values are finite."""
        values = (*self.moments[:2], self.gradient, self.psi)
        return all(v is None or bool(v.isfinite().all()) for v in values)


def _pool(batches: Sequence[_Seen]) -> _Seen:
    """Pool the statistics of batches as if they had the same weights."""
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
    r"""Hook that records the statistics of chosen norms.

    It records what the MABN paper (arXiv:2001.06838) plots in Fig. 2-4, for
    any norm with a scale: the L2 norms over the channels of

    - ``mean`` :math:`\mu`, ``var`` :math:`\sigma^2` and ``mean_square``
      :math:`\chi^2` of the input,
    - ``gradient`` :math:`g = \text{mean}(\partial L/\partial y)` and ``psi``
      :math:`\Psi = \text{mean}(y\,\partial L/\partial y)` for the normalised
      features y before scale and shift. They are computed from the gradients
      of scale and shift, :math:`\Psi = \gamma\,\partial L/\partial\gamma /
      m`, and need no activation memory.

    It records them for each batch, for ``regular`` batches pooled into a
    large batch, and for the layer's moving averages (``ema_mean`` and
    ``ema_var``; MABN's ``ema_mean_square``, ``sma_mean_square`` and
    ``sma_psi``).

    With ``optim_wrapper.accumulative_counts=regular`` all batches of a large
    batch have the same weights, as in the paper. Otherwise the weights change
    a little in between. g and :math:`\Psi` of a large batch are the averages
    over its batches, and each batch is normalised as in training. Gradients
    are those of the unscaled loss, without the division for gradient
    accumulation. A batch with values that are not finite is left out of the
    large batch.

    Each process sees its own batches, and the main process records. The
    values go to mmengine's visualisation backends as
    ``statistics/LAYER/NAME`` and to ``statistics.jsonl`` in the log folder,
    one line per layer and iteration. ``tools/plot_statistics.py`` draws them.

    Example:
        >>> custom_hooks = [
        ...     dict(type='StatisticsHook', layers=['neck.fpn_convs.*.bn'])]

    Args:
        layers (str | Sequence[str]): Names of norms in the model. Wildcards
            are allowed, as in ``'neck.*.bn'``.
        interval (int): Number of iterations between records. Each record
            reads the layer's input once more, and the host waits for the
            device.
        regular (int): Number of recorded batches in a large batch.

    Raises:
        ValueError: If an argument is out of range.
        SetupError: At the start of training, if a name matches no norm, and
            after the first recorded iteration, if none of the norms trains.
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
        """Find the layers and register hooks on them."""
        norms = {
            name: module
            for name, module in bare_model(runner).named_modules()
            if isinstance(module, (_BatchNorm, nn.GroupNorm))
        }
        for pattern in self.patterns:
            found = {n: m for n, m in norms.items() if fnmatch(n, pattern)}
            if not found:
                raise SetupError(
                    f'StatisticsHook: layers={pattern!r} matches no norm of '
                    f'the model. {did_you_mean(pattern, list(norms))}')
            self._layers.update(found)
        for name, layer in self._layers.items():
            self._listen(name, layer)
        self._path = Path(runner.log_dir) / 'statistics.jsonl'

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Discard the values of the last iteration."""
        self._moments.clear()
        self._gradients.clear()
        self._active = runner.iter % self.interval == 0
        if self._active:
            self._scale = gradient_scale(runner)

    def after_train_iter(self, runner, *args, **kwargs) -> None:
        """Record the statistics of this iteration."""
        if not self._active:
            return
        self._active = False
        if not self._checked:
            self._check_modes(runner)
        for name, layer in self._layers.items():
            if self._moments[name]:
                self._record(runner, name, layer, self._seen(name))

    def after_train(self, runner) -> None:
        """Remove the hooks from the layers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._layers.clear()
        self._blocks.clear()

    def _check_modes(self, runner) -> None:
        """Report the layers that had no forward pass in training mode."""
        self._checked = True
        silent = [name for name in self._layers if not self._moments[name]]
        if not silent:
            return
        message = (
            f'StatisticsHook: {len(silent)} of {len(self._layers)} norms '
            f'(first: {silent[0]!r}) had no forward pass in training mode. '
            'They are frozen, kept in evaluation mode (norm_eval), not used, '
            'or inside activation checkpointing')
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
                    # Times the scale: the gradient by the normalised values.
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
