"""A diagnosis as a table and as JSON."""
import math
import statistics
from itertools import groupby
from typing import Any, Dict, List, Sequence

from ..norm_report.table import part_of
from .advice import Advice, agreements, summary_of, verdict_of
from .diagnosis import Diagnosis
from .measures import Layer

_COLUMNS = {
    'values': 'values',
    'mean_noise': 'mean',
    'var_noise': 'var',
    'g_noise': 'g',
    'psi_noise': 'Psi',
    'between': 'between',
    'effective': 'worth',
    'disagreement': 'change',
    'agreement': 'agree'
}
LEGEND = (
    'values: a channel, in a batch. mean, var: noise of its statistics, in '
    'deviations and relative. g, Psi: part of its gradient statistics that is '
    'noise. between: part of the variance that is between examples. worth: '
    'independent values that the batch is worth. change: of the output, in '
    'deviations, with the statistics of all batches. agree: of the gradient, '
    '1 is the best.')


def layer_table(diagnosis: Diagnosis, each: bool = False) -> List[List[str]]:
    """Rows of the watched norms, means over those of a part.

    Args:
        diagnosis (Diagnosis): What was measured.
        each (bool): A row for each norm.

    Returns:
        list[list[str]]: The first row is the head.
    """
    rows = [['norms', '', *_COLUMNS.values()]]
    groups: Sequence[Any] = [(la.name, [la]) for la in diagnosis.layers]
    if not each:
        groups = [(part, list(own)) for part, own in groupby(
            diagnosis.layers, lambda layer: part_of(layer.name))]
    for name, layers in groups:
        rows.append([name, str(len(layers)), *(
            _mean(layers, key) for key in _COLUMNS)])
    return rows


def _mean(layers: List[Layer], key: str) -> str:
    values = [getattr(layer, key) for layer in layers]
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return '-'
    mean = statistics.mean(values)
    return f'{mean:.0f}' if key in ('values', 'effective') else f'{mean:.2f}'


def as_json(diagnosis: Diagnosis) -> Dict[str, Any]:
    """A diagnosis in JSON's types; NaN becomes null."""

    def plain(value: Any) -> Any:
        if isinstance(value, float):
            return None if math.isnan(value) else round(value, 5)
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, Layer):
            return plain(value._asdict())
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return value

    return plain(diagnosis._asdict())


def scalars(diagnosis: Diagnosis) -> Dict[str, float]:
    """What mmengine's visualisation backends get."""
    found = {f'doctor/agreement_{size}': mean
             for size, (mean, _) in agreements(diagnosis).items()}
    found.update({f'doctor/{layer.name}/agreement': layer.agreement
                  for layer in diagnosis.layers
                  if not math.isnan(layer.agreement)})
    found.update({f'doctor/{layer.name}/output_change': layer.disagreement
                  for layer in diagnosis.layers})
    return found


def as_text(diagnosis: Diagnosis, advice: Sequence[Advice],
            lines: Sequence[str]) -> str:
    """The verdict and the advice in words.

    Args:
        diagnosis (Diagnosis): What was measured.
        advice (Sequence[Advice]): What to do, the most promising first.
        lines (Sequence[str]): Config lines of each.
    """
    said = ['\n'.join(summary_of(diagnosis))]
    for number, (one, code) in enumerate(zip(advice, lines), 1):
        folds = 'folds' if one.folds else 'does not fold'
        said.append('\n   '.join(
            [f'{number}. {one.title}.', *one.reasons,
             f'The model {folds} into plain convolutions.',
             *(['Add to a config whose _base_ is yours:'] if code else []),
             *(f'    {line}' for line in code.splitlines())]))
    return '\n\n'.join(said)


def summary_json(diagnosis: Diagnosis, advice: Sequence[Advice],
                 lines: Sequence[str]) -> Dict[str, Any]:
    """All of it, for a file."""
    return dict(
        verdict=verdict_of(diagnosis),
        summary=summary_of(diagnosis),
        advice=[dict(one._asdict(), lines=code)
                for one, code in zip(advice, lines)],
        **as_json(diagnosis))
