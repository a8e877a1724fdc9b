"""The commands and links of the documentation are ones that work."""
import configparser
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from mmengine.config import Config

from mmdet_smallbn.cli import (analyses, demo_results, gradient_study,
                               print_norms, study)
from mmdet_smallbn.tables import as_markdown
from tests import versions

ROOT = Path(__file__).resolve().parents[1]
CHANGELOG = ROOT / 'CHANGELOG.md'
# All pages of the site.
PAGES = [
    ROOT / 'README.md', CHANGELOG,
    *sorted((ROOT / 'docs').rglob('*.md')),
    *sorted((ROOT / 'configs').rglob('README.md'))
]
COMMAND = re.compile(
    r'^(?:[A-Z_]+=\S+ )*(?:python )?(tools/\w+\.(?:py|sh)) (.*)$', re.M)
# What stands for a user's own.
OWN = {'CONFIG': 'configs/demo/faster-rcnn_r18_fpn_bn-all_1xb2_shapes-coco.py'}


def _name(page):
    return str(page.relative_to(ROOT))


def _commands(page):
    text = page.read_text()
    blocks = re.findall(r'^```shell\n(.*?)^```', text, re.M | re.S)
    spans = re.findall(r'`([^`\n]+)`', text)
    for source in [*blocks, *spans]:
        yield from COMMAND.findall(source)


# The changelog names tools with a flag or two, not whole commands.
COMMANDS = sorted(
    {c for page in PAGES if page != CHANGELOG for c in _commands(page)})


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
    main = runpy.run_path(str(ROOT / 'tools' / f'{name}.py'))['main']
    sys.modules[main.__module__].parse_args(words)


# What they print needs another toolbox.
ELSEWHERE = ROOT / 'configs' / 'other_toolboxes' / 'README.md'


@pytest.mark.parametrize(
    'page', [
        p for p in PAGES if p != ELSEWHERE and (
            '\npart  ' in p.read_text() or p.parents[1].name == 'configs')
    ], ids=_name)
def test_printed_tables_are_what_the_tool_prints(page, capsys):
    (words, table), = re.findall(
        r'print_norms\.py (configs[^\n]+)\n *```\n.*?^```\n(part .*?)^```',
        page.read_text(), re.M | re.S)
    print_norms.main(words.split())
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


@pytest.mark.parametrize('page', PAGES, ids=_name)
def test_links_go_somewhere(page):
    for target in re.findall(r'(?:\]\(|src=")([^)"#]+)[)"#]',
                             page.read_text()):
        assert '://' in target or (page.parent / target).exists(), target


def test_the_costs_are_the_benchmarks():
    docs = ROOT / 'docs'
    page = (docs / 'costs.md').read_text()
    rows = json.loads((docs / 'benchmark_cpu.json').read_text())['rows']
    blocks = {(r['norm'], r['case']): r['time']['median']
              for r in rows if r['level'] == 'block'}
    cases = list(dict.fromkeys(case for _, case in blocks))
    head = page[page.index('| time of a block'):].splitlines()
    assert head[0].split(' | ')[1:] == [*cases[:-1], f'{cases[-1]} |']
    lines = [line.strip('| ').split(' | ') for line in head[2:10]]
    assert len(lines) == 8
    for name, *numbers in lines:
        assert numbers == [f'{blocks[name, case]:.2f}' for case in cases]
    hosts = {r['norm']: r for r in rows if r['level'] == 'host'}
    lines = page[page.index('| 50 blocks'):].splitlines()[2:8]
    for line in lines:
        name, time, launches = line.strip('| ').split(' | ')
        assert time == f'{hosts[name]["time"]["median"]:.2f}'
        assert launches == str(hosts[name]['launches'])

    rows = json.loads(
        (docs / 'benchmark_detectors_cpu.json').read_text())['rows']
    found = {(r['case'], r['norm']): r for r in rows}
    for detector in ('Faster', 'Mask'):
        for norm in ('CBN, window 4', 'MABN'):
            heads, everywhere = (
                found[f'{detector} R-CNN, norms in {place}', norm]
                for place in ('heads', 'all'))
            numbers = [
                heads['time']['median'], everywhere['time']['median'],
                heads['memory'], everywhere['memory']
            ]
            line = ' | '.join(f'{number:.2f}' for number in numbers)
            states = ' | '.join(f'{part["state_bytes"] / 2**20:.1f}'
                                for part in (heads, everywhere))
            assert f'| {detector} R-CNN, {norm} | {line} | {states} |' in page


def test_the_latencies_are_the_benchmarks():
    docs = ROOT / 'docs'
    page = (docs / 'deployment.md').read_text()
    rows = json.loads(
        (docs / 'benchmark_latency_cpu.json').read_text())['rows']
    found = {(r['norm'], r['case']): r['time']['median'] for r in rows}
    cases = list(dict.fromkeys(case for _, case in found))
    norms = list(dict.fromkeys(norm for norm, _ in found))
    for norm in norms[1:]:
        line = ' | '.join(f'{found[norm, case]:.2f}' for case in cases)
        assert f'| {norm} | {line} |' in page
    assert len(norms) == 13


def test_the_gradients_are_the_studys():
    docs = ROOT / 'docs'
    page = (docs / 'gradient.md').read_text()
    tables = gradient_study.tables(
        json.loads((docs / 'gradient_study.json').read_text()))
    assert len(tables) == 3
    for rows in tables:
        for row in rows:
            assert f'| {" | ".join(row)} |' in page


def test_the_studys_tables_are_the_results():
    folder = ROOT / 'docs' / 'results'
    assert (folder / 'README.md').read_text() == study.page(
        study.Results(folder))
    assert len(study.Results(folder).rows) > 50


def test_the_demos_table_is_its_results():
    runs = demo_results.read_results(ROOT / 'docs' / 'results' / 'demo.json')
    page = (ROOT / 'configs' / 'demo' / 'README.md').read_text()
    assert as_markdown(demo_results.results_table(runs)) in page
    # With the command of each, or the form of those of the demo's configs.
    for run in runs:
        short = re.fullmatch(r'python tools/demo\.py configs/demo/(\S+)',
                             run['command'])
        assert (f']({short[1]})' if short else run['command']) in page
    # What make demo compares with is there.
    cfg = Config.fromfile(ROOT / OWN['CONFIG'])
    assert demo_results.batch_norm_note(runs, demo_results.trained_as(cfg))


def test_the_analyses_tables_are_the_results():
    folder = ROOT / 'docs' / 'results'
    assert (folder / 'analyses.md').read_text() == analyses.page(
        json.loads((folder / 'analyses.json').read_text()))


def test_the_short_tables_are_the_results():
    results = study.Results(ROOT / 'docs' / 'results')
    for page, part in (('README.md', study.README), ('docs/which_norm.md', {})):
        assert as_markdown(study.in_short(results, **part)) in (
            ROOT / page).read_text()


def test_the_readme_is_short():
    assert len((ROOT / 'README.md').read_text().split()) <= 900


def test_the_table_of_versions_is_what_was_run():
    docs = ROOT / 'docs'
    runs = versions.read_runs(docs / 'results' / 'versions.json')
    assert (docs / 'versions.md').read_text() == versions.page(runs)
