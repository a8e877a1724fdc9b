"""Errors that a user can mend, and how the tools show them."""
import difflib
import os
import sys
import traceback
from contextlib import contextmanager
from typing import Iterator, Optional, Sequence


class SetupError(RuntimeError):
    """The configuration and the model do not fit; raised before training."""


def did_you_mean(unknown: str, known: Sequence[str]) -> str:
    """Known names near an unknown one, as the end of a message."""
    near = difflib.get_close_matches(unknown, known, n=2, cutoff=0.5)
    if near:
        return f'Did you mean {" or ".join(near)}?'
    return f'Known are {", ".join(sorted(known))}'


def check_known(flag: str, names: Optional[Sequence[str]],
                known: Sequence[str]) -> None:
    """Refuse a flag's names that are not known.

    Raises:
        SetupError: It says which is near.
    """
    for name in names or ():
        if name not in known:
            raise SetupError(f'{flag} {name!r} is not known. '
                             f'{did_you_mean(name, known)}')


def describe(error: BaseException) -> str:
    """One line that says what went wrong.

    Registries wrap an error once a level ("class `FasterRCNN` in a.py: class
    `FPN` in b.py: ..."), and data workers send a whole traceback: the
    innermost message is the one to read.
    """
    text = str(error.args[0]) if len(error.args) == 1 else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    text = lines[-1 if 'Traceback' in text else 0] if lines else ''
    while text.startswith('class `') and '.py: ' in text:
        text = text.split('.py: ', 1)[1]
    if isinstance(error, (SetupError, ValueError, OSError)):
        return text or type(error).__name__
    # What nobody foresaw may as well be a mistake in the code.
    return f'{type(error).__name__}: {text} (SMALLBN_TRACEBACK=1 shows where)'


def _comes_from_a_loop(error: BaseException) -> bool:
    from mmengine.runner import BaseLoop
    return any(
        isinstance(frame.f_locals.get('self'), BaseLoop)
        and frame.f_code.co_name == 'run'
        for frame, _ in traceback.walk_tb(error.__traceback__))


@contextmanager
def one_line_errors(after_stop: str = '') -> Iterator[None]:
    """End the program with status 1 and one line on the user's errors.

    Until a training or test loop runs, everything that goes wrong is taken to
    be the configuration's doing; after that, only :class:`SetupError` and
    missing files are. The environment variable ``SMALLBN_TRACEBACK=1`` shows
    the whole trace. Ctrl-C ends it with status 130.

    Args:
        after_stop (str): What to say after Ctrl-C: how to go on.
    """
    try:
        yield
    except KeyboardInterrupt:
        print(f'stopped by Ctrl-C. {after_stop}'.rstrip(), file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        mendable = (
            isinstance(error, (SetupError, FileNotFoundError))
            or not _comes_from_a_loop(error))
        if os.environ.get('SMALLBN_TRACEBACK') == '1' or not mendable:
            raise
        print(f'error: {describe(error)}', file=sys.stderr)
        sys.exit(1)
