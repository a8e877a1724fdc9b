"""Probe that runs a model's batch norms as BatchNorm and records their input.
"""
import enum
from collections import defaultdict
from typing import Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import SetupError
from ..functional import Moments, example_moments, normalize, pool_moments
from ..layers.conv_call import find_producer
from ..layers.forward_pass import ForwardPass, current_pass
from ..layers.moment_window import MomentWindow
from ..layers.statistics import Batch

Place = Tuple[str, int]  # name of a norm, index of its call in the pass


class Mode(enum.Enum):
    """Statistics that the norms use.

    Attributes:
        BATCH: Statistics of the batch, with their gradient, as BatchNorm in
            training.
        FIXED: Pooled statistics as constants, as BatchNorm in evaluation.
    """
    BATCH = 'batch'
    FIXED = 'fixed'


class Seen(NamedTuple):
    """Statistics of one batch in one call of a norm.

    Attributes:
        examples (Tensor): Mean of each example, shape (N, C).
        moments (Moments): Moments of the batch, shape (C,).
        gradients (list[Tensor]): Empty before the backward pass. After it,
            one tensor of shape (2, C): the means of g and of g * x_hat (MABN,
            arXiv:2001.06838, Eq. 8, 9).
    """
    examples: Tensor
    moments: Moments
    gradients: List[Tensor]


def pooled(batches: List[Moments]) -> Tuple[Tensor, Tensor]:
    """Return mean and variance of several batches together, shape (C,)."""
    counts = batches[0].mean.new_tensor([b.count for b in batches])
    return pool_moments(
        torch.stack([b.mean for b in batches]),
        torch.stack([b.var for b in batches]), counts[:, None])


class Past:
    """Moments of the last iterations in one call of a norm.

    Args:
        size (int): Number of iterations to remember.
    """

    def __init__(self, size: int) -> None:
        self._ring = MomentWindow(size + 1, positions=32)
        self._plain: List[Moments] = []
        self._size = size
        self._follows = True

    @torch.no_grad()
    def see(self, x: Tensor, moments: Moments, step: ForwardPass) -> None:
        """Add an iteration."""
        self._plain = [moments, *self._plain][:self._size]
        with torch.enable_grad():
            producer = find_producer(x, step)
        self._follows &= producer.known and producer.call is not None
        if self._follows:
            self._ring.enter(Batch(x, moments, moments), producer.call,
                             whole=False, alone=True)

    def plain(self, window: int) -> Tuple[Tensor, Tensor]:
        """Return the pooled moments of the last iterations, as they were."""
        return pooled(self._plain[:window])

    def followed(self) -> Optional[List[Moments]]:
        """Return each iteration's moments, recomputed with current weights.

        The newest iteration comes first. None if the norm's input is not the
        output of a convolution with a trainable weight.
        """
        if not self._follows:
            return None
        found = self._ring.replayed()
        return [Moments(mean, var, now.count) for mean, var, now in zip(
            found.mean.t(), found.var.t(), self._plain)]


def batch_norms(model: nn.Module) -> Dict[str, nn.Module]:
    """Return a model's 2d batch norms, also those of this package."""
    return {
        name: module for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and not isinstance(module, (nn.BatchNorm1d, nn.BatchNorm3d))
    }


class Probe:
    """Recorder that runs a model's batch norms as plain BatchNorm.

    It replaces the forward methods of the norms, so the model must be a copy.

    Args:
        model (nn.Module): Copy of the user's model.
        norms (dict[str, nn.Module]): Norms to measure, by name.
        wake (bool): Measure norms in evaluation mode as if they trained.

    Attributes:
        mode (Mode): Statistics that the norms use.
        watches (bool): True if :attr:`seen` records batches.
        seen (dict): Lists of :class:`Seen` by place.
        filters (dict[str, str]): Name of the weight before each norm.
        single (set[str]): Norms that saw one value per channel.
        past (dict): :class:`Past` by place; recorded while ``remember`` is
            above 0.
        remember (int): Number of iterations that :attr:`past` holds.
    """

    def __init__(self, model: nn.Module,
                 norms: Dict[str, nn.Module],
                 wake: bool = False) -> None:
        self.norms = norms
        self.wake = wake
        self.mode = Mode.BATCH
        self.watches = True
        self.seen: Dict[Place, List[Seen]] = defaultdict(list)
        self.filters: Dict[str, str] = {}
        self.single: Set[str] = set()
        self.past: Dict[Place, Past] = {}
        self.remember = 0
        self._fixed: Dict[str, Tuple[Tensor, Tensor]] = {}
        self._calls: Dict[str, int] = defaultdict(int)
        self._names = {id(p): name for name, p in model.named_parameters()}
        for name, norm in self.norms.items():
            norm.forward = self._forward_of(name, norm)

    def begin(self) -> None:
        """Prepare for a forward pass of the model."""
        self._calls.clear()

    def by_name(self) -> Iterator[Tuple[str, List[List[Seen]]]]:
        """Yield each norm's name and the batches of each of its calls."""
        found = defaultdict(list)
        for (name, _), batches in sorted(self.seen.items(),
                                         key=lambda item: item[0][1]):
            found[name].append(batches)
        for name in self.norms:
            if name in found:
                yield name, found[name]

    def fix(self) -> None:
        """Pool the recorded statistics, for mode ``FIXED``."""
        for name, calls in self.by_name():
            self._fixed[name] = pooled(
                [seen.moments for batches in calls for seen in batches])

    def _forward_of(self, name: str, norm: nn.Module):

        def forward(x: Tensor) -> Tensor:
            return self._forward(name, norm, x)

        return forward

    def _forward(self, name: str, norm: nn.Module, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise SetupError(f'{name}: the norm doctor measures inputs of '
                             'shape (N, C, H, W), but this one has '
                             f'{x.dim()} dimensions')
        single = x.numel() == x.size(1)
        if single:
            self.single.add(name)
        if not norm.training and not self.wake:  # for example in a teacher
            return F.batch_norm(x, norm.running_mean, norm.running_var,
                                norm.weight, norm.bias, eps=norm.eps)
        if single or self.mode is Mode.FIXED:
            mean, var = self._fixed.get(
                name, (norm.running_mean, norm.running_var))
            return F.batch_norm(x, mean, var, norm.weight, norm.bias,
                                eps=norm.eps)
        examples = example_moments(x)
        moments = examples.over_examples()
        step = current_pass()
        gradients: List[Tensor] = []
        if self.watches and step is not ForwardPass.RECOMPUTED and x.numel():
            place = name, self._calls[name]
            self._calls[name] += 1
            self.seen[place].append(Seen(examples.mean, moments, gradients))
            self._see_filters(name, x, step)
            if self.remember:
                past = self.past.setdefault(place, Past(self.remember))
                past.see(x, moments, step)
        elif self.watches and step is ForwardPass.RECOMPUTED:
            gradients = self._first_pass(name, moments).gradients

        def keep(mean_g: Tensor, mean_gx: Tensor):
            gradients[:] = [torch.stack([mean_g, mean_gx])]
            return mean_g, mean_gx

        return normalize(x, moments.mean, moments.var, norm.weight, norm.bias,
                         norm.eps, gradient=keep)

    def _first_pass(self, name: str, moments: Moments) -> Seen:
        """Find the record of the pass that checkpointing recomputes."""
        for place, batches in self.seen.items():
            if place[0] == name and batches and torch.equal(
                    batches[-1].moments.mean, moments.mean):
                return batches[-1]
        return Seen(moments.mean, moments, [])

    def _see_filters(self, name: str, x: Tensor, step: ForwardPass) -> None:
        if name in self.filters or not torch.is_grad_enabled():
            return
        call = find_producer(x, step).call
        if call is not None and id(call.filters.weight) in self._names:
            self.filters[name] = self._names[id(call.filters.weight)]
