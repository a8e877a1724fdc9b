"""Tools that are killed leave no process behind."""
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize('tool, arguments', [
    ('study', ['--regimes', 'video', '--jobs', '2', '--out', '{out}']),
    ('make_shapes_coco', ['{out}', '--train', '99999', '--workers', '2']),
], ids=['study', 'make_shapes_coco'])
def test_workers_end_with_a_tool_that_is_killed(tool, arguments, tmp_path):
    command = [sys.executable, f'tools/{tool}.py',
               *(word.format(out=tmp_path / 'out') for word in arguments)]
    with subprocess.Popen(command, cwd=ROOT) as running:
        try:
            parent, workers = psutil.Process(running.pid), []
            end = time.monotonic() + 120
            while len(workers) < 2 and time.monotonic() < end:
                time.sleep(0.5)
                workers = parent.children()
            time.sleep(5)  # they have begun
            workers = parent.children()
            assert len(workers) >= 2 and running.poll() is None
        finally:
            running.kill()
    _, left = psutil.wait_procs(workers, timeout=30)
    for process in left:
        process.kill()
    assert not left
