"""The norm doctor beside the study."""
import json
import shutil
from pathlib import Path
from statistics import mean

import pytest

from mmdet_smallbn.cli import check_doctor, study
from mmdet_smallbn.doctor import verdict_of
from mmdet_smallbn.doctor.advice import THRESHOLD, agreement_of

RESULTS = Path(__file__).resolve().parents[2] / 'docs' / 'results'


@pytest.fixture(scope='module')
def parts():
    rows = json.loads((RESULTS / 'doctor.json').read_text())['runs']
    return check_doctor.cells_of(rows, study.Results(RESULTS))


def test_the_page_is_what_the_tool_makes(parts):
    assert (RESULTS / 'doctor.md').read_text() == check_doctor.page(parts)
    said = (RESULTS.parent / 'doctor.md').read_text()
    for line in check_doctor.in_sum(parts):
        assert line in said


def test_the_threshold_is_set_by_the_rule(parts):
    cells = parts['Regimes that set the threshold']
    agreement = {True: [], False: []}
    for cell in cells:
        falls = cell.fall > study.COUNTS
        agreement[falls].append(agreement_of(cell.whole)[0])
    middle = (max(agreement[True]) + min(agreement[False])) / 2
    assert THRESHOLD == pytest.approx(middle, abs=0.02)


def test_verdicts_of_the_regimes_that_judge(parts):
    for cell in parts['Regimes that judge']:
        if verdict_of(cell.whole) == 'hurts':
            assert cell.fall > study.COUNTS, (cell.regime, cell.images)
        if verdict_of(cell.whole) == 'fine':
            assert cell.fall < 2 * study.COUNTS, (cell.regime, cell.images)


def test_rank_correlation():
    rank = check_doctor.rank_correlation
    assert rank([1, 2, 3], [10, 20, 400]) == pytest.approx(1)
    assert rank([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)


def test_a_cell_is_diagnosed_and_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check_doctor, 'STEPS', 2)
    monkeypatch.setattr(check_doctor, 'BLOCKS', 2)
    shutil.copy(RESULTS / 'plain.json', tmp_path)
    arguments = ['--results', str(tmp_path), '--regimes', 'plain', '--seeds',
                 '1']
    check_doctor.main(arguments)
    rows = json.loads((tmp_path / 'doctor.json').read_text())['runs']
    assert [row['images'] for row in rows] == [4, 2, 1]
    assert 'plain, 4' in capsys.readouterr().out
    written = (tmp_path / 'doctor.json').stat().st_mtime
    check_doctor.main(arguments)  # nothing is done twice
    assert (tmp_path / 'doctor.json').stat().st_mtime == written
    assert (tmp_path / 'doctor.png').stat().st_size > 1000


def test_what_the_advice_says_of_the_study():
    """The sentences in doctor/advice.py, held against the trainings."""
    results = study.Results(RESULTS)

    def closed(regime, name, images):
        text = study.closed(results, regime, name, images)
        return int(text.split('%')[0]) if text else None

    for regime in ('detector', 'hasty detector'):
        for images in (4, 2, 1):
            part = closed(regime, 'BN, frozen late', images)
            assert part is None or part >= 75, (regime, images)
    for images in (4, 2, 1):
        assert closed('detector', 'CBN', images) >= 80
    assert closed('hasty detector', 'CBN', 2) < 0
    for regime in ('one class a batch', 'video', 'head'):
        for images in (4, 2, 1):
            assert closed(regime, 'MABN', images) >= 95, (regime, images)
    score = study.EVALUATIONS['BN, the best example weight'][1]
    for regime in study.REGIMES:
        for images in (2, 1):
            high, low = (mean(results.scores(regime, 'BN', n))
                         for n in (16, images))
            best = mean(results.scores(regime, 'BN', images, score))
            if high - low > 10 and regime != 'head':
                assert best - low > 0.5 * (high - low), (regime, images)
