"""Norm doctor: does the batch hurt BatchNorm, and which norm helps."""
import argparse
import json
from functools import partial
from pathlib import Path
from typing import Optional, Sequence

from mmdet.models import BaseDetector
from mmengine.config import Config
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.runner import Runner
from rich.console import Console
from torch import nn

from ..deploy.state_dict import find_state_dict, load_strictly
from ..doctor import advise, diagnose, summary_of
from ..doctor.advice import THRESHOLD, agreements
from ..doctor.lines import config_lines
from ..doctor.report import (LEGEND, as_text, layer_table, scalars,
                             summary_json)
from ..errors import SetupError, one_line_errors
from ..files import write_whole
from ..hooks import bare_model
from ..pictures import save_diagnosis
from ..progress import progress_bar
from ..tables import show
from .checkpoints import add_trust_argument, load_from_local
from .runtime import (add_config_arguments, build_runner,
                      enable_auto_scale_lr, load_config, training_alone)


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description='Measure on your own config and data whether the batch '
        'is too small for BatchNorm, and recommend a norm. The tool writes '
        'only its report')
    add_config_arguments(parser)
    parser.add_argument(
        'checkpoint', nargs='?', help='checkpoint of a trained model '
        '(default: the weights that the config starts from)')
    parser.add_argument(
        '--images', type=int, default=64,
        help='number of images to measure with (default: 64)')
    parser.add_argument(
        '--reference', type=int, default=16,
        help='size of the large batch, which must fit in the memory of the '
        'device (default: 16)')
    parser.add_argument(
        '--iters', type=int, default=48,
        help='training iterations of a copy of the model (default: 48)')
    parser.add_argument(
        '--auto-scale-lr', action='store_true',
        help='scale the learning rate with the batch size')
    parser.add_argument(
        '--each', action='store_true',
        help='print a row for each norm layer')
    parser.add_argument(
        '--seed', type=int, default=0,
        help='random seed of weights and images (default: 0)')
    parser.add_argument('--work-dir', help='folder for the report')
    add_trust_argument(parser)
    args = parser.parse_intermixed_args(argv)
    if args.reference < 2 or args.images < 2 * args.reference:
        parser.error('--images must be at least twice --reference, but got '
                     f'{args.images} and {args.reference}')
    if args.iters < 2:
        parser.error(f'--iters must be at least 2, but got {args.iters}')
    args.launcher, args.local_rank = 'none', 0
    return args


def prepare(cfg: Config, args: argparse.Namespace) -> Config:
    """Return the config with only the parts that the doctor uses.

    Raises:
        SetupError: If the config has no training data or optimizer.
    """
    for name in ('train_dataloader', 'optim_wrapper'):
        if cfg.get(name) is None:
            raise SetupError(f'{args.config} has no {name}: the norm doctor '
                             'measures the start of a training. Give a config '
                             'that trains')
    cfg = training_alone(cfg)
    if args.auto_scale_lr:
        enable_auto_scale_lr(cfg)
    cfg.custom_hooks = []
    cfg.randomness = dict(seed=args.seed)
    # mmengine keeps loggers and visualisers by name: each run has its own.
    cfg.experiment_name = 'doctor' + cfg.work_dir.replace('/', '_')
    if cfg.get('visualizer'):
        cfg.visualizer.name = cfg.experiment_name
    return cfg


def optimizer_of(runner: Runner, model: nn.Module) -> OptimWrapper:
    """Build the config's optimizer for a copy of the runner's model."""
    wrapper = build_optim_wrapper(model, runner.cfg.optim_wrapper)
    runner.scale_lr(wrapper, runner.cfg.get('auto_scale_lr'))
    return wrapper


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the doctor and report."""
    args = parse_args(argv)
    with one_line_errors():
        cfg = load_config(args)
        runner = build_runner(prepare(cfg, args))
        model = bare_model(runner)
        if args.checkpoint:
            load_strictly(
                model,
                find_state_dict(
                    load_from_local(args.checkpoint, 'cpu'), args.checkpoint),
                f"{args.checkpoint} does not fit {args.config}'s model",
                allow_more=True)
        else:
            model.init_weights()
            runner.load_or_resume()
        # Some augmentations and heads read these values in a training.
        for key in ('epoch', 'iter'):
            runner.message_hub.update_info(key, 0)
            runner.message_hub.update_info(
                f'max_{key}s', cfg.train_cfg.get(f'max_{key}s') or args.iters)
        with progress_bar('measuring images') as tell:
            diagnosis = diagnose(
                model,
                runner.build_dataloader(cfg.train_dataloader, seed=args.seed),
                partial(optimizer_of, runner),
                reference=args.reference,
                blocks=args.images // args.reference,
                iters=args.iters,
                trained=args.checkpoint is not None,
                tell=lambda done, total: tell(completed=done, total=total))
        advice = advise(diagnosis, isinstance(model, BaseDetector),
                        args.checkpoint is not None)
        lines = [config_lines(one, diagnosis, cfg) for one in advice]
        folder = Path(runner.work_dir)
        if diagnosis.layers:
            console = Console()
            console.width = max(console.width, 110)
            show(layer_table(diagnosis, args.each), console,
                 'Statistics of a batch against those of all images')
            print(f'{LEGEND}\n')
            runner.visualizer.add_scalars(scalars(diagnosis))
        print(as_text(diagnosis, advice, lines))
        write_whole(folder / 'doctor.json', json.dumps(
            summary_json(diagnosis, advice, lines), indent=1) + '\n')
        files = 'doctor.json'
        if diagnosis.agreement:
            save_diagnosis(agreements(diagnosis), diagnosis.reference,
                           diagnosis.windows, THRESHOLD,
                           summary_of(diagnosis)[0], folder / 'doctor.png')
            files += ', doctor.png'
        print(f'\nwritten to {folder}: {files}')


if __name__ == '__main__':
    main()
