"""What every small-batch norm shares."""
import warnings
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn

from ..functional import (Moments, Processes, batch_moments, normalize,
                          normalize_for_inference, statistics_dtype)
from .checks import check_at_least, check_input, name_of
from .forward_pass import ForwardPass, current_pass, run_eagerly
from .recomputation import FirstPasses
from .statistics import Batch, Statistics

# No model calls a layer so often: the iteration is not told any more.
MAX_CALLS = 64


class TrainingStep:
    """What a training loop tells its layers, in one object for all of them.

    Attributes:
        iteration (int, optional): None: unknown, and every training forward
            is an iteration of its own.
        gradient_scale (float | Tensor): What the loss is multiplied with
            before the backward pass: a loss scale in mixed precision, one
            part in gradient accumulation.
        mends_running (bool): Whether the loop takes out of the running
            statistics what is not finite, after each iteration.
    """

    def __init__(self) -> None:
        self.iteration: Optional[int] = None
        self.gradient_scale: Any = 1.
        self.mends_running = False


def _told(name: str) -> property:
    """An attribute of the layer that its training loop tells."""
    return property(
        lambda self: getattr(self.training_step, name),
        lambda self, value: setattr(self.training_step, name, value))


class SmallBatchNorm(nn.BatchNorm2d):
    """Base of the norms: batch normalisation with a hole for the statistics.

    To the toolboxes it is a BatchNorm: the same parameters, buffers and state
    dict (pretrained weights load, ``norm_decay_mult``, ``norm_eval`` and
    freezing apply), the same evaluation, a per-channel affine map. In training
    a subclass says in :meth:`batch_statistics` and :meth:`statistics` what to
    normalise with.

    ``running_mean`` and ``running_var`` follow the present batch, as in
    ``nn.BatchNorm2d`` unless :meth:`running_targets` says otherwise, with
    three differences: a recomputation in a backward pass (activation
    checkpointing) does not count twice, a non-finite batch and an empty one
    leave them untouched.

    In activation checkpointing, re-entrant or not, a layer does what it does
    without: the first pass is the training step's, and the recomputation
    normalises with the same statistics.

    State beyond BatchNorm's lives in plain attributes: ``buffers()`` and
    ``state_dict()`` hold BatchNorm's three buffers and nothing else, because
    the toolboxes average, cast and copy buffers as they please.

    Args:
        num_features (int): Channels C.
        eps (float): Added to variances, inside the root.
        momentum (float, optional): Weight of the present batch in the running
            statistics. None: cumulative average.
        affine (bool): Whether there are scale and shift to learn.
        track_running_stats (bool): Whether to keep running statistics.
        sync (bool): Whether the batch is that of all processes, as in
            SyncBatchNorm. One process more or less changes nothing else.

    Attributes:
        burns_in (bool): Whether the kind of layer has a burn-in.
        keeps_states (bool): Whether it remembers past iterations, by the call
            in an iteration.
        centered (bool): Whether means are subtracted.
        follows_batch_norm (bool): Whether the running statistics are
            BatchNorm's, and training does not read them.
        averaged_iterations (int): Iterations behind the statistics.
        held_iterations (list[int]): Iterations that it remembers now, of each
            of its calls in an iteration.
        num_groups (int, optional): Groups of channels that share statistics.
            None: every channel has its own.
        example_weight (float): Weight of an example's own statistics in
            evaluation; see :func:`mmdet_smallbn.set_example_weight`.
        built_example_weight (float): The one it was built with.
        training_step (TrainingStep): What the training loop tells.
        burning_in (bool): Whether the layer is in its burn-in.
        layer_name (str, optional): The layer's place in the model, told by
            the hook, for messages.
    """

    burns_in = False
    keeps_states = False
    centered = True
    follows_batch_norm = True
    averaged_iterations = 1
    num_groups: Optional[int] = None
    built_example_weight = 0.
    iteration = _told('iteration')
    gradient_scale = _told('gradient_scale')

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
        self.burning_in = False
        self.layer_name: Optional[str] = None
        self._last_iteration: Optional[int] = None
        self._call = 0
        self._first_passes = FirstPasses(MAX_CALLS)
        self._warned_of_fallback = False

    @property
    def held_iterations(self) -> List[int]:
        return []

    # What subclasses fill in.

    def uses_past(self) -> bool:
        """Whether :meth:`statistics` looks beyond the present batch now."""
        return False

    def statistics(self, batch: Batch) -> Statistics:
        """What a training forward normalises with; the hole to fill.

        Called where :meth:`uses_past`, and the forward is one of a training
        step, not of a recomputation or under ``no_grad``.
        """
        raise NotImplementedError

    def batch_statistics(self, batch: Batch) -> Statistics:
        """The present batch alone: batch normalisation.

        Raises:
            ValueError: If there is one value a channel, as in torch.
        """
        self.check_count(batch.moments.count)
        return Statistics(batch.moments.mean, batch.moments.var)

    def measure(self, x: Tensor) -> Moments:
        """Moments of the input, shape (C,), or (N, C) of each example."""
        return batch_moments(x)

    def running_targets(self, moments: Moments,
                        factor: float) -> Tuple[Optional[Tensor], Tensor]:
        """What ``running_mean`` and ``running_var`` go towards.

        Args:
            moments (Moments): Of the present batch, shape (C,).
            factor (float): How far they go.

        Returns:
            tuple: Of shape (C,); None for one that stays.
        """
        return moments.mean, moments.unbiased_var()

    def moving_averages(self) -> Dict[str, Optional[Tensor]]:
        """Averages over past iterations by name, shape (C,), for records."""
        return dict(ema_mean=self.running_mean, ema_var=self.running_var)

    # What they use.

    def reset_state(self) -> None:
        """Forget what was gathered over past iterations."""

    def export_states(self) -> List[Dict[str, Any]]:
        """What was gathered over past iterations, for a checkpoint."""
        return []

    def count_call(self, x: Tensor) -> None:
        """Set the index of this forward among those of the iteration."""
        iteration = self.training_step.iteration
        if iteration is not None and iteration == self._last_iteration:
            self._call += 1
            return
        if iteration is not None:
            self._first_passes.clear()
        self._last_iteration = iteration
        self._call = 0

    def check_count(self, count) -> None:
        """Refuse one value a channel, of which there is no variance."""
        if isinstance(count, int) and count == 1:
            raise ValueError(
                f'{name_of(self)} got one value per channel, which has no '
                'variance. Give it more images, a larger feature map, or put '
                'no norm there')

    def warn_once(self, reason: str, remedy: str) -> None:
        """Say that the layer falls back to the present batch, and why."""
        if self._warned_of_fallback:
            return
        self._warned_of_fallback = True
        warnings.warn(
            f'{name_of(self)} {reason}: it normalises with the present batch '
            f'alone. {remedy}')

    # The forward pass.

    def forward(self, input: Tensor) -> Tensor:
        """Normalise an input of shape (N, C, H, W); same shape and dtype."""
        check_input(self, input)
        if not self.training and self.running_mean is not None:
            return self.evaluate(input)
        return self._forward_of_batch(input)

    @run_eagerly
    def _forward_of_batch(self, x: Tensor) -> Tensor:
        """The forward pass with statistics of the input's own."""
        step = current_pass()
        if step is ForwardPass.RECOMPUTED:
            return self._recompute(x)
        if not self.training or step is ForwardPass.UNTRACKED:
            return self._forward_alone(x, update=self.training)
        self.count_call(x)
        batch = self._see(x, step, update=True)
        if batch.is_empty:
            return self._pass_through(batch)
        statistics = (
            self.statistics(batch)
            if self.uses_past() else self.batch_statistics(batch))
        self._count_batch(batch)
        if step is ForwardPass.CHECKPOINTED:
            self._first_passes.add(batch, statistics)
        return self._normalize(batch, statistics)

    def _recompute(self, x: Tensor) -> Tensor:
        """Activation checkpointing's repetition of a forward pass."""
        first = self._first_passes.find(x, self.measure)
        if first is not None:
            return self._normalize(
                first.batch._replace(x=x), first.statistics)
        if self.training and self.uses_past() and x.numel():
            self.warn_once(
                'runs in a backward pass, and repeats no forward pass that '
                'it has seen', 'Please report how to reproduce this')
        return self._forward_alone(x, update=False)

    def _forward_alone(self, x: Tensor, update: bool) -> Tensor:
        """A forward pass of no training step: the present batch alone."""
        batch = self._see(x, ForwardPass.UNTRACKED, update)
        if batch.is_empty:
            return self._pass_through(batch)
        statistics = self.batch_statistics(batch)
        if update:
            self._count_batch(batch)
        return self._normalize(batch, statistics)

    def _see(self, x: Tensor, step: ForwardPass, update: bool) -> Batch:
        """The present batch, joined with other processes' parts of it."""
        if update and self._kernel_updates_running(x):
            moments = batch_moments(x, self.running_mean, self.running_var,
                                    self.momentum)
            return Batch(x, moments, moments, None, step, updated=True)
        own = self.measure(x)
        moments = own if own.mean.dim() == 1 else own.over_examples()
        processes = None
        if self.sync and self.training:
            processes = Processes.current()
        if processes is not None:
            moments = processes.join(moments)
        return Batch(x, own, moments, processes, step)

    def _pass_through(self, batch: Batch) -> Tensor:
        """Zero RoIs: no state changes, and the graph stays connected."""
        return normalize(batch.x, batch.moments.mean, batch.moments.var,
                         self.weight, self.bias, self.eps)

    def evaluate(self, x: Tensor) -> Tensor:
        """The forward pass in evaluation.

        An affine map of each channel, unless examples have a weight in it.
        """
        return normalize_for_inference(x, self.running_mean, self.running_var,
                                       self.weight, self.bias, self.eps,
                                       self.example_weight, self.num_groups,
                                       self.centered)

    def _normalize(self, batch: Batch, statistics: Statistics) -> Tensor:
        mean, var, gradient, r, d, past = statistics
        weight, bias = self.weight, self.bias
        # An empty batch has no moments to renormalise with.
        if r is not None and batch.x.numel():
            if d is not None:
                bias = _affine(d, weight, bias)
            weight = r if weight is None else weight * r
        if batch.processes is not None and mean.dim() == 1:
            gradient = batch.processes.gradient_statistics(
                batch.part, gradient)
        return normalize(batch.x, mean, var, weight, bias, self.eps, gradient,
                         past, batch.moments.count)

    def _kernel_updates_running(self, x: Tensor) -> bool:
        """Whether the kernel of the moments may update the running ones.

        It lets through what is not finite.
        """
        return (self.training_step.mends_running and self.follows_batch_norm
                and self.running_mean is not None and self.momentum is not None
                and self.running_mean.dtype == statistics_dtype(x)
                and not self.sync and x.numel() > 0)

    def _count_batch(self, batch: Batch) -> None:
        """Take a batch into the running statistics, once."""
        if self.running_mean is not None:
            self.num_batches_tracked.add_(1)
            if not batch.updated:
                self._update_running(batch)

    @torch.no_grad()
    def _update_running(self, batch: Batch) -> None:
        moments, factor = batch.moments, self.momentum
        if factor is None:  # cumulative average, as in nn.BatchNorm2d
            factor = self.num_batches_tracked.to(
                moments.mean.dtype).reciprocal()
        targets = self.running_targets(moments, factor)
        for running, target in zip((self.running_mean, self.running_var),
                                   targets):
            if target is None:
                continue
            now = running.to(target.dtype)
            if not self.training_step.mends_running:
                # x - x is 0 for what is finite alone.
                target = torch.where(target - target == 0, target, now)
            if now is running:
                running.lerp_(target, factor)
            else:
                running.copy_(torch.lerp(now, target, factor))

    def extra_repr(self) -> str:
        return super().extra_repr() + (', sync=True' if self.sync else '')


def _affine(x: Tensor, weight: Optional[Tensor],
            bias: Optional[Tensor]) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias
