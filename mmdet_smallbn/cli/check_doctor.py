"""Comparison of the norm doctor's advice with the study's trainings."""
import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

import torch
from mmengine.optim import OptimWrapper
from rich.console import Console
from scipy.stats import spearmanr
from torch import Tensor, nn

from ..doctor import Diagnosis, Layer, Task, advise, diagnose, verdict_of
from ..doctor.advice import agreement_of
from ..errors import one_line_errors
from ..files import write_runs, write_whole
from ..pictures import save_check
from ..progress import progress_bar
from ..study.detector import detection_loss
from ..study.regimes import REGIMES
from ..study.settings import SETTINGS
from ..study.training import STEP, Regime, order
from ..tables import as_sections, show, spread
from .study import EVALUATIONS, Results, chosen

# The doctor's threshold was set on these regimes. The others test it.
CALIBRATION = ('plain', 'video', 'hasty detector')
IMAGES = (4, 2, 1)
# This setting serves the study only: its steps cost four times as much.
_NOT_OFFERED = ('CBN, fresh window', )
BLOCKS = 8  # number of blocks of 16 images
STEPS = 40  # optimizer steps before the weights are frozen


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Run the norm doctor on the study's models, and compare "
        'its advice with the results of their trainings')
    parser.add_argument('--results', default='docs/results',
                        help="folder with the study's results "
                        '(default: %(default)s)')
    parser.add_argument('--regimes', nargs='+', metavar='NAME',
                        help='regimes to diagnose (default: all)')
    parser.add_argument('--seeds', type=int, default=2,
                        help='number of seeds, from 0 (default: 2)')
    parser.add_argument('--report', action='store_true',
                        help='only print the tables and draw the picture, '
                        'from stored diagnoses')
    return parser.parse_args(argv)


class StudyTask(Task):
    """Task of a regime of the study. A batch is a tensor of indices."""

    def __init__(self, regime: Regime) -> None:
        self.regime = regime
        self.examples = regime.splits()[0]

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return self.regime.loss(model, self.examples.of(batch))

    def batches(self, images: int, seed: int) -> Iterator[Tensor]:
        """Yield batches in the study's order, with the given seed."""
        for step in order(self.examples.groups, self.regime.together, seed):
            yield from step.split(images)


def examine(name: str, images: int, seed: int) -> Diagnosis:
    """Diagnose BatchNorm in a regime of the study."""
    regime = REGIMES[name]
    task = StudyTask(regime)

    def optimizer(model: nn.Module) -> OptimWrapper:
        kind = torch.optim.AdamW if regime.adam else torch.optim.SGD
        more = {} if regime.adam else dict(momentum=0.9)
        return OptimWrapper(
            kind(model.parameters(), regime.lr, **more),
            accumulative_counts=STEP // images)

    torch.manual_seed(seed)
    model = regime.build(SETTINGS['BN'].norm)
    return diagnose(model, task.batches(images, 1000 + seed), optimizer, task,
                    reference=STEP, blocks=BLOCKS,
                    iters=STEPS * STEP // images)


def row_of(diagnosis: Diagnosis) -> Dict[str, Any]:
    """Return the part of a diagnosis that this check needs, for JSON."""
    return dict(
        images=diagnosis.images,
        agreement={str(size): [round(v, 4) for v in values]
                   for size, values in diagnosis.agreement.items()},
        floor=[round(v, 4) for v in diagnosis.floor],
        mean_noise=round(statistics.mean(
            layer.mean_noise for layer in diagnosis.layers), 4))


def _joined(rows: List[Dict[str, Any]]) -> Diagnosis:
    """Join the diagnoses of all seeds, which have separate blocks."""
    noise = statistics.mean(row['mean_noise'] for row in rows)
    unknown = dict.fromkeys(Layer._fields, math.nan)
    return Diagnosis(
        images=rows[0]['images'],
        reference=STEP,
        layers=[Layer(**dict(unknown, name='mean of all', channels=64,
                             calls=1, mean_noise=noise))],
        agreement={
            int(size): [v for row in rows for v in row['agreement'][size]]
            for size in rows[0]['agreement']
        },
        floor=[v for row in rows for v in row['floor']],
        loss=dict(batch=[], fixed=[], reference=[]),
        windows={}, moved=0., asleep=[], alike=math.nan, single=[], others={})


class _Cell:
    """Diagnosis and trainings of one regime at one number of images.

    Args:
        rows (list[dict]): Diagnoses, one per seed.
        results (Results): The study's trainings.
    """

    def __init__(self, rows: List[Dict[str, Any]], results: Results) -> None:
        self.regime, self.images = rows[0]['regime'], rows[0]['images']
        self.results = results
        self.whole = _joined(rows)
        low = results.by_seed(self.regime, 'BN', self.images)
        high = results.by_seed(self.regime, 'BN', 16)
        self.fall = statistics.mean(
            high[seed] - low[seed] for seed in high.keys() & low.keys())

    def scores(self, setting: str) -> List[float]:
        name, *score = EVALUATIONS.get(setting, (setting, ))
        images = 16 if name.startswith('GN') else self.images
        return self.results.scores(self.regime, name, images, *score)

    def best(self, folds: bool) -> str:
        """Return the setting with the best mean score."""
        names = [*SETTINGS, *([] if folds else EVALUATIONS)]
        names = [name for name in names if name not in _NOT_OFFERED]
        fit = [name for name in names if self.scores(name) and not (
            folds and (name.startswith('GN') or name == 'BGN'))]
        return max(fit, key=lambda n: statistics.mean(self.scores(n)))

    def pick(self, folds: bool) -> str:
        """Return the first advised setting that folds, or does not."""
        detects = REGIMES[self.regime].loss is detection_loss
        found = [a for a in advise(self.whole, detects) if a.setting
                 and a.folds == folds]
        return found[0].setting if found else 'BN'

    def is_within(self, folds: bool) -> Optional[bool]:
        """True if the pick is within one deviation of the best setting.

        The deviation is that of the difference of the two means. None if the
        pick was not trained.
        """
        best, own = (self.scores(name) for name in (
            self.best(folds), self.pick(folds)))
        if not own:
            return None
        deviation = math.sqrt(sum(statistics.variance(v) for v in (best, own)
                                  if len(v) > 1))
        return statistics.mean(best) - statistics.mean(own) <= deviation


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's rank correlation."""
    return float(spearmanr(a, b).statistic)


def _table(cells: List[_Cell]) -> List[List[str]]:
    rows = [['regime, images', 'agreement', 'verdict', 'fall of BatchNorm',
             'pick that folds', 'best that folds', 'within',
             'pick that does not', 'best of all', 'within']]
    said = {True: 'yes', False: '**no**', None: ''}
    for cell in cells:
        mean, error = agreement_of(cell.whole)
        row = [f'{cell.regime}, {cell.images}', f'{mean:.2f} ± {error:.2f}',
               verdict_of(cell.whole), f'{cell.fall:.1f}']
        for folds in (True, False):
            for name in (cell.pick(folds), cell.best(folds)):
                row.append(f'{name} {spread(cell.scores(name))}'.strip())
            row.append(said[cell.is_within(folds)])
        rows.append(row)
    return rows


def in_sum(parts: Dict[str, List[_Cell]]) -> List[str]:
    """Summarise each table in one line."""
    every = [cell for cells in parts.values() for cell in cells]
    lines = []
    for title, cells in dict({'All': every}, **parts).items():
        if len(cells) < 3:
            continue
        falls = [c.fall for c in cells]
        rho = rank_correlation(falls, [
            -agreement_of(c.whole)[0] for c in cells])
        noise = rank_correlation(falls, [
            c.whole.layers[0].mean_noise for c in cells])
        line = (f'- {title}: {len(cells)} cells. Rank correlation of the fall '
                f'with 1 - agreement {rho:.2f}; with the noise of the mean '
                f'{noise:.2f}.')
        for folds, name in ((True, 'Picks that fold'),
                            (False, 'Picks that do not')):
            within = [w for w in (c.is_within(folds) for c in cells)
                      if w is not None]
            line += f' {name}: {sum(within)} of {len(within)} within.'
        lines.append(line)
    return lines


def cells_of(rows: List[Dict[str, Any]],
             results: Results) -> Dict[str, List[_Cell]]:
    """Group the diagnosed cells: regimes that set the threshold, and those
    that test it."""
    by_cell: Dict[tuple, List[Dict[str, Any]]] = {}
    for row in rows:
        by_cell.setdefault((row['regime'], row['images']), []).append(row)
    cells = [_Cell(by_cell[name, images], results) for name in REGIMES
             for images in IMAGES if (name, images) in by_cell]
    return {
        'Regimes that set the threshold': [
            c for c in cells if c.regime in CALIBRATION],
        'Regimes that judge': [
            c for c in cells if c.regime not in CALIBRATION]
    }


def page(parts: Dict[str, List[_Cell]]) -> str:
    """Return the tables as a Markdown page."""
    lines = [
        '# The norm doctor, held against the study', '',
        'Agreement: of the gradient of a batch with that of 16 images, mean '
        'and standard error. Fall: from BatchNorm with 16 images, in points. '
        'Scores in percent, mean and deviation over seeds. A pick is the '
        'first advice that folds, or that does not, and BN if there is no '
        'advice; within: no further from the best norm than the '
        'deviation of their difference. Made by '
        '`python tools/check_doctor.py`.', '', *in_sum(parts), ''
    ]
    return '\n'.join([*lines, as_sections(
        {title: _table(own) for title, own in parts.items() if own})])


def report(parts: Dict[str, List[_Cell]], folder: Path,
           console: Console) -> None:
    """Print the tables, and write a page and a picture to the folder."""
    for title, own in parts.items():
        if own:
            show(_table(own), console, title)
    console.print('\n'.join(in_sum(parts)))
    write_whole(folder / 'doctor.md', page(parts))
    save_check({
        title: [(f'{c.regime}, {c.images}', agreement_of(c.whole)[0], c.fall)
                for c in own] for title, own in parts.items()
    }, folder / 'doctor.png')


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Diagnose, compare with the trainings and report."""
    args = parse_args(argv)
    torch.set_num_threads(1)
    folder = Path(args.results)
    path = folder / 'doctor.json'
    with one_line_errors():
        names = chosen(args.regimes, list(REGIMES), '--regimes')
        rows = json.loads(path.read_text())['runs'] if path.exists() else []
        known = {(r['regime'], r['images'], r['seed']) for r in rows}
        todo = [(name, images, seed) for seed in range(args.seeds)
                for name in names for images in IMAGES
                if (name, images, seed) not in known]
        if args.report:
            todo = []
        with progress_bar('diagnoses', len(todo)) as tell:
            for name, images, seed in todo:
                rows.append(dict(regime=name, seed=seed, steps=STEPS,
                                 **row_of(examine(name, images, seed))))
                write_runs(path, rows, command='python tools/check_doctor.py')
                tell(advance=1)
        report(cells_of(rows, Results(folder)), folder, Console(width=200))
        print(f'written to {folder}: doctor.md, doctor.json, doctor.png')


if __name__ == '__main__':
    main()
