"""Measure what a small batch does to a model's batch norms."""
import copy
import random
import statistics
from contextlib import contextmanager
from itertools import chain, repeat
from typing import (Any, Callable, Dict, Iterable, Iterator, List, NamedTuple,
                    Optional, Sequence, Tuple, Union)

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.optim import OptimWrapper
from torch import Tensor, nn

from ..errors import SetupError
from ..layers import check_positive_int
from ..layers.checks import check_at_least
from .measures import (Layer, alikeness, measure_layer, moments_of,
                       window_errors)
from .probe import Mode, Probe, batch_norms

WINDOWS = (2, 4, 8, 16)


class Task:
    """How mmengine's models train. Subclass it for models of other loops."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch, a scalar."""
        # Preprocessing writes to the samples.
        data = model.data_preprocessor(copy.deepcopy(batch), True)
        return model.parse_losses(model(**data, mode='loss'))[0]

    def size(self, batch: Any) -> int:
        """Images of a batch."""
        if isinstance(batch, dict):
            return self.size(next(iter(batch.values())))
        return len(batch)

    def join(self, batches: Sequence[Any]) -> Any:
        """Several batches as one."""
        first = batches[0]
        if isinstance(first, dict):
            return {key: self.join([batch[key] for batch in batches])
                    for key in first}
        if isinstance(first, Tensor):
            return torch.cat(list(batches))
        return list(chain.from_iterable(batches))


class Diagnosis(NamedTuple):
    """What :func:`diagnose` measured.

    Attributes:
        images (int): Images of a batch.
        reference (int): Images of the large batch.
        layers (list[Layer]): The watched norms, in the order of the model.
        agreement (dict[int, list[float]]): By the number of images that are
            normalised together, the cosine of two gradients of the same
            images: normalised so, and all ``reference`` images together. Mean
            over the weights of convolutions and linear layers; a value a
            block of ``reference`` images. 1: the small batch does no harm.
        loss (dict[str, list[float]]): Of each block, the mean loss
            ``'batch'``: with statistics of each batch, ``'fixed'``: with
            those of all batches, as in evaluation, ``'reference'``: of the
            large batch.
        windows (dict[int, tuple]): By window, RMS error of the normalised
            output, mean over layers: past moments as they were, and brought
            to today's weights (None: nowhere possible). 1 is BatchNorm.
        moved (float): Change of the weights in ``moved_over`` iterations, as
            a part of their size.
        moved_over (int): Iterations, 0 if the weights stood still.
        asleep (list[str]): Batch norms that the model keeps in evaluation
            mode. If these are all, they were measured as if they trained.
        alike (float): How alike the images of a batch are, in the first norm:
            0 as images taken by chance, 1 the same. NaN of one image, and if
            it sees regions.
        single (list[str]): Norms that see one value a channel.
        others (dict[str, int]): How many norms of other kinds there are.
    """
    images: int
    reference: int
    layers: List[Layer]
    agreement: Dict[int, List[float]]
    loss: Dict[str, List[float]]
    windows: Dict[int, Tuple[float, Optional[float]]]
    moved: float
    moved_over: int
    asleep: List[str]
    alike: float
    single: List[str]
    others: Dict[str, int]


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
    BatchNorm there. The copy trains ``iters`` iterations, so that its weights
    are no longer those of the initialisation. Then the weights stand still,
    and ``blocks`` of ``reference`` images are shown to it, in batches and
    joined.

    Args:
        model (nn.Module): The model, on its device.
        batches (Iterable): Training batches of one size. It is begun again
            where it ends; a batch of another size is left out.
        optimizer (callable, optional): Makes the copy's optimizer, a torch
            optimizer or mmengine's OptimWrapper. Its learning rates rise from
            0 over the iterations. None: the weights stand still, and windows
            are not measured.
        task (Task, optional): How the model trains. None: as mmengine's do.
        reference (int): Images of the large batch, which must fit on the
            device. More than the batch, and a multiple of it.
        blocks (int): Large batches to measure with, at least 2.
        iters (int): Training iterations; at least 2 if there are any.
        trained (bool): Whether the weights are those of a training: they are
            measured first, and move afterwards.
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
                            iters, tell).run(trained)


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
                 iters, tell) -> None:
        self.model = copy.deepcopy(model).train()
        self.task = task
        self.batches = self._endless(batches)
        self.images = task.size(next(self.batches))
        self.reference = max(reference, self.images)
        if self.reference % self.images:
            raise ValueError(
                f'reference must be a multiple of the batch, {self.images} '
                f'images, but got {reference}')
        self.blocks = blocks
        self.iters = iters if optimizer is not None else 0
        self.optimizer = optimizer
        norms = batch_norms(self.model)
        awake = {name: n for name, n in norms.items() if n.training}
        self.asleep = [name for name in norms if name not in awake]
        self.probe = Probe(self.model, awake or norms)
        self.moved, self.done, self.alike = 0., 0, float('nan')
        self.total = self.images * self.iters + (
            self.reference * blocks * self._sweeps())
        self.tell = tell

    def _endless(self, batches: Iterable[Any]) -> Iterator[Any]:
        size = None
        for epoch in repeat(batches):
            found = False
            for batch in epoch:
                size = size or self.task.size(batch)
                if self.task.size(batch) == size:
                    found = True
                    yield batch
            if not found:
                raise SetupError('there are no training images to diagnose '
                                 'with: look at train_dataloader')

    def _sizes(self) -> List[int]:
        """Numbers of images to normalise together, but for all of them."""
        sizes, size = [], self.images
        while size < self.reference:
            if self.reference % size == 0:
                sizes.append(size)
            size *= 2
        return sizes

    def _sweeps(self) -> int:
        # One to see the moments; two in evaluation; one a size, and of all.
        return 4 + len(self._sizes()) if self._sizes() else 1

    def run(self, trained: bool) -> Diagnosis:
        if not self.probe.norms:
            return self._result([], {}, {}, {})
        if not trained:
            self._train()
        blocks = [[next(self.batches)
                   for _ in range(self.reference // self.images)]
                  for _ in range(self.blocks)]
        self._look(blocks)
        self.probe.fix()
        self.alike = alikeness(next(iter(self.probe.seen.values()), []),
                               self.images)
        layers = dict(self._layers())
        windows = {} if trained else self._windows()
        agreement, by_weight, loss = self._compare(blocks)
        layers = [
            layer._replace(agreement=by_weight.get(
                self.probe.filters.get(name), float('nan')))
            for name, layer in layers.items()
        ]
        if trained and self.iters:
            self._train()
            self._look(blocks)
            windows = self._windows()
        return self._result(layers, agreement, loss, windows)

    def _result(self, layers, agreement, loss, windows) -> Diagnosis:
        watched = set(self.probe.norms.values())
        others: Dict[str, int] = {}
        for module in self.model.modules():
            kind = type(module)
            if module not in watched and issubclass(
                    kind, (nn.GroupNorm, nn.LayerNorm,
                           nn.modules.instancenorm._InstanceNorm)):
                others[kind.__name__] = others.get(kind.__name__, 0) + 1
        return Diagnosis(
            self.images, self.reference, layers, agreement, loss, windows,
            self.moved, min(self.iters, max(WINDOWS)), self.asleep, self.alike,
            sorted(self.probe.single), others)

    # The steps.

    def _train(self) -> None:
        """Move the weights, and remember the last iterations."""
        wrapper = self.optimizer(self.model) if self.iters else None
        if wrapper is None:
            return
        if isinstance(wrapper, torch.optim.Optimizer):
            wrapper = OptimWrapper(wrapper)
        if not isinstance(wrapper, OptimWrapper):
            raise SetupError(
                'the norm doctor follows one optimizer, but the config has a '
                f'{type(wrapper).__name__}')
        groups = wrapper.optimizer.param_groups
        rates = [group['lr'] for group in groups]
        begin = self.iters - max(WINDOWS)
        wrapper.initialize_count_status(self.model, 0, self.iters)
        before: List[Tensor] = []
        for turn in range(self.iters):
            for group, rate in zip(groups, rates):
                group['lr'] = rate * (turn + 1) / self.iters
            if turn == max(begin, 0):
                self.probe.remember = max(WINDOWS)
                before = [p.detach().clone() for p in self._weights().values()]
            with wrapper.optim_context(self.model):
                loss = self._loss(next(self.batches))
            if not loss.isfinite():
                raise SetupError(
                    f'the loss is {loss.item()} after {turn} iterations of '
                    'training. Lower the learning rate, or give a checkpoint')
            wrapper.update_params(loss)
            self.probe.seen.clear()
        self.probe.remember = 0
        wrapper.zero_grad()
        self.moved = statistics.mean(
            ((now.detach() - old).norm() / old.norm().clamp(min=1e-12)).item()
            for now, old in zip(self._weights().values(), before))

    def _look(self, blocks: List[List[Any]]) -> None:
        """Let the probe see the batches, at weights that stand still."""
        self.probe.seen.clear()
        for number, block in enumerate(blocks):
            torch.manual_seed(number)
            for batch in block:
                self._loss(batch).backward()
        self.model.zero_grad()

    def _layers(self) -> Iterator[Tuple[str, Layer]]:
        for name, calls in self.probe.by_name():
            layer = measure_layer(name, calls)
            if layer is not None:
                yield name, layer

    def _windows(self) -> Dict[int, Tuple[float, Optional[float]]]:
        """Mean errors over the layers, by window."""
        windows = [w for w in (1, *WINDOWS) if w <= self.iters]
        rows = []
        for name, calls in self.probe.by_name():
            for call, truth in enumerate(moments_of(calls)):
                past = self.probe.past.get((name, call))
                if past is not None:
                    rows.append(window_errors(past, windows, truth))
        self.probe.past.clear()
        if not rows:
            return {}
        found = {}
        for window in windows:
            plain = [row[window][0] for row in rows]
            followed = [row[window][1] for row in rows
                        if row[window][1] is not None]
            found[window] = (
                statistics.mean(plain),
                statistics.mean(followed) if followed else None)
        return found

    def _compare(self, blocks: List[List[Any]]
                 ) -> Tuple[Dict[int, List[float]], Dict[str, float],
                            Dict[str, List[float]]]:
        """Gradients of batches, of larger batches and of the largest."""
        agreement: Dict[int, List[float]] = {s: [] for s in self._sizes()}
        loss: Dict[str, List[float]] = dict(batch=[], fixed=[], reference=[])
        by_weight: Dict[str, List[float]] = {}
        for seed, block in enumerate(blocks if agreement else []):
            floor = None
            for mode in (Mode.FIXED, Mode.BATCH):
                self.probe.mode = mode
                whole, value = self._gradient([self.task.join(block)], seed)
                if mode is Mode.BATCH:
                    loss['reference'].append(value)
                for size in self._sizes():
                    if mode is Mode.FIXED and size != self.images:
                        continue
                    parts = self._in_parts(block, size)
                    own, value = self._gradient(parts, seed)
                    cosines = {
                        name: F.cosine_similarity(
                            own[name].flatten(), whole[name].flatten(),
                            0).item() for name in whole if name in own
                    }
                    mean = statistics.mean(cosines.values())
                    if mode is Mode.FIXED:
                        floor = max(mean, 0.05)
                        loss['fixed'].append(value)
                        continue
                    agreement[size].append(min(mean / floor, 1.))
                    if size == self.images:
                        loss['batch'].append(value)
                        for name, cosine in cosines.items():
                            by_weight.setdefault(name, []).append(cosine)
            self.probe.seen.clear()
        means = {name: statistics.mean(v) for name, v in by_weight.items()}
        return agreement, means, loss

    def _in_parts(self, block: List[Any], size: int) -> List[Any]:
        together = size // self.images
        return [self.task.join(block[start:start + together])
                for start in range(0, len(block), together)]

    def _gradient(self, parts: List[Any],
                  seed: int) -> Tuple[Dict[str, Tensor], float]:
        """Of the mean loss of some batches, and that loss."""
        torch.manual_seed(seed)
        self.model.zero_grad()
        total = 0.
        try:
            for part in parts:
                loss = self._loss(part).div(len(parts))
                loss.backward()
                total += loss.item()
        except torch.cuda.OutOfMemoryError as error:
            raise SetupError(
                f'{self.task.size(parts[0])} images at once do not fit on the '
                f'device. Take a smaller reference than {self.reference}, '
                'smaller images, or the CPU') from error
        grads = {name: p.grad.clone() for name, p in self._weights().items()
                 if p.grad is not None and p.grad.any()}
        self.model.zero_grad()
        return grads, total

    def _weights(self) -> Dict[str, nn.Parameter]:
        """The weights of convolutions and linear layers that train."""
        return {name: p for name, p in self.model.named_parameters()
                if p.requires_grad and p.dim() > 1}

    def _loss(self, batch: Any) -> Tensor:
        self.probe.begin()
        loss = self.task.loss(self.model, batch)
        self.done += self.task.size(batch)
        self.tell(min(self.done, self.total), self.total)
        return loss
