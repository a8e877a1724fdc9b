import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mmdet_smallbn
from mmdet_smallbn.version import BOUNDS, check_versions
from tests import versions

ROOT = Path(__file__).resolve().parents[1]


def _pretend(monkeypatch, **versions):
    real = importlib.metadata.version

    def version(name):
        if name in versions:
            if versions[name] is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]
        return real(name)

    monkeypatch.setattr('mmdet_smallbn.version.version', version)


def test_what_is_installed_passes():
    check_versions()


@pytest.mark.parametrize('name, found', [('mmdet', '2.28.0'),
                                         ('mmcv', '1.7.1'),
                                         ('mmengine', '0.7.4'),
                                         ('torch', '1.13.1+cu117')])
def test_out_of_bounds_names_bounds_and_found(monkeypatch, name, found):
    _pretend(monkeypatch, **{name: found})
    with pytest.raises(ImportError) as error:
        check_versions()
    assert f'needs {name}>={BOUNDS[name][1]}' in str(error.value)
    assert f'found {name} {found}' in str(error.value)


def test_without_mmcv_and_mmdet_the_layers_work(monkeypatch):
    _pretend(
        monkeypatch, **{
            name: None
            for name in ('mmcv', 'onedl-mmcv', 'mmdet', 'onedl-mmdetection')
        })
    check_versions()
    with pytest.raises(ImportError, match='mmcv.*not installed. Remedy'):
        check_versions(whole=True)  # as the tools do
    _pretend(monkeypatch, **{'mmengine': None, 'onedl-mmengine': None})
    with pytest.raises(ImportError, match='mmengine.*not installed'):
        check_versions()


def test_the_forks_count(monkeypatch):
    _pretend(
        monkeypatch, **{
            'mmdet': None,
            'onedl-mmdetection': '3.5.1',
            'mmcv': None,
            'onedl-mmcv': '2.3.6'
        })
    check_versions()


def test_importing_the_layers_imports_neither_mmcv_nor_mmdet():
    code = ('import sys, mmdet_smallbn\n'
            'print({"mmcv", "mmdet"} & set(sys.modules))')
    out = subprocess.check_output([sys.executable, '-W', 'ignore', '-c', code],
                                  text=True)
    assert out.strip() == 'set()'


def test_the_mathematics_imports_torch_alone():
    folder = Path(mmdet_smallbn.__file__).parent / 'functional'
    imports = re.findall(r'^(?:from|import) ([\w.]+)', '\n'.join(
        path.read_text() for path in folder.glob('*.py')), re.M)
    imports = {name.split('.')[0] for name in imports} - {''}
    assert imports - set(sys.stdlib_module_names) == {'torch'}


def test_a_run_is_recorded_with_its_versions(tmp_path):
    """In place of the one before, and only if there were tests."""
    (tmp_path / 'conftest.py').write_text(
        'from tests.conftest import *  # noqa\n')
    tests = tmp_path / 'test_some.py'
    docs = tmp_path / 'docs'

    def run(code):
        tests.write_text(code)
        subprocess.run(
            [sys.executable, '-m', 'pytest', '-n', '1', '--rootdir',
             str(tmp_path), str(tests), '--record', 'some'],
            cwd=ROOT, capture_output=True)
        return versions.read_runs(docs / 'results' / 'versions.json')

    assert run('') == []
    run('def test_a(): pass')
    kept, = run('import pytest\n'
                'def test_a(): pass\n'
                'def test_b(): assert 0\n'
                'def test_c(): pytest.skip()\n'
                'def test_d(fixture_that_is_not): pass\n')
    assert {name: kept[name] for name in versions.COUNTS} == dict(
        passed=1, failed=2, skipped=1)
    row = (docs / 'versions.md').read_text().splitlines()[-1]
    assert row.startswith(f'| some | {sys.version.split()[0]} | ')
    assert f' | {importlib.metadata.version("torch")} | ' in row
    assert row.endswith(f' | 1 | 2 | 1 | {kept["date"]} |')


def test_forks_and_missing_packages_show(monkeypatch):
    _pretend(
        monkeypatch, **{
            'mmcv': None,
            'onedl-mmcv': '2.3.6',
            'mmdet': None,
            'onedl-mmdetection': None
        })
    found = versions.found()
    assert (found['mmcv'], found['mmdet']) == ('onedl-mmcv 2.3.6', '-')
