"""BatchNorm with this package's running statistics and evaluation."""
from typing import Dict, Optional, Tuple

from torch import Tensor, nn

from ..functional import (Moments, move_towards, normalize_for_inference,
                          statistics_dtype)
from .checks import check_at_least
from .statistics import Batch, TrainingStep


def _of_training_step(name: str) -> property:
    """Return a property of the layer that its training loop sets."""
    return property(
        lambda self: getattr(self.training_step, name),
        lambda self, value: setattr(self.training_step, name, value))


class RunningNorm(nn.BatchNorm2d):
    """BatchNorm with this package's running statistics and evaluation.

    ``running_mean`` and ``running_var`` are updated from the present batch,
    as in ``nn.BatchNorm2d``, unless :meth:`running_targets` is overridden.
    There are three differences. A recomputation in a backward pass
    (activation checkpointing) does not update them a second time. A
    non-finite batch does not change them. An empty batch does not change
    them.

    Args:
        num_features (int): Channels C.
        eps (float): Added to variances, inside the root.
        momentum (float, optional): Weight of the present batch in the running
            statistics. None: cumulative average.
        affine, track_running_stats (bool): As in ``nn.BatchNorm2d``.
        sync (bool): If True, the batch is that of all processes, as in
            SyncBatchNorm. Everything else is independent of the number of
            processes.

    Attributes:
        centered (bool): True if means are subtracted.
        follows_batch_norm (bool): True if the running statistics are those of
            BatchNorm and training does not read them.
        num_groups (int, optional): Groups of channels that share statistics.
            None: every channel has its own statistics.
        example_weight (float): Weight of an example's own statistics in
            evaluation; see :func:`mmdet_smallbn.set_example_weight`.
        built_example_weight (float): The ``example_weight`` that the layer
            was built with.
        training_step (TrainingStep): Values that the training loop sets.
    """

    centered = True
    follows_batch_norm = True
    num_groups: Optional[int] = None
    built_example_weight = 0.
    iteration = _of_training_step('iteration')
    gradient_scale = _of_training_step('gradient_scale')

    def __init__(self,
                 num_features: int,
                 eps: float = 1e-5,
                 momentum: Optional[float] = 0.1,
                 affine: bool = True,
                 track_running_stats: bool = True,
                 sync: bool = False,
                 device=None,
                 dtype=None) -> None:
        check_at_least('eps', eps, 0)
        if momentum is not None:
            check_at_least('momentum', momentum, 0)
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device=device,
            dtype=dtype)
        self.sync = sync
        self.example_weight = 0.
        self.training_step = TrainingStep()

    def running_targets(self, moments: Moments,
                        factor: float) -> Tuple[Optional[Tensor], Tensor]:
        """Return the values that the running statistics move towards.

        Args:
            moments (Moments): Moments of the present batch, shape (C,).
            factor (float): Weight of these values in the moving average.

        Returns:
            tuple: Targets of ``running_mean`` and ``running_var``, shape
            (C,); None if a buffer does not change.
        """
        return moments.mean, moments.unbiased_var()

    def moving_averages(self) -> Dict[str, Optional[Tensor]]:
        """Return the averages over past iterations, (C,), by name, to log."""
        return dict(ema_mean=self.running_mean, ema_var=self.running_var)

    def evaluate(self, x: Tensor) -> Tensor:
        """Run the forward pass in evaluation.

        It is an affine map of each channel, unless examples have a weight.
        """
        return normalize_for_inference(x, self.running_mean, self.running_var,
                                       self.weight, self.bias, self.eps,
                                       self.example_weight, self.num_groups,
                                       self.centered)

    def kernel_updates_running(self, x: Tensor) -> bool:
        """Return True if the moments' kernel may update running statistics.

        The kernel also takes in non-finite values, so the training loop must
        remove them afterwards.
        """
        return (self.training_step.mends_running and self.follows_batch_norm
                and self.running_mean is not None and self.momentum is not None
                and self.running_mean.dtype == statistics_dtype(x)
                and not self.sync and x.numel() > 0)

    def count_batch(self, batch: Batch) -> None:
        """Update the running statistics with a batch, if not yet done."""
        if self.running_mean is None:
            return
        self.num_batches_tracked.add_(1)
        if batch.updated:
            return
        factor = self.momentum
        if factor is None:  # cumulative average, as in nn.BatchNorm2d
            factor = self.num_batches_tracked.to(
                batch.moments.mean.dtype).reciprocal()
        targets = self.running_targets(batch.moments, factor)
        for running, target in zip((self.running_mean, self.running_var),
                                   targets):
            if target is not None:
                move_towards(running, target, factor,
                             not self.training_step.mends_running)

    def extra_repr(self) -> str:
        return super().extra_repr() + (', sync=True' if self.sync else '')
