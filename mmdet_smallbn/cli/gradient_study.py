"""Comparison of backward passes for CBN."""
import argparse
import copy
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmengine.hooks import Hook
from rich.console import Console
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..benchmark.classifier import (Images, Schedule, accuracy, batches_of,
                                    build_classifier, loss_of, make_images,
                                    tell_iteration, train_classifier)
from ..errors import one_line_errors
from ..hooks import bare_model
from ..layers import CBN
from ..layers.moving_average import SimpleMovingAverage
from ..layers.statistics import Batch, Statistics
from ..norm_report import norm_cfgs
from ..pictures import save_cosines
from ..progress import progress_bar
from ..tables import show, spread
from .own_data import use_data
from .runtime import build_runner, open_config
from .statistics_error import prepare

WINDOW = 8
# Settings that all results in one file share.
_SETTINGS = ('steps', 'lr', 'train', 'val')
_DEMO = 'configs/demo/faster-rcnn_r18_fpn_cbn-all_1xb2_shapes-coco.py'


class AveragedCBN(CBN, nn.BatchNorm2d, _BatchNorm):
    """CBN with MABN's backward pass, for this study alone.

    The means of g and of g * x_hat (MABN, arXiv:2001.06838, Eq. 20) are
    averaged over the last ``window_size`` backward passes. The current batch
    gets the whole averaged gradient.

    Args:
        num_features, window_size, gradient: As in :class:`CBN`.
    """

    def __init__(self, num_features: int, eps: float = 1e-5,
                 window_size: int = 4, gradient: str = 'whole') -> None:
        super().__init__(
            num_features, eps, window_size=window_size, gradient=gradient)
        self.backwards = SimpleMovingAverage(window_size)

    def statistics(self, batch: Batch) -> Statistics:
        found = super().statistics(batch)

        def average(mean_g: Tensor, mean_gx: Tensor):
            self.backwards.push(torch.stack([mean_g, mean_gx]))
            return self.backwards.mean()

        past = found.past
        if past is not None and past.shift is not None:
            # Each past iteration gets its share of the averaged gradient.
            past = past._replace(
                shift=past.shift * past.share, scale=past.scale * past.share)
        return found._replace(gradient=average, past=past)


BN = dict(type='BN')
VARIANTS: Dict[str, dict] = {
    'BN': BN,
    "CBN, gradient='released'": dict(
        type='CBN', window_size=WINDOW, gradient='released'),
    "CBN, gradient='whole'": dict(type='CBN', window_size=WINDOW),
    'CBN, averaged gradient statistics': dict(
        type=AveragedCBN, window_size=WINDOW, gradient='released'),
    'CBN, averaged and whole': dict(type=AveragedCBN, window_size=WINDOW),
    "MABN(centered=True, forward_statistics='sma')": dict(
        type='MABN',
        centered=True,
        forward_statistics='sma',
        buffer_size=WINDOW),
}


def schedules(steps: int, lr: float) -> Dict[str, Schedule]:
    """Return schedules that see equally many images in total.

    SGD's learning rate is proportional to the images of a step.
    """
    burn_in = steps // 10
    return {
        '16 images': Schedule(16, 1, steps, lr, 0),
        'normalise 2, accumulate to 16': Schedule(2, 8, steps, lr, burn_in),
        '2 images a step': Schedule(2, 1, 8 * steps, lr / 8, 8 * burn_in),
    }


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description='Compare backward passes for CBN on a small classifier '
        'of synthetic images: by the cosine to the gradient of BatchNorm on a '
        'large batch, and by training accuracy')
    parser.add_argument(
        '--parts',
        nargs='+',
        choices=['cosines', 'training', 'orthogonality'],
        default=['cosines', 'training'],
        help='parts to run (default: cosines training). orthogonality is the '
        'cosine of gradient and weight in the demo, and needs --data')
    parser.add_argument(
        '--data', metavar='DIR',
        help='folder of ShapesCOCO, which tools/make_shapes_coco.py writes')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2],
                        help='random seeds (default: 0 1 2)')
    parser.add_argument(
        '--steps', type=int, default=160,
        help='training steps of 16 images (default: 160)')
    parser.add_argument(
        '--lr', type=float, default=0.02,
        help='learning rate for a step of 16 images (default: 0.02)')
    parser.add_argument('--train', type=int, default=3000,
                        help='number of training images (default: 3000)')
    parser.add_argument('--val', type=int, default=1000,
                        help='number of validation images (default: 1000)')
    parser.add_argument(
        '--iters', type=int, default=100,
        help='iterations of the demo for orthogonality (default: 100)')
    parser.add_argument(
        '--out',
        default='work_dirs/gradient_study.json',
        help='JSON file to write; trainings that it already holds are not run '
        'again (default: %(default)s)')
    args = parser.parse_args(argv)
    if 'orthogonality' in args.parts and args.data is None:
        parser.error('--parts orthogonality needs --data')
    return args


def _weights(model: nn.Module) -> Dict[str, nn.Parameter]:
    """Return the convolutions' weights by name."""
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    }


def _gradients(model: nn.Module, batches: Sequence[Images],
               first: int = 0) -> Dict[str, Tensor]:
    """Return the gradients of the mean loss over batches, by name."""
    model.zero_grad()
    for iteration, batch in enumerate(batches, first):
        tell_iteration(model, iteration, 1 / len(batches))
        loss_of(model, batch).div(len(batches)).backward()
    return {name: w.grad.clone() for name, w in _weights(model).items()}


def cosines(train: Images, seed: int,
            schedule: Schedule) -> Dict[str, List[float]]:
    """Compare gradients of 8 batches of 2 with that of all 16 images.

    The weights are those of a trained BatchNorm model and stay fixed. Every
    variant sees the batches repeatedly until the past statistics of all its
    layers come from these weights.

    Returns:
        dict: For each variant a list of cosines, one per layer.
    """
    torch.manual_seed(seed)
    base = build_classifier(dict(norm_cfg=BN))
    train_classifier(base, train, schedule, seed)
    base.train()
    sixteen = train.of(next(batches_of(len(train.labels), 16, seed + 100)))
    wanted = _gradients(copy.deepcopy(base), [sixteen])
    twos = [
        sixteen.of(indices) for indices in torch.arange(16).view(WINDOW, 2)
    ]
    found = {}
    for name, norm_cfg in VARIANTS.items():
        model = build_classifier(dict(norm_cfg=norm_cfg))
        model.load_state_dict(base.state_dict())
        model.train()
        for turn in range(12):  # number of convolutions, plus one
            gradients = _gradients(model, twos, turn * WINDOW)
        found[name] = [
            F.cosine_similarity(wanted[key].flatten(), value.flatten(),
                                0).item()
            for key, value in gradients.items()
        ]
    return found


def train_variant(name: str, schedule: Schedule, train: Images, val: Images,
                  seed: int) -> float:
    """Train one variant and return its validation accuracy."""
    torch.manual_seed(seed)
    model = build_classifier(dict(norm_cfg=VARIANTS[name]))
    train_classifier(model, train, schedule, seed)
    return accuracy(model, val)


class _Orthogonality(Hook):
    """Recorder of the |cosine| of weights and gradients before a step."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self.tell = tell
        self.values: List[Tensor] = []

    def before_train(self, runner) -> None:
        self.handles = [
            module.conv.weight.register_post_accumulate_grad_hook(self._watch)
            for module in bare_model(runner).modules()
            if isinstance(module, ConvModule) and module.with_norm
        ]

    def _watch(self, weight: Tensor) -> None:
        self.values.append(
            F.cosine_similarity(weight.flatten(), weight.grad.flatten(),
                                0).abs().detach())

    def after_train_iter(self, runner, *args, **kwargs) -> None:
        self.tell()

    def after_train(self, runner) -> None:
        for handle in self.handles:
            handle.remove()


def orthogonality(data: str, iters: int, seed: int, norm_cfg: dict,
                  folder: Path, tell: Callable[[], None]) -> float:
    """Return the mean |cosine| of weights and gradients in the demo.

    The demo trains with 2 images per batch. If the norm after a convolution
    makes the output independent of the weight's scale, the cosine is 0.
    """
    cfg = open_config(_DEMO)
    for _, place in norm_cfgs(cfg.model, 'model'):
        place.clear()
        place.update(norm_cfg)
    use_data(cfg, data, True)
    cfg.launcher, cfg.work_dir = 'none', str(folder / norm_cfg['type'])
    watched = argparse.Namespace(batch=2, iters=iters, seed=seed)
    cfg = prepare(cfg, watched, 1.)
    if norm_cfg['type'] == 'BN':
        cfg.custom_hooks = []
    cfg.experiment_name = f'orthogonality_{len(list(folder.iterdir()))}'
    runner = build_runner(cfg)
    hook = _Orthogonality(tell)
    runner.register_hook(hook)
    runner.train()
    return torch.stack(hook.values).mean().item()


def tables(results: Dict[str, Any]) -> List[List[List[str]]]:
    """Return a table per measured part: a header, and a row per variant."""
    found = []
    if 'cosines' in results:
        rows = [['gradient', 'cosine, mean', 'cosine, least']]
        for variant, by_seed in results['cosines'].items():
            values = [v for row in by_seed.values() for v in row]
            rows.append([variant, f'{statistics.mean(values):.2f}',
                         f'{min(values):.2f}'])
        found.append(rows)
    if 'training' in results:
        training = results['training']
        rows = [['gradient', *training]]
        for variant in VARIANTS:
            rows.append([variant, *(
                spread([100 * v for v in by.get(variant, {}).values()])
                for by in training.values())])
        found.append(rows)
    if 'orthogonality' in results:
        found.append([['gradient', 'mean absolute cosine'], *(
            [name, f'{value:.4f}']
            for name, value in results['orthogonality'].items())])
    return found


def report(results: Dict[str, Any], console: Console) -> None:
    """Print the tables."""
    for rows in tables(results):
        show(rows, console)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Measure and report."""
    args = parse_args(argv)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(args, name) for name in _SETTINGS}
    results = dict(settings=settings)
    if out.exists():
        results = json.loads(out.read_text())
        if results['settings'] != settings:
            raise SystemExit(
                f'{out} was measured with {results["settings"]}, but this run '
                f'has {settings}: give another --out')

    def keep() -> None:
        out.write_text(json.dumps(results, indent=1) + '\n')

    with one_line_errors():
        train, val = make_images(args.train, 0), make_images(args.val, 1)
        if 'cosines' in args.parts:
            short = schedules(args.steps // 4, args.lr)['16 images']
            found = results.setdefault('cosines', {})
            with progress_bar('cosines', len(args.seeds)) as tell:
                for seed in args.seeds:
                    for name, row in cosines(train, seed, short).items():
                        found.setdefault(name, {})[str(seed)] = row
                    keep()
                    tell(advance=1)
        if 'training' in args.parts:
            regimes = schedules(args.steps, args.lr)
            jobs = [(regime, seed, name) for regime in regimes
                    for seed in args.seeds for name in VARIANTS
                    if name == 'BN' or regime != '16 images']
            found = results.setdefault('training', {})
            with progress_bar('training', len(jobs)) as tell:
                for regime, seed, name in jobs:
                    rows = found.setdefault(regime, {}).setdefault(name, {})
                    if str(seed) not in rows:
                        rows[str(seed)] = train_variant(
                            name, regimes[regime], train, val, seed)
                        keep()
                    tell(advance=1)
        if 'orthogonality' in args.parts:
            found = results.setdefault('orthogonality', {})
            names = ('BN', "CBN, gradient='released'",
                     "CBN, gradient='whole'")
            folder = out.parent / 'orthogonality'
            folder.mkdir(exist_ok=True)
            with progress_bar(
                    'orthogonality', len(names) * args.iters) as tell:
                for name in names:
                    tell(description=name)
                    found[name] = orthogonality(
                        args.data, args.iters, args.seeds[0], VARIANTS[name],
                        folder, partial(tell, advance=1))
                    keep()
    if 'cosines' in results:
        save_cosines(results['cosines'], out.with_suffix('.png'))
    report(results, Console())
    print(f'written: {out}')


if __name__ == '__main__':
    main()
