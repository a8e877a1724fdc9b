"""Converter of other projects' checkpoints to mmdet 3.x."""
import argparse
from pathlib import Path
from typing import Any, Iterator, Optional, Sequence

import torch

from ..deploy.released import LAYOUTS, Conversion, convert, layout_of
from ..deploy.state_dict import find_state_dict, load_strictly
from ..errors import SetupError, one_line_errors
from ..words import some
from .checkpoints import add_trust_argument, load_from_local, load_safely
from .runtime import build_model, open_config


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description='Convert a checkpoint of the released CBN code (mmdet1) '
        'or MABN code (maskrcnn-benchmark, mabn-imagenet) so that mmdet 3.x '
        'loads it into a model of this package. Checkpoints of torchvision, '
        'mmdet 2.x and mmdet 3.x need no conversion')
    parser.add_argument('checkpoint', metavar='IN',
                        help='checkpoint file to read')
    parser.add_argument(
        '-o',
        '--out',
        metavar='OUT',
        required=True,
        help='checkpoint file to write')
    parser.add_argument(
        '--layout',
        choices=['auto', *LAYOUTS],
        default='auto',
        help='project that wrote the file (default: auto, recognised by its '
        'keys)')
    parser.add_argument(
        '--model',
        metavar='CONFIG',
        help="write the file only if it loads strictly into this config's "
        'model')
    parser.add_argument(
        '--match-eps',
        action='store_true',
        help='mmdet1 only: change the scales of CBN so that it evaluates as '
        'the released code, which adds eps outside the root. Do not use it '
        'for a model with out_p=True')
    add_trust_argument(parser)
    parser.add_argument(
        '--verbose', action='store_true',
        help='print the new name of each key')
    args = parser.parse_args(argv)
    if Path(args.checkpoint).expanduser().resolve() == Path(
            args.out).expanduser().resolve():
        parser.error('OUT must be another file than IN')
    return args


def report(result: Conversion, verbose: bool) -> Iterator[str]:
    """Yield the lines to print about a conversion."""
    if verbose:
        for old, new, done in result.became:
            yield f'{old} -> {new}' + (f' ({done})' if done else '')
        for key in result.added:
            yield f'added {key} (0)'
    for reason, keys in result.dropped.items():
        yield f'Dropped {some(keys)}: {reason}.'
    for note in result.notes:
        yield f'Note: {note}.'


def new_meta(old: Any, layout: str) -> dict:
    """Return a ``meta`` with the class names where mmdet 3.x reads them."""
    meta = dict(converted_from=layout)
    names = old.get('CLASSES') if isinstance(old, dict) else None
    if names:
        meta['dataset_meta'] = dict(classes=tuple(names))
    return meta


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Convert the file that the command line names."""
    args = parse_args(argv)
    with one_line_errors():
        load_safely(args)
        checkpoint = load_from_local(args.checkpoint, map_location='cpu')
        state = find_state_dict(checkpoint, args.checkpoint)
        try:
            meta = checkpoint.get('meta')
            layout = args.layout
            if layout == 'auto':
                layout = layout_of(state, meta)
            if layout is None:
                print(f'{args.checkpoint} needs no conversion: use it as '
                      'load_from, or in the init_cfg of the backbone. Nothing '
                      'was written.')
                return
            result = convert(state, layout, args.match_eps)
        except SetupError as error:
            raise SetupError(f'{args.checkpoint}: {error}') from error
        if args.model is not None:
            load_strictly(
                build_model(open_config(args.model)), result.state_dict,
                f'Nothing was written: the keys do not fit {args.model}')
        for line in report(result, args.verbose):
            print(line)
        out = Path(args.out).expanduser()
        out.parent.mkdir(parents=True, exist_ok=True)
        torch.save(
            dict(
                meta=new_meta(meta, layout), state_dict=result.state_dict),
            out)
        print(f'{args.checkpoint}, {layout}: wrote {len(result.state_dict)} '
              f'tensors to {out}, {len(result.added)} of them new.')


if __name__ == '__main__':
    main()
