"""The installer, as far as it goes without installing."""
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _setup_env():
    spec = importlib.util.spec_from_file_location(
        'setup_env', ROOT / 'tools' / 'setup_env.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_environment_behind_a_link_is_left_alone(tmp_path):
    other = tmp_path / 'other'
    other.mkdir()
    link = tmp_path / '.venv'
    link.symlink_to(other)
    result = subprocess.run(
        [sys.executable, 'tools/setup_env.py', str(link)],
        cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert f'{link} is a link to {other}' in result.stderr
    assert list(other.iterdir()) == []


def test_each_toolbox_has_its_mmcv():
    pinned_mmcv = _setup_env().pinned_mmcv
    assert pinned_mmcv('openmmlab').startswith('mmcv==2.')
    assert pinned_mmcv('onedl').startswith('onedl-mmcv==2.')


@pytest.mark.skipif(not shutil.which('g++'), reason='needs g++')
def test_an_extension_takes_the_precompiled_header(tmp_path, monkeypatch):
    """If it is built as mmcv is. With a small header in place of torch's."""
    monkeypatch.setenv('CXX', 'g++')
    include = tmp_path / 'include'
    (include / 'torch').mkdir(parents=True)
    (include / 'torch' / 'types.h').write_text(
        '#pragma once\ninline int one() { return 1; }\n')
    python = tmp_path / 'python'  # names the folders of torch's headers
    python.write_text(f'#!/bin/sh\necho {include}\n')
    python.chmod(0o755)
    header, log = tmp_path / 'torch_types.h', tmp_path / 'log'
    setup_env = _setup_env()
    flags = setup_env.precompile(python, header, log)

    (tmp_path / 'a.cpp').write_text(
        '#include <torch/types.h>\nint two() { return 2 * one(); }\n')
    (tmp_path / 'setup.py').write_text(
        'from setuptools import setup\n'
        'from torch.utils.cpp_extension import BuildExtension, CppExtension\n'
        'extension = CppExtension("_ext", ["a.cpp"],\n'
        f'    include_dirs=[{str(include)!r}],\n'
        '    extra_compile_args=dict(cxx=["-std=c++17"]))\n'
        'setup(name="a", ext_modules=[extension],\n'
        '      cmdclass=dict(build_ext=BuildExtension))\n')
    result = subprocess.run(
        [sys.executable, 'setup.py', 'build_ext'],
        cwd=tmp_path,
        env=setup_env.environment(f'{flags} -H'),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True)
    assert result.returncode == 0, result.stdout + log.read_text()
    # ccache makes paths relative.
    assert re.search(rf'^! \S*{header.name}\.gch', result.stdout, re.M)
