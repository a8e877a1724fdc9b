"""The commands and links of the documentation are ones that work."""
import configparser
import importlib
import re
import shlex
from pathlib import Path

import pytest

from mmdet_smallbn.cli import print_norms

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / 'README.md', ROOT / 'docs' / 'training_features.md',
    ROOT / 'docs' / 'costs.md',
    *sorted((ROOT / 'configs').rglob('README.md'))
]
COMMAND = re.compile(
    r'^(?:[A-Z_]+=\S+ )*(?:python )?(tools/\w+\.(?:py|sh)) (.*)$', re.M)
# What stands for a user's own.
OWN = {'CONFIG': 'configs/demo/faster-rcnn_r18_fpn_bn-all_1xb4_shapes-coco.py'}


def _commands(page):
    text = page.read_text()
    blocks = re.findall(r'^```shell\n(.*?)^```', text, re.M | re.S)
    spans = re.findall(r'`([^`\n]+)`', text)
    for source in [*blocks, *spans]:
        yield from COMMAND.findall(source)


COMMANDS = sorted({c for page in PAGES for c in _commands(page)})


def test_there_are_commands():
    assert len(COMMANDS) >= 20


@pytest.mark.parametrize(
    'tool, arguments', COMMANDS, ids=map(' '.join, COMMANDS))
def test_the_command_is_understood(tool, arguments):
    assert (ROOT / tool).is_file()
    words = [OWN.get(w, w) for w in shlex.split(arguments, comments=True)]
    for word in words:
        if word.startswith('configs/'):
            assert (ROOT / word).is_file()
    name = Path(tool).stem
    if tool.endswith('.sh'):
        # What the scripts take for themselves comes before the flags.
        name = name.rpartition('_')[2]
        words = [w for w in words if w.startswith('configs/')]
        words += ['a.pth'] * (name == 'test')
    module = importlib.import_module(f'mmdet_smallbn.cli.{name}')
    module.parse_args(words)


@pytest.mark.parametrize(
    'page', [p for p in PAGES if '\npart  ' in p.read_text()],
    ids=lambda p: p.parent.name)
def test_printed_tables_are_what_the_tool_prints(page, capsys):
    (config, table), = re.findall(
        r'print_norms\.py (configs\S+)\n```\n.*?^```\n(part .*?)^```',
        page.read_text(), re.M | re.S)
    print_norms.main([config])
    assert capsys.readouterr().out == table


def test_the_package_carries_configs_and_tools():
    """For mim, which looks for them in the package's folder .mim."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / 'setup.cfg')
    patterns = setup['options.package_data']['mmdet_smallbn'].split()
    package = ROOT / 'mmdet_smallbn'
    held = {
        path.relative_to(package / '.mim')
        for pattern in patterns for path in package.glob(pattern)
    }
    for name in ('configs', 'tools'):
        for path in (ROOT / name).rglob('*'):
            if path.is_file() and '__pycache__' not in path.parts:
                assert path.relative_to(ROOT) in held
    assert Path('model-index.yml') in held


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.parent.name)
def test_links_go_somewhere(page):
    for target in re.findall(r'(?:\]\(|src=")([^)"#]+)[)"#]',
                             page.read_text()):
        assert '://' in target or (page.parent / target).exists(), target
