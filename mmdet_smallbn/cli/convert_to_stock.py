"""Converter of a trained detector to stock mmdet."""
import argparse
from pathlib import Path
from typing import Any, Optional, Sequence

import torch
from mmengine.logging import MMLogger

from ..deploy.state_dict import find_state_dict
from ..deploy.stock import to_stock
from ..errors import SetupError, one_line_errors
from .checkpoints import add_trust_argument, load_from_local
from .runtime import add_config_arguments, check_norms, read_config


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description='Convert the config and checkpoint of a trained detector '
        'to BatchNorm and plain convolutions. mmdet then gives the same '
        "detections without this package, and mmdet's own tools can fuse and "
        'deploy the detector')
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '-o',
        '--out',
        required=True,
        metavar='OUT.pth',
        help='checkpoint to write; the config is saved next to it as OUT.py')
    parser.add_argument(
        '--example-weight',
        type=float,
        choices=[0.],
        help='0: let norms with example weighting (BGN) use only their moving '
        'averages, as BatchNorm does. This changes the detections: '
        'tools/sweep_example_weight.py measures by how much')
    add_trust_argument(parser)
    args = parser.parse_args(argv)
    if not args.out.endswith('.pth'):
        parser.error(f'--out must end in .pth, but got {args.out}')
    return args


def _plain(value: Any) -> Any:
    """Replace numpy types, which torch's safe loading refuses."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(part) for part in value)
    return value.tolist() if hasattr(value, 'tolist') else value


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Convert, compare and write the files."""
    args = parse_args(argv)
    out = Path(args.out).expanduser()
    with one_line_errors():
        for path in (args.config, args.checkpoint):
            if Path(path).resolve() in (out.resolve(),
                                        out.with_suffix('.py').resolve()):
                raise SetupError(f'--out {args.out} would overwrite {path}: '
                                 'choose another name')
        cfg = read_config(args, training=False)
        check_norms(cfg)
        MMLogger.get_current_instance().setLevel('WARNING')
        checkpoint = load_from_local(args.checkpoint, map_location='cpu')
        state = find_state_dict(checkpoint, args.checkpoint)
        stock_cfg, state, changes = to_stock(cfg, state, args.example_weight)
        out.parent.mkdir(parents=True, exist_ok=True)
        stock_cfg.dump(out.with_suffix('.py'))
        meta = checkpoint.get('meta')
        meta = meta if isinstance(meta, dict) else {}
        torch.save(
            dict(
                state_dict=state,
                meta={
                    key: _plain(meta[key])
                    for key in ('dataset_meta', 'epoch', 'iter')
                    if key in meta
                }), out)
    for change in changes:
        print(change)
    print(f'written for stock mmdet: {out}, {out.with_suffix(".py")}')


if __name__ == '__main__':
    main()
