"""Measure what a small batch does to a model's batch norms."""
import copy
import math
import random
import statistics
from contextlib import contextmanager
from itertools import chain, count
from typing import (Any, Callable, Dict, Iterable, Iterator, List, Optional,
                    Sequence, Tuple, Union)

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import Tensor, nn

from ..errors import SetupError
from ..layers import check_positive_int
from ..layers.checks import check_at_least
from .diagnosis import Diagnosis
from .measures import (Layer, WindowErrors, alikeness, mean_errors,
                       measure_layer, window_errors)
from .memory import bytes_kept, memory_of
from .probe import Mode, Probe, batch_norms
from .task import Task

WINDOWS = (2, 4, 8, 16)
_WARM_UP = 8  # iterations, before windows look back
_STRETCHES = 3  # of training, that windows are averaged over


class Diverged(SetupError):
    """A loss is not finite."""


Optimizer = Union[torch.optim.Optimizer, OptimWrapper]


def diagnose(model: nn.Module,
             batches: Iterable[Any],
             optimizer: Optional[Callable[[nn.Module], Optimizer]] = None,
             task: Optional[Task] = None,
             reference: int = 16,
             blocks: int = 4,
             iters: int = 48,
             trained: bool = False,
             tell: Callable[[int, int], None] = lambda done, total: None
             ) -> Diagnosis:
    """Measure what a small batch does to a model's batch norms.

    All is done to a copy of the model: parameters, buffers and random state
    stay as they were. Every batch norm, CBN and its like too, is plain
    BatchNorm there. The copy trains ``iters`` iterations, with warm-up and a
    cosine schedule, so that its weights are no longer those of the
    initialisation. Then the weights stand still, and ``blocks`` of
    ``reference`` images are shown to it, in batches and joined. At last it
    trains at the full learning rate, for the windows.

    Args:
        model (nn.Module): The model, on its device.
        batches (Iterable): Training batches of one size. It is begun again
            where it ends; a batch of another size is left out.
        optimizer (callable, optional): Makes the copy's optimizer, a torch
            optimizer or mmengine's OptimWrapper. None: the weights
            stand still, and windows are not measured.
        task (Task, optional): How the model trains. None: as mmengine's do.
        reference (int): Images of the large batch, which must fit on the
            device. The next multiple of the batch is taken.
        blocks (int): Large batches to measure with, at least 2.
        iters (int): Training iterations before the measurement, at least 2.
        trained (bool): Whether the weights are those of a training: they are
            measured as they are.
        tell (callable): Called with the images seen and those in all.

    Returns:
        Diagnosis: The numbers. Without a batch norm they are empty.

    Raises:
        ValueError: If a number is out of range.
        SetupError: If there are no batches, if the loss is not finite, or if
            the large batch does not fit on the device.
    """
    check_positive_int('reference', reference)
    check_at_least('blocks', blocks, 2)
    check_at_least('iters', iters, 2)
    task = task or Task()
    with _random_state_kept():
        return _Examination(model, batches, optimizer, task, reference, blocks,
                            iters, trained, tell).run()


@contextmanager
def _random_state_kept() -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


class _Examination:
    """One diagnosis: the copy, its batches, and what was measured."""

    def __init__(self, model, batches, optimizer, task, reference, blocks,
                 iters, trained, tell) -> None:
        self.model = copy.deepcopy(model).train()
        self.task = task
        self.batches = self._endless(batches)
        first = next(self.batches)
        self.images = task.size(first)
        self.reference = self.images * -(-reference // self.images)
        self.blocks = blocks
        self.iters = iters
        self.optimizer = optimizer
        self.trained = trained
        self.wrapper: Optional[OptimWrapper] = None
        norms = batch_norms(self.model)
        awake = {name: n for name, n in norms.items() if n.training}
        self.asleep = [name for name in norms if name not in awake]
        self.probe = Probe(self.model, awake or norms, wake=not awake)
        self.done, self.turns, self.alike = 0, 0, float('nan')
        # Of each block: its batches, larger ones, all at once; then twice with
        # fixed statistics.
        sweeps = 3 + len(self._sizes()) if self._sizes() else 1
        self.total = self.images + self.reference * blocks * sweeps
        if optimizer is not None:
            self.total += _STRETCHES * self.reference * blocks + (
                self.images * (_WARM_UP + _STRETCHES * max(WINDOWS) +
                               (0 if trained else iters)))
        self.tell = tell
        if norms and not self._weights():
            raise SetupError('no convolution or linear layer of the model '
                             'trains: there is no gradient to compare')
        self._check_memory(first)

    def _endless(self, batches: Iterable[Any]) -> Iterator[Any]:
        size, seen = None, 0
        for epoch in count():
            sampler = getattr(batches, 'sampler', None)
            if hasattr(sampler, 'set_epoch'):
                sampler.set_epoch(epoch)
            before = seen
            for batch in batches:
                size = size or self.task.size(batch)
                if self.task.size(batch) == size:
                    seen += 1
                    yield batch
            if seen == before:
                raise SetupError(
                    'there are no training images to diagnose with: look at '
                    'train_dataloader' if not seen else
                    f'the batches ended after {seen}, and cannot be begun '
                    'again: give a list or a data loader')

    def _sizes(self) -> List[int]:
        """Numbers of images to normalise together, but for all of them."""
        sizes, size = [], self.images
        while size < self.reference:
            if self.reference % size == 0:
                sizes.append(size)
            size *= 2
        return sizes

    def run(self) -> Diagnosis:
        """Train, compare at weights that stand still, move."""
        if not self.probe.norms:
            return self._result([], {}, [], {}, {}, 0.)
        if self.optimizer is not None and not self.trained:
            warm = max(1, self.iters // 10)
            self._train(self.iters, lambda turn: min(1, (turn + 1) / warm) * (
                0.5 + 0.5 * math.cos(math.pi * turn / self.iters)))
        blocks = [[next(self.batches)
                   for _ in range(self.reference // self.images)]
                  for _ in range(self.blocks)]
        agreement, by_weight, loss = self._compare(blocks)
        self.alike = alikeness(next(iter(self.probe.seen.values()), []),
                               self.images)
        layers = [
            layer._replace(agreement=by_weight.get(
                self.probe.filters.get(layer.name), float('nan')))
            for layer in self._layers()
        ]
        self.probe.fix()
        floor, loss['fixed'] = self._floor(blocks if agreement else [])
        moved, windows = 0., {}
        if self.optimizer is not None:
            try:
                moved, windows = self._move(blocks)
            except Diverged:
                pass  # the full rate is too high for windows of any size
        return self._result(layers, agreement, floor, loss, windows, moved)

    def _result(self, layers, agreement, floor, loss, windows,
                moved) -> Diagnosis:
        watched = set(self.probe.norms.values())
        others: Dict[str, int] = {}
        for module in self.model.modules():
            kind = type(module)
            if module not in watched and issubclass(
                    kind, (nn.GroupNorm, nn.LayerNorm,
                           nn.modules.instancenorm._InstanceNorm)):
                others[kind.__name__] = others.get(kind.__name__, 0) + 1
        return Diagnosis(
            self.images, self.reference, layers, agreement, floor, loss,
            windows, moved, self.asleep, self.alike,
            sorted(self.probe.single), others)

    def _check_memory(self, batch: Any) -> None:
        """Refuse a large batch that would take more memory than there is.

        On a CPU the system would end the process without a word.
        """
        if self.reference == self.images or not self.probe.norms:
            return
        self.probe.watches = False
        needed = self.reference / self.images * bytes_kept(
            lambda: self._loss(batch), self.model)
        self.probe.watches = True
        memory = memory_of(next(self.model.parameters()).device)
        if needed > memory:
            raise SetupError(
                f'a large batch of {self.reference} images takes '
                f'{needed / 2**30:.1f} GiB for its backward pass, but only '
                f'{memory / 2**30:.1f} GiB are free. Take a smaller '
                '--reference, or smaller images')

    # The steps.

    def _train(self, iters: int, rate: Callable[[int], float]) -> None:
        """Train, with factors of the learning rates by iteration."""
        if self.wrapper is None:
            self.wrapper, self.rates = self._build_optimizer()
        self.wrapper.initialize_count_status(self.model, 0, iters)
        for turn in range(iters):
            for group, highest in zip(self.wrapper.optimizer.param_groups,
                                      self.rates):
                group['lr'] = highest * rate(turn)
            with self.wrapper.optim_context(self.model):
                loss = self._loss(next(self.batches))
            self.wrapper.update_params(loss)
            self.turns += 1
            self.probe.seen.clear()
        self.wrapper.zero_grad()

    def _build_optimizer(self) -> Tuple[OptimWrapper, List[float]]:
        wrapper = self.optimizer(self.model)
        if isinstance(wrapper, torch.optim.Optimizer):
            wrapper = OptimWrapper(wrapper)
        if not isinstance(wrapper, OptimWrapper) or isinstance(
                wrapper, OptimWrapperDict):
            raise SetupError(
                'the norm doctor follows one optimizer, but the config has a '
                f'{type(wrapper).__name__}')
        return wrapper, [g['lr'] for g in wrapper.optimizer.param_groups]

    def _move(self, blocks: List[List[Any]]
              ) -> Tuple[float, WindowErrors]:
        """Train at the full rate, and see what windows make of the past.

        Returns:
            tuple: The change of the weights in the largest window, relative;
            errors by window.
        """
        self._train(_WARM_UP, lambda turn: (turn + 1) / _WARM_UP)
        self.probe.remember = max(WINDOWS)
        moved, rows = [], []
        for _ in range(_STRETCHES):
            before = [p.detach().clone() for p in self._weights().values()]
            self._train(max(WINDOWS), lambda turn: 1.)
            moved += [
                ((p.detach() - old).norm() / old.norm().clamp(min=1e-12)
                 ).item() for p, old in zip(self._weights().values(), before)]
            self.probe.remember = 0
            with torch.no_grad():
                self._losses(chain.from_iterable(blocks), 0)
            self.probe.remember = max(WINDOWS)
            rows += self._window_rows()
            self.probe.seen.clear()
        return statistics.mean(moved), mean_errors(rows)

    def _layers(self) -> Iterator[Layer]:
        for name, calls in self.probe.by_name():
            layer = measure_layer(name, calls)
            if layer is not None:
                yield layer

    def _window_rows(self) -> Iterator[WindowErrors]:
        """Errors of each layer, and of each of its calls."""
        for name, calls in self.probe.by_name():
            for call, batches in enumerate(calls):
                past = self.probe.past.get((name, call))
                if past is not None:
                    yield window_errors(past, WINDOWS, batches)

    def _compare(self, blocks: List[List[Any]]
                 ) -> Tuple[Dict[int, List[float]], Dict[str, float],
                            Dict[str, List[float]]]:
        """Gradients of batches, of larger batches and of the largest.

        Returns:
            tuple: Agreement by number of images, a value a block; that of the
            batch by weight; losses by block.
        """
        agreement: Dict[int, List[float]] = {s: [] for s in self._sizes()}
        by_weight: Dict[str, List[float]] = {}
        loss: Dict[str, List[float]] = dict(batch=[], reference=[])
        for seed, block in enumerate(blocks):
            own, value = self._gradient(block, seed)
            loss['batch'].append(value)
            if not agreement:
                continue
            self.probe.watches = False
            whole, value = self._gradient([self.task.join(block)], seed)
            loss['reference'].append(value)
            for size, values in agreement.items():
                if size > self.images:
                    own, _ = self._gradient(self._in_parts(block, size), seed)
                cosines = _cosines(own, whole)
                values.append(statistics.mean(cosines.values()))
                if size == self.images:
                    for name, cosine in cosines.items():
                        by_weight.setdefault(name, []).append(cosine)
            self.probe.watches = True
        return agreement, {
            name: statistics.mean(values) for name, values in by_weight.items()
        }, loss

    def _floor(self, blocks: List[List[Any]]
               ) -> Tuple[List[float], List[float]]:
        """Agreement and loss with statistics that are the same for all."""
        self.probe.mode = Mode.FIXED
        found: Tuple[List[float], List[float]] = [], []
        for seed, block in enumerate(blocks):
            own, value = self._gradient(block, seed)
            whole, _ = self._gradient([self.task.join(block)], seed)
            found[0].append(statistics.mean(_cosines(own, whole).values()))
            found[1].append(value)
        self.probe.mode = Mode.BATCH
        return found

    def _in_parts(self, block: List[Any], size: int) -> List[Any]:
        together = size // self.images
        return [self.task.join(block[start:start + together])
                for start in range(0, len(block), together)]

    def _gradient(self, parts: Sequence[Any],
                  seed: int) -> Tuple[Dict[str, Tensor], float]:
        """Of the mean loss of some batches, and that loss."""
        try:
            value = self._losses(parts, seed)
        except torch.cuda.OutOfMemoryError as error:
            raise SetupError(
                f'{self.task.size(parts[0])} images at once do not fit on the '
                f'device. Take a smaller --reference than {self.reference}, '
                'smaller images, or the CPU') from error
        grads = {name: p.grad / len(parts)
                 for name, p in self._weights().items()
                 if p.grad is not None and p.grad.any()}
        self.model.zero_grad()
        return grads, value

    def _losses(self, parts: Iterable[Any], seed: int) -> float:
        """Mean loss; with a backward pass for each, where there is a graph."""
        torch.manual_seed(seed)
        values = []
        for part in parts:
            loss = self._loss(part)
            if torch.is_grad_enabled():
                loss.backward()
            values.append(loss.item())
        return statistics.mean(values)

    def _weights(self) -> Dict[str, nn.Parameter]:
        """The weights of convolutions and linear layers that train."""
        return {name: p for name, p in self.model.named_parameters()
                if p.requires_grad and p.dim() > 1}

    def _loss(self, batch: Any) -> Tensor:
        self.probe.begin()
        loss = self.task.loss(self.model, batch)
        if not loss.isfinite():
            raise Diverged(
                f'the loss is {loss.item()} after {self.turns} iterations of '
                'training. Lower the learning rate in the config')
        self.done += self.task.size(batch)
        self.tell(self.done, self.total)
        return loss


def _cosines(a: Dict[str, Tensor], b: Dict[str, Tensor]) -> Dict[str, float]:
    return {name: F.cosine_similarity(value.flatten(), b[name].flatten(),
                                      0).item()
            for name, value in a.items() if name in b}
