"""Report of a diagnosis as a table, text, JSON and scalars."""
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
    'values: number of values per channel in a batch. mean: noise of the '
    'mean, in standard deviations. var: relative noise of the variance. g, '
    'Psi: fraction of noise in the gradient statistics. between: fraction of '
    'the variance that is between examples. worth: number of independent '
    'values that contain as much information as the batch. change: change of '
    'the output with the statistics of all batches, in standard deviations. '
    'agree: agreement of the gradient with that of the large batch, 1 is the '
    'best.')


def layer_table(diagnosis: Diagnosis, each: bool = False) -> List[List[str]]:
    """Return the table of the measured norms.

    Args:
        diagnosis (Diagnosis): The measurements.
        each (bool): Make one row per norm. False: one row per part of the
            model, with the means of its norms.

    Returns:
        list[list[str]]: Rows; the first row is the header.
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
    """Return a diagnosis in JSON's types; NaN becomes null."""

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
    """Return the numbers for mmengine's visualisation backends."""
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
    """Return the verdict and the advice in words.

    Args:
        diagnosis (Diagnosis): The measurements.
        advice (Sequence[Advice]): Changes, the most promising first.
        lines (Sequence[str]): Config lines of each change.
    """
    said = ['\n'.join(summary_of(diagnosis))]
    for number, (one, code) in enumerate(zip(advice, lines), 1):
        folds = 'fold' if one.folds else 'do not fold'
        said.append('\n   '.join(
            [f'{number}. {one.title}.', *one.reasons,
             f'For inference, the norms {folds} into the convolutions.',
             *(['Add to a config whose _base_ is your config:'] if code
               else []),
             *(f'    {line}' for line in code.splitlines())]))
    return '\n\n'.join(said)


def summary_json(diagnosis: Diagnosis, advice: Sequence[Advice],
                 lines: Sequence[str]) -> Dict[str, Any]:
    """Return diagnosis, verdict and advice in JSON's types."""
    return dict(
        verdict=verdict_of(diagnosis),
        summary=summary_of(diagnosis),
        advice=[dict(one._asdict(), lines=code)
                for one, code in zip(advice, lines)],
        **as_json(diagnosis))
