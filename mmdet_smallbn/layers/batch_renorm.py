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

    The layer normalises with the batch's own statistics, and their gradient
    is that of batch normalisation. Then r and d correct the result towards
    normalisation with the running statistics, within bounds, so that training
    and evaluation agree:

    .. math::
        y = \gamma\left(r\,\frac{x - \mu_B}{\sigma_B} + d\right) + \beta,
        \qquad
        r = \text{clip}\left(\frac{\sigma_B}{\hat\sigma},
            \frac{1}{r_{max}}, r_{max}\right), \qquad
        d = \text{clip}\left(\frac{\mu_B - \hat\mu}{\hat\sigma},
            -d_{max}, d_{max}\right),

    with :math:`\sigma = \sqrt{\text{var} + \epsilon}`. r and d are constants
    in the backward pass. The running statistics are read before this
    iteration's update. In burn-in and under ``no_grad`` the layer is batch
    normalisation: r = 1 and d = 0.

    The paper relaxes the bounds over the first steps. Here they are fixed, as
    in the comparison of the MABN paper, and the hook sets the burn-in.

    Args:
        num_features (int): Channels C.
        eps (float): Added to variances, inside the root.
        momentum (float, optional): Weight of the present batch in the running
            statistics. The default is 1 - 0.98, as in the MABN paper. None:
            cumulative average.
        affine (bool): If True, the layer learns a scale and a shift.
        track_running_stats (bool): Must be True.
        r_max (float): Largest r, at least 1.
        d_max (float): Largest d, at least 0.
        sync (bool): If True, the batch is that of all processes.

    Shape:
        - Input: (N, C, H, W). N may differ from call to call, and may be 0.
        - Output: the same shape and dtype.

    Raises:
        ValueError: If an argument is out of range, or if a channel has only
            one value in burn-in.
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
            raise ValueError('BRN needs the running statistics, but got '
                             'track_running_stats=False. Set '
                             'track_running_stats=True')
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
