"""Counts and lists in messages."""
from typing import Any, Sequence


def counted(number: Any, unit: str) -> str:
    """A number with its unit: ``1 image``, ``2 images``."""
    return f'{number} {unit}{"" if number == 1 else "s"}'


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    if not names:
        return 'nothing'
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(names[:most]) + more
