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

    BatchNorm for gradient accumulation. An optimizer step takes several small
    batches, its parts. Each part is normalised with the statistics of all
    values of the step so far, its own included. The weights stand still
    between the parts, so the statistics need no correction as in
    :class:`CBN`. The last part is normalised with exactly the mean and
    variance of all values that the layer got in the step; with one part a
    step the layer is ``nn.BatchNorm2d``. A network of several such layers is
    not exactly one with BatchNorm on the joined batch: behind the first norm
    the values of earlier parts come from fewer images.

    The gradient of a part flows through its own share of the statistics. The
    parts before are constants: their graphs are gone. Each part enters the
    running statistics by itself, as in BatchNorm.

    :class:`mmdet_smallbn.SmallBatchNormHook` tells the layer when a step was
    taken, and :class:`mmdet_smallbn.TrainingLoop` in a loop of your own. Each
    of its calls in an iteration has parts of its own then. Without them every
    call is a part, and the layer sees a step by its own scale:
    ``zero_grad()`` takes its gradient away, or the step changes its version.
    A fused optimizer with ``zero_grad(set_to_none=False)`` does neither: take
    the hook or the loop. If the scale does not train, each batch is normalised
    by itself, with a warning.

    Loading a state dict ends the step. Checkpoints do not hold its parts, as
    they do not hold the accumulated gradients.

    Args:
        num_features (int): Channels C.
        eps (float): Added to the variance, inside the root.
        momentum (float, optional): Weight of a part in the running
            statistics. None: cumulative average.
        affine (bool): Whether there are scale and shift to learn.
        track_running_stats (bool): Whether to keep running statistics.
        sync (bool): Whether a part is that of all processes.

    Shape:
        - Input: (N, C, H, W). N may differ from call to call, and be 0.
        - Output: the same shape and dtype.

    Raises:
        ValueError: If a channel has one value, in the first part of a step.

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
        """Mean and variance of the optimizer step so far."""
        step, anew = self._step()
        if step is None:
            self.warn_once(
                'cannot tell when the optimizer takes a step',
                'SmallBatchNormHook in custom_hooks tells it, and '
                'TrainingLoop.iteration(after_step=...) in a loop of your own')
            return self.batch_statistics(batch)
        while len(self._parts) <= self._call:
            self._parts.append(StepMoments())
        parts = self._parts[self._call]
        parts.begin(step, anew)
        alone = parts.filled == 0
        if alone:
            found = self.batch_statistics(batch)
        (mean, var), share = parts.enter(batch.moments)
        return found if alone else Statistics(mean, var, gradient=share)

    def _step(self) -> Tuple[Optional[int], bool]:
        """A number that each step changes, and whether one was seen.

        The number is None if there is nothing to see it by.
        """
        told = self.training_step.optimizer_steps
        if told is not None:
            return told, False
        scale = self.weight
        if scale is None or not scale.requires_grad:
            return None, False
        # Fused optimizers leave the version as it is.
        return scale._version, scale.grad is None

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.reset_state()

    def count_call(self, x: Tensor) -> None:
        super().count_call(x)
        self.check_calls(x)


class StepMoments:
    """Moments of all values of an optimizer step so far."""

    def __init__(self) -> None:
        self.filled = 0
        self._step: Optional[int] = None
        self._moments: Optional[Tensor] = None  # mean and variance, (2, C)
        self._count: Optional[Tensor] = None  # values of each channel, (C,)

    def begin(self, step: int, anew: bool) -> None:
        """Forget the parts of another step."""
        if anew or step != self._step:
            self._step, self.filled = step, 0

    @torch.no_grad()
    def enter(self, part: Moments) -> Tuple[Tensor, Tensor]:
        """Add a part; what is not finite in it is not added.

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
