"""The tools that measure: their numbers are of what they say."""
import json
import time

import pytest
import torch

from mmdet_smallbn.benchmark import cases, contests
from mmdet_smallbn.benchmark.measure import (interleave, launches,
                                             peak_memory, ratio)
from mmdet_smallbn.cli import benchmark, statistics_error

CPU = torch.device('cpu')
DEMO = 'configs/demo/faster-rcnn_r18_fpn_cbn-all_1xb2_shapes-coco.py'


def test_all_run_in_each_round():
    log = []
    runs = {name: lambda name=name: log.append(name) for name in 'abc'}
    told = []
    times = interleave(runs, 5, CPU, least=0., tell=lambda: told.append(1))
    assert len(told) == 5 and all(len(t) == 5 for t in times.values())
    rounds = [log[i:i + 3] for i in range(6, len(log), 3)]
    assert len(rounds) == 5 and all(set(r) == set('abc') for r in rounds)
    assert len(set(map(tuple, rounds))) > 1  # in changing order


def test_the_ratio_is_that_of_the_rounds():
    """Where the machine slows down for a while, both are slower."""
    slow = [1, 1, 5, 5, 1]
    found = ratio([2 * s for s in slow], slow)
    assert found == (2, 2, 2)
    assert ratio([1, 2, 3, 4, 9], [1] * 5) == (3, 1.5, 6.5)


def test_time_is_that_of_one_run():
    runs = dict(a=lambda: time.sleep(0.002), b=lambda: time.sleep(0.006))
    times = interleave(runs, 3, CPU, least=0.01)
    assert 0.002 <= min(times['a']) and 0.006 <= min(times['b'])


def test_the_peak_is_of_what_lives_together():
    mega = 250_000  # floats of 4 bytes

    def run():
        for _ in range(3):
            a = torch.zeros(2 * mega)
            b = a + 1
            del a, b

    assert peak_memory(run, CPU) == pytest.approx(4e6, rel=0.01)


def test_views_are_no_launches():
    x = torch.randn(4, 4)
    assert launches(lambda: x.view(16)[2:].add(1), CPU) == 1
    assert launches(lambda: x.add(1).mul(2), CPU) == 2


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(
        contests, 'BLOCKS', {
            'backbone, 2x64x64x64, 3x3': cases.Block((2, 32, 16, 16), 3),
            'RoI head': cases.Block((4, 32, 7, 7), 3)
        })


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_every_norm_is_measured(small, tmp_path, dtype, capsys):
    path = tmp_path / 'docs' / 'cpu.json'
    benchmark.main([
        '--rounds', '3', '--threads', '1', '--dtype', dtype, '--out',
        str(path)
    ])
    result = json.loads(path.read_text())
    assert result['machine']['dtype'] == dtype
    table = path.with_suffix('.md').read_text()
    assert result['command'] in table
    assert table.count('\n| ') == len(result['rows']) + 2
    rows = {(r['level'], r['case'], r['norm']): r for r in result['rows']}
    assert {level for level, _, _ in rows} == {
        'norm', 'block', 'growth', 'host', 'inference'
    }
    for name in cases.NORMS:
        assert ('block', 'RoI head', name) in rows
    for row in rows.values():
        assert row['time']['low'] <= row['time']['median'] <= (
            row['time']['high'])
        if row['norm'] == 'BN':
            assert row['time']['median'] == row['memory'] == 1

    def of_block(name):
        return rows['block', 'RoI head', name]

    # For each iteration 32 patches, their outputs, and a little.
    patches = cases.IN_A_ROW * 32 * (32 * 9 + 32) * 4
    states = [of_block(f'CBN, window {k}')['state_bytes'] for k in (2, 8)]
    assert patches < (states[1] - states[0]) / 6 < 1.02 * patches
    assert of_block('BRN')['state_bytes'] == 0
    base = of_block('no norm')['launches']
    assert base < of_block('BN')['launches']
    # What is done for all at once among them. A copy of many tensors counts
    # once a tensor here, and once in all on a GPU.
    for name, most in (('BRN', 32), ('MABN', 50), ('CBN, window 4', 50),
                       ('BGN', 80)):
        assert of_block(name)['launches'] - base < most * cases.IN_A_ROW, name


def test_the_pictures_are_drawn_from_what_is_stored(tmp_path):
    benchmark.draw(contests.CONFIGS.parents[1] / 'docs', tmp_path)
    for name in ('costs', 'windows', 'growth'):
        assert (tmp_path / f'{name}.png').stat().st_size > 10_000


def test_what_is_unknown_is_said(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(['--norms', 'CBM'])
    assert "error: --norms 'CBM' is not known" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        benchmark.parse_args(['--rounds', '2'])


@pytest.mark.slow
def test_a_detectors_step_is_measured(tmp_path):
    """A smaller one."""
    norm = cases.NORMS['CBN, window 4']
    config = contests.CONFIGS / cases.DETECTORS['Mask R-CNN']
    step = cases.train_detector(
        str(config), 'all', norm, cases.Setting(), 1, (64, 64), 4)
    for _ in range(2):
        step.run()
    assert 5e7 < step.state_bytes() < 6e7
    assert step.resident_bytes() > step.state_bytes() + 2e8
    baseline = cases.train_detector(
        str(config), 'heads', cases.NORMS['BN'], cases.Setting(), 1, (64, 64),
        4)
    assert baseline.state_bytes() == 0
    norms = [type(m).__name__ for m in baseline.module.modules()]
    assert 'CBN' not in norms and norms.count('BatchNorm2d') > 60


@pytest.mark.slow
def test_errors_of_statistics_are_measured(shapes, tmp_path, capsys):
    statistics_error.main([
        DEMO, '--data',
        str(shapes), '--work-dir',
        str(tmp_path), '--iters', '11', '--every', '5', '--images', '20',
        '--windows', '1', '4', '--positions', '2048', '32',
        '--learning-rates', '1', '--cfg-options',
        'train_dataloader.dataset.pipeline.2.scale=(96,96)',
        'model.backbone.base_channels=8', 'model.neck.in_channels=8,16,32,64',
        'train_dataloader.num_workers=0',
        'train_dataloader.persistent_workers=False'
    ])
    rows = [
        json.loads(line)
        for line in (tmp_path /
                     'statistics_error.jsonl').read_text().splitlines()
    ]
    assert (tmp_path / 'statistics_error.png').stat().st_size > 10_000
    assert {row['iter'] for row in rows} == {5, 10}
    assert len({row['layer'] for row in rows}) == 32
    means = statistics_error.summarise(rows)
    exact = means[1., statistics_error.EXACT, 4]
    for positions, most in ((2048, 0.01), (32, 0.1)):
        estimate = means[1., f'CBN, {positions} positions', 4]
        assert estimate != exact
        assert estimate['var'] == pytest.approx(exact['var'], rel=most)
    assert exact['var'] < means[1., statistics_error.BN, 1]['var']
    assert 'x 1' in capsys.readouterr().out
