"""Batch-Group Normalization and Ghost Batch Normalization.

Paper: Four Things Everyone Should Know to Improve Batch Normalization,
Summers and Dinneen, ICLR 2020, arXiv:1906.03548, Sec. 3.4 and 3.2. Released
code: ceciliaresearch/four_things_batch_norm.
"""
from typing import Callable, Optional, Tuple

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..functional import (Moments, average_groups, example_moments,
                          pool_groups)
from .base import SmallBatchNorm
from .checks import check_count, check_example_weight, check_positive_int
from .statistics import Batch, Statistics


@MODELS.register_module()
class BGN(SmallBatchNorm, nn.BatchNorm2d, _BatchNorm):
    r"""Batch-Group Normalization (arXiv:1906.03548, Sec. 3.4).

    Statistics are over groups of examples and groups of channels together:

    .. math::
        \mu_{G} = \text{mean}_{n \in G_n,\, c \in G_c,\, h,\, w}(x_{nchw}),
        \qquad
        y_{nchw} = \gamma_c \frac{x_{nchw} - \mu_G}
            {\sqrt{\sigma_G^2 + \epsilon}} + \beta_c.

    With ``examples_per_group=1`` the layer is group normalisation. With
    ``num_groups=num_features`` it is Ghost batch normalisation, and batch
    normalisation if the group also holds the whole batch. Examples are
    grouped in their order. The last group may be smaller, and a batch smaller
    than a group is one group. In a RoI head the examples are regions: to group
    two images, set ``examples_per_group`` to the number of regions of both.

    Evaluation mixes two kinds of statistics. The first are the example's own,
    over its groups of channels, as in group normalisation. The second are the
    moving averages of the mean and mean square, averaged over the groups.
    ``example_weight`` is the weight of the first kind, Eq. (3). The weight 1
    is group normalisation; it is close to training if a group has a few
    examples. The weight 0 is an affine map of each channel; it is close to
    training if a group has hundreds of examples, such as regions.

    ``running_var`` holds, for each channel, the moving average of the mean
    square minus the squared ``running_mean``. Evaluation averages both over
    the groups. mmcv's ``fuse_conv_bn`` does not do that.

    Args:
        num_features (int): Channels C.
        eps (float): Added to variances, inside the root.
        momentum (float, optional): Weight of the present batch in the moving
            averages. None: cumulative average.
        affine (bool): If True, the layer learns a scale and a shift.
        track_running_stats (bool): If True, the layer keeps the moving
            averages. If False, evaluation groups examples as training does.
        num_groups (int, optional): Groups of channels; must divide
            ``num_features``. None: the largest divisor up to 32.
        examples_per_group (int): Examples in a group.
        example_weight (float): Weight from 0 to 1; see above.
        sync (bool): If True, the batch is that of all processes, with the
            examples in the order of the ranks. The host then waits until it
            knows how many examples each process has.

    Shape:
        - Input: (N, C, H, W). N may differ from call to call, and may be 0.
        - Output: the same shape and dtype.

    Raises:
        ValueError: If an argument is out of range, or if a group has only one
            value.
    """

    follows_batch_norm = False

    def __init__(self,
                 num_features: int,
                 eps: float = 1e-5,
                 momentum: Optional[float] = 0.01,
                 affine: bool = True,
                 track_running_stats: bool = True,
                 num_groups: Optional[int] = None,
                 examples_per_group: int = 2,
                 example_weight: float = 1.0,
                 sync: bool = False,
                 device=None,
                 dtype=None) -> None:
        if num_groups is None:
            num_groups = next(groups for groups in range(32, 0, -1)
                              if num_features % groups == 0)
        check_positive_int('num_groups', num_groups)
        check_positive_int('examples_per_group', examples_per_group)
        check_example_weight(example_weight)
        if num_features % num_groups:
            raise ValueError(
                f'num_groups must divide num_features={num_features}, but got '
                f'{num_groups}. Choose a common divisor of the channel '
                'numbers of all layers that this norm_cfg builds')
        super().__init__(num_features, eps, momentum, affine,
                         track_running_stats, sync, device, dtype)
        self.num_groups = num_groups
        self.examples_per_group = examples_per_group
        self.built_example_weight = self.example_weight = example_weight

    def measure(self, x: Tensor) -> Moments:
        return example_moments(x)

    def batch_statistics(self, batch: Batch) -> Statistics:
        average = self._average_of_groups(batch)
        mean, var = pool_groups(batch.own, average)

        def gradient(mean_g: Tensor, mean_gx: Tensor):
            both = average(torch.cat([mean_g, mean_gx], 1), 2)
            return both.chunk(2, 1)

        return Statistics(mean, var, gradient=gradient)

    def _average_of_groups(self, batch: Batch) -> Callable[..., Tensor]:
        """Return the function that averages over groups.

        It takes values of shape (N, C), or several of them side by side.
        """
        size, own = self.examples_per_group, batch.own
        examples = len(own.mean)
        if batch.processes is None:
            smallest = min(examples % size or size, examples) * own.count

            def average(values: Tensor, repeats: int = 1) -> Tensor:
                return average_groups(values, repeats * self.num_groups, size)
        else:
            groups = batch.processes.group_examples(examples, own.count, size,
                                                    own.mean.device)
            smallest = groups.smallest

            def average(values: Tensor, repeats: int = 1) -> Tensor:
                return groups.average(values, repeats * self.num_groups)

        check_count(self, smallest * (self.num_features // self.num_groups))
        return average

    def running_targets(self, moments: Moments,
                        factor: float) -> Tuple[Tensor, Tensor]:
        # With this target the moving averages are of mean and mean square.
        between = (moments.mean - self.running_mean).square()
        return moments.mean, moments.var + between * (1 - factor)

    def extra_repr(self) -> str:
        return (f'{super().extra_repr()}, num_groups={self.num_groups}, '
                f'examples_per_group={self.examples_per_group}, '
                f'example_weight={self.example_weight}')


@MODELS.register_module()
class GhostBN(BGN, nn.BatchNorm2d, _BatchNorm):
    """Ghost Batch Normalization (arXiv:1705.08741; arXiv:1906.03548, Eq. 4).

    Each ghost batch of ``ghost_size`` examples is normalised alone. This is
    Batch-Group normalisation with one channel in a group. It is a regulariser
    for large batches. Evaluation is batch normalisation. With
    ``ghost_size=1`` and ``example_weight=1`` each image is normalised alone,
    in training and in evaluation.

    Args:
        num_features (int): Channels C.
        eps, momentum, affine, track_running_stats: As in ``nn.BatchNorm2d``;
            the moving averages are those of :class:`BGN`.
        ghost_size (int): Examples of a ghost batch; in a RoI head, regions.
            The last ghost batch may be smaller.
        example_weight (float): As in :class:`BGN`.
        sync (bool): If True, the batch is that of all processes.
    """

    def __init__(self,
                 num_features: int,
                 eps: float = 1e-5,
                 momentum: Optional[float] = 0.1,
                 affine: bool = True,
                 track_running_stats: bool = True,
                 ghost_size: int = 2,
                 example_weight: float = 0.0,
                 sync: bool = False,
                 device=None,
                 dtype=None) -> None:
        check_positive_int('ghost_size', ghost_size)
        super().__init__(num_features, eps, momentum, affine,
                         track_running_stats, num_features, ghost_size,
                         example_weight, sync, device, dtype)

    @property
    def ghost_size(self) -> int:
        return self.examples_per_group
