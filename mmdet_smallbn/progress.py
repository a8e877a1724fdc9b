"""Progress of long work: a bar on a terminal, one line elsewhere."""
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
    """True if the error stream is a terminal."""
    return sys.stderr.isatty()


@contextmanager
def progress_bar(title: str, total: Optional[int] = None
                 ) -> Iterator[Callable[..., None]]:
    """Show progress on the error stream, in the main process only.

    Example:
        >>> with progress_bar('images', 10) as tell:
        ...     tell(advance=1)

    Args:
        title (str): Name of the work.
        total (int, optional): Number of steps. None: it is set later.

    Yields:
        callable: Call it with ``advance`` or ``completed`` to move the bar,
        and with ``total`` or ``description`` to change them.
    """
    main = is_main_process()
    bar = Progress(
        TextColumn('{task.description}', markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        # Without a terminal, output must go to its file.
        redirect_stdout=sys.stdout.isatty(),
        disable=not (main and on_terminal()))
    if main and bar.disable and total != 0:
        print(f'{title} ...', file=sys.stderr, flush=True)
    with bar:
        yield partial(bar.update, bar.add_task(title, total=total))


def track(items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
    """Yield the items, and advance a progress bar after each."""
    with progress_bar(title, total) as tell:
        for item in items:
            yield item
            tell(advance=1)
