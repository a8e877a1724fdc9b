"""Command line tool that writes ShapesCOCO and a sheet of its images."""
import argparse
from pathlib import Path
from typing import Optional, Sequence

from ..data.coco_folder import find_coco_split
from ..data.shapes_coco import make_shapes_coco
from ..errors import one_line_errors
from ..pictures import save_sheet


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description='Write ShapesCOCO, a small synthetic COCO data set',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('root', help='folder to write to')
    parser.add_argument('--train', type=int, default=1200,
                        help='number of training images')
    parser.add_argument('--val', type=int, default=150,
                        help='number of validation images')
    parser.add_argument(
        '--size', type=int, default=192,
        help='image height and width in pixels')
    parser.add_argument('--seed', type=int, default=0, help='random seed')
    parser.add_argument(
        '--conditions',
        type=float,
        default=0.,
        metavar='STRENGTH',
        help='strength from 0 to 1 of random exposure, white balance, gamma '
        "and haze per image, as a car's camera sees by day, at dusk or in fog")
    parser.add_argument(
        '--frames', type=int, default=1, metavar='N',
        help='with --conditions: number of consecutive images with the same '
        'condition, as in a video')
    parser.add_argument('--workers', type=int,
                        help='number of processes that draw')
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Write the data set and the sheet."""
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
