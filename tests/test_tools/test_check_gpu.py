"""The check of a GPU, as far as a CPU shows it."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmdet_smallbn.benchmark import check_gpu
from mmdet_smallbn.errors import SetupError

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / 'docs' / 'results' / 'gpu.json'


def test_the_page_is_that_of_the_record():
    result = json.loads(RESULT.read_text())
    page = RESULT.with_suffix('.md').read_text()
    assert page == check_gpu.page(result)
    assert set(result['costs']) == set(check_gpu.SETTINGS)
    assert all(one['waits'] == 0 for one in result['steps'].values())


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit):
        check_gpu.main([])
    assert 'torch finds no GPU' in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused():
    ended = subprocess.run(
        [sys.executable, '-m', 'pytest', '--device', 'cuda',
         'tests/test_version.py'],
        cwd=ROOT,
        env=dict(CUDA_VISIBLE_DEVICES=''),
        capture_output=True,
        text=True)
    assert ended.returncode == pytest.ExitCode.USAGE_ERROR
    assert 'this torch sees no GPU' in ended.stderr


def test_tests_run_and_are_counted():
    found = check_gpu.run_tests(['tests/test_version.py'], 'cpu', 300)
    assert found['passed'] > 0 and not found['failed']
    with pytest.raises(SetupError, match='the tests did not run'):
        check_gpu.run_tests(['tests/nowhere.py'], 'cpu', 300)


def test_failed_tests_are_named(tmp_path):
    (tmp_path / 'test_some.py').write_text(
        'import pytest\n'
        'def test_good(): pass\n'
        'def test_bad(): assert 1 == 2, "not the same"\n'
        'def test_left(): pytest.skip("no reason")\n')
    report = tmp_path / 'report.xml'
    subprocess.run([sys.executable, '-m', 'pytest', '-q', '--junitxml',
                    str(report), str(tmp_path)], capture_output=True)
    found = check_gpu.read_report(report)
    assert found['passed'] == 1 and found['skipped'] == {'no reason': 1}
    failed, = found['failed']
    assert failed['name'].endswith('test_some::test_bad')
    assert 'not the same' in failed['message']
