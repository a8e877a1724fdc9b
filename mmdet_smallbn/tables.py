"""Tables of measured numbers, for the terminal and for Markdown pages."""
import statistics
from typing import Mapping, Optional, Sequence

from rich.console import Console
from rich.table import Table

Rows = Sequence[Sequence[str]]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Format the mean and standard deviation of a few values.

    Args:
        values (Sequence[float]): Values. Without values the text is empty,
            and one value has no standard deviation.
        digits (int): Digits after the decimal point.
    """
    if not values:
        return ''
    mean = f'{statistics.mean(values):.{digits}f}'
    if len(values) == 1:
        return mean
    return f'{mean} ± {statistics.stdev(values):.{digits}f}'


def as_markdown(rows: Rows) -> str:
    """Return a Markdown table; the first row is the header."""
    head, *others = rows
    return '\n'.join(f'| {" | ".join(row)} |'
                     for row in (head, ['---'] * len(head), *others))


def as_sections(tables: Mapping[str, Rows]) -> str:
    """Return Markdown tables, each below its title."""
    return '\n'.join(f'## {title[:1].upper()}{title[1:]}\n\n'
                     f'{as_markdown(rows)}\n'
                     for title, rows in tables.items())


def show(rows: Rows, console: Console, title: Optional[str] = None) -> None:
    """Print a table; the first row is the header."""
    head, *others = rows
    table = Table(*head, title=title)
    for row in others:
        table.add_row(*row)
    console.print(table)
