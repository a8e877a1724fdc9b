"""What a user can mend ends in one clear line."""
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.runner import BaseLoop

from mmdet_smallbn.cli.runtime import open_config
from mmdet_smallbn.errors import SetupError, describe, one_line_errors

ROOT = Path(__file__).resolve().parents[2]
DEMO = 'configs/demo/faster-rcnn_r18_fpn_cbn-all_1xb2_shapes-coco.py'


def _run(tool, *arguments):
    result = subprocess.run(
        [sys.executable, '-W', 'ignore', f'tools/{tool}.py', *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True)
    return result.returncode, result.stderr.strip()


@pytest.mark.parametrize('changes, message', [
    (['model.neck.norm_cfg.type=CNB'],
     "model.neck.norm_cfg.type='CNB' is not a known norm. Did you mean CBN"),
    (['model.neck.norm_cfg.window_size=0'],
     'neck.norm_cfg: window_size must be an integer of at least 1, but got '),
    (['model.neck.norm_cfg.windowsize=3'],
     "model.neck.norm_cfg: CBN takes no 'windowsize'. Did you mean window_s"),
    (['custom_hooks.0.iters=-5'],
     'iters must be an integer of at least 0, but got -5'),
    (['train_dataloader.dataset.ann_file=/nowhere/coco.json'],
     'No such file.*/nowhere/coco.json'),
    (['train_dataloader.dataset.type=CocoDatset'], 'CocoDatset'),
    (['custom_hooks.0.iters=5000'], 'iters=5000 is not shorter'),
    (['load_from=nothing.pth'], 'no checkpoint at nothing.pth'),
], ids=[
    'norm', 'window', 'keyword', 'burn-in', 'annotations', 'data set',
    'long burn-in', 'checkpoint'
])
@pytest.mark.slow
def test_one_line(changes, message, tmp_path, shapes):
    code, stderr = _run('train', DEMO, '--work-dir', str(tmp_path),
                        '--data', str(shapes), '--cfg-options', *changes)
    assert code == 1
    last = stderr.splitlines()[-1]
    assert last.startswith('error: ') and re.search(message, last), stderr
    assert 'Traceback' not in stderr


@pytest.mark.slow
def test_a_missing_config_ends_in_one_line():
    code, stderr = _run('train', 'configs/nothing.py')
    assert code == 1
    assert stderr.splitlines()[-1].startswith(
        'error: no config at configs/nothing.py: check the path')


@pytest.mark.slow
def test_a_damaged_checkpoint_ends_a_test_run(tmp_path, shapes):
    path = tmp_path / 'damaged.pth'
    path.write_text('hello')
    code, stderr = _run('test', DEMO, str(path), '--work-dir', str(tmp_path),
                        '--data', str(shapes))
    assert code == 1
    assert re.search('error: .*damaged.pth is not a checkpoint.*again',
                     stderr.splitlines()[-1])


def test_innermost_message_is_shown():
    error = ValueError('class `FasterRCNN` in mmdet/models/a.py: class `FPN` '
                       'in mmdet/models/b.py: window_size is 0\nmore')
    assert describe(error) == 'window_size is 0'
    assert describe(ValueError()) == 'ValueError'
    assert describe(KeyError('bar')).startswith('KeyError: bar (SMALLBN_TRACE')
    worker = ('Caught FileNotFoundError in DataLoader worker process 0.\n'
              'Original Traceback (most recent call last):\n  File "x"\n'
              "FileNotFoundError: [Errno 2] No such file: 'a.jpg'\n")
    assert describe(
        FileNotFoundError(worker)).endswith("No such file: 'a.jpg'")


class _Loop(BaseLoop):

    def __init__(self, error):
        self.error = error

    def run(self):
        raise self.error


def test_the_users_errors_are_shortened(monkeypatch, capsys):
    for error in (SetupError('do this'), ZeroDivisionError('1 / 0')):
        with pytest.raises(SystemExit) as exit_, one_line_errors():
            raise error
        assert exit_.value.code == 1
        assert capsys.readouterr().err.startswith('error: ')
    monkeypatch.setenv('SMALLBN_TRACEBACK', '1')
    with pytest.raises(SetupError), one_line_errors():
        raise SetupError('do this')


def test_what_a_running_loop_meets_keeps_its_trace(capsys):
    with pytest.raises(ZeroDivisionError), one_line_errors():
        _Loop(ZeroDivisionError()).run()
    with pytest.raises(SystemExit), one_line_errors():
        _Loop(SetupError('do this')).run()
    with pytest.raises(SystemExit), one_line_errors():
        _Loop(FileNotFoundError('no image')).run()
    assert capsys.readouterr().err == 'error: do this\nerror: no image\n'


def test_ctrl_c_says_how_to_go_on(capsys):
    with pytest.raises(SystemExit) as stop, one_line_errors('Add --resume'):
        raise KeyboardInterrupt
    assert stop.value.code == 130
    assert capsys.readouterr().err == 'stopped by Ctrl-C. Add --resume\n'


def test_a_config_of_mmdet_2_is_told(tmp_path):
    path = tmp_path / 'old.py'
    path.write_text('model = dict(type="FasterRCNN")\n'
                    'data = dict(samples_per_gpu=2)\n'
                    'optimizer = dict(type="SGD")\n')
    with pytest.raises(SetupError, match='has data, optimizer: that is a '
                       'config of mmdet 2.x'):
        open_config(str(path))
    # mmsegmentation names its optimizer first.
    path.write_text('model = dict(type="FasterRCNN")\n'
                    'optimizer = dict(type="SGD")\n'
                    'optim_wrapper = dict(optimizer=optimizer)\n')
    assert open_config(str(path)).optimizer.type == 'SGD'
