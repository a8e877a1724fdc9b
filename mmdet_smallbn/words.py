"""Counts and lists of names, as text for messages."""
from typing import Any, Sequence


def counted(number: Any, unit: str) -> str:
    """Return a number with its unit: ``1 image``, ``2 images``."""
    return f'{number} {unit}{"" if number == 1 else "s"}'


def some(names: Sequence[str], most: int = 3) -> str:
    """Return the first few names and the number of the others."""
    if not names:
        return 'nothing'
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(names[:most]) + more
