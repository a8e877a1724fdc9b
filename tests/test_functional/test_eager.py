"""What the package takes out of torch.compile's graphs."""
import subprocess
import sys

import torch

from mmdet_smallbn.functional import run_eagerly


def test_an_import_leaves_the_compiler_alone():
    """It takes a second to load, and most tools compile nothing."""
    program = ('import sys, mmdet_smallbn; '
               'sys.exit("torch._dynamo" in sys.modules)')
    assert subprocess.run([sys.executable, '-c', program]).returncode == 0


def test_it_runs_between_the_graphs():
    """From the first call of a compiled function on."""
    compiling = []

    @run_eagerly
    def inner(x):
        compiling.append(torch.compiler.is_compiling())
        return x * len(compiling)

    def outer(x):
        return inner(x + 1) + 1

    compiled = torch.compile(outer, backend='eager')
    x = torch.ones(2)
    for count in (1, 2, 3):
        assert (compiled(x) == 2 * count + 1).all()
    assert (outer(x) == 9).all()
    assert compiling == [False] * 4
