"""Draw what StatisticsHook recorded, as the MABN paper's Fig. 2-4."""
import argparse
import fnmatch
import json
from pathlib import Path
from typing import List, Optional, Sequence

from ..errors import SetupError, did_you_mean, one_line_errors
from ..pictures import draw_statistics


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Flags of the plot."""
    parser = argparse.ArgumentParser(
        description='Draw the statistics that StatisticsHook recorded: small '
        'batch, large batch and moving averages')
    parser.add_argument(
        'files',
        nargs='+',
        help='statistics.jsonl of a run; of a resumed run those of all its '
        'parts, in their order')
    parser.add_argument(
        '-o', '--out', help='picture to write; beside the last file if not '
        'given')
    parser.add_argument(
        '--layers',
        nargs='+',
        help='names of layers, with wildcards; all if not given')
    return parser.parse_args(argv)


def read_rows(paths: Sequence[str]) -> List[dict]:
    """The records of files; where they overlap, those of the later.

    Raises:
        FileNotFoundError: If there is no such file.
        SetupError: If it holds something else, or nothing.
    """
    rows = {}
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(
                f'no file {path}: StatisticsHook writes statistics.jsonl to '
                'the log folder of a run')
        found = 0
        for line in Path(path).read_text(errors='replace').splitlines():
            try:
                row = json.loads(line)
                rows[row['iter'], row['layer']] = row
                found += 'batch' in row
            except (ValueError, TypeError, KeyError):
                continue  # a run that was ended while it wrote
        if not found:
            raise SetupError(f'{path} holds no records of StatisticsHook')
    return [rows[key] for key in sorted(rows, key=lambda key: key[0])]


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Draw as the command line says."""
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
