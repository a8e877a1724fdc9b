"""What every small-batch norm shares."""
import warnings
from typing import Any, Dict, List, Optional

from torch import Tensor, nn

from ..functional import (Moments, Processes, batch_moments, normalize,
                          run_eagerly)
from .checks import check_count, check_input, check_no_capture, name_of
from .forward_pass import ForwardPass, current_pass
from .recomputation import FirstPasses
from .running_norm import RunningNorm
from .statistics import Batch, Statistics

# No model calls a layer so often: the iteration is not told any more.
MAX_CALLS = 64


class SmallBatchNorm(RunningNorm):
    """Base of the norms: batch normalisation with a hole for the statistics.

    To the toolboxes it is a BatchNorm: the same parameters, buffers and state
    dict (pretrained weights load, ``norm_decay_mult``, ``norm_eval`` and
    freezing apply), the same evaluation, a per-channel affine map. In training
    a subclass says in :meth:`batch_statistics` and :meth:`statistics` what to
    normalise with.

    In activation checkpointing, re-entrant or not, a layer does what it does
    without: the recomputation normalises with the first pass's statistics.
    State beyond BatchNorm's lives in plain attributes, because the toolboxes
    average, cast and copy buffers as they please.

    Args:
        *args, **kwargs: As of :class:`RunningNorm`.

    Attributes:
        burns_in (bool): Whether the kind of layer has a burn-in.
        keeps_states (bool): Whether it remembers past iterations.
        averaged_iterations (int): Iterations behind the statistics.
        held_iterations (list[int]): Iterations that it remembers now, of each
            of its calls in an iteration.
        burning_in (bool): Whether the layer is in its burn-in.
        layer_name (str, optional): Its place in the model, for messages.
    """

    burns_in = False
    keeps_states = False
    averaged_iterations = 1

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.burning_in = False
        self.layer_name: Optional[str] = None
        self._last_iteration: Optional[int] = None
        self._call = 0
        self._first_passes = FirstPasses(MAX_CALLS)
        self._warned_of_fallback = False
        self._warned_of_calls = False

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
        check_count(self, batch.moments.count)
        return Statistics(batch.moments.mean, batch.moments.var)

    def measure(self, x: Tensor) -> Moments:
        """Moments of the input, shape (C,), or (N, C) of each example."""
        return batch_moments(x)

    # What they use.

    def reset_state(self) -> None:
        """Forget what was gathered over past iterations."""

    def export_states(self, names=None) -> List[Dict[str, Any]]:
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

    def check_calls(self, x: Tensor) -> None:
        """For norms whose calls in an iteration have statistics each.

        Raises:
            RuntimeError: If there are too many to be of one iteration, or if
                a CUDA graph is being captured.
        """
        if self.uses_past():
            check_no_capture(self, x)
        if self._call == 1 and not self._warned_of_calls:
            self._warned_of_calls = True
            warnings.warn(
                f'{name_of(self)} is called several times in an iteration, as '
                'a head that pyramid levels share. Each call has past '
                'statistics of its own, but the running statistics mix them: '
                'take a head with a norm for each level (RetinaSepBNHead)')
        if self._call == MAX_CALLS:
            raise RuntimeError(
                f'{name_of(self)} was called {MAX_CALLS} times in iteration '
                f'{self.iteration}. If training was interrupted and the model '
                'is now used otherwise, set .iteration = None on its norms')

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
        self.count_batch(batch)
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
            self.count_batch(batch)
        return self._normalize(batch, statistics)

    def _see(self, x: Tensor, step: ForwardPass, update: bool) -> Batch:
        """The present batch, joined with other processes' parts of it."""
        if update and self.kernel_updates_running(x):
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
                         self.centered, past, batch.moments.count)


def norms_of(model: nn.Module) -> Dict[str, SmallBatchNorm]:
    """The norms of this package in a model, by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, SmallBatchNorm)
    }


def _affine(x: Tensor, weight: Optional[Tensor],
            bias: Optional[Tensor]) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias
