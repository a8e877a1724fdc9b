"""Write ShapesCOCO, and a sheet of its images."""
import argparse
from pathlib import Path
from typing import Optional, Sequence

from ..data.coco_folder import find_coco_split
from ..data.shapes_coco import make_shapes_coco
from ..errors import one_line_errors
from ..pictures import save_sheet


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Flags of the data set."""
    parser = argparse.ArgumentParser(
        description='Write ShapesCOCO, a small COCO-format data set',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('root', help='folder to write to')
    parser.add_argument('--train', type=int, default=1200, help='images')
    parser.add_argument('--val', type=int, default=150, help='images')
    parser.add_argument(
        '--size', type=int, default=192, help='height and width in pixels')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--conditions',
        type=float,
        default=0.,
        metavar='STRENGTH',
        help='from 0 to 1: give each image an exposure, white balance, gamma '
        "and haze of its own, as a car's camera has by day, at dusk, in fog")
    parser.add_argument(
        '--frames', type=int, default=1, metavar='N',
        help='with --conditions: images that follow each other under one '
        'condition, as those of a film do')
    parser.add_argument('--workers', type=int, help='drawing processes')
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Write the data set as the command line says."""
    args = parse_args(argv)
    with one_line_errors():
        root = make_shapes_coco(args.root, args.train, args.val, args.size,
                                args.seed, args.conditions, args.workers,
                                args.frames)
        split = find_coco_split(root, 'train')
        sheet = Path(root) / 'sheet.png'
        save_sheet(split.ann_file, split.image_dir, sheet)
    print(f'{args.train} training and {args.val} validation images in {root}, '
          f'a sheet of them in {sheet}')


if __name__ == '__main__':
    main()
