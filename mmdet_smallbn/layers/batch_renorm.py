"""Batch Renormalization.

Paper: Batch Renormalization: Towards Reducing Minibatch Dependence in
Batch-Normalized Models, Ioffe, NeurIPS 2017, arXiv:1702.03275; a baseline of
the MABN paper, arXiv:2001.06838, Eq. (14).
"""
from typing import Optional

from mmengine.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..functional import renormalization
from .base import SmallBatchNorm
from .checks import check_at_least
from .statistics import Batch, Statistics


@MODELS.register_module()
class BRN(SmallBatchNorm, nn.BatchNorm2d, _BatchNorm):
    r"""Batch Renormalization (arXiv:1702.03275).

    The batch's own statistics normalise, and carry gradients as in batch
    normalisation. What results is moved to where the running statistics
    would have put it, within bounds, so that training and evaluation agree:

    .. math::
        y = \gamma\left(r\,\frac{x - \mu_B}{\sigma_B} + d\right) + \beta,
        \qquad
        r = \text{clip}\left(\frac{\sigma_B}{\hat\sigma},
            \frac{1}{r_{max}}, r_{max}\right), \qquad
        d = \text{clip}\left(\frac{\mu_B - \hat\mu}{\hat\sigma},
            -d_{max}, d_{max}\right),

    with :math:`\sigma = \sqrt{\text{var} + \epsilon}`. r and d are constants
    to the gradient, and the running statistics are read before this
    iteration's update. In burn-in, and under ``no_grad``, r = 1 and d = 0:
    batch normalisation.

    The paper relaxes the bounds over the first steps. Here they are fixed, as
    in the MABN paper's comparison, and burn-in is the hook's.

    Args:
        num_features (int): Channels C.
        eps (float): Added to variances, inside the root.
        momentum (float, optional): Weight of the present batch in the running
            statistics; 1 - 0.98 of the MABN paper.
        affine (bool): Whether there are scale and shift to learn.
        track_running_stats (bool): Must be True.
        r_max (float): Largest r, at least 1.
        d_max (float): Largest d, at least 0.
        sync (bool): Whether the batch is that of all processes.

    Shape:
        - Input: (N, C, H, W). N may differ from call to call, and be 0.
        - Output: the same shape and dtype.

    Raises:
        ValueError: If an argument is out of range, or in burn-in if a channel
            has one value.
    """

    burns_in = True
    follows_batch_norm = False

    def __init__(self,
                 num_features: int,
                 eps: float = 1e-5,
                 momentum: Optional[float] = 0.02,
                 affine: bool = True,
                 track_running_stats: bool = True,
                 r_max: float = 3.0,
                 d_max: float = 5.0,
                 sync: bool = False,
                 device=None,
                 dtype=None) -> None:
        check_at_least('r_max', r_max, 1)
        check_at_least('d_max', d_max, 0)
        if not track_running_stats:
            raise ValueError('BRN needs track_running_stats=True: it '
                             'renormalises to the running statistics')
        super().__init__(num_features, eps, momentum, affine,
                         track_running_stats, sync, device, dtype)
        self.r_max = r_max
        self.d_max = d_max

    def uses_past(self) -> bool:
        return not self.burning_in

    def statistics(self, batch: Batch) -> Statistics:
        mean, var, _ = batch.moments
        r, d = renormalization(mean, var, self.running_mean, self.running_var,
                               self.eps, self.r_max, self.d_max)
        return Statistics(mean, var, r=r, d=d)

    def extra_repr(self) -> str:
        return (f'{super().extra_repr()}, r_max={self.r_max}, '
                f'd_max={self.d_max}')
