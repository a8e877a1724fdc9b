"""Moving Average Batch Normalization.

Paper: Towards Stabilizing Batch Statistics in Backward Propagation of Batch
Normalization, Yan et al., ICLR 2020, arXiv:2001.06838. Released code:
megvii-model/MABN.

Unlike the released code, the moving average of the mean square takes in each
batch's mean square, not the average over the buffer, and a hook sets the
burn-in. Unlike Eq. (19), and like the released code, the exponential moving
average is of the mean square, not of its root, so that evaluation is batch
normalisation.
"""
import warnings
from typing import Dict, Optional, Tuple

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..functional import Moments, renormalization
from .checks import (check_at_least, check_count, check_positive_int,
                     name_of)
from .mabn_averages import MovingGradient, MovingStatistics, check_kinds
from .remembering import RememberingNorm
from .statistics import Batch, Statistics


@MODELS.register_module()
class MABN(RememberingNorm, nn.BatchNorm2d, _BatchNorm):
    r"""Moving Average Batch Normalization (arXiv:2001.06838).

    The statistics of the forward and the backward pass are averaged over the
    last iterations. Features are divided by the root of their mean square
    :math:`\chi^2`, and their mean is not subtracted. So use the layer with
    centred weights, ``conv_cfg=dict(type='CenConv')``.

    Forward, Eq. (19), with the average :math:`\bar\chi^2` of the mean squares
    of the last ``buffer_size`` iterations and their exponential moving
    average :math:`\hat\chi^2`, read before this iteration's update:

    .. math::
        z = \frac{x}{\sqrt{\bar\chi^2 + \epsilon}}, \qquad
        r = \text{clip}\left(\sqrt{\frac{\bar\chi^2 + \epsilon}
            {\hat\chi^2 + \epsilon}}, \frac1\lambda, \lambda\right), \qquad
        y = \gamma r z + \beta.

    Backward, Eq. (20), with :math:`g = \gamma r\,\partial L/\partial y`,
    :math:`\Psi = \text{mean}(g z)` and the average :math:`\bar\Psi` over the
    last ``buffer_size`` backward passes:

    .. math::
        \frac{\partial L}{\partial x} = \frac{g - z \bar\Psi}
            {\sqrt{\bar\chi^2 + \epsilon}}, \qquad
        \frac{\partial L}{\partial \gamma} = \sum
            \frac{\partial L}{\partial y}\, r z, \qquad
        \frac{\partial L}{\partial \beta} = \sum
            \frac{\partial L}{\partial y}.

    Both averages include the present value. At first they are over the values
    so far. In burn-in :math:`\bar\chi^2 = \chi^2`, :math:`\bar\Psi = \Psi`
    and :math:`r = 1`, while the averages fill.

    Evaluation is batch normalisation: ``running_mean`` stays 0 and
    ``running_var`` holds :math:`\hat\chi^2`. The state dict of a BatchNorm
    also loads: ``running_var + running_mean ** 2`` becomes
    :math:`\hat\chi^2`.

    The rows of the paper's Tables 2 and 4 are settings of the two statistics
    and of ``centered``. Features are normalised with the backward kind of
    statistics and then renormalised to the forward kind. So Batch
    Renormalization is forward ``'ema'``, backward ``'batch'``, centred.

    Activation checkpointing changes nothing. Under ``no_grad`` in training
    mode the layer normalises with the present batch alone. If
    :class:`mmdet_smallbn.SmallBatchNormHook` numbers the iterations, each
    call in an iteration has its own averages. A second backward pass through
    the same forward pass replaces the first (with ``'ema'``, only if no other
    backward pass came between). The hook also reports the loss scale, which
    dynamic loss scaling needs, and saves the averages in its checkpoints.
    Loading a state dict empties the averages.

    Args:
        num_features (int): Channels C.
        eps (float): Added to mean squares, inside the root.
        momentum (float, optional): Weight of the present batch in the moving
            average. The default is 1 - 0.98, as in the paper.
        affine, track_running_stats (bool): As in ``nn.BatchNorm2d``.
        buffer_size (int): Iterations in the averages, m.
        clip (float): Largest r, :math:`\lambda`, and largest d; at least 1.
        forward_statistics (str): ``'ema'``, ``'sma'`` or ``'batch'``:
            exponential or simple moving average, or the present batch.
        backward_statistics (str): ``'sma'``, ``'ema'`` (which includes the
            present value, Eq. (7), and starts at 0) or ``'batch'``.
        centered (bool): If True, the means of features and of gradients are
            subtracted.
        sync (bool): If True, the batch is that of all processes.

    Shape:
        - Input: (N, C, H, W). N may differ from call to call, and may be 0.
        - Output: the same shape and dtype.

    Raises:
        ValueError: If an argument is out of range, or if a channel of a
            centred layer has only one value and no average to join.
    """

    burns_in = True
    follows_batch_norm = False
    state_settings = ('num_features', 'buffer_size', 'forward_statistics',
                      'backward_statistics', 'centered')

    def __init__(self,
                 num_features: int,
                 eps: float = 1e-5,
                 momentum: Optional[float] = 0.02,
                 affine: bool = True,
                 track_running_stats: bool = True,
                 buffer_size: int = 16,
                 clip: float = 5.0,
                 forward_statistics: str = 'ema',
                 backward_statistics: str = 'sma',
                 centered: bool = False,
                 sync: bool = False,
                 device=None,
                 dtype=None) -> None:
        check_positive_int('buffer_size', buffer_size)
        check_at_least('clip', clip, 1)
        check_kinds(forward_statistics, backward_statistics,
                    track_running_stats, momentum)
        super().__init__(num_features, eps, momentum, affine,
                         track_running_stats, sync, device, dtype)
        self.buffer_size = buffer_size
        self.clip = clip
        self.forward_statistics = forward_statistics
        self.backward_statistics = backward_statistics
        self.centered = centered

    @property
    def averaged_iterations(self) -> int:
        kinds = (self.forward_statistics, self.backward_statistics)
        return self.buffer_size if 'sma' in kinds else 1

    def uses_past(self) -> bool:
        return True

    def new_state(self) -> MovingStatistics:
        return MovingStatistics(self.buffer_size, self.backward_statistics,
                                self.momentum)

    def moving_averages(self) -> Dict[str, Optional[Tensor]]:
        """Return the running averages, and those of the first call."""
        second = 'var' if self.centered else 'mean_square'
        averages = super().moving_averages() if self.centered else dict(
            ema_mean_square=self.running_var)
        for state in self.states[:1]:
            if state.forward.filled:
                averages[f'sma_{second}'] = state.forward.mean()[-1]
            if state.backward is not None and state.backward.turn >= 0:
                averages[f'{self.backward_statistics}_psi'] = (
                    state.backward.mean()[-1])
        return averages

    def statistics(self, batch: Batch) -> Statistics:
        """Return the statistics of Eq. (19), and of Eq. (20) for backward."""
        state = self.state_of_call()
        present = self._present(batch)
        if 'sma' in (self.forward_statistics, self.backward_statistics):
            state.forward.push(present)
        inner, r, d = present, None, None
        if not self.burning_in:
            # Running statistics change before the forward uses them, so it
            # needs a copy.
            inner = self._of_kind(self.backward_statistics, present, state)
            if self.backward_statistics == 'ema':
                inner = inner.clone()
            if self.forward_statistics != self.backward_statistics:
                target = self._of_kind(self.forward_statistics, present,
                                       state)
                r, d = renormalization(*self._mean_var(inner),
                                       *self._mean_var(target), self.eps,
                                       self.clip, self.clip)
        if self.centered and inner is present:
            check_count(self, batch.moments.count)
        mean, var = self._mean_var(inner)
        return Statistics(
            batch.moments.mean if mean is None else mean,
            var,
            gradient=MovingGradient(state.backward, not self.burning_in,
                                    self.centered, self.gradient_scale),
            r=r,
            d=d)

    def batch_statistics(self, batch: Batch) -> Statistics:
        if self.centered:
            return super().batch_statistics(batch)
        return Statistics(
            *batch.moments[:2],
            gradient=lambda mean_g, mean_gx: (None, mean_gx))

    def measure(self, x: Tensor) -> Moments:
        """Return the input's moments; 0 and mean square if not centred."""
        moments = super().measure(x)
        if not self.centered and x.numel():
            moments.var.addcmul_(moments.mean, moments.mean)
            moments.mean.zero_()
        return moments

    def _present(self, batch: Batch) -> Tensor:
        """Return mean and variance, (2, C), or the mean square, (1, C)."""
        if self.centered:
            return torch.stack(batch.moments[:2])
        return batch.moments.var[None]

    def _mean_var(self, values: Tensor) -> Tuple[Optional[Tensor], Tensor]:
        return (values[0] if self.centered else None), values[-1]

    def _of_kind(self, kind: str, present: Tensor,
                 state: MovingStatistics) -> Tensor:
        if kind == 'batch':
            return present
        if kind == 'sma':
            return state.forward.mean()
        if not self.centered:
            return self.running_var[None].to(present.dtype)
        kept = torch.stack([self.running_mean, self.running_var])
        return kept.to(present.dtype)

    def running_targets(self, moments: Moments,
                        factor: float) -> Tuple[Optional[Tensor], Tensor]:
        if self.centered:
            return super().running_targets(moments, factor)
        return None, moments.var

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        mean, var = self.running_mean, self.running_var
        if self.centered or mean is None or mean.is_meta or not mean.any():
            return
        if args[2].get('assign_to_params_buffers', False):
            # The buffers are the caller's tensors, which must not change.
            self.running_mean, self.running_var = mean, var = (mean.clone(),
                                                               var.clone())
        with torch.no_grad():
            var.add_(mean.square())
            mean.zero_()
        # Without layer names one warning serves all layers of a model.
        who = name_of(self) if self.layer_name else type(self).__name__
        warnings.warn(f'{who} loaded the statistics of a BatchNorm and '
                      'computed a mean square of them: train it before use')

    def extra_repr(self) -> str:
        return (f'{super().extra_repr()}, buffer_size={self.buffer_size}, '
                f'clip={self.clip}, '
                f'forward_statistics={self.forward_statistics!r}, '
                f'backward_statistics={self.backward_statistics!r}, '
                f'centered={self.centered}')
