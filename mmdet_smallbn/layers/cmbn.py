"""Cross mini-Batch Normalization.

Paper: YOLOv4: Optimal Speed and Accuracy of Object Detection, Bochkovskiy et
al., 2020, arXiv:2004.10934, Fig. 4.
"""
from typing import List, Optional, Tuple

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..functional import Moments, mix_moments
from .base import SmallBatchNorm
from .statistics import Batch, Statistics


@MODELS.register_module()
class CmBN(SmallBatchNorm, nn.BatchNorm2d, _BatchNorm):
    r"""Cross mini-Batch Normalization (YOLOv4, arXiv:2004.10934).

    BatchNorm for gradient accumulation. An optimizer step accumulates the
    gradients of several small batches, the parts of the step. Each part is
    normalised with the statistics of all values of the step so far, its own
    included. The weights do not change between the parts, so the statistics
    need no correction as in :class:`CBN`. The last part is normalised with
    exactly the mean and variance of all values that the layer got in the
    step. With one part in a step the layer is ``nn.BatchNorm2d``. A network
    with several such layers does not exactly equal BatchNorm on the joined
    batch: after the first norm, the values of earlier parts come from
    statistics of fewer images.

    The gradient of a part flows through its own share of the statistics. The
    earlier parts are constants, because their graphs are freed. Each part
    updates the running statistics alone, as in BatchNorm.

    :class:`mmdet_smallbn.SmallBatchNormHook`, or
    :class:`mmdet_smallbn.TrainingLoop` in your own training loop, reports the
    optimizer steps to the layer. Then each of the layer's calls in an
    iteration has its own parts. Without them every call is a part, and the
    layer detects a step by its scale: ``zero_grad()`` removes the scale's
    gradient, or the step changes the scale's version. A fused optimizer with
    ``zero_grad(set_to_none=False)`` does neither, so use the hook or the
    loop. If the scale does not train, each batch is normalised alone, with a
    warning.

    Loading a state dict ends the step. Checkpoints do not hold the parts, as
    they do not hold the accumulated gradients.

    Args:
        num_features (int): Channels C.
        eps (float): Added to the variance, inside the root.
        momentum (float, optional): Weight of a part in the running
            statistics. None: cumulative average.
        affine, track_running_stats (bool): As in ``nn.BatchNorm2d``.
        sync (bool): If True, a part is the batch of all processes.

    Shape:
        - Input: (N, C, H, W). N may differ from call to call, and may be 0.
        - Output: the same shape and dtype.

    Raises:
        ValueError: If a channel has only one value in the first part of a
            step.

    Example:
        >>> norm_cfg = dict(type='CmBN')
        >>> optim_wrapper = dict(accumulative_counts=8)
    """

    def __init__(self,
                 num_features: int,
                 eps: float = 1e-5,
                 momentum: Optional[float] = 0.1,
                 affine: bool = True,
                 track_running_stats: bool = True,
                 sync: bool = False,
                 device=None,
                 dtype=None) -> None:
        super().__init__(num_features, eps, momentum, affine,
                         track_running_stats, sync, device, dtype)
        self._parts: List[StepMoments] = []

    @property
    def held_iterations(self) -> List[int]:
        return [parts.filled for parts in self._parts]

    def reset_state(self) -> None:
        self._parts = []

    def uses_past(self) -> bool:
        return True

    def statistics(self, batch: Batch) -> Statistics:
        """Return the mean and variance of the optimizer step so far."""
        step, new_step = self._step()
        if step is None:
            self.warn_once(
                'cannot tell when the optimizer takes a step',
                'Add SmallBatchNormHook to custom_hooks, or use TrainingLoop.'
                'iteration(after_step=...) in your own training loop')
            return self.batch_statistics(batch)
        while len(self._parts) <= self._call:
            self._parts.append(StepMoments())
        parts = self._parts[self._call]
        parts.begin(step, new_step)
        alone = parts.filled == 0
        if alone:
            found = self.batch_statistics(batch)
        (mean, var), share = parts.enter(batch.moments)
        return found if alone else Statistics(mean, var, gradient=share)

    def _step(self) -> Tuple[Optional[int], bool]:
        """Return a number that each step changes, and if a step was seen.

        The number is None if the layer cannot detect steps.
        """
        steps = self.training_step.optimizer_steps
        if steps is not None:
            return steps, False
        scale = self.weight
        if scale is None or not scale.requires_grad:
            return None, False
        # Fused optimizers do not change the version, but zero_grad() removes
        # the gradient.
        return scale._version, scale.grad is None

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.reset_state()

    def count_call(self, x: Tensor) -> None:
        super().count_call(x)
        self.check_calls(x)


class StepMoments:
    """Moments over all values of an optimizer step so far."""

    def __init__(self) -> None:
        self.filled = 0
        self._step: Optional[int] = None
        self._moments: Optional[Tensor] = None  # mean and variance, (2, C)
        self._count: Optional[Tensor] = None  # values of each channel, (C,)

    def begin(self, step: int, new_step: bool) -> None:
        """Forget the parts of the last step if a new step began."""
        if new_step or step != self._step:
            self._step, self.filled = step, 0

    @torch.no_grad()
    def enter(self, part: Moments) -> Tuple[Tensor, Tensor]:
        """Add a part; channels with non-finite moments are not added.

        Returns:
            tuple: Moments of the step with this part, shape (2, C), and the
            part's share in them, shape (C,).
        """
        new = torch.stack(part[:2])
        if self.filled == 0 or self._moments.device != new.device:
            self._moments = torch.zeros_like(new)
            self._count = torch.zeros_like(new[0])
        count = self._count + part.count
        share = part.count / count.clamp(min=1)
        mixed = mix_moments(self._moments, new, share)
        finite = mixed.sum(0).isfinite()
        self._moments = torch.where(finite, mixed, self._moments)
        self._count = torch.where(finite, count, self._count)
        self.filled += 1
        return mixed, share
