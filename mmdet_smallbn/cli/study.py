"""The small-batch study: where BatchNorm suffers, and what helps there."""
import argparse
import datetime
import json
import multiprocessing
import statistics
import time
from concurrent.futures import (FIRST_COMPLETED, Future, ProcessPoolExecutor,
                                wait)
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set

import torch
from rich.console import Console
from rich.progress import (BarColumn, MofNCompleteColumn, Progress,
                           TextColumn, TimeRemainingColumn)
from rich.table import Table

from ..errors import check_known, one_line_errors
from ..pictures import save_study
from ..study.regimes import REGIMES, run
from ..study.settings import SETTINGS
from .benchmark import processor
from .gradient_study import spread

# Settings, and images of a batch that is normalised; the first ones say most.
# What is the same at any number of images trains at 16, the fastest.
CELLS = (
    ('BN', 16), ('BN', 2), ('BN', 1), ('MABN', 2), ('CBN', 2),
    ('BN, CenConv', 2), ('MABN', 1), ('CBN', 1), ('CBN, CenConv', 2),
    ('GN', 16),
    ('BN, frozen late', 2), ('BRN', 2), ('NaiveCBN', 2), ('BGN', 2),
    ('CBN, released gradient', 2), ('MABN, centred', 2),
    ('GN, weight standardisation', 16), ('BN, CenConv', 16),
    ('CBN, fresh window', 2), ('BN, frozen', 16), ('BN', 4), ('CBN', 4),
    ('MABN', 4))
_FIRST = 10
IMAGES = (16, 4, 2, 1)  # the columns of a table


class Cell(NamedTuple):
    """One training of the study."""
    regime: str
    setting: str
    images: int
    seed: int


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Flags of the tool."""
    parser = argparse.ArgumentParser(
        description='Train every norm in every regime. Stop it at any time: '
        'the next start goes on where it was')
    parser.add_argument('--regimes', nargs='+', metavar='NAME',
                        help='all, if not given')
    parser.add_argument('--settings', nargs='+', metavar='NAME',
                        help='all, if not given')
    parser.add_argument('--seeds', type=int, default=5, help='from 0 on')
    parser.add_argument('--jobs', type=int, default=1,
                        help='trainings at the same time, a thread each')
    parser.add_argument('--minutes', type=float,
                        help='start no training after so many')
    parser.add_argument('--out', default='docs/results',
                        help='folder; a JSON file for each regime')
    parser.add_argument('--report', action='store_true',
                        help='train nothing: print the tables, and draw')
    args = parser.parse_args(argv)
    for flag in ('seeds', 'jobs'):
        if getattr(args, flag) < 1:
            parser.error(f'--{flag} must be at least 1, but got '
                         f'{getattr(args, flag)}')
    return args


def chosen(names: Optional[Sequence[str]], known: Sequence[str],
           flag: str) -> List[str]:
    """The names of a flag; all that are known if it is not given.

    Raises:
        SetupError: If a name is unknown.
    """
    check_known(flag, names, known)
    return [name for name in known if names is None or name in names]


def cells(args: argparse.Namespace) -> List[Cell]:
    """The trainings, in an order in which early results say most."""
    regimes = chosen(args.regimes, list(REGIMES), '--regimes')
    settings = chosen(args.settings, list(SETTINGS), '--settings')
    places = [place for place, (setting, _) in enumerate(CELLS)
              if setting in settings]
    order = sorted(
        ((place >= _FIRST, seed, place, regime) for place in places
         for seed in range(args.seeds) for regime in regimes),
        key=lambda key: key[:3])
    return [Cell(regime, *CELLS[place], seed)
            for _, seed, place, regime in order]


class Results:
    """The finished trainings of a folder, a JSON file for each regime.

    Args:
        folder (str | Path): It is made if it is not there.
    """

    def __init__(self, folder) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows: Dict[Cell, Dict[str, Any]] = {}
        for regime in REGIMES:
            path = self._path(regime)
            if path.exists():
                for row in json.loads(path.read_text())['runs']:
                    self.rows[_cell(row)] = row

    def _path(self, regime: str) -> Path:
        return self.folder / f'{regime.replace(" ", "_")}.json'

    def add(self, row: Dict[str, Any]) -> None:
        """Keep a training, in memory and on disk."""
        self.rows[_cell(row)] = row
        regime = row['regime']
        runs = [self.rows[cell] for cell in sorted(self.rows)
                if cell.regime == regime]
        command = f'python tools/study.py --regimes {json.dumps(regime)}'
        lines = ',\n'.join(f'  {json.dumps(run)}' for run in runs)
        path = self._path(regime)
        whole = path.with_suffix('.part')
        whole.write_text(f'{{"command": {json.dumps(command)},\n'
                         f' "runs": [\n{lines}\n]}}\n')
        whole.replace(path)

    def scores(self, regime: str, setting: str, images: int,
               kind: str = 'score') -> List[float]:
        """Scores of the seeds, in percent."""
        return [row[kind] for cell, row in sorted(self.rows.items())
                if cell[:3] == (regime, setting, images) and kind in row]


def _cell(row: Dict[str, Any]) -> Cell:
    return Cell(*(row[name] for name in Cell._fields))


def _train(cell: Cell) -> Dict[str, Any]:
    torch.set_num_threads(1)
    row = run(*cell)
    row.update(machine=f'{processor()}, 1 thread, torch {torch.__version__}',
               date=datetime.date.today().isoformat())
    return row


def train_all(todo: List[Cell], results: Results, jobs: int,
              minutes: Optional[float]) -> None:
    """Train cells, several at a time, and keep each as it ends."""
    begun = time.monotonic()
    columns = (TextColumn('{task.description}'), BarColumn(),
               MofNCompleteColumn(), TimeRemainingColumn())
    context = multiprocessing.get_context('spawn')
    todo = list(todo)
    waiting: Set[Future] = set()
    with ProcessPoolExecutor(jobs, context) as pool, Progress(
            *columns) as progress:
        task = progress.add_task('trainings', total=len(todo))
        while todo or waiting:
            late = minutes is not None and (
                time.monotonic() - begun > 60 * minutes)
            while todo and not late and len(waiting) < jobs:
                waiting.add(pool.submit(_train, todo.pop(0)))
            if not waiting:
                break
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                row = future.result()
                results.add(row)
                progress.update(
                    task, advance=1, description=', '.join(
                        map(str, _cell(row))))


def table(results: Results, regime: str) -> List[List[str]]:
    """Rows of a regime: settings, and their scores by images."""
    rows = [['norm', *map(str, IMAGES)]]
    for setting in SETTINGS:
        by_images = [results.scores(regime, setting, n) for n in IMAGES]
        if any(by_images):
            rows.append([setting, *map(spread, by_images)])
    for kind, name in EVALUATIONS.items():
        by_images = [results.scores(regime, 'BN', n, kind) for n in IMAGES]
        if any(by_images):
            rows.append([name, *map(spread, by_images)])
    return rows


def closed(results: Results, regime: str, setting: str, images: int,
           kind: str = 'score') -> Optional[float]:
    """Part of BatchNorm's fall that a setting takes back, in percent.

    None if something was not measured.
    """
    whole, low, found = (
        results.scores(regime, *where) for where in
        (('BN', 16), ('BN', images), (setting, images, kind)))
    if not (whole and low and found):
        return None
    whole, low, found = map(statistics.mean, (whole, low, found))
    return 100 * (found - low) / (whole - low) if whole > low else None


def summary(results: Results, images: int = 2) -> List[List[str]]:
    """A row for each regime: BatchNorm's fall, and what closes it."""
    names = ('CBN', 'MABN', 'BN, CenConv', 'CBN, CenConv')
    rows = [['regime', 'BN at 16', f'BN at {images}', 'fall',
             *(f'{name} closes' for name in names)]]
    for regime in REGIMES:
        whole = results.scores(regime, 'BN', 16)
        low = results.scores(regime, 'BN', images)
        if not (whole and low):
            continue
        parts = [closed(results, regime, name, images) for name in names]
        fall = statistics.mean(whole) - statistics.mean(low)
        rows.append([
            regime, spread(whole), spread(low), f'{fall:.1f}',
            *('' if part is None or fall < 1 else f'{part:.0f}%'
              for part in parts)])
    return rows


def all_tables(results: Results) -> Dict[str, List[List[str]]]:
    """The summary and a table for each regime, if there is anything in it."""
    tables = dict(summary=summary(results),
                  **{regime: table(results, regime) for regime in REGIMES})
    return {name: rows for name, rows in tables.items() if len(rows) > 1}


def page(results: Results) -> str:
    """The tables as a Markdown page."""
    machines = sorted({f'{row["machine"]}, {row["date"]}'
                       for row in results.rows.values()})
    lines = [
        '# Results of the small-batch study', '',
        'Scores in percent, mean and deviation over seeds; a number without '
        'a deviation is of one seed. Columns are images of a normalised '
        'batch. Made by `python tools/study.py`, on made data. '
        f'{"; ".join(machines)}.', ''
    ]
    for title, (head, *rows) in all_tables(results).items():
        lines += [f'## {title.capitalize()}', '']
        lines += [f'| {" | ".join(row)} |'
                  for row in (head, ['---'] * len(head), *rows)]
        lines.append('')
    return '\n'.join(lines)


def report(results: Results, console: Console) -> None:
    """Print the tables, and put them and a picture beside the results."""
    tables = all_tables(results)
    for title, (head, *rows) in tables.items():
        shown = Table(*head, title=title)
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
    if not tables:
        return
    (results.folder / 'README.md').write_text(page(results))
    save_study(
        {regime: {
            setting: {
                n: results.scores(regime, setting, n) for n in IMAGES
            } for setting in ('BN', 'GN', 'CBN', 'MABN')
        } for regime in tables if regime in REGIMES},
        results.folder / 'study.png')


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Train what is missing, and report."""
    args = parse_args(argv)
    with one_line_errors():
        wanted = cells(args)
        results = Results(args.out)
        todo = [cell for cell in wanted if cell not in results.rows]
        try:
            if not args.report:
                train_all(todo, results, args.jobs, args.minutes)
        except KeyboardInterrupt:
            print('stopped; the same command goes on from here')
            raise SystemExit(130) from None
        report(results, Console())
        missing = sum(cell not in results.rows for cell in wanted)
        print(f'In {args.out}; {missing} of {len(wanted)} trainings are '
              'still to come')


if __name__ == '__main__':
    main()
