"""Draw what StatisticsHook recorded, as the MABN paper's Fig. 2-4."""
import argparse
import json
from pathlib import Path
from typing import Optional, Sequence

from ..errors import SetupError, did_you_mean, one_line_errors
from ..pictures import save_statistics


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Flags of the plot."""
    parser = argparse.ArgumentParser(
        description='Draw the statistics that StatisticsHook recorded: small '
        'batch, large batch and moving averages')
    parser.add_argument('file', help='statistics.jsonl of a run')
    parser.add_argument(
        '-o', '--out', help='picture to write; beside the file if not given')
    parser.add_argument(
        '--layers', nargs='+', help='names of layers; all if not given')
    return parser.parse_args(argv)


def read_rows(path: str) -> list:
    """The records of a file.

    Raises:
        FileNotFoundError: If there is none.
        SetupError: If it holds something else, or nothing.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f'no file {path}: StatisticsHook writes statistics.jsonl to the '
            'log folder of a run')
    try:
        rows = [json.loads(line) for line in Path(path).open()]
        if rows and {'iter', 'layer', 'batch'} <= set(rows[0]):
            return rows
    except (ValueError, TypeError):
        pass
    raise SetupError(f'{path} holds no records of StatisticsHook')


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Draw as the command line says."""
    args = parse_args(argv)
    with one_line_errors():
        rows = read_rows(args.file)
        known = list(dict.fromkeys(row['layer'] for row in rows))
        for name in args.layers or ():
            if name not in known:
                raise SetupError(f'--layers {name} was not recorded. '
                                 f'{did_you_mean(name, known)}')
        out = Path(args.out or Path(args.file).with_suffix('.png'))
        out.parent.mkdir(parents=True, exist_ok=True)
        save_statistics(rows, args.layers or known, out)
    print(f'written: {out}')


if __name__ == '__main__':
    main()
