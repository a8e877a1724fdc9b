"""Table of the norms in each part of a config's model."""
import argparse
from typing import Iterator, List, Optional, Sequence

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import HOOKS
from torch import nn

from ..errors import SetupError, one_line_errors
from ..hooks import (BurnInHook, ExampleWeightHook, FreezeStatisticsHook,
                     SmallBatchNormHook)
from ..norm_report import norm_summary
from .runtime import (add_config_arguments, build_model, images_of,
                      read_config)


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Build a config's model without weights or data, and "
        'print the norms that each of its parts has in training: the mode, '
        'the trained parameters, the values behind the statistics, the '
        'burn-in, and settings that look unintended')
    add_config_arguments(parser)
    parser.add_argument(
        '--gpus', type=int, help='number of GPUs in training')
    parser.add_argument(
        '--each',
        action='store_true',
        help='print a row for each norm; without it, equal norms of a part '
        'share a row')
    args = parser.parse_args(argv)
    if args.gpus is not None and args.gpus < 1:
        parser.error(f'--gpus must be at least 1, but got {args.gpus}')
    return args


def norm_hooks(cfg: Config) -> List[Hook]:
    """Build the hooks of a config that control its norms."""
    kinds = (SmallBatchNormHook, BurnInHook, ExampleWeightHook,
             FreezeStatisticsHook)
    names = tuple(kind.__name__ for kind in kinds)
    return [
        HOOKS.build(hook) for hook in cfg.get('custom_hooks') or []
        if hook.get('type') in kinds + names
    ]


def complaints(cfg: Config, model: nn.Module,
               hooks: Sequence[Hook]) -> Iterator[str]:
    """Yield the errors that would stop the training at its start."""
    loop = cfg.get('train_cfg') or {}
    by_epoch = (
        loop.get('type') == 'EpochBasedTrainLoop' or loop.get('by_epoch'))
    for hook in hooks:
        if not isinstance(hook, (BurnInHook, FreezeStatisticsHook)):
            continue
        try:
            hook.find_layers(model)
            hook.check_length(
                bool(by_epoch), loop.get('max_epochs'), loop.get('max_iters'))
        except SetupError as error:
            yield str(error)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Print the table and the complaints."""
    args = parse_args(argv)
    with one_line_errors():
        cfg = read_config(args)
        alone = args.gpus == 1
        cfg.launcher = 'none' if alone else 'pytorch'
        model = build_model(cfg)
        if alone:  # as the runner does
            model = revert_sync_batchnorm(model)
        hooks = norm_hooks(cfg)
        print(
            norm_summary(model, images_of(cfg), args.gpus, hooks, cfg,
                         args.each))
        if cfg.get('sync_bn') and not alone:
            print(f'Note: sync_bn={cfg.sync_bn!r} turns every BatchNorm into '
                  'SyncBatchNorm when several processes train.')
        for complaint in complaints(cfg, model, hooks):
            print(f'Training would stop at its start: {complaint}.')


if __name__ == '__main__':
    main()
