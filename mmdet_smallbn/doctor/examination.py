"""Measurement of the effect of a small batch on a model's batch norms."""
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
_WARM_UP = 8  # iterations of training before the windows are measured
_STRETCHES = 3  # windows are measured so many times, and averaged


class Diverged(SetupError):
    """Error for a loss that is not finite."""


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
    """Measure the effect of a small batch on a model's batch norms.

    The function works on a copy of the model. Parameters, buffers and random
    state of the model do not change. In the copy every batch norm, also CBN
    and the other norms of this package, runs as plain BatchNorm.

    First the copy trains for ``iters`` iterations, with warm-up and a cosine
    schedule: weights right after the initialisation say little. Then its
    weights are fixed, and it computes gradients of ``blocks`` times
    ``reference`` images, in small batches and in one large batch. Finally it
    trains at the full learning rate, to measure the windows.

    Args:
        model (nn.Module): The model, on its device.
        batches (Iterable): Training batches of one size. The function
            iterates over them again when they end, and skips a batch of
            another size.
        optimizer (callable, optional): Function that takes the copy and
            returns its optimizer, a torch optimizer or mmengine's
            OptimWrapper. None: the copy does not train, and windows are not
            measured.
        task (Task, optional): Training of the model. None: that of mmengine's
            models.
        reference (int): Images in the large batch, which must fit on the
            device. It is rounded up to a multiple of the batch.
        blocks (int): Number of large batches to measure with, at least 2.
        iters (int): Training iterations before the measurement, at least 2.
        trained (bool): True if the model is trained. It is then measured
            without these iterations.
        tell (callable): Progress callback. It takes the number of images
            processed so far and their total number.

    Returns:
        Diagnosis: The measurements. They are empty if the model has no batch
        norm.

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
    """One diagnosis: the copy of the model, the batches, the results."""

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
        # Passes over each block: one per number of images normalised together
        # (the largest is all of them), then two with fixed statistics.
        sweeps = 3 + len(self._sizes()) if self._sizes() else 1
        self.total = self.images + self.reference * blocks * sweeps
        if optimizer is not None:
            self.total += _STRETCHES * self.reference * blocks + (
                self.images * (_WARM_UP + _STRETCHES * max(WINDOWS) +
                               (0 if trained else iters)))
        self.tell = tell
        if norms and not self._weights():
            raise SetupError('no convolution or linear layer of the model '
                             'trains, so there is no gradient to compare. '
                             'Unfreeze some layers')
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
                    'there are no training images to diagnose with. Check '
                    'train_dataloader' if not seen else
                    f'the batches ended after {seen} and cannot be iterated '
                    'again. Give a list or a data loader')

    def _sizes(self) -> List[int]:
        """Return the numbers of images to normalise together.

        The reference itself is not among them.
        """
        sizes, size = [], self.images
        while size < self.reference:
            if self.reference % size == 0:
                sizes.append(size)
            size *= 2
        return sizes

    def run(self) -> Diagnosis:
        """Train, compare gradients at fixed weights, measure the windows."""
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
                pass  # the full learning rate is too high for any window
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
        """Check that the large batch fits into the free memory.

        On a CPU the system would otherwise kill the process without a
        message.

        Raises:
            SetupError: If it does not fit.
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
                f'{memory / 2**30:.1f} GiB are free. Use a smaller '
                '--reference or smaller images')

    def _train(self, iters: int, rate: Callable[[int], float]) -> None:
        """Train; ``rate`` gives each iteration's learning rate factor."""
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
                'the norm doctor supports models with one optimizer, but the '
                f'config has a {type(wrapper).__name__}')
        return wrapper, [g['lr'] for g in wrapper.optimizer.param_groups]

    def _move(self, blocks: List[List[Any]]
              ) -> Tuple[float, WindowErrors]:
        """Train at the full learning rate, and measure the windows.

        Returns:
            tuple: Relative change of the weights in the largest window;
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
        """Yield the window errors of each call of each layer."""
        for name, calls in self.probe.by_name():
            for call, batches in enumerate(calls):
                past = self.probe.past.get((name, call))
                if past is not None:
                    yield window_errors(past, WINDOWS, batches)

    def _compare(self, blocks: List[List[Any]]
                 ) -> Tuple[Dict[int, List[float]], Dict[str, float],
                            Dict[str, List[float]]]:
        """Compare gradients of small batches with those of the large batch.

        Returns:
            tuple: Agreement of each block, by number of images; agreement of
            the small batch, by weight; losses of each block.
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
        """Return each block's agreement and loss with fixed statistics."""
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
        """Return the gradient of the mean loss of some batches, and the loss.
        """
        try:
            value = self._losses(parts, seed)
        except torch.cuda.OutOfMemoryError as error:
            raise SetupError(
                f'{self.task.size(parts[0])} images at once do not fit on the '
                f'device. Use a --reference below {self.reference}, smaller '
                'images, or the CPU') from error
        grads = {name: p.grad / len(parts)
                 for name, p in self._weights().items()
                 if p.grad is not None and p.grad.any()}
        self.model.zero_grad()
        return grads, value

    def _losses(self, parts: Iterable[Any], seed: int) -> float:
        """Return the mean loss; run backward if gradients are enabled."""
        torch.manual_seed(seed)
        values = []
        for part in parts:
            loss = self._loss(part)
            if torch.is_grad_enabled():
                loss.backward()
            values.append(loss.item())
        return statistics.mean(values)

    def _weights(self) -> Dict[str, nn.Parameter]:
        """Return the trainable weights of convolutions and linear layers."""
        return {name: p for name, p in self.model.named_parameters()
                if p.requires_grad and p.dim() > 1}

    def _loss(self, batch: Any) -> Tensor:
        self.probe.begin()
        loss = self.task.loss(self.model, batch)
        if not loss.isfinite():
            raise Diverged(
                f'the loss is {loss.item()} after {self.turns} training '
                'iterations. Lower the learning rate in the config')
        self.done += self.task.size(batch)
        self.tell(self.done, self.total)
        return loss


def _cosines(a: Dict[str, Tensor], b: Dict[str, Tensor]) -> Dict[str, float]:
    return {name: F.cosine_similarity(value.flatten(), b[name].flatten(),
                                      0).item()
            for name, value in a.items() if name in b}
