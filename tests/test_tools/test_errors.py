"""What a user can mend ends in one clear line."""
import subprocess
import sys
from pathlib import Path

import pytest

from mmdet_smallbn.errors import SetupError, describe, one_line_errors

ROOT = Path(__file__).resolve().parents[2]
DEMO = 'configs/demo/faster-rcnn_r18_fpn_cbn-all_1xb4_shapes-coco.py'


def _run(tool, *arguments):
    result = subprocess.run(
        [sys.executable, '-W', 'ignore', f'tools/{tool}.py', *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True)
    return result.returncode, result.stderr.strip()


@pytest.mark.parametrize('arguments, message', [
    (['configs/nothing.py'], 'no config at configs/nothing.py'),
    ([DEMO, '--cfg-options', 'model.neck.norm_cfg.type=CNB'],
     'CNB.*Did you mean CBN'),
    ([DEMO, '--cfg-options', 'model.neck.norm_cfg.window_size=0'],
     'window_size must be an integer of at least 1, but got 0'),
    ([DEMO, '--cfg-options', 'model.neck.norm_cfg.windowsize=3'],
     "unexpected keyword argument 'windowsize'"),
    ([DEMO, '--cfg-options', 'custom_hooks.0.iters=-5'],
     'iters must be an integer of at least 0, but got -5'),
    ([
        DEMO, '--cfg-options',
        'train_dataloader.dataset.data_root=/nowhere/coco/'
    ], 'No such file.*/nowhere/coco/'),
    ([DEMO, '--resume', 'nothing.pth'], 'no checkpoint at nothing.pth'),
], ids=[
    'config', 'norm', 'window', 'keyword', 'burn-in', 'annotations',
    'checkpoint'
])
@pytest.mark.slow
def test_one_line(arguments, message, tmp_path, shapes):
    import re
    options = ['--work-dir', str(tmp_path)]
    if 'data_root' not in ' '.join(arguments):
        options += data_options(shapes, arguments)
    code, stderr = _run('train', *arguments, *options)
    assert code == 1
    last = stderr.splitlines()[-1]
    assert last.startswith('error: ') and re.search(message, last), stderr
    assert 'Traceback' not in stderr


def data_options(root, arguments=()):
    """Point the demo config at a data set, whatever else is overridden."""
    options = [
        f'{loader}_dataloader.dataset.data_root={root}/'
        for loader in ('train', 'val', 'test')
    ] + [
        f'{kind}_evaluator.ann_file={root}/annotations/instances_val.json'
        for kind in ('val', 'test')
    ]
    if '--cfg-options' in arguments:
        # argparse keeps the last occurrence only.
        arguments += options
        return []
    return ['--cfg-options', *options]


@pytest.mark.slow
def test_a_missing_checkpoint_ends_a_test_run(tmp_path, shapes):
    code, stderr = _run('test', DEMO, 'nothing.pth', '--work-dir',
                        str(tmp_path), *data_options(shapes))
    assert code == 1
    assert stderr.splitlines()[-1] == 'error: no checkpoint at nothing.pth'


def test_innermost_message_is_shown():
    error = KeyError('class `FasterRCNN` in mmdet/models/a.py: class `FPN` in '
                     'mmdet/models/b.py: "CNB is not in the mmengine::model '
                     'registry. More advice."')
    assert describe(error).startswith('CNB is not in the mmengine::model')
    assert 'Did you mean CBN' in describe(error)
    assert describe(ValueError()) == 'ValueError'
    worker = ('Caught FileNotFoundError in DataLoader worker process 0.\n'
              'Original Traceback (most recent call last):\n  File "x"\n'
              "FileNotFoundError: [Errno 2] No such file: 'a.jpg'\n")
    assert describe(FileNotFoundError(worker)).endswith("'a.jpg")


def test_only_the_users_errors_are_shortened(monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_:
        with one_line_errors((SetupError, )):
            raise SetupError('do this')
    assert exit_.value.code == 1
    assert capsys.readouterr().err == 'error: do this\n'
    with pytest.raises(ZeroDivisionError):
        with one_line_errors((SetupError, )):
            1 / 0
    monkeypatch.setenv('SMALLBN_TRACEBACK', '1')
    with pytest.raises(SetupError):
        with one_line_errors((SetupError, )):
            raise SetupError('do this')
