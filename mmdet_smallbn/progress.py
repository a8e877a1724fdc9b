"""How far long work is: a bar on a terminal, one line elsewhere."""
import sys
from contextlib import contextmanager
from functools import partial
from typing import Callable, Iterable, Iterator, Optional, TypeVar

from mmengine.dist import is_main_process
from rich.console import Console
from rich.progress import (BarColumn, MofNCompleteColumn, Progress,
                           TextColumn, TimeRemainingColumn)

Item = TypeVar('Item')


def on_terminal() -> bool:
    """Whether what is drawn is seen, and not kept in a file."""
    return sys.stderr.isatty()


@contextmanager
def progress_bar(title: str, total: Optional[int] = None
                 ) -> Iterator[Callable[..., None]]:
    """Show progress on the error stream, of the main process alone.

    Example:
        >>> with progress_bar('images', 10) as tell:
        ...     tell(advance=1)

    Args:
        title (str): What is done.
        total (int, optional): Number of steps; None if it is told later.

    Yields:
        callable: To be called with ``advance`` or ``completed``, and with
        ``total`` and ``description`` where they change.
    """
    main = is_main_process()
    bar = Progress(
        TextColumn('{task.description}', markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        # What goes to a file stays there.
        redirect_stdout=sys.stdout.isatty(),
        disable=not (main and on_terminal()))
    if main and bar.disable and total != 0:
        print(f'{title} ...', file=sys.stderr, flush=True)
    with bar:
        yield partial(bar.update, bar.add_task(title, total=total))


def track(items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
    """The items, with a bar that is a step further after each."""
    with progress_bar(title, total) as tell:
        for item in items:
            yield item
            tell(advance=1)
