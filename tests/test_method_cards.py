"""The method cards say what the code and the results say."""
import inspect
import json
import re
import runpy
from pathlib import Path
from statistics import mean

import matplotlib
import pytest
import torch
from mmdet.registry import MODELS as DETECTION_MODELS
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS
from torch import nn

from mmdet_smallbn import fuse_norm, set_example_weight
from mmdet_smallbn.cli import demo_results, study
from mmdet_smallbn.errors import SetupError
from mmdet_smallbn.tables import spread

DOCS = Path(__file__).resolve().parents[1] / 'docs'

FOLDER = DOCS / 'methods'
PAGES = {
    path.stem: path.read_text()
    for path in sorted(FOLDER.glob('*.md')) if path.stem != 'README'
}
SECTIONS = [
    'How to use', 'Suggested values', 'How it works', '❗ What it costs',
    '🚧 When it fails', 'Differences from the released code', 'Citation'
]
# The norm of a card as the benchmarks name it.
MEASURED = dict(
    cbn='CBN, window 4', naive_cbn='NaiveCBN, window 4', mabn='MABN',
    brn='BRN', bgn='BGN', ghost_bn='GhostBN', example_weighting='BGN')
BLOCK = 'backbone, 2x64x64x64, 3x3'

each_card = pytest.mark.parametrize('card', PAGES)


def section(card, title):
    return re.search(rf'^## {title}\n(.*?)(?=^## |\Z)', PAGES[card],
                     re.M | re.S)[1]


def tables(text, head):
    """Rows of cells of the tables whose first cell begins so."""
    found = [[re.split(r' *\| *', line.strip('| '))
              for line in block.strip().splitlines()]
             for block in re.findall(r'(?:^\|.*\n)+', text, re.M)]
    return [rows[:1] + rows[2:] for rows in found
            if rows[0][0].startswith(head)]


def code(card):
    return re.findall(r'^```python\n(.*?)^```', section(card, 'How to use'),
                      re.M | re.S)


def registered(card):
    name = re.search(r"\*\*Registered as:\*\* `'(\w+)'`", PAGES[card])[1]
    return HOOKS.get(name) or MODELS.get(name)


def folds(card):
    return re.search(r'\*\*Folds:\*\* (\w+)', PAGES[card])[1]


@each_card
def test_a_card_has_all_parts(card):
    head, *_ = PAGES[card].partition('## How to use')
    assert re.match(r'# .+\n\n.+\n', head)
    assert '**Paper:**' in head and 'https://arxiv.org/abs/' in head
    assert f']({card}.svg)' in head
    assert re.findall(r'^## (.*)$', PAGES[card], re.M) == SECTIONS
    assert '```bibtex' in section(card, 'Citation')


def test_the_pictures_are_what_the_script_draws(tmp_path):
    runpy.run_path(str(DOCS / 'draw_methods.py'))['main'](tmp_path)
    drawn = {path.stem: path.read_bytes() for path in tmp_path.iterdir()}
    assert drawn.keys() == PAGES.keys()
    for card, picture in drawn.items():
        kept = (FOLDER / f'{card}.svg').read_bytes()
        # Another version of matplotlib may place a glyph elsewhere.
        if f'Matplotlib v{matplotlib.__version__}'.encode() in kept:
            assert picture == kept, card


@each_card
def test_links_into_pages_find_their_headings(card):
    for page, place in re.findall(r'\]\(([^)#:]+)#([^)]+)\)', PAGES[card]):
        headings = re.findall(r'^#+ (.*)$', (FOLDER / page).read_text(), re.M)
        assert place in [re.sub(r'[^\w -]', '', heading).lower().replace(
            ' ', '-') for heading in headings], (page, place)


@each_card
def test_the_config_builds(card, tmp_path):
    (tmp_path / 'config.py').write_text(code(card)[0])
    cfg = Config.fromfile(tmp_path / 'config.py')
    made = [HOOKS.build(hook) for hook in cfg.get('custom_hooks', ())]
    parts = (cfg.model.neck, cfg.model.roi_head.bbox_head)
    if card != 'example_weighting':
        made += [norm for part in parts
                 for norm in DETECTION_MODELS.build(part).modules()
                 if type(norm) is registered(card)]
        assert len(made) >= 8 + 4  # FPN, 4conv1fc
    assert registered(card) in map(type, made)


@each_card
def test_the_lines_for_torch_build(card):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    names = dict(nn=nn, model=model)
    exec(code(card)[1], names)
    if card == 'example_weighting':
        assert model[1].example_weight == 0.05
    else:
        assert registered(card) in map(type, names['norm'].modules())
        assert names['norm'](torch.randn(4, 256, 5, 5)).isfinite().all()


@each_card
def test_the_arguments_are_the_classs(card):
    rows, = tables(section(card, 'Suggested values'), 'argument')
    assert rows[0] == ['argument', 'default', 'meaning', 'suggested', 'source']
    arguments = inspect.signature(registered(card)).parameters
    stock = inspect.signature(nn.BatchNorm2d).parameters
    named = []
    for names, default, *texts in rows[1:]:
        assert len(texts) == 3 and texts[0]
        for name in re.findall(r'`(\w+)`', names):
            named.append(name)
            if default == 'as `nn.BatchNorm2d`':
                assert arguments[name].default == stock[name].default
            elif default == 'required':
                assert arguments[name].default is inspect.Parameter.empty
            else:
                assert default == f'`{arguments[name].default!r}`'
    assert sorted(named) == sorted(arguments)


def _costs():
    """Ratios of time to BatchNorm by what was measured, and norm."""
    found = {}
    rows = json.loads((DOCS / 'benchmark_cpu.json').read_text())['rows']
    gpu = json.loads((DOCS / 'results' / 'gpu.json').read_text())
    detectors = json.loads(
        (DOCS / 'benchmark_detectors_cpu.json').read_text())['rows']
    for name, source, level, case in (
            ('training step, four blocks of a backbone, 2 CPU cores', rows,
             'block', BLOCK),
            ('training step, four blocks of a backbone, one H100',
             gpu['costs']['float32'], 'block', BLOCK),
            ('inference, a block of a backbone, 2 CPU cores', rows,
             'inference', BLOCK),
            ('training step, Faster R-CNN, norms in all, 2 CPU cores',
             detectors, 'detector', 'Faster R-CNN, norms in all')):
        found.update({(name, row['norm']): row['time']['median']
                      for row in source
                      if (row['level'], row['case']) == (level, case)})
    return found


def test_the_costs_are_the_benchmarks():
    costs = _costs()
    with_numbers = set()
    for card in PAGES:
        for rows in tables(section(card, '❗ What it costs'), 'measured'):
            with_numbers.add(card)
            assert 1 <= len(rows[1:]) <= 3
            for what, number in rows[1:]:
                assert number == f'{costs[what, MEASURED[card]]:.2f}', what
    assert with_numbers == MEASURED.keys()


def _study_cell(results, regime, column):
    setting, images = re.fullmatch(r'(.*), (\d+) images?', column).groups()
    setting, score = study.EVALUATIONS.get(
        setting, (setting, lambda row: row['score']))
    if setting == 'BN, example weight 1':
        setting, score = 'BN', lambda row: row['weighted']['1']
    return spread(results.scores(regime, setting, int(images), score))


def test_the_results_are_the_studys():
    results = study.Results(DOCS / 'results')
    with_numbers = set()
    for card in PAGES:
        for head, *rows in tables(section(card, '🚧 When it fails'),
                                  'regime of the [study]'):
            with_numbers.add(card)
            for regime, *numbers in rows:
                assert numbers == [_study_cell(results, regime, column)
                                   for column in head[1:]], (card, regime)
    assert with_numbers == PAGES.keys() - {'cmbn'}


def test_the_results_are_the_demos():
    known = {tuple(row[:3]): row[5] for row in demo_results.results_table(
        demo_results.read_results(DOCS / 'results' / 'demo.json'))}
    with_numbers = set()
    for card in PAGES:
        for head, *rows in tables(section(card, '🚧 When it fails'), 'demo'):
            with_numbers.add(card)
            images = re.fullmatch('demo, (.*) images', head[0])[1]
            for detector, *numbers in rows:
                assert numbers == [known[detector, norm, images]
                                   for norm in head[1:]]
    assert with_numbers == {'cbn', 'cmbn', 'ghost_bn'}


@each_card
def test_no_result_of_ours_is_beside_the_tables(card):
    for title in SECTIONS[3:5]:
        text = re.sub(r'^\|.*$', '', section(card, title), flags=re.M)
        for item in re.split(r'\n(?=\n|- )', text):
            if not item.startswith('- *Paper'):
                assert not re.search(r'\d\.\d|\d%', item), item


def test_the_best_example_weights_are_the_studys():
    """At most 0.2 at 16 images, 0.5 or 1 where BatchNorm fell."""
    results = study.Results(DOCS / 'results')
    falls = 0
    for regime in study.REGIMES:
        for images in (16, 2, 1):
            by_weight = {
                float(weight): mean(results.scores(
                    regime, 'BN', images,
                    lambda row: row['weighted'][weight]))
                for weight in ('0.02', '0.05', '0.1', '0.2', '0.5', '1')
            }
            by_weight[0.] = mean(results.scores(regime, 'BN', images))
            best = max(by_weight, key=by_weight.get)
            if images == 16:
                assert best <= 0.2
                whole = by_weight[0.]
            elif whole - by_weight[0.] > 10:
                falls += 1
                assert best >= 0.5
    assert falls >= 5


@each_card
def test_it_folds_as_the_card_says(card):
    weighs = card == 'example_weighting'
    norm = (nn.BatchNorm2d if weighs else registered(card))(8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm)
    if weighs:
        set_example_weight(model, 0.5)
    x = torch.randn(2, 3, 9, 9)
    if folds(card) == 'yes':
        assert type(fuse_norm(model, x)[1]) is nn.Identity
    else:
        with pytest.raises(SetupError, match='example_weight'):
            fuse_norm(model, x)


def test_the_overview_lists_the_cards():
    rows, = tables((FOLDER / 'README.md').read_text(), 'method')
    listed = {}
    for method, _, answer, _ in rows[1:]:
        card = re.search(r'\]\((\w+)\.md\)', method)[1]
        listed[card] = re.split(r'\W', answer)[0]
    assert listed == {card: folds(card) for card in PAGES}
