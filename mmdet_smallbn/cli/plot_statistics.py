"""Plots of StatisticsHook's records, as in MABN's Fig. 2-4."""
import argparse
import fnmatch
import json
from pathlib import Path
from typing import List, Optional, Sequence

from ..errors import SetupError, did_you_mean, one_line_errors
from ..pictures import draw_statistics


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description='Plot the statistics that StatisticsHook recorded: those '
        'of a small batch, those of a large batch and the moving averages')
    parser.add_argument(
        'files',
        nargs='+',
        help='statistics.jsonl of a run; for a resumed run, the files of all '
        'its parts in order')
    parser.add_argument(
        '-o', '--out',
        help='picture to write (default: next to the last file)')
    parser.add_argument(
        '--layers',
        nargs='+',
        help='layer names, with wildcards (default: all)')
    return parser.parse_args(argv)


def read_rows(paths: Sequence[str]) -> List[dict]:
    """Read the records of several files; a later file wins an overlap.

    Raises:
        FileNotFoundError: If a file does not exist.
        SetupError: If a file has no records of StatisticsHook.
    """
    rows = {}
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(
                f'no file {path}: check the path. StatisticsHook writes '
                'statistics.jsonl to the log folder of a run')
        found = 0
        for line in Path(path).read_text(errors='replace').splitlines():
            try:
                row = json.loads(line)
                rows[row['iter'], row['layer']] = row
                found += 'batch' in row
            except (ValueError, TypeError, KeyError):
                continue  # a killed run leaves an incomplete line
        if not found:
            raise SetupError(f'{path} has no records of StatisticsHook: give '
                             'the statistics.jsonl of a run')
    return [rows[key] for key in sorted(rows, key=lambda key: key[0])]


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Draw the plot."""
    args = parse_args(argv)
    with one_line_errors():
        rows = read_rows(args.files)
        known = list(dict.fromkeys(row['layer'] for row in rows))
        layers = []
        for pattern in args.layers or ['*']:
            found = fnmatch.filter(known, pattern)
            if not found:
                raise SetupError(f'--layers {pattern} was not recorded. '
                                 f'{did_you_mean(pattern, known)}')
            layers += found
        out = Path(args.out or Path(args.files[-1]).with_suffix('.png'))
        out.parent.mkdir(parents=True, exist_ok=True)
        draw_statistics(rows, layers).savefig(out, dpi=110)
    print(f'written: {out}')


if __name__ == '__main__':
    main()
