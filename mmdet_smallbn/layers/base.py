"""Base class of all small-batch norms."""
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

# No model calls a layer so often in one iteration. More calls mean that
# nothing updates the iteration any more.
MAX_CALLS = 64


class SmallBatchNorm(RunningNorm):
    """Base class of the norms; a subclass provides the training statistics.

    The toolboxes treat the layer as a BatchNorm. It has the same parameters,
    buffers and state dict, so pretrained weights load, and
    ``norm_decay_mult``, ``norm_eval`` and freezing apply. Evaluation is the
    same affine map of each channel. A subclass overrides :meth:`statistics`
    and, if needed, :meth:`batch_statistics`.

    Activation checkpointing, re-entrant or not, does not change the results:
    the recomputation uses the statistics of the first forward pass. State
    that BatchNorm does not have is in plain attributes, because the toolboxes
    average, cast and copy buffers.

    Args:
        *args: Arguments of :class:`RunningNorm`.
        **kwargs: Arguments of :class:`RunningNorm`.

    Attributes:
        burns_in (bool): True if this type of norm has a burn-in.
        keeps_states (bool): True if this type remembers past iterations.
        averaged_iterations (int): Number of iterations in the statistics.
        held_iterations (list[int]): Number of iterations that the layer
            remembers now, one number for each of its calls in an iteration.
        burning_in (bool): True while the layer is in its burn-in.
        layer_name (str, optional): Name of the layer in the model, used in
            messages.
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

    # Subclasses override these methods.

    def uses_past(self) -> bool:
        """Return True if :meth:`statistics` applies, not the batch alone."""
        return False

    def statistics(self, batch: Batch) -> Statistics:
        """Return the statistics for a forward pass of a training step.

        It is called if :meth:`uses_past` is True, but not in a recomputation
        and not under ``no_grad``.
        """
        raise NotImplementedError

    def batch_statistics(self, batch: Batch) -> Statistics:
        """Return the statistics of the present batch, as BatchNorm does.

        Raises:
            ValueError: If each channel has only one value, as in torch.
        """
        check_count(self, batch.moments.count)
        return Statistics(batch.moments.mean, batch.moments.var)

    def measure(self, x: Tensor) -> Moments:
        """Return the input's moments, (C,), or (N, C) for each example."""
        return batch_moments(x)

    # Subclasses use these methods.

    def reset_state(self) -> None:
        """Forget the past iterations."""

    def export_states(self, names=None) -> List[Dict[str, Any]]:
        """Return the state of past iterations, for a checkpoint."""
        return []

    def count_call(self, x: Tensor) -> None:
        """Count the layer's forward passes in this iteration."""
        iteration = self.training_step.iteration
        if iteration is not None and iteration == self._last_iteration:
            self._call += 1
            return
        if iteration is not None:
            self._first_passes.clear()
        self._last_iteration = iteration
        self._call = 0

    def check_calls(self, x: Tensor) -> None:
        """Check the calls of a norm that has statistics for each call.

        Raises:
            RuntimeError: If there are too many calls for one iteration, or if
                a CUDA graph is being captured.
        """
        if self.uses_past():
            check_no_capture(self, x)
        if self._call == 1 and not self._warned_of_calls:
            self._warned_of_calls = True
            warnings.warn(
                f'{name_of(self)} is called several times in an iteration, as '
                'in a head that all pyramid levels share. Each call keeps its '
                'own past statistics, but the running statistics mix them. '
                'Use a head with a norm for each level (RetinaSepBNHead)')
        if self._call == MAX_CALLS:
            raise RuntimeError(
                f'{name_of(self)} was called {MAX_CALLS} times in iteration '
                f'{self.iteration}. If the training loop was interrupted and '
                'the model is now used without it, set .iteration = None on '
                'its norms')

    def warn_once(self, reason: str, remedy: str) -> None:
        """Warn that the layer uses the present batch alone, and why."""
        if self._warned_of_fallback:
            return
        self._warned_of_fallback = True
        warnings.warn(
            f'{name_of(self)} {reason}. It normalises with the present batch '
            f'alone. {remedy}')

    def forward(self, input: Tensor) -> Tensor:
        """Normalise an input of shape (N, C, H, W); same shape and dtype."""
        check_input(self, input)
        if not self.training and self.running_mean is not None:
            return self.evaluate(input)
        return self._forward_of_batch(input)

    @run_eagerly
    def _forward_of_batch(self, x: Tensor) -> Tensor:
        """Normalise with batch statistics, not the running statistics."""
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
        """Repeat a forward pass for activation checkpointing."""
        first = self._first_passes.find(x, self.measure)
        if first is not None:
            return self._normalize(
                first.batch._replace(x=x), first.statistics)
        if self.training and self.uses_past() and x.numel():
            self.warn_once(
                'runs in a backward pass, but no earlier forward pass of it '
                'matches', 'Please report how to reproduce this')
        return self._forward_alone(x, update=False)

    def _forward_alone(self, x: Tensor, update: bool) -> Tensor:
        """Run a forward pass outside training steps, with this batch alone."""
        batch = self._see(x, ForwardPass.UNTRACKED, update)
        if batch.is_empty:
            return self._pass_through(batch)
        statistics = self.batch_statistics(batch)
        if update:
            self.count_batch(batch)
        return self._normalize(batch, statistics)

    def _see(self, x: Tensor, step: ForwardPass, update: bool) -> Batch:
        """Measure the present batch, and join the other processes' parts."""
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
        """Return an empty output that stays connected to the graph.

        An empty batch (zero RoIs) changes no state.
        """
        return normalize(batch.x, batch.moments.mean, batch.moments.var,
                         self.weight, self.bias, self.eps)

    def _normalize(self, batch: Batch, statistics: Statistics) -> Tensor:
        mean, var, gradient, r, d, past = statistics
        weight, bias = self.weight, self.bias
        # An empty batch has no moments, so r and d are not defined.
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
    """Return the model's norms that are from this package, by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, SmallBatchNorm)
    }


def _affine(x: Tensor, weight: Optional[Tensor],
            bias: Optional[Tensor]) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias
