"""Small-batch study: where BatchNorm loses accuracy, and what helps."""
import argparse
import datetime
import json
import multiprocessing
import statistics
import time
from concurrent.futures import (FIRST_COMPLETED, Future, ProcessPoolExecutor,
                                wait)
from operator import itemgetter
from pathlib import Path
from typing import (Any, Callable, Dict, List, NamedTuple, Optional, Sequence,
                    Set, Tuple)

import torch
from rich.console import Console

from ..benchmark.contests import processor
from ..errors import check_known, one_line_errors
from ..files import write_runs
from ..pictures import save_lines
from ..processes import end_with_parent
from ..progress import progress_bar
from ..study.regimes import EXAMPLE_WEIGHTS, REGIMES, asked, run
from ..study.settings import ABLATIONS, SETTINGS
from ..tables import as_sections, show, spread

# Settings and images per normalised batch, the most informative first.
# Settings that do not depend on the number of images train at 16, the fastest.
_FIRST = (('BN', 16), ('BN', 2), ('BN', 1), ('MABN', 2), ('CBN', 2),
          ('BN, CenConv', 2), ('MABN', 1), ('GN', 16), ('CBN, CenConv', 2))
_SECOND = (('BN, frozen late', 2), ('BRN', 2), ('NaiveCBN', 2), ('BGN', 2),
           ('CBN, released gradient', 2), ('GN, weight standardisation', 16),
           ('BN, frozen', 16), ('BN', 4), ('BN, frozen late', 1),
           ('CBN, fresh window', 2), ('CBN', 1), ('MABN', 4), ('CBN', 4),
           ('BN, frozen late', 4))
# Further trainings that the ablations need, in some regimes.
_LAST = tuple(dict.fromkeys(
    where for rows in ABLATIONS.values() for where in rows
    if where not in _FIRST + _SECOND))
_ABLATED = ('head', 'detector')
LINES = (_FIRST, _SECOND, _LAST)
_STEADY = 'GN, weight standardisation'  # the same at any number of images
IMAGES = (16, 4, 2, 1)  # the columns of a table
COUNTS = 4.  # a fall counts from so many points beyond the deviation


def _by_weight(row: Dict[str, Any]) -> Dict[str, float]:
    """Return the scores by example weight; weight 0 is plain BatchNorm."""
    return {'0': row['score'], **row['weighted']}


Score = Callable[[Dict[str, Any]], Optional[float]]
# Further evaluations of trained models: the setting, and its score.
EVALUATIONS: Dict[str, Tuple[str, Score]] = {
    'BN, PreciseBN': ('BN', lambda row: row.get('precise')),
    'BN, the best example weight': (
        'BN', lambda row: max(_by_weight(row).values())),
}


class Cell(NamedTuple):
    """One training of the study."""
    regime: str
    setting: str
    images: int
    seed: int


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description='Train every norm in every regime. You can stop the tool '
        'at any time: the same command continues where it stopped')
    parser.add_argument('--regimes', nargs='+', metavar='NAME',
                        help='regimes to train (default: all)')
    parser.add_argument('--settings', nargs='+', metavar='NAME',
                        help='norm settings to train (default: all)')
    parser.add_argument('--images', nargs='+', type=int, choices=IMAGES,
                        help='images per normalised batch (default: all)')
    parser.add_argument('--seeds', type=int, default=5,
                        help='number of seeds, from 0 (default: 5)')
    parser.add_argument('--jobs', type=int, default=1,
                        help='trainings to run in parallel, each with one '
                        'thread (default: 1)')
    parser.add_argument('--minutes', type=float,
                        help='start no training after this time')
    parser.add_argument('--out', default='docs/results',
                        help='folder for a JSON file per regime (default: '
                        '%(default)s)')
    parser.add_argument('--report', action='store_true',
                        help='only print the tables and draw the pictures, '
                        'from stored results')
    args = parser.parse_args(argv)
    for flag in ('seeds', 'jobs'):
        if getattr(args, flag) < 1:
            parser.error(f'--{flag} must be at least 1, but got '
                         f'{getattr(args, flag)}')
    return args


def chosen(names: Optional[Sequence[str]], known: Sequence[str],
           flag: str) -> List[str]:
    """Return the names that a flag gives, or all known names.

    Raises:
        SetupError: If a name is unknown.
    """
    check_known(flag, names, known)
    return [name for name in known if names is None or name in names]


def cells(args: argparse.Namespace) -> List[Cell]:
    """Return the trainings to run, the most informative first.

    All seeds of a line (:data:`LINES`) come before the next line.
    """
    regimes = chosen(args.regimes, list(REGIMES), '--regimes')
    settings = chosen(args.settings, list(SETTINGS), '--settings')
    return [
        Cell(regime, setting, images, seed) for line in LINES
        for seed in range(args.seeds) for setting, images in line
        for regime in regimes if setting in settings
        and (args.images is None or images in args.images)
        and (line is not _LAST or regime in _ABLATED)
    ]


class Results:
    """Finished trainings in a folder, with one JSON file per regime.

    Args:
        folder (str | Path): The folder. It is created if needed.
    """

    def __init__(self, folder) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows: Dict[Cell, Dict[str, Any]] = {}
        for regime in REGIMES:
            self._read(regime)

    def _read(self, regime: str) -> None:
        path = self._path(regime)
        if path.exists():
            for row in json.loads(path.read_text())['runs']:
                self.rows[_cell(row)] = row

    def _path(self, regime: str) -> Path:
        return self.folder / f'{regime.replace(" ", "_")}.json'

    def add(self, row: Dict[str, Any]) -> None:
        """Store a training in memory and on disk."""
        regime = row['regime']
        self._read(regime)  # another process may have added results
        self.rows[_cell(row)] = row
        runs = [self.rows[cell] for cell in sorted(self.rows)
                if cell.regime == regime]
        command = f'python tools/study.py --regimes {json.dumps(regime)}'
        write_runs(self._path(regime), runs, command=command)

    def has(self, cell: Cell) -> bool:
        """True if a training is stored with the current settings and scores.

        A training with, for example, another number of steps or without an
        evaluation is run again.
        """
        kept = self.rows.get(cell, {})
        now = json.loads(json.dumps(asked(*cell)))
        scores = ('weighted', 'precise') if cell.setting == 'BN' else ()
        return (all(kept.get(name) == value for name, value in now.items())
                and all(name in kept for name in scores))

    def scores(self, regime: str, setting: str, images: int,
               score: Score = itemgetter('score')) -> List[float]:
        """Return the scores of all seeds, in percent."""
        return list(self.by_seed(regime, setting, images, score).values())

    def by_seed(self, regime: str, setting: str, images: int,
                score: Score = itemgetter('score')) -> Dict[int, float]:
        """Return the scores, in percent, by seed."""
        found = {cell.seed: score(row)
                 for cell, row in sorted(self.rows.items())
                 if cell[:3] == (regime, setting, images)}
        return {seed: value for seed, value in found.items()
                if value is not None}


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
    """Train several cells in parallel, and store each when it ends."""
    begun = time.monotonic()
    context = multiprocessing.get_context('spawn')
    todo = list(todo)
    waiting: Set[Future] = set()
    with ProcessPoolExecutor(
            jobs, context, end_with_parent) as pool, progress_bar(
                'trainings', len(todo)) as tell:
        while todo or waiting:
            late = minutes is not None and (
                time.monotonic() - begun > 60 * minutes)
            while todo and not late and len(waiting) < jobs:
                waiting.add(pool.submit(_train, todo.pop(0)))
            if not waiting:
                break
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            # Store the finished trainings before a failure is raised.
            for future in sorted(
                    done, key=lambda f: f.exception() is not None):
                row = future.result()
                results.add(row)
                tell(advance=1, description=', '.join(map(str, _cell(row))))


def table(results: Results, regime: str) -> List[List[str]]:
    """Return a regime's table: a row per setting, a column per batch."""
    rows = [['norm', *map(str, IMAGES)]]
    settings = dict.fromkeys(name for name, _ in _FIRST + _SECOND)
    shown = {name: (name, itemgetter('score')) for name in SETTINGS
             if name in settings}
    for name, (setting, score) in dict(shown, **EVALUATIONS).items():
        by_images = [results.scores(regime, setting, n, score) for n in IMAGES]
        if any(by_images):
            rows.append([name, *map(spread, by_images)])
    return rows


_SHORT = ('BN', 'BN, the best example weight', 'BN, frozen late',
          'BN, CenConv', 'CBN', 'MABN', 'GN, weight standardisation')
# Networks from scratch have nothing to freeze: a frozen BatchNorm is no norm.
_NO_NORM = 'BN, frozen'
# Part of the table that README shows.
README = dict(
    regimes=('detector', 'plain detector', 'head'),
    batches=('2', ),
    names=(_NO_NORM, 'BN', 'CBN', 'MABN', 'GN, weight standardisation'))


def in_short(results: Results,
             regimes: Sequence[str] = tuple(REGIMES),
             batches: Sequence[str] = ('2', '1'),
             names: Sequence[str] = _SHORT) -> List[List[str]]:
    """Return the main table: a row per regime and small batch.

    GroupNorm and no norm do not depend on the number of images, so they
    train at 16.
    """
    rows = [['regime, images', 'BN at 16 images',
             *('no norm' if name == _NO_NORM else name for name in names)]]
    for regime in regimes:
        head, *others = table(results, regime)
        if not others:
            continue
        found = {(name, images): text for name, *texts in others
                 for images, text in zip(head[1:], texts)}
        rows.extend(
            [f'{regime}, {images}', found.get(('BN', '16'), ''),
             *(found.get((name, '16' if name in (_STEADY, _NO_NORM)
                          else images), '') for name in names)]
            for images in batches)
    return rows


def ablation(results: Results, title: str) -> List[List[str]]:
    """Return the rows of a paper's table or figure, a column per regime."""
    return [['', *_ABLATED], *(
        [text, *(spread(results.scores(regime, *where))
                 for regime in _ABLATED)]
        for where, text in ABLATIONS[title].items()
        if any(results.scores(regime, *where) for regime in _ABLATED))]


def _beyond(whole: List[float], low: List[float]) -> float:
    """Return the fall of the mean beyond the deviation; 0 if unknown."""
    if min(len(whole), len(low)) < 2:
        return 0.
    deviation = (statistics.variance(whole) + statistics.variance(low))**0.5
    return max(
        statistics.mean(whole) - statistics.mean(low) - deviation, 0.)


def closed(results: Results, regime: str, name: str, images: int) -> str:
    """Return the share of BatchNorm's fall that a setting recovers.

    The text gives it in percent, with the number of seeds that all three
    trainings have in common.
    """
    whole, low, found = (results.by_seed(regime, *where) for where in (
        ('BN', 16), ('BN', images), (name, images)))
    seeds = whole.keys() & low.keys() & found.keys()
    if not seeds:
        return ''
    gain = sum(found[seed] - low[seed] for seed in seeds)
    fall = sum(whole[seed] - low[seed] for seed in seeds)
    return f'{100 * gain / fall:.0f}% ({len(seeds)})'


def summary(results: Results) -> List[List[str]]:
    """Return the falls and the recovered shares per regime and batch."""
    names = ('CBN', 'MABN', 'BN, CenConv', 'BN, frozen late')
    rows = [['regime', 'images', 'BN at 16', 'BN', 'fall',
             'beyond the deviation',
             *(f'{name} closes (seeds)' for name in names)]]
    for regime in REGIMES:
        whole = results.scores(regime, 'BN', 16)
        for images in (2, 1):
            low = results.scores(regime, 'BN', images)
            if not (whole and low):
                continue
            fall = statistics.mean(whole) - statistics.mean(low)
            beyond = _beyond(whole, low)
            rows.append([
                regime, str(images), spread(whole), spread(low), f'{fall:.1f}',
                f'{beyond:.1f}',
                *('' if beyond < COUNTS else closed(
                    results, regime, name, images) for name in names)])
    return rows


def all_tables(results: Results) -> Dict[str, List[List[str]]]:
    """Return the tables that have results, by title."""
    tables = dict({'in README': in_short(results, **README),
                   'in short': in_short(results),
                   'what is closed': summary(results)},
                  **{regime: table(results, regime) for regime in REGIMES},
                  **{title: ablation(results, title) for title in ABLATIONS})
    return {name: rows for name, rows in tables.items() if len(rows) > 1}


def page(results: Results) -> str:
    """Return the tables as a Markdown page."""
    machines = sorted({f'{row["machine"]}, {row["date"]}'
                       for row in results.rows.values()})
    lines = [
        '# Results of the small-batch study', '',
        'Scores in percent, mean and deviation over seeds; a number without '
        'a deviation is of one seed. Columns are images of a normalised '
        'batch. Made by `python tools/study.py`, on made data. '
        f'{"; ".join(machines)}.', ''
    ]
    return '\n'.join([*lines, as_sections(all_tables(results))])


def _draw_regimes(results: Results, regimes: List[str]) -> None:
    save_lines(
        {regime: {
            setting: {
                str(n): results.scores(regime, setting, n)
                for n in reversed(IMAGES)
            } for setting in ('BN', _STEADY, 'CBN', 'MABN')
        } for regime in regimes},
        results.folder / 'study.png', 'images of a normalised batch',
        'score, %', steady=_STEADY)
    save_lines(
        {regime: {
            f'BN at {n}': {
                weight: results.scores(
                    regime, 'BN', n, lambda row: _by_weight(row)[weight])
                for weight in ('0', *map('{:g}'.format, EXAMPLE_WEIGHTS))
            } for n in reversed(IMAGES)
        } for regime in regimes},
        results.folder / 'example_weight.png', 'weight of the example',
        'score, %')


def report(results: Results, console: Console) -> None:
    """Print the tables, and save them and the pictures with the results."""
    tables = all_tables(results)
    for title, rows in tables.items():
        show(rows, console, title)
    if not tables:
        return
    (results.folder / 'README.md').write_text(page(results))
    regimes = [regime for regime in REGIMES if regime in tables]
    if regimes:
        _draw_regimes(results, regimes)
    ablated = {
        f'{title.split(":")[0]}, {regime}': {
            '': {text.split(':')[0]: results.scores(regime, *where)
                 for where, text in rows.items()}
        } for title, rows in ABLATIONS.items() for regime in _ABLATED
        # A picture of less than half the rows is not useful.
        if 2 * sum(bool(results.scores(regime, *where)) for where in rows
                   ) > len(rows)}
    if ablated:
        save_lines(
            ablated, results.folder / 'ablations.png', 'row', 'score, %',
            joined=False)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the missing trainings and report."""
    args = parse_args(argv)
    with one_line_errors():
        wanted = cells(args)
        results = Results(args.out)
        todo = [cell for cell in wanted if not results.has(cell)]
        try:
            if not args.report:
                train_all(todo, results, args.jobs, args.minutes)
        except KeyboardInterrupt:
            print('stopped; the same command continues from here')
            raise SystemExit(130) from None
        report(results, Console())
        missing = sum(not results.has(cell) for cell in wanted)
        print(f'written to {args.out}; {missing} of {len(wanted)} trainings '
              'are missing')


if __name__ == '__main__':
    main()
