"""Decorator that keeps code out of torch.compile's graphs."""
import functools
from typing import Callable

import torch

_compiler = getattr(torch, 'compiler', None)
_disable = getattr(_compiler, 'disable', lambda function: function)
_is_compiling = getattr(_compiler, 'is_compiling', lambda: True)


def run_eagerly(function: Callable) -> Callable:
    """Keep a function out of torch.compile's graphs.

    The function reads values that change from call to call, such as the kind
    of the pass, the past statistics or the version of a tensor. A graph would
    store them as constants.
    """
    disabled = None

    @functools.wraps(function)
    def run(*args):
        nonlocal disabled
        # torch's wrapper is slow, so it is used only in compilation.
        if not _is_compiling():
            return function(*args)
        # Making the wrapper imports the compiler, so it waits until needed.
        if disabled is None:
            disabled = _disable(function)
        return disabled(*args)

    return run
