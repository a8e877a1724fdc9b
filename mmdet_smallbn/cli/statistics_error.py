"""Errors of the norms' statistics against those of a large batch."""
import argparse
import json
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..errors import SetupError, one_line_errors
from ..functional import Moments, batch_moments, normalize, pool_moments
from ..hooks import bare_model
from ..layers import CBN
from ..layers.conv_call import find_producer
from ..layers.forward_pass import ForwardPass
from ..layers.moment_window import MomentWindow
from ..layers.moving_average import ExponentialMovingAverage
from ..layers.statistics import Batch
from ..pictures import save_errors
from ..progress import progress_bar
from .runtime import (add_config_arguments, add_run_arguments, build_runner,
                      load_config, training_alone)

BN, NAIVE, EXACT, EMA = 'BN', 'NaiveCBN', 'CBN, all positions', 'EMA'
METRICS = ('mean', 'var', 'mean_square')


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description='Train with CBN. At several iterations, compute the mean '
        'and variance that different norms would use, and measure their '
        'errors against a large batch with the same weights')
    add_config_arguments(parser)
    add_run_arguments(parser)
    parser.add_argument(
        '--windows', type=int, nargs='+', default=[1, 2, 4, 8, 16],
        help='window sizes, in iterations (default: 1 2 4 8 16)')
    parser.add_argument(
        '--positions',
        type=int,
        nargs='+',
        default=[32, 128],
        help='numbers of positions to estimate the derivative from (default: '
        '32 128)')
    parser.add_argument(
        '--images', type=int, default=64,
        help='size of the large batch (default: 64)')
    parser.add_argument('--batch', type=int, default=2,
                        help='training batch size (default: 2)')
    parser.add_argument('--iters', type=int, default=300,
                        help='training iterations (default: 300)')
    parser.add_argument(
        '--every', type=int, default=25,
        help='iterations between measurements (default: 25)')
    parser.add_argument(
        '--learning-rates',
        type=float,
        nargs='+',
        default=[0.25, 1., 4.],
        help="factors on the config's learning rate (default: 0.25 1 4)")
    parser.add_argument('--seed', type=int, default=0,
                        help='random seed (default: 0)')
    return parser.parse_args(argv)


class _Layer:
    """Statistics that several norms would use at one layer."""

    def __init__(self, norm: CBN, windows: int,
                 positions: Sequence[int]) -> None:
        self.norm = norm
        size = windows + 1  # they are read after the latest was pushed
        self.naive = MomentWindow(size)
        self.compensated = {EXACT: MomentWindow(size)}
        self.compensated.update(
            (f'CBN, {p} positions', MomentWindow(size, p)) for p in positions)
        self.average = ExponentialMovingAverage(0.02)
        # Means and variances of the stored iterations, the newest first.
        self.held: Dict[str, Tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def see(self, x: Tensor) -> None:
        """Record the input of a training forward pass."""
        moments = batch_moments(x)
        batch = Batch(x, moments, moments)
        producer = find_producer(x, ForwardPass.PLAIN)
        windows = {NAIVE: (self.naive, None)}
        windows.update((name, (window, producer.call))
                       for name, window in self.compensated.items())
        for name, (window, call) in windows.items():
            window.enter(batch, call, whole=False, alone=True)
            found = window.replayed()
            self.held[name] = found.mean.t(), found.var.t()
        square = moments.mean_square()
        self.average.push(torch.stack([moments.mean, square]))

    def estimates(self, windows: Sequence[int]):
        """Yield name, window, mean and variance of each estimate."""
        for name, (means, variances) in self.held.items():
            for k in windows:
                if k == 1 and name != NAIVE:
                    continue
                ones = means.new_ones((k, 1))
                yield (BN if k == 1 else name, k,
                       *pool_moments(means[:k], variances[:k], ones))
        # The average starts at 0, so it is divided by its total weight.
        grown = 1 - (1 - self.average.momentum)**(self.average.turn + 1)
        mean, square = self.average.mean() / grown
        yield EMA, None, mean, (square - mean.square()).clamp(min=0)


class _Measure(Hook):
    """Hook that records the layers and measures every few iterations."""
    priority = 'LOW'

    def __init__(self, args: argparse.Namespace, tell) -> None:
        self.args = args
        self.tell = tell
        self.rows: List[Dict[str, Any]] = []

    def before_train(self, runner) -> None:
        self.layers = {
            name: _Layer(norm, max(self.args.windows), self.args.positions)
            for name, norm in bare_model(runner).named_modules()
            if isinstance(norm, CBN) and norm.compensate and norm.training
        }
        if not self.layers:
            raise SetupError('this model has no CBN that trains: use a config '
                             'from configs/cbn, or the demo')
        loader = runner.cfg.train_dataloader.copy()
        loader.update(
            batch_size=self.args.images,
            sampler=dict(type='DefaultSampler', shuffle=False))
        self.large = next(iter(runner.build_dataloader(loader, seed=0)))
        if len(self.large['inputs']) < self.args.images:
            raise SetupError(f'--images {self.args.images} is more than the '
                             f'{len(self.large["inputs"])} training images: '
                             'give a smaller number')
        self.handles = [
            layer.norm.register_forward_pre_hook(self._watch(layer))
            for layer in self.layers.values()
        ]

    @staticmethod
    def _watch(layer: _Layer):

        def hook(norm, inputs):
            if norm.training and torch.is_grad_enabled():
                layer.see(inputs[0])

        return hook

    def before_train_iter(self, runner, *args, **kwargs) -> None:
        self.truth: Dict[str, Moments] = {}
        if runner.iter % self.args.every == 0 and runner.iter >= max(
                self.args.windows):
            self.truth = self._large_batch(runner)

    def after_train_iter(self, runner, *args, **kwargs) -> None:
        for name, truth in self.truth.items():
            for kind, window, *moments in self.layers[name].estimates(
                    self.args.windows):
                self.rows.append(
                    dict(
                        iter=runner.iter,
                        layer=name,
                        kind=kind,
                        window=window,
                        **_errors(*moments, truth)))
        self.tell()

    def after_train(self, runner) -> None:
        for handle in self.handles:
            handle.remove()

    @torch.no_grad()
    def _large_batch(self, runner) -> Dict[str, Moments]:
        """Return the large batch's moments at each layer.

        Each layer normalises with the moments of this batch.
        """
        seen: Dict[str, Moments] = {}
        model = bare_model(runner)

        def forward_of(name: str, norm: CBN):

            def forward(x: Tensor) -> Tensor:
                seen[name] = moments = batch_moments(x)
                return normalize(x, moments.mean, moments.var, norm.weight,
                                 norm.bias, norm.eps)

            return forward

        for name, layer in self.layers.items():
            layer.norm.forward = forward_of(name, layer.norm)
        try:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model(**model.data_preprocessor(self.large, True), mode='loss')
        finally:
            for layer in self.layers.values():
                del layer.norm.forward
        return seen


def _errors(mean: Tensor, var: Tensor, truth: Moments) -> Dict[str, float]:
    """Return the mean absolute errors over channels.

    The error of the mean is in standard deviations. Those of variance and
    mean square are relative.
    """
    square = var + mean.square()
    alive = truth.var > 1e-12  # excludes constant channels
    errors = dict(
        mean=(mean - truth.mean) / truth.var.sqrt(),
        var=var / truth.var - 1,
        mean_square=square / truth.mean_square() - 1)
    return {
        name: error[alive].abs().mean().item()
        for name, error in errors.items()
    }


def prepare(cfg: Config, args: argparse.Namespace, factor: float) -> Config:
    """Return the config of the training to measure."""
    cfg = training_alone(cfg)
    cfg.train_dataloader.batch_size = args.batch
    cfg.optim_wrapper.optimizer.lr *= factor
    cfg.train_cfg = dict(
        type='IterBasedTrainLoop',
        max_iters=args.iters,
        val_interval=args.iters + 1)
    cfg.custom_hooks = [dict(type='BurnInHook', iters=0)]
    cfg.randomness = dict(seed=args.seed)
    cfg.work_dir = str(Path(cfg.work_dir) / f'lr_{factor:g}')
    cfg.experiment_name = f'statistics_error_{factor:g}'
    return cfg


def summarise(rows: Sequence[Dict[str, Any]]) -> Dict[tuple, Dict[str, float]]:
    """Average the errors over layers and iterations.

    Returns:
        dict: Errors, keyed by learning rate factor, statistics and window.
    """
    groups: Dict[tuple, List[Dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row['lr'], row['kind'], row['window']].append(row)
    return {
        key: {
            metric: sum(row[metric] for row in group) / len(group)
            for metric in METRICS
        }
        for key, group in groups.items()
    }


def report(rows: Sequence[Dict[str, Any]], console: Console) -> None:
    """Print the errors, those of CBN's estimates relative to the exact."""
    means = summarise(rows)
    table = Table(title='Mean error against the large batch')
    for column in ('learning rate', 'statistics', 'window',
                   'mean / deviation', 'variance', 'mean square',
                   'variance, to exact'):
        table.add_column(column, justify='right')
    for (factor, kind, window), errors in means.items():
        exact = means.get((factor, EXACT, window))
        beside = exact and kind.startswith('CBN,') and kind != EXACT
        table.add_row(
            f'x {factor:g}', kind, str(window or '-'),
            *(f'{errors[metric]:.4f}' for metric in METRICS),
            f'{errors["var"] / exact["var"]:.3f}' if beside else '')
    console.print(table)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Train, measure and report."""
    args = parse_args(argv)
    rows: List[Dict[str, Any]] = []
    with one_line_errors():
        cfg = load_config(args)
        folder = Path(cfg.work_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with progress_bar('iterations', args.iters *
                          len(args.learning_rates)) as tell:
            for factor in args.learning_rates:
                tell(description=f'learning rate x {factor:g}')
                measure = _Measure(args, partial(tell, advance=1))
                runner: Runner = build_runner(prepare(cfg, args, factor))
                runner.register_hook(measure)
                runner.train()
                rows += [dict(lr=factor, **row) for row in measure.rows]
    lines = [json.dumps(row) for row in rows]
    (folder / 'statistics_error.jsonl').write_text('\n'.join(lines) + '\n')
    save_errors(summarise(rows), folder / 'statistics_error.png')
    report(rows, Console())
    print(f'written to {folder}: statistics_error.jsonl, '
          'statistics_error.png')


if __name__ == '__main__':
    main()
