"""How processes are started: Slurm's srun is played by a script."""
import os
import subprocess
from pathlib import Path

import pytest

from mmdet_smallbn.cli import test as test_cli
from mmdet_smallbn.cli import train as train_cli

ROOT = Path(__file__).resolve().parents[2]
CONFIG = 'configs/cbn/faster-rcnn_r50_fpn_4conv1fc_cbn-head_4xb4-1x_coco.py'


@pytest.fixture
def srun(tmp_path, monkeypatch):
    """Runs a tool with an srun that writes down what it is given."""
    script = tmp_path / 'srun'
    script.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')

    def run(tool, *arguments, **environment):
        result = subprocess.run([f'tools/{tool}.sh', *arguments],
                                cwd=ROOT,
                                capture_output=True,
                                text=True,
                                env=dict(os.environ, **environment))
        lines = result.stdout.splitlines()
        if result.returncode:
            return result.returncode, result.stderr
        start = lines.index('python')
        assert lines[start + 1] == '-u'
        script = Path(lines[start + 2])
        assert (ROOT / script).is_file()
        return lines[:start], script.name, lines[start + 3:]

    return run


def test_training(srun):
    flags, script, arguments = srun(
        'slurm_train',
        'gpu',
        'my job',
        CONFIG,
        'work dir',
        '--amp',
        GPUS='4',
        SRUN_ARGS='--qos=high --time=9')
    assert flags == [
        '--partition=gpu', '--job-name=my job', '--gres=gpu:4', '--ntasks=4',
        '--ntasks-per-node=4', '--cpus-per-task=5', '--kill-on-bad-exit=1',
        '--qos=high', '--time=9'
    ]
    assert script == 'train.py'
    args = train_cli.parse_args(arguments)
    assert (args.config, args.work_dir, args.launcher,
            args.amp) == (CONFIG, 'work dir', 'slurm', True)


def test_testing_on_two_nodes(srun):
    flags, script, arguments = srun(
        'slurm_test', 'gpu', 'job', CONFIG, 'a.pth', GPUS='16')
    assert '--ntasks=16' in flags and '--ntasks-per-node=8' in flags
    assert script == 'test.py'
    args = test_cli.parse_args(arguments)
    assert (args.config, args.checkpoint, args.launcher) == (CONFIG, 'a.pth',
                                                             'slurm')


@pytest.mark.parametrize('tool', ['slurm_train', 'slurm_test'])
def test_too_few_arguments(srun, tool):
    code, message = srun(tool, 'gpu', 'job', CONFIG)
    assert code == 2 and message.startswith('usage: tools/slurm_')
