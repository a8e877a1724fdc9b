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

    Statistics are over groups of examples and groups of channels at once:

    .. math::
        \mu_{G} = \text{mean}_{n \in G_n,\, c \in G_c,\, h,\, w}(x_{nchw}),
        \qquad
        y_{nchw} = \gamma_c \frac{x_{nchw} - \mu_G}
            {\sqrt{\sigma_G^2 + \epsilon}} + \beta_c.

    With ``examples_per_group=1`` it is group normalisation, with
    ``num_groups=num_features`` Ghost batch normalisation, and batch
    normalisation if besides the group takes in the whole batch. Examples are
    grouped in their order; the last group may be smaller, and a batch smaller
    than a group is one group. In a RoI head the examples are regions: the
    group of two images takes the regions of both.

    Evaluation knows two kinds of statistics: an example's own, over its
    groups of channels as in group normalisation, and the moving averages of
    the mean and mean square, averaged over the groups. ``example_weight`` is
    the weight of the first, Eq. (3): 1 is group normalisation and close to
    training where a group has a few examples, 0 is an affine map of each
    channel and close to training where it has hundreds, as of regions.
    ``running_var`` holds the moving average of the mean square less the
    squared ``running_mean``, of each channel; evaluation averages them over
    the groups, which mmcv's ``fuse_conv_bn`` does not know of.

    Args:
        num_features (int): Channels C.
        eps (float): Added to variances, inside the root.
        momentum (float, optional): Weight of the present batch in the moving
            averages.
        affine (bool): Whether there are scale and shift to learn.
        track_running_stats (bool): Whether to keep the averages. False:
            evaluation groups examples as training does.
        num_groups (int, optional): Groups of channels; divides
            ``num_features``. None: the largest number up to 32 that does.
        examples_per_group (int): Examples in a group.
        example_weight (float): From 0 to 1; see above.
        sync (bool): Whether the batch is that of all processes, their
            examples in the order of the ranks. The host then waits for their
            numbers.

    Shape:
        - Input: (N, C, H, W). N may differ from call to call, and be 0.
        - Output: the same shape and dtype.

    Raises:
        ValueError: If an argument is out of range, or if a group has one
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
                f'{num_groups}. Take a common divisor of the widths that the '
                'norm_cfg is given to')
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
        """Average of (N, C), or of several of them side by side."""
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
        # So that mean and mean square are what is averaged.
        between = (moments.mean - self.running_mean).square()
        return moments.mean, moments.var + between * (1 - factor)

    def extra_repr(self) -> str:
        return (f'{super().extra_repr()}, num_groups={self.num_groups}, '
                f'examples_per_group={self.examples_per_group}, '
                f'example_weight={self.example_weight}')


@MODELS.register_module()
class GhostBN(BGN, nn.BatchNorm2d, _BatchNorm):
    """Ghost Batch Normalization (arXiv:1705.08741; arXiv:1906.03548, Eq. 4).

    Batch normalisation of each ``ghost_size`` examples by themselves:
    Batch-Group normalisation with one channel a group. It is a regulariser
    for batches that are large enough, and evaluates as batch normalisation.
    With ``ghost_size=1`` and ``example_weight=1`` each image is normalised by
    itself, in training and in evaluation.

    Args:
        num_features (int): Channels C.
        eps, momentum, affine, track_running_stats: As in ``nn.BatchNorm2d``;
            the moving averages are those of :class:`BGN`.
        ghost_size (int): Examples of a ghost batch; in a RoI head, regions.
            The last ghost batch may be smaller.
        example_weight (float): As in :class:`BGN`.
        sync (bool): Whether the batch is that of all processes.
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
