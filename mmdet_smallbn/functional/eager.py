"""Code that torch.compile must not take into a graph."""
import functools
from typing import Callable

import torch

_compiler = getattr(torch, 'compiler', None)
_disable = getattr(_compiler, 'disable', lambda function: function)
_is_compiling = getattr(_compiler, 'is_compiling', lambda: True)


def run_eagerly(function: Callable) -> Callable:
    """Keep a function out of torch.compile's graphs.

    It reads what changes from call to call, and a graph would hold it as a
    constant: the kind of the pass, the past, the version of a tensor.
    """
    disabled = None

    @functools.wraps(function)
    def run(*args):
        nonlocal disabled
        # torch's wrapper takes time, so it is used in compilation alone.
        if not _is_compiling():
            return function(*args)
        # To make one loads the compiler: an import of this package does not.
        if disabled is None:
            disabled = _disable(function)
        return disabled(*args)

    return run
