"""What every small-batch norm shares."""
import warnings
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn

from ..functional import (Moments, Processes, batch_moments, normalize,
                          normalize_for_inference)
from .checks import check_at_least
from .forward_pass import ForwardPass, current_pass, run_eagerly
from .recomputation import FirstPasses
from .statistics import Batch, Statistics

# No model calls a layer so often: the iteration is not told any more.
_MAX_CALLS = 64


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
        averaged_iterations (int): Iterations behind the statistics.
        num_groups (int, optional): Groups of channels that share statistics.
            None: every channel has its own.
        example_weight (float): Weight of an example's own statistics in
            evaluation; see :func:`mmdet_smallbn.set_example_weight`.
        built_example_weight (float): The one it was built with.
        gradient_scale (float | Tensor): What the loss is multiplied with
            before the backward pass, told by the hook: a loss scale in mixed
            precision, one part in gradient accumulation.
        iteration (int, optional): The training loop's iteration, told by
            :class:`mmdet_smallbn.BurnInHook`. None: unknown, and every
            training forward is an iteration of its own.
        burning_in (bool): Whether the layer is in its burn-in.
        layer_name (str, optional): The layer's place in the model, told by
            the hook, for messages.
    """

    burns_in = False
    keeps_states = False
    centered = True
    num_groups: Optional[int] = None
    built_example_weight = 0.

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
        self.gradient_scale = 1.
        self.iteration: Optional[int] = None
        self.burning_in = False
        self.layer_name: Optional[str] = None
        self._last_iteration: Optional[int] = None
        self._call = 0
        self._states: List[Any] = []
        self._first_passes = FirstPasses(_MAX_CALLS)
        self._last_seen: Optional[Tuple[int, torch.Size]] = None
        self._warned_of_calls = False
        self._warned_of_levels = False
        self._warned_of_fallback = False

    @property
    def averaged_iterations(self) -> int:
        return 1

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

    def new_state(self) -> Any:
        """Empty state for one of the layer's calls in an iteration."""
        raise NotImplementedError

    # What they use.

    def reset_state(self) -> None:
        """Forget what was gathered over past iterations."""
        self._states = []

    def export_states(self) -> List[Dict[str, Any]]:
        """What was gathered over past iterations, for a checkpoint.

        Returns:
            list[dict]: Of each call in an iteration; of tensors and numbers,
            copied to the CPU, beside the layer's settings. Empty if there is
            nothing.
        """
        return [
            dict(layer=repr(self), state=_on(state.state_dict(), 'cpu'))
            for state in self._states
        ]

    def restore_states(self, exported: List[Dict[str, Any]]) -> None:
        """Take up what :meth:`export_states` gave.

        Raises:
            ValueError: If it was gathered by a layer with other settings.
        """
        states = []
        for values in exported:
            if values['layer'] != repr(self):
                raise ValueError(f'{self._who()}: it was {values["layer"]}, '
                                 f'and is {self!r}')
            state = self.new_state()
            state.load_state_dict(_on(values['state'], self._device()))
            states.append(state)
        self._states = states

    def _device(self) -> Optional[torch.device]:
        anchor = self.weight if self.weight is not None else self.running_mean
        return None if anchor is None else anchor.device

    def state_of_call(self) -> Any:
        """The state of this forward's place among those of the iteration."""
        while len(self._states) <= self._call:
            self._states.append(self.new_state())
        return self._states[self._call]

    def check_count(self, count) -> None:
        """Refuse one value a channel, of which there is no variance."""
        if isinstance(count, int) and count == 1:
            raise ValueError(
                f'{self._who()} got one value per channel, which has no '
                'variance. Give it more images, a larger feature map, or put '
                'no norm there')

    def warn_once(self, reason: str, remedy: str) -> None:
        """Say that the layer falls back to the present batch, and why."""
        if self._warned_of_fallback:
            return
        self._warned_of_fallback = True
        warnings.warn(
            f'{self._who()} {reason}: it normalises with the present batch '
            f'alone. {remedy}')

    # The forward pass.

    def forward(self, input: Tensor) -> Tensor:
        """Normalise an input of shape (N, C, H, W); same shape and dtype."""
        self._refuse_what_would_go_wrong(input)
        self._check_input_dim(input)
        if not self.training and self.running_mean is not None:
            return self.evaluate(input)
        return self._forward_of_batch(input)

    @run_eagerly
    def _forward_of_batch(self, x: Tensor) -> Tensor:
        """The forward pass with statistics of the input's own."""
        step = current_pass()
        if step is ForwardPass.RECOMPUTED:
            first = self._first_passes.find(x, self.measure)
            if first is not None:
                return self._normalize(
                    first.batch._replace(x=x), first.statistics)
            if self.training and self.uses_past() and x.numel():
                self.warn_once(
                    'runs in a backward pass, and not as the repetition of '
                    'a forward that it knows', 'Report how it came to that')
        elif self.training and step is not ForwardPass.UNTRACKED:
            self._count_call(x)
        processes = Processes.current() if self.sync and self.training else (
            None)
        own = self.measure(x)
        moments = own if own.mean.dim() == 1 else own.over_examples()
        if processes is None and x.numel() == 0:
            # Zero RoIs: no state changes, the graph stays connected.
            return normalize(x, moments.mean, moments.var, self.weight,
                             self.bias, self.eps)
        if processes is not None:
            moments = processes.join(moments)
        batch = Batch(x, own, moments, processes)
        statistics = self._statistics_in_use(batch, step)
        if self.training and step is not ForwardPass.RECOMPUTED:
            self._update_running(moments)
        if step is ForwardPass.CHECKPOINTED and self.training:
            self._first_passes.add(batch, statistics)
        return self._normalize(batch, statistics)

    def evaluate(self, x: Tensor) -> Tensor:
        """The forward pass in evaluation.

        An affine map of each channel, unless examples have a weight in it.
        """
        return normalize_for_inference(x, self.running_mean, self.running_var,
                                       self.weight, self.bias, self.eps,
                                       self.example_weight, self.num_groups,
                                       self.centered)

    def _statistics_in_use(self, batch: Batch,
                           step: ForwardPass) -> Statistics:
        if (self.training and self.uses_past()
                and step in (ForwardPass.PLAIN, ForwardPass.CHECKPOINTED)):
            return self.statistics(batch)
        return self.batch_statistics(batch)

    def _normalize(self, batch: Batch, statistics: Statistics) -> Tensor:
        mean, var, share, gradient, r, d, follow = statistics
        if follow is not None and torch.is_grad_enabled():
            mean, var = follow()
        weight, bias = self.weight, self.bias
        # Of no values there are no moments: nothing to renormalise with.
        if r is not None and batch.x.numel():
            if d is not None:
                bias = _affine(d, weight, bias)
            weight = r if weight is None else weight * r
        if batch.processes is not None and mean.dim() == 1:
            gradient = batch.processes.gradient_statistics(
                batch.own.count / batch.moments.count, gradient)
        return normalize(batch.x, mean, var, weight, bias, self.eps, share,
                         gradient, batch.moments.count)

    @torch.no_grad()
    def _update_running(self, moments: Moments) -> None:
        if self.running_mean is None:
            return
        self.num_batches_tracked.add_(1)
        factor = self.momentum
        if factor is None:  # cumulative average, as in nn.BatchNorm2d
            factor = self.num_batches_tracked.to(
                moments.mean.dtype).reciprocal()
        targets = self.running_targets(moments, factor)
        for running, target in zip((self.running_mean, self.running_var),
                                   targets):
            if target is None:
                continue
            now = running.to(target.dtype)
            # x - x is 0 for what is finite alone.
            target = torch.where(target - target == 0, target, now)
            if now is running:
                running.lerp_(target, factor)
            else:
                running.copy_(torch.lerp(now, target, factor))

    def _refuse_what_would_go_wrong(self, x: Tensor) -> None:
        if isinstance(x, torch.fx.Proxy):
            raise TypeError(
                f'{self._who()} cannot be traced symbolically, which would '
                'make one of its branches the only one. Remove '
                'efficient_conv_bn_eval from the config')
        if self.training and getattr(self, '_is_replica', False):
            raise RuntimeError(
                f'{self._who()} was copied for one forward by DataParallel, '
                'and what it gathers would be lost. Use '
                'DistributedDataParallel')

    def _count_call(self, x: Tensor) -> None:
        """Set the index of this forward among those of the iteration.

        Raises:
            RuntimeError: If there are too many to be of one iteration.
        """
        if self.iteration is None:
            self._watch_for_levels(x)
        if self.iteration is None or self.iteration != self._last_iteration:
            if self.iteration is not None:
                self._first_passes.clear()
            self._last_iteration = self.iteration
            self._call = 0
            return
        self._call += 1
        if not self.keeps_states:
            return
        if self._call == 1 and not self._warned_of_calls:
            self._warned_of_calls = True
            warnings.warn(
                f'{self._who()} is called several times in an iteration, as a '
                'head that pyramid levels share. Each call has past '
                'statistics of its own, but the running statistics mix them: '
                'take a head with a norm for each level (RetinaSepBNHead)')
        if self._call == _MAX_CALLS:
            raise RuntimeError(
                f'{self._who()} was called {_MAX_CALLS} times in iteration '
                f'{self.iteration}. If training was interrupted and the model '
                'is now used otherwise, set .iteration = None on its norms')

    def _watch_for_levels(self, x: Tensor) -> None:
        """Warn of levels of a pyramid that pose as iterations.

        Where the iteration is not known, maps of another size at weights that
        no step has moved are the sign.
        """
        if not self.keeps_states or self._warned_of_levels or (
                self.weight is None or not self.weight.requires_grad):
            return
        seen = (self.weight._version, x.shape[2:])
        last, self._last_seen = self._last_seen, seen
        if last is not None and last[0] == seen[0] and last[1] != seen[1]:
            self._warned_of_levels = True
            warnings.warn(
                f'{self._who()} is called with maps of several sizes between '
                'two steps, and takes every call for an iteration. If they '
                'are levels of a pyramid that share a head, take one with a '
                'norm for each level (RetinaSepBNHead), or let BurnInHook '
                'tell the iterations')

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() != 4:
            raise ValueError(
                f'{self._who()} takes feature maps of shape (N, C, H, W), but '
                f'got an input of shape {tuple(x.shape)}. Give it 4D inputs, '
                'such as the output of a convolution')
        if x.size(1) != self.num_features:
            raise ValueError(
                f'{self._who()} was built for {self.num_features} channels, '
                f'but got an input of shape {tuple(x.shape)}. Build it with '
                f'num_features={x.size(1)}, or give it the output that it was '
                'built for')

    def _who(self) -> str:
        kind = type(self).__name__
        if self.layer_name:
            return f'{kind} {self.layer_name!r}'
        return f'{kind}({self.num_features})'

    # State that is not in buffers.

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # The weights jumped: the past has nothing to say about them.
        self.reset_state()

    def _apply(self, fn, *args, **kwargs):
        super()._apply(fn, *args, **kwargs)
        device = self._device()
        if device is not None:
            for state in self._states:
                state.to(device)
        return self

    def extra_repr(self) -> str:
        return super().extra_repr() + (', sync=True' if self.sync else '')


def _affine(x: Tensor, weight: Optional[Tensor],
            bias: Optional[Tensor]) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _on(values: Dict[str, Any], device) -> Dict[str, Any]:
    """Copies of the tensors in a nested dict on a device."""
    return {
        key: _on(value, device) if isinstance(value, dict) else
        value.detach().to(device, copy=True)
        if isinstance(value, Tensor) else value
        for key, value in values.items()
    }
