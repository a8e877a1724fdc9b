"""The site builds without a warning, and holds every name and every tool."""
import os
import re
import runpy
import subprocess
import sys
import zlib
from html import unescape
from pathlib import Path

import pytest

import mmdet_smallbn
from mmdet_smallbn import deploy, doctor, functional, layers

pytest.importorskip('furo')
pytest.importorskip('myst_parser')
ROOT = Path(__file__).resolve().parents[1]
NAMES = {
    module.__name__: module.__all__
    for module in (mmdet_smallbn, layers, functional, deploy, doctor)
}


def _build(source, folder):
    return subprocess.run(
        [
            sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-c',
            'docs', source,
            str(folder)
        ],
        cwd=ROOT,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True)


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp('site')
    result = _build('.', folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope='module')
def targets(site):
    """The names in objects.inv: four lines, then compressed ones."""
    lines = (site / 'objects.inv').read_bytes().split(b'\n', 4)[4]
    return {
        line.split()[0]
        for line in zlib.decompress(lines).decode().splitlines()
    }


@pytest.mark.parametrize('module', NAMES)
def test_every_public_name_has_a_target(module, targets):
    missing = {
        name
        for name in NAMES[module]
        if not {f'mmdet_smallbn.{name}', f'{module}.{name}'} & targets
    }
    assert not missing


@pytest.mark.parametrize(
    'tool', [path.name for path in sorted((ROOT / 'tools').glob('*.*'))])
def test_every_tool_is_on_the_page(tool, site):
    page = (site / 'docs' / 'tools.html').read_text()
    text = unescape(re.sub('<[^>]+>', '', page))
    assert (f'usage: {tool} ' if tool.endswith('.py') else tool) in text


def test_the_pages_link_to_each_other_and_to_files(site):
    page = (site / 'docs' / 'study.html').read_text()
    assert 'href="results/README.html"' in page
    page = (site / 'docs' / 'training_features.html').read_text()
    assert re.search(r'href="\.\./_downloads/\w+/test_contract\.py"', page)
    page = (site / 'index.html').read_text()
    linked, = re.findall('href="([^"]+)"', page)
    assert (site / linked).is_file()


def test_the_folder_of_the_pages_alone_is_no_source(tmp_path):
    result = _build('docs', tmp_path)
    assert result.returncode and 'make docs' in result.stderr


def test_the_picture_of_the_house_is_the_scripts():
    script = runpy.run_path(str(ROOT / 'docs' / 'draw_house.py'))
    assert (ROOT / 'docs' / 'house.svg').read_text() == script['picture']()


def test_the_norm_of_the_page_trains_and_folds():
    page = (ROOT / 'docs' / 'how_it_works.md').read_text()
    blocks = re.findall(r'^```python\n(.*?)^```', page, re.M | re.S)
    check = '''
kinds = [type(layer).__name__ for layer in model]
assert kinds[:2] == ['Conv2d', 'Identity'], kinds
assert len(losses) == 3 and losses[2] < losses[0], losses
'''
    # Another process: the example registers a norm.
    result = subprocess.run(
        [sys.executable, '-c', '\n'.join([*blocks, check])],
        cwd=ROOT,
        capture_output=True,
        text=True)
    assert result.returncode == 0, result.stderr
