"""Progress of long work, on a terminal and in a file."""
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = '''
from mmdet_smallbn.progress import progress_bar, track
print(sum(track(range(500), "adding", 500)))
with progress_bar("later") as tell:
    for done in range(500):
        tell(completed=done, total=500, description=f"[step] {done}")
for _ in track([], "nothing", 0):
    pass
'''


def _python(*arguments):
    return subprocess.run([sys.executable, '-W', 'ignore', *arguments],
                          cwd=ROOT,
                          text=True,
                          check=True,
                          capture_output=True)


def test_a_line_each_where_there_is_no_terminal():
    done = _python('-c', WORK)
    assert done.stderr == 'adding ...\nlater ...\n'
    assert done.stdout == '124750\n'


def _on_terminal(program, results):
    """What a program writes to a terminal on its error stream."""
    reader, terminal = pty.openpty()
    with results.open('w') as file:
        running = subprocess.Popen([sys.executable, '-W', 'ignore', '-c',
                                    program],
                                   cwd=ROOT,
                                   stdout=file,
                                   stderr=terminal)
    os.close(terminal)
    drawn = b''
    try:
        while True:
            drawn += os.read(reader, 4096)
    except OSError:  # it has ended
        os.close(reader)
    assert running.wait() == 0
    return drawn.decode()


def test_a_bar_on_a_terminal(tmp_path):
    drawn = _on_terminal(WORK, tmp_path / 'results')
    assert '500/500' in drawn and '[step] 499' in drawn
    assert ' ...' not in drawn
    # Results that go to a file stay there.
    assert (tmp_path / 'results').read_text() == '124750\n'


def test_other_processes_are_silent(tmp_path):
    program = ('import mmdet_smallbn.progress as p; '
               'p.is_main_process = lambda: False; '
               'list(p.track("ab", "adding", 2))')
    assert _python('-c', program).stderr == ''
    assert _on_terminal(program, tmp_path / 'results') == ''


def test_a_tool_writes_a_line_for_each_bar(tmp_path):
    done = _python('tools/make_shapes_coco.py', str(tmp_path / 'out'),
                   '--train', '60', '--val', '20')
    assert done.stderr == ('drawing 60 train images of ShapesCOCO ...\n'
                           'drawing 20 val images of ShapesCOCO ...\n')
    assert len(done.stdout.splitlines()) == 1


def test_nothing_else_draws_progress():
    for path in (ROOT / 'mmdet_smallbn').rglob('*.py'):
        drawn = re.search(r'rich\.progress|tqdm|ProgressBar\(',
                          path.read_text())
        assert (drawn is not None) == (path.name == 'progress.py')
