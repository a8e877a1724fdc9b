"""Cross-Iteration Batch Normalization.

Paper: Cross-Iteration Batch Normalization, Yao et al., CVPR 2021,
arXiv:2002.05712. Released code: Howal/Cross-iterationBatchNorm.

Where this differs from the released code, it follows the paper:

- The gradient flows through Eq. (7), (8) to the present weight. The released
  code uses ``weight.data`` there (``gradient='released'``).
- Past mean squares are clamped by max[nu, mu^2], Eq. (10). The released code
  drops past entries with nu < mu^2.
- eps is inside the root and the variance is biased, Eq. (12).

Eq. (7)-(11) are in :mod:`mmdet_smallbn.functional.replay`.
"""
from typing import Optional

import torch
from mmengine.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..functional import mix_moments
from .checks import check_at_least, check_positive_int
from .conv_call import FROZEN, find_producer, is_compiled
from .forward_pass import ForwardPass
from .moment_window import MomentWindow
from .remembering import RememberingNorm
from .statistics import Batch, Statistics


@MODELS.register_module()
class CBN(RememberingNorm, nn.BatchNorm2d, _BatchNorm):
    r"""Cross-Iteration Batch Normalization (arXiv:2002.05712).

    A small batch is normalised with the statistics of the last ``window_size``
    iterations. Past iterations had other weights. Their statistics are
    corrected for the current weights with a first-order Taylor polynomial in
    the weight (and bias) :math:`\theta` of the convolution before the layer,
    Eq. (7)-(12):

    .. math::
        \mu_{t-\tau}(\theta_t) &= \mu_{t-\tau} + \left\langle
            \tfrac{\partial \mu_{t-\tau}}{\partial \theta},
            \theta_t - \theta_{t-\tau}\right\rangle, \qquad
        \nu_{t-\tau}(\theta_t) = \nu_{t-\tau} + \left\langle
            \tfrac{\partial \nu_{t-\tau}}{\partial \theta},
            \theta_t - \theta_{t-\tau}\right\rangle, \\
        \bar\mu &= \tfrac1k \textstyle\sum_\tau \mu_{t-\tau}(\theta_t), \qquad
        \bar\nu = \tfrac1k \textstyle\sum_\tau \max\left[
            \nu_{t-\tau}(\theta_t), \mu_{t-\tau}(\theta_t)^2\right], \\
        y &= \gamma\,\frac{x - \bar\mu}
            {\sqrt{\bar\nu - \bar\mu^2 + \epsilon}} + \beta.

    The average is over the k iterations that the window holds, at most
    ``window_size``. Every iteration has the same weight, whatever its batch
    size. With ``window_size=1``, and in burn-in, the layer is
    ``nn.BatchNorm2d``.

    The gradient flows through these equations to :math:`x_t`, whose weight in
    the statistics is 1 / k, and to :math:`\theta_t`, also through Eq. (7),
    (8). The remembered values are constants. If the weights do not change and
    the window holds the same k batches, the weight gradients of the
    convolution, summed over the k batches, equal those of batch normalisation
    on the joined batch. This is exact if all positions are remembered. A
    second backward pass through a graph must come before the layer's next
    forward pass.

    The layer finds the convolution in the autograd graph, so
    ``norm_cfg=dict(type='CBN')`` is enough. The convolution may be grouped,
    transposed, standardised or deformable. The sampling locations of a
    deformable one are not recomputed.

    - After a frozen convolution, or if nothing before the layer trains, the
      past is used without compensation, because it stays valid.
    - After any other operation (a sum, a pooling) or a computed bias, the
      layer normalises with the present batch, as BatchNorm does, and warns
      once.
    - Activation checkpointing and torch.compile change nothing if the model
      has :class:`mmdet_smallbn.SmallBatchNormHook`, or
      :class:`mmdet_smallbn.TrainingLoop` in your own training loop. Without
      them, or after a convolution with its own ``forward``, the layer
      normalises with the present batch there, and warns once.
    - Under ``no_grad`` in training mode the layer also normalises with the
      present batch.
    - The hook and the loop also number the iterations. Then each call of the
      layer in an iteration has its own window. Without them every call counts
      as an iteration.

    Loading a state dict empties the window. No state dict holds the window,
    but the hook saves it in its checkpoints, for a resume.

    Args:
        num_features (int): Channels C.
        eps (float): Added to the variance, inside the root.
        momentum (float, optional): Weight of the present batch in the running
            statistics. None: cumulative average.
        affine, track_running_stats (bool): As in ``nn.BatchNorm2d``.
        window_size (int): Iterations in the statistics, the present one
            included; see :func:`suggested_window_size`.
        compensate (bool): If False, the past statistics are not corrected:
            "Naive CBN".
        gradient (str): ``'whole'``, or ``'released'``: past moments are
            constants, as in the released code. ``'released'`` trains worse.
        sync (bool): If True, an iteration's batch is that of all processes,
            as in SyncBatchNorm. An iteration that is empty in all processes
            still takes a place in the window.
        derivative_positions (int, optional): Positions of a batch's feature
            maps that are remembered; at least 2. They differ from iteration
            to iteration. A smaller map is remembered whole. Eq. (7), (8) are
            estimated from these positions; ``tools/statistics_error.py``
            measures the error. None: all positions, without an error. The
            memory then grows by ``window_size`` unfolded inputs.

    Shape:
        - Input: (N, C, H, W). N may differ from call to call, and may be 0.
        - Output: the same shape and dtype.

    Raises:
        ValueError: If an argument is out of range, or if a channel has only
            one value and the window holds no past iteration.
    """

    burns_in = True
    state_settings = ('num_features', 'window_size', 'compensate',
                      'derivative_positions')

    def __init__(self,
                 num_features: int,
                 eps: float = 1e-5,
                 momentum: Optional[float] = 0.1,
                 affine: bool = True,
                 track_running_stats: bool = True,
                 window_size: int = 4,
                 compensate: bool = True,
                 gradient: str = 'whole',
                 sync: bool = False,
                 derivative_positions: Optional[int] = 32,
                 device=None,
                 dtype=None) -> None:
        check_positive_int('window_size', window_size)
        if gradient not in ('whole', 'released'):
            raise ValueError("gradient must be 'whole' or 'released', but got "
                             f'{gradient!r}')
        if derivative_positions is not None:
            check_positive_int('derivative_positions', derivative_positions)
            check_at_least('derivative_positions', derivative_positions, 2)
        super().__init__(num_features, eps, momentum, affine,
                         track_running_stats, sync, device, dtype)
        self.window_size = window_size
        self.compensate = compensate
        self.gradient = gradient
        self.derivative_positions = derivative_positions

    @property
    def averaged_iterations(self) -> int:
        return self.window_size

    def uses_past(self) -> bool:
        return self.window_size > 1 and not self.burning_in

    def new_state(self) -> MomentWindow:
        return MomentWindow(self.window_size, self.derivative_positions)

    def statistics(self, batch: Batch) -> Statistics:
        """Pool the corrected past and the present batch, Eq. (7)-(11)."""
        producer = FROZEN
        if self.compensate:
            producer = find_producer(batch.x, batch.step)
        if not producer.known:
            self._warn_of_producer(batch)
            return self.batch_statistics(batch)
        past, present = self.state_of_call().enter(
            batch,
            producer.call,
            whole=self.gradient == 'whole',
            alone=not torch.is_grad_enabled())
        if past is None:
            return self.batch_statistics(batch)
        if batch.processes is not None:
            # The batch may be empty in all processes.
            present = torch.where(batch.moments.count > 0, present,
                                  past.moments)
        mean, var = mix_moments(past.moments, present, past.share)
        return Statistics(mean, var, gradient=past.share, past=past)

    def _warn_of_producer(self, batch: Batch) -> None:
        x = batch.x
        if batch.step is ForwardPass.CHECKPOINTED or is_compiled(x):
            self.warn_once(
                'runs inside activation checkpointing, under other hooks on '
                'saved tensors or in torch.compile, where it cannot find the '
                'convolution before it',
                'Add SmallBatchNormHook to custom_hooks, or use '
                'TrainingLoop(model) in your own training loop. Neither helps '
                'after a convolution with its own forward or a computed '
                'weight')
            return
        made_by = 'a leaf' if x.grad_fn is None else x.grad_fn.name()
        self.warn_once(
            'follows no convolution whose weight it can compensate for '
            f'(its input comes from {made_by})',
            "Put it after a convolution, or use type='NaiveCBN'")

    def extra_repr(self) -> str:
        described = (f'{super().extra_repr()}, '
                     f'window_size={self.window_size}, '
                     f'compensate={self.compensate}')
        if self.compensate:
            described += (f', gradient={self.gradient!r}, '
                          f'derivative_positions={self.derivative_positions}')
        return described


@MODELS.register_module()
class NaiveCBN(CBN, nn.BatchNorm2d, _BatchNorm):
    """CBN without compensation, the paper's baseline "Naive CBN".

    Args:
        window_size (int): Number of iterations in the statistics.
        num_features, eps, momentum, affine, track_running_stats, sync: As in
            :class:`CBN`.
    """

    def __init__(self,
                 num_features: int,
                 eps: float = 1e-5,
                 momentum: Optional[float] = 0.1,
                 affine: bool = True,
                 track_running_stats: bool = True,
                 window_size: int = 4,
                 sync: bool = False,
                 device=None,
                 dtype=None) -> None:
        super().__init__(num_features, eps, momentum, affine,
                         track_running_stats, window_size, compensate=False,
                         sync=sync, device=device, dtype=dtype)


def suggested_window_size(images_per_gpu: int) -> int:
    """Return min(ceil(16 / images per GPU), 8), as the paper, Sec. 4.3.

    Args:
        images_per_gpu (int): Images of a batch on one GPU, at least 1.

    Returns:
        int: Window size in iterations, from 1 to 8.

    Raises:
        ValueError: If ``images_per_gpu`` is below 1.
    """
    if images_per_gpu < 1:
        raise ValueError('images_per_gpu must be at least 1, but got '
                         f'{images_per_gpu}')
    return min(-(-16 // images_per_gpu), 8)
