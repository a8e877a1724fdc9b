"""Errors that a user can mend, and how the tools show them."""
import difflib
import os
import sys
from contextlib import contextmanager
from typing import Iterator, Tuple, Type


class SetupError(RuntimeError):
    """The configuration and the model do not fit; raised before training."""


# What goes wrong while a model and a run are put together.
SETUP_ERRORS = (SetupError, AssertionError, AttributeError, ImportError,
                KeyError, NotImplementedError, OSError, RuntimeError,
                SyntaxError, TypeError, ValueError)
# What of it may still come once the loops are running.
RUN_ERRORS = (SetupError, FileNotFoundError)


def describe(error: BaseException) -> str:
    """One line that says what went wrong.

    The registries wrap an error once a level ("class `FasterRCNN` in ...:
    class `FPN` in ...: ..."), and data workers send a whole traceback: the
    innermost message is the one to read.
    """
    text = str(error.args[0]) if len(error.args) == 1 else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    text = lines[-1 if 'Traceback' in text else 0] if lines else ''
    while text.startswith('class `') and '.py: ' in text:
        text = text.split('.py: ', 1)[1]
    text = text.strip('"\'') or type(error).__name__
    return text + _did_you_mean(text)


def _did_you_mean(text: str) -> str:
    """Registered names near the one that a registry did not find."""
    from mmengine.registry import HOOKS, MODELS
    marker = ' is not in the '
    if marker not in text:
        return ''
    unknown = text.split(marker)[0].split()[-1].strip('\'"`')
    own = [
        name for registry in (MODELS, HOOKS)
        for name, cls in registry.module_dict.items()
        if cls.__module__.startswith('mmdet_smallbn')
    ]
    near = difflib.get_close_matches(unknown, own, n=2, cutoff=0.5)
    if not near:
        return f". This package's own are {', '.join(sorted(own))}"
    return f'. Did you mean {" or ".join(near)}?'


@contextmanager
def one_line_errors(kinds: Tuple[Type[BaseException], ...]) -> Iterator[None]:
    """End the program with status 1 and one line on errors of these kinds.

    The environment variable ``SMALLBN_TRACEBACK=1`` shows the whole trace.

    Args:
        kinds (tuple[type]): Exceptions that are the user's to mend.
    """
    try:
        yield
    except kinds as error:
        if os.environ.get('SMALLBN_TRACEBACK') == '1':
            raise
        print(f'error: {describe(error)}', file=sys.stderr)
        sys.exit(1)
