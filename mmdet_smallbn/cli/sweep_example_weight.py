"""Search for the best example weight (alpha) at inference."""
import argparse
import hashlib
import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from rich.console import Console
from rich.table import Table

from ..errors import SetupError, one_line_errors
from ..files import write_whole
from ..hooks import bare_model, calibrate
from ..layers import (check_example_weight, check_positive_int,
                      lacks_averages, set_example_weight, weights_as_trained)
from ..pictures import save_sweep
from ..progress import progress_bar
from .runtime import (add_config_arguments, add_run_arguments, build_runner,
                      load_config)

_WEIGHTS = (0., 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.)


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description='Evaluate a detector on the images of test_dataloader '
        'with several example weights (inference example weighting: the '
        'weight of an example in its own normalisation statistics), and '
        'report the best weight. A stopped sweep continues where it stopped')
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    add_run_arguments(parser)
    parser.add_argument(
        '--weights',
        type=float,
        nargs='+',
        default=_WEIGHTS,
        metavar='ALPHA',
        help='weights to evaluate, each from 0 to 1 '
        f'(default: {" ".join(f"{w:g}" for w in _WEIGHTS)}); the weight that '
        'the norms were trained with is added')
    parser.add_argument(
        '--exclude',
        nargs='+',
        default=[],
        metavar='PREFIX',
        help='parts of the model that keep their trained weight, such as '
        'backbone with its frozen norms')
    parser.add_argument(
        '--metric',
        default='coco/bbox_mAP',
        help='metric to maximise, such as coco/segm_mAP (default: '
        '%(default)s)')
    parser.add_argument(
        '--calibration-images',
        type=int,
        default=256,
        metavar='N',
        help='training images to compute moving averages for GroupNorm from '
        '(default: 256)')
    return parser.parse_args(argv)


class Results:
    """Metrics of each weight, in a file that a later run continues.

    Args:
        path (Path): The file.
        identity (dict): Everything but the weight that the metrics depend on.

    Raises:
        SetupError: If the file holds the metrics of another sweep.
    """

    def __init__(self, path: Path, identity: Dict[str, Any]) -> None:
        self.path = path
        self.identity = identity
        self.metrics: Dict[float, Dict[str, float]] = {}
        if not path.exists():
            return
        try:
            held = json.loads(path.read_text())
            rows = held.pop('weights')
        except (ValueError, KeyError) as error:
            raise SetupError(f'{path} was not written by this tool: remove '
                             'it, or choose another --work-dir') from error
        different = [k for k, v in identity.items() if held.get(k) != v]
        if different:
            raise SetupError(
                f'{path} holds the results of another sweep. It differs in '
                f'{", ".join(different)}. Remove it, or choose another '
                '--work-dir')
        self.metrics = {row.pop('weight'): row for row in rows}

    def add(self, weight: float, metrics: Dict[str, float]) -> None:
        """Add a row and write the file."""
        self.metrics[weight] = metrics
        rows = [
            dict(weight=w, **self.metrics[w]) for w in sorted(self.metrics)
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(
            dict(self.identity, weights=rows), indent=2))


class _Tick(Hook):
    """Hook that advances the progress bar after each batch."""

    def __init__(self, tell: Callable[..., None]) -> None:
        self.tell = tell

    def after_test_iter(self, runner, *args, **kwargs) -> None:
        self.tell(advance=1)


def _digest(content: bytes) -> str:
    # 16 digits are enough to distinguish files.
    return hashlib.sha256(content).hexdigest()[:16]


def identity_of(args: argparse.Namespace, cfg: Config,
                calibrated: bool) -> Dict[str, Any]:
    """Return everything but the weight that the metrics depend on."""
    settings = [
        cfg.model, cfg.test_dataloader.dataset, cfg.get('test_evaluator')
    ]
    if calibrated:
        settings += [cfg.get('train_dataloader'), args.calibration_images]
    path = Path(args.checkpoint)
    return dict(
        config=Path(args.config).name,
        checkpoint=_digest(path.read_bytes())
        if path.is_file() else args.checkpoint,
        settings=_digest(repr(settings).encode()),
        exclude=sorted(args.exclude))


def sweep(runner: Runner, args: argparse.Namespace, todo: List[float],
          results: Results) -> None:
    """Evaluate the remaining weights."""
    model = bare_model(runner)
    if any(lacks_averages(model, w, args.exclude) for w in todo):
        with progress_bar(
                'GroupNorm averages', args.calibration_images) as tell:
            calibrate(runner, args.calibration_images,
                      lambda seen: tell(completed=seen))
    with progress_bar(
            'weights', len(todo) * len(runner.test_loop.dataloader)) as tell:
        runner.register_hook(_Tick(tell))
        for weight in todo:
            set_example_weight(model, weight, args.exclude)
            tell(description=f'weight {weight:g}')
            with redirect_stdout(io.StringIO()):  # pycocotools
                metrics = runner.test()
            # mmdet reports no metrics if a model detects nothing.
            metrics = metrics or {args.metric: 0.}
            if is_main_process():
                results.add(weight, metrics)
                value = _metric(metrics, args.metric)
                print(f'weight {weight:g}: {args.metric} {value:.4f}')


def _metric(metrics: Dict[str, float], name: str) -> float:
    if name not in metrics:
        raise SetupError(f'--metric {name} is not among '
                         f'{", ".join(sorted(metrics))}: choose one of these')
    return metrics[name]


def best_weight(metrics: Dict[float, Dict[str, float]],
                metric: str,
                trained: Optional[float] = None) -> float:
    """Return the weight with the best metric.

    A tie goes to the weight that the norms were trained with, or else to the
    smallest weight.
    """
    return max(
        sorted(metrics),
        key=lambda w: (_metric(metrics[w], metric), w == trained))


def report(metrics: Dict[float, Dict[str, float]], metric: str,
           trained: Optional[float], exclude: List[str],
           console: Console) -> float:
    """Print the table and how to use the best weight; return it."""
    prefix = metric.rsplit('_mAP', 1)[0]
    columns = [metric] + [
        key for key in (f'{prefix}_mAP_50', f'{prefix}_mAP_75')
        if key != metric and all(key in row for row in metrics.values())
    ]
    table = Table(title='Example weight at inference')
    table.add_column('weight', justify='right')
    for column in columns:
        table.add_column(column, justify='right')
    best = best_weight(metrics, metric, trained)
    for weight in sorted(metrics):
        label = f'{weight:g}'
        table.add_row(
            f'{label} (as trained)' if weight == trained else label,
            *(f'{metrics[weight][column]:.4f}' for column in columns),
            style='bold' if weight == best else None)
    console.print(table)
    line = f'best: {best:g}, {metric} {metrics[best][metric]:.4f}'
    if best == trained:
        console.print(f'{line}, as trained: there is nothing to gain',
                      highlight=False)
        return best
    if trained is not None:
        gain = metrics[best][metric] - metrics[trained][metric]
        line += f' ({gain:+.4f} over the model as trained)'
    console.print(line, highlight=False)
    entry = f'weight={best:g}' + (f', exclude={exclude}' if exclude else '')
    console.print(
        'in a config: custom_hooks = [..., '
        f"dict(type='ExampleWeightHook', {entry})]",
        highlight=False,
        soft_wrap=True,
        markup=False)
    return best


def prepare(args: argparse.Namespace) -> Config:
    """Return the config of the evaluations.

    Raises:
        ValueError: If an argument is out of range.
    """
    for weight in args.weights:
        check_example_weight(weight)
    check_positive_int('--calibration-images', args.calibration_images)
    cfg = load_config(args)
    cfg.load_from = args.checkpoint
    # One line per result, instead of mmengine's hundreds.
    cfg.log_level = 'WARNING'
    # The hook would set its own weight before each evaluation.
    cfg.custom_hooks = [
        hook for hook in cfg.get('custom_hooks') or []
        if hook['type'] != 'ExampleWeightHook'
    ]
    return cfg


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the sweep."""
    args = parse_args(argv)
    console = Console()
    with one_line_errors():
        cfg = prepare(args)
        with redirect_stdout(io.StringIO()):
            runner = build_runner(cfg)
            runner.call_hook('before_run')  # EMAHook makes its model there
            runner.load_or_resume()
            runner.test_loop  # reads the annotations
        model = bare_model(runner)
        built = weights_as_trained(model, args.exclude)
        trained = built.pop() if len(built) == 1 else None
        weights = {*args.weights} | ({trained} - {None})
        calibrated = any(
            lacks_averages(model, w, args.exclude) for w in weights)
        results = Results(
            Path(cfg.work_dir) / 'example_weight.json',
            identity_of(args, cfg, calibrated))
        todo = sorted(weights - {*results.metrics})
        if len(todo) < len(weights):
            console.print(f'{len(weights) - len(todo)} of {len(weights)} '
                          f'weights are already in {results.path}')
        if todo:
            sweep(runner, args, todo, results)
        if not is_main_process():
            return
        chosen = {w: results.metrics[w] for w in weights}
        best = report(chosen, args.metric, trained, args.exclude, console)
        picture = results.path.with_suffix('.png')
        save_sweep({w: row[args.metric] for w, row in chosen.items()},
                   args.metric, picture, best, trained)
        console.print(f'written: {results.path}, {picture}', soft_wrap=True)


if __name__ == '__main__':
    main()
