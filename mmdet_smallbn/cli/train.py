"""Training of a detector, with mmdet's flags and one-line errors."""
import argparse
from typing import Optional, Sequence

from mmengine.config import Config
from mmengine.dist import get_world_size
from mmengine.runner import Runner

from ..errors import one_line_errors
from ..hooks import bare_model
from ..norm_report import norm_summary
from .checkpoints import latest_checkpoint
from .runtime import (add_config_arguments, add_run_arguments, build_runner,
                      enable_auto_scale_lr, images_of, load_config)


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the flags of mmdet's ``tools/train.py``."""
    parser = argparse.ArgumentParser(description='Train a detector')
    add_config_arguments(parser)
    add_run_arguments(parser)
    parser.add_argument(
        '--amp', action='store_true',
        help='train with automatic mixed precision')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate with the batch size')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='resume from this checkpoint, or without a value from the latest '
        'one in the work folder')
    return parser.parse_args(argv)


def apply_train_flags(cfg: Config, args: argparse.Namespace) -> None:
    """Set ``--amp``, ``--auto-scale-lr`` and ``--resume`` in the config.

    Raises:
        SetupError: If the config has no ``base_batch_size``.
    """
    if args.amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.loss_scale = 'dynamic'
    if args.auto_scale_lr:
        enable_auto_scale_lr(cfg)
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = args.resume
        if args.resume == 'auto':
            cfg.load_from = latest_checkpoint(cfg.work_dir)


def summary(runner: Runner) -> str:
    """Return the table of the model's norms in training."""
    return norm_summary(
        bare_model(runner), images_of(runner.cfg), get_world_size(),
        runner.hooks, runner.cfg)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the training."""
    args = parse_args(argv)
    with one_line_errors('To resume from the last checkpoint, add --resume to '
                         'the same command'):
        cfg = load_config(args)
        apply_train_flags(cfg, args)
        runner = build_runner(cfg)
        runner.logger.info(f'Norms of the model\n{summary(runner)}')
        runner.train()


if __name__ == '__main__':
    main()
