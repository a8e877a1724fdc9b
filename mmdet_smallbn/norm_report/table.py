"""Table and summary of a model's norms, as text."""
import io
from itertools import groupby
from typing import Any, Iterator, List, Optional, Sequence, Tuple

from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..layers import is_under
from .describe import Norm, describe_norms
from .notes import notes

_COLUMNS = ('part', 'norms', 'kind', 'after', 'mode', 'scale, shift',
            'statistics in training', 'burn-in', 'at inference')
# Names of submodules that are whole detectors.
_WRAPPERS = ('student', 'teacher', 'detector', 'module')


def part_of(name: str) -> str:
    """Return the part of a detector that a module belongs to."""
    names = name.split('.')
    depth = 1
    while depth < len(names) and names[depth - 1] in _WRAPPERS:
        depth += 1
    if names[depth - 1] == 'roi_head':
        depth += 1
    return '.'.join(names[:depth])


def _rows(norms: Sequence[Norm]) -> Iterator[Tuple[str, int, Norm]]:
    """Group the equal norms of a part; yield label, count and first norm."""
    for part, group in groupby(norms, lambda norm: part_of(norm.name)):
        alike: dict = {}
        for norm in group:
            alike.setdefault(norm[1:], []).append(norm)
        labels = [_label(part, same) for same in alike.values()]
        for label, same in zip(labels, alike.values()):
            if len(alike) == 1:
                label = part
            elif labels.count(label) > 1:
                last = dict.fromkeys(n.name.rpartition('.')[2] for n in same)
                label = f'{label} ({", ".join(last)})'
            yield label, len(same), same[0]


def _label(part: str, norms: Sequence[Norm]) -> str:
    inner = dict.fromkeys(n.name[len(part) + 1:].split('.')[0] for n in norms)
    return f'{part}.{", ".join(inner)}'.rstrip('.')


def norm_table(norms: Sequence[Norm], each: bool = False) -> str:
    """Return a table of norms, with one row for the equal norms of a part.

    Args:
        norms (Sequence[Norm]): Norms from :func:`describe_norms`.
        each (bool): Print one row for each norm.

    Returns:
        str: The table, as lines of text.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in _COLUMNS:
        table.add_column(
            column,
            no_wrap=True,
            justify='right' if column == 'norms' else 'left')
    rows = ((norm.name, 1, norm) for norm in norms) if each else _rows(norms)
    for label, count, norm in rows:
        table.add_row(label, str(count), *norm[1:])
    text = io.StringIO()
    Console(file=text, width=1000, color_system=None).print(
        table, highlight=False)
    lines = text.getvalue().splitlines()
    return '\n'.join(line.rstrip() for line in lines)


def norm_summary(model: nn.Module,
                 images: Optional[int] = None,
                 processes: Optional[int] = None,
                 hooks: Sequence[Any] = (),
                 cfg: Optional[dict] = None,
                 each: bool = False) -> str:
    """Return the table, the parts without a norm, and the notes.

    The arguments are those of :func:`describe_norms`, :func:`notes` and
    :func:`norm_table`.
    """
    norms = describe_norms(model, images, processes, hooks)
    lines = [norm_table(norms, each) if norms else 'no norms']
    bare = _parts_without(model, norms)
    if norms and bare:
        lines.append(f'No norm in {", ".join(bare)}.')
    lines += [
        f'Note: {note}.' for note in notes(model, norms, hooks, cfg)
    ]
    return '\n'.join(lines)


def _parts_without(model: nn.Module, norms: Sequence[Norm]) -> List[str]:
    parts = dict.fromkeys(
        part_of(name) for name, module in model.named_modules()
        if isinstance(module, _ConvNd))
    return [
        part for part in parts
        if not any(is_under(norm.name, part) for norm in norms)
    ]
