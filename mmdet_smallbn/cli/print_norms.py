"""Print what norm each part of a config's model really carries."""
import argparse
from typing import List, Optional, Sequence

from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import HOOKS, MODELS

from ..errors import one_line_errors
from ..hooks import BurnInHook
from ..norm_table import norm_summary
from .runtime import (add_config_arguments, check_norms, images_of,
                      read_config)


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Flags of the table."""
    parser = argparse.ArgumentParser(
        description="Build a config's model, without weights or data, and "
        'print what norm each part of it really carries in training: its '
        'mode, what trains, what is behind its statistics, its burn-in, and '
        'what looks unintended')
    add_config_arguments(parser)
    parser.add_argument(
        '--gpus', type=int, help='number of GPUs that training would take')
    parser.add_argument(
        '--each',
        action='store_true',
        help='a row for each norm, not for those of a part that are alike')
    args = parser.parse_args(argv)
    if args.gpus is not None and args.gpus < 1:
        parser.error(f'--gpus must be at least 1, but got {args.gpus}')
    return args


def burn_in_hooks(cfg: Config) -> List[BurnInHook]:
    """The hooks of a config that rule the norms' burn-in."""
    return [
        HOOKS.build(hook) for hook in cfg.get('custom_hooks') or []
        if hook['type'] in ('BurnInHook', BurnInHook)
    ]


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Print the table."""
    args = parse_args(argv)
    with one_line_errors():
        cfg = read_config(args)
        check_norms(cfg)
        # Heads and necks tell of themselves while they are built.
        MMLogger.get_current_instance().setLevel('WARNING')
        model = MODELS.build(cfg.model)
        print(
            norm_summary(model, images_of(cfg), args.gpus, burn_in_hooks(cfg),
                         cfg.model, args.each))


if __name__ == '__main__':
    main()
