"""Errors that a user can fix, and their one-line display in the tools."""
import difflib
import os
import sys
import traceback
from contextlib import contextmanager
from typing import Iterator, Optional, Sequence


class SetupError(RuntimeError):
    """Error in the config, model or data that the user can fix."""


def did_you_mean(unknown: str, known: Sequence[str]) -> str:
    """Return a sentence with the known names that resemble an unknown one."""
    near = difflib.get_close_matches(unknown, known, n=2, cutoff=0.5)
    if near:
        return f'Did you mean {" or ".join(near)}?'
    return f'Known names: {", ".join(sorted(known))}'


def check_known(flag: str, names: Optional[Sequence[str]],
                known: Sequence[str]) -> None:
    """Check that all names given to a flag are known.

    Raises:
        SetupError: If one is unknown. The message suggests a known name.
    """
    for name in names or ():
        if name not in known:
            raise SetupError(f'{flag} {name!r} is not known. '
                             f'{did_you_mean(name, known)}')


def describe(error: BaseException) -> str:
    """Return the innermost message of an error, in one line.

    Registries add a prefix at each level ("class `FasterRCNN` in a.py: class
    `FPN` in b.py: ..."), and data workers send a whole traceback. Only the
    innermost message helps the user.
    """
    text = str(error.args[0]) if len(error.args) == 1 else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    text = lines[-1 if 'Traceback' in text else 0] if lines else ''
    while text.startswith('class `') and '.py: ' in text:
        text = text.split('.py: ', 1)[1]
    if isinstance(error, (SetupError, ValueError, OSError)):
        return text or type(error).__name__
    # Another type of error may also be a bug, so its name is shown.
    return f'{type(error).__name__}: {text} (SMALLBN_TRACEBACK=1 shows where)'


def _comes_from_a_loop(error: BaseException) -> bool:
    from mmengine.runner import BaseLoop
    return any(
        isinstance(frame.f_locals.get('self'), BaseLoop)
        and frame.f_code.co_name == 'run'
        for frame, _ in traceback.walk_tb(error.__traceback__))


@contextmanager
def one_line_errors(after_stop: str = '') -> Iterator[None]:
    """End the program with status 1 and one line if the user made an error.

    Before a training or test loop runs, every error counts as an error of the
    config. Later only :class:`SetupError` and missing files do. The
    environment variable ``SMALLBN_TRACEBACK=1`` shows the whole traceback.
    Ctrl-C ends the program with status 130.

    Args:
        after_stop (str): Sentence printed after Ctrl-C: how to continue.
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
