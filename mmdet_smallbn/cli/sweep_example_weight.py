"""Find the weight of examples at inference: COCO AP over alpha."""
import argparse
import hashlib
import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import (BarColumn, MofNCompleteColumn, Progress, TextColumn,
                           TimeRemainingColumn)
from rich.table import Table
from torch import nn

from ..errors import SetupError, one_line_errors
from ..hooks import bare_model
from ..layers import (calibrate_group_norms, check_example_weight,
                      set_example_weight)
from ..pictures import save_sweep
from .runtime import add_common_arguments, build_runner, load_config

# Parts of the config that metrics depend on.
_SETTINGS = ('model', 'test_dataloader')
_WEIGHTS = (0., 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.)


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Flags of the sweep."""
    parser = argparse.ArgumentParser(
        description='Evaluate a detector at several weights of the examples '
        'in their own normalisation (inference example weighting), and name '
        'the best')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    add_common_arguments(parser)
    parser.add_argument(
        '--weights',
        type=float,
        nargs='+',
        default=_WEIGHTS,
        metavar='ALPHA',
        help='weights to evaluate, each from 0 to 1')
    parser.add_argument(
        '--exclude',
        nargs='+',
        default=[],
        metavar='PREFIX',
        help='parts of the model to leave as trained, such as backbone for '
        'its frozen norms')
    parser.add_argument(
        '--metric',
        default='coco/bbox_mAP',
        help='what is best: coco/bbox_mAP, coco/segm_mAP, ...')
    parser.add_argument(
        '--calibration-images',
        type=int,
        default=256,
        metavar='N',
        help='training images to gather moving averages for GroupNorm from')
    return parser.parse_args(argv)


class Results:
    """Metrics of each weight, in a file that a later run goes on from.

    Args:
        path (Path): The file.
        identity (dict): What the metrics depend on besides the weight.

    Raises:
        SetupError: If the file holds metrics of something else.
    """

    def __init__(self, path: Path, identity: Dict[str, Any]) -> None:
        self.path = path
        self.identity = identity
        self.metrics: Dict[float, Dict[str, float]] = {}
        if not path.exists():
            return
        held = json.loads(path.read_text())
        rows = held.pop('weights')
        different = [k for k, v in identity.items() if held.get(k) != v]
        if different:
            raise SetupError(
                f'{path} holds the results of another sweep, with another '
                f'{" and ".join(different)}. Remove it, or choose another '
                '--work-dir')
        self.metrics = {row.pop('weight'): row for row in rows}

    def add(self, weight: float, metrics: Dict[str, float]) -> None:
        """Add a row, and write the file."""
        self.metrics[weight] = metrics
        rows = [
            dict(weight=w, **self.metrics[w]) for w in sorted(self.metrics)
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(
            json.dumps(dict(self.identity, weights=rows), indent=2))


class _Tick(Hook):
    """A step of the progress bar for each batch."""

    def __init__(self, progress: Progress, task) -> None:
        self.progress = progress
        self.task = task

    def after_test_iter(self, runner, *args, **kwargs) -> None:
        self.progress.advance(self.task)


def digest(content: bytes) -> str:
    """SHA-256, of which 16 digits are enough to tell files apart."""
    return hashlib.sha256(content).hexdigest()[:16]


def calibrate(runner: Runner, cfg: Config, images: int,
              progress: Progress) -> None:
    """Moving averages for GroupNorm, from training images."""
    loader = runner.build_dataloader(cfg.train_dataloader)
    task = progress.add_task('GroupNorm averages', total=images)
    model, seen = bare_model(runner), 0
    model.eval()
    with calibrate_group_norms(model), torch.no_grad():
        for batch in loader:
            # The losses' forward: RoIs as in training.
            model(**model.data_preprocessor(batch, True), mode='loss')
            seen += len(batch['inputs'])
            progress.update(task, completed=min(seen, images))
            if seen >= images:
                break


def report(metrics: Dict[float, Dict[str, float]], metric: str,
           exclude: List[str], console: Console) -> None:
    """Print the table, the best weight, and how to use it."""
    prefix = metric.rsplit('_mAP', 1)[0]
    columns = [metric] + [
        key for key in (f'{prefix}_mAP_50', f'{prefix}_mAP_75')
        if all(key in row for row in metrics.values())
    ]
    table = Table(title='Weight of the examples at inference')
    table.add_column('weight', justify='right')
    for column in columns:
        table.add_column(column, justify='right')
    best = best_weight(metrics, metric)
    for weight in sorted(metrics):
        table.add_row(
            f'{weight:g}',
            *(f'{metrics[weight][column]:.4f}' for column in columns),
            style='bold' if weight == best else None)
    console.print(table)
    line = f'best: {best:g}, {metric} {metrics[best][metric]:.4f}'
    if 0. in metrics and best != 0:
        gain = metrics[best][metric] - metrics[0.][metric]
        line += f' ({gain:+.4f} over 0)'
    console.print(line, highlight=False)
    entry = f'weight={best:g}' + (f', exclude={exclude}' if exclude else '')
    console.print(
        'in a config: custom_hooks = [..., '
        f"dict(type='ExampleWeightHook', {entry})]",
        highlight=False,
        soft_wrap=True,
        markup=False)


def best_weight(metrics: Dict[float, Dict[str, float]], metric: str) -> float:
    """The weight with the best metric; of equals the smallest."""
    return max(sorted(metrics), key=lambda weight: metrics[weight][metric])


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Sweep as the command line says."""
    args = parse_args(argv)
    console = Console()
    with one_line_errors():
        for weight in args.weights:
            check_example_weight(weight)
        cfg = load_config(args)
        cfg.load_from = args.checkpoint
        # One line a result, instead of the toolbox's hundreds.
        cfg.log_level = 'WARNING'
        # It would set its own weight before each evaluation.
        cfg.custom_hooks = [
            hook for hook in cfg.get('custom_hooks') or []
            if hook['type'] != 'ExampleWeightHook'
        ]
        runner = build_runner(cfg)
        runner.load_or_resume()
        results = Results(
            Path(cfg.work_dir) / 'example_weight.json',
            dict(
                config=Path(args.config).name,
                checkpoint=digest(Path(args.checkpoint).read_bytes()),
                settings=digest(
                    repr([cfg[key].to_dict() for key in _SETTINGS]).encode()),
                exclude=sorted(args.exclude)))
        todo = [w for w in args.weights if w not in results.metrics]
        done = len(args.weights) - len(todo)
        if done:
            console.print(f'{done} of {len(args.weights)} weights are in '
                          f'{results.path} already')
        with Progress(
                TextColumn('{task.description}'),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=console,
                disable=not is_main_process()) as progress:
            if todo and any(
                    isinstance(m, nn.GroupNorm)
                    for m in runner.model.modules()):
                calibrate(runner, cfg, args.calibration_images, progress)
            task = progress.add_task('')
            runner.register_hook(_Tick(progress, task))
            for weight in todo:
                set_example_weight(bare_model(runner), weight, args.exclude)
                progress.reset(
                    task,
                    total=len(runner.test_loop.dataloader),
                    description=f'weight {weight:g}')
                with redirect_stdout(io.StringIO()):  # pycocotools
                    metrics = runner.test()
                # Nothing detected at all is no metrics.
                metrics = metrics or {args.metric: 0.}
                if args.metric not in metrics:
                    raise SetupError(
                        f'--metric {args.metric} is not among '
                        f'{", ".join(sorted(metrics)) or "the results"}')
                if is_main_process():
                    results.add(weight, metrics)
                    progress.console.print(
                        f'weight {weight:g}: {args.metric} '
                        f'{metrics[args.metric]:.4f}',
                        highlight=False)
        if not is_main_process():
            return
        chosen = {w: results.metrics[w] for w in args.weights}
        report(chosen, args.metric, args.exclude, console)
        picture = results.path.with_suffix('.png')
        save_sweep({w: row[args.metric] for w, row in chosen.items()},
                   args.metric, picture)
        console.print(
            f'written: {results.path}, {picture}', soft_wrap=True)


if __name__ == '__main__':
    main()
