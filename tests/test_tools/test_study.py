"""The small-batch study, with trainings of a few steps."""
import json

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from mmdet_smallbn.cli import study
from mmdet_smallbn.study import regimes
from mmdet_smallbn.study.settings import SETTINGS, setting_of
from mmdet_smallbn.study.training import make_precise, order, train


@pytest.fixture
def short(monkeypatch):
    """The regimes with trainings of three steps, on few images."""
    for name, regime in list(regimes.REGIMES.items()):
        train, val = regime.splits()
        few = train.of(torch.arange(400)), val.of(torch.arange(40))
        monkeypatch.setitem(
            regimes.REGIMES, name,
            regime._replace(examples=lambda strength, few=few: few, steps=3))


@pytest.mark.slow
@pytest.mark.parametrize('regime', regimes.REGIMES)
def test_every_regime_trains(short, regime):
    row = regimes.run(regime, 'CBN', 4, 0)
    assert 0 <= row['score'] <= 100 and row['images'] == 4
    assert row['norm']['norm_cfg'] == dict(type='CBN', window_size=4)
    json.dumps(row)


@pytest.mark.slow
def test_a_cell_is_a_function_of_its_seed(short, monkeypatch):
    longer = regimes.REGIMES['video']._replace(steps=25)
    monkeypatch.setitem(regimes.REGIMES, 'video', longer)
    scores = [regimes.run('video', 'MABN', 2, seed)['score']
              for seed in (0, 0, 1)]
    assert scores[0] == scores[1] != scores[2]


def test_every_split_of_a_step_sees_the_same_images():
    groups = torch.arange(400) // 4
    first, again = (next(order(groups, 4, 3)) for _ in range(2))
    assert (first == again).all() and len(first.unique()) == 16
    # Those of a group follow each other.
    assert (groups[first].view(4, 4) == groups[first][::4, None]).all()
    assert (first != next(order(groups, 4, 4))).any()


def test_precise_statistics_are_those_of_all_values(short):
    """Of the first norm: its input depends on no other."""
    regime = regimes.REGIMES['video']
    torch.manual_seed(0)
    model = regime.build(SETTINGS['BN'].norm)
    examples = regime.splits()[0]
    make_precise(model, regime, examples, images=2, batches=40)
    steps = order(examples.groups, regime.together, 0)
    seen = torch.cat([next(steps) for _ in range(5)])
    norm = next(m for m in model.modules() if isinstance(m, _BatchNorm))
    inputs = []
    norm.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    with torch.no_grad():
        model(examples.of(seen).pixels)
    assert norm.running_mean.allclose(inputs[0].mean((0, 2, 3)), atol=1e-5)
    assert norm.running_var.allclose(
        inputs[0].var((0, 2, 3), unbiased=False), rtol=1e-4)


def test_the_window_is_the_papers():
    assert setting_of('CBN', 2).norm['norm_cfg']['window_size'] == 8
    assert setting_of('NaiveCBN', 4).norm['norm_cfg']['window_size'] == 4
    assert 'window_size' not in SETTINGS['CBN'].norm['norm_cfg']


def _made_up(cell):
    """BatchNorm falls from 90 to 70; CBN takes back 15 of these 20."""
    regime, setting, images, seed = cell
    score = 90. if images == 16 else {'BN': 70., 'CBN': 85.}.get(setting, 60.)
    weighted = {f'{w:g}': score + w for w in regimes.EXAMPLE_WEIGHTS}
    return dict(regimes.asked(*cell), score=score + seed, precise=score + 1,
                weighted=weighted, machine='a machine', date='2026-01-01')


@pytest.fixture
def made_up(monkeypatch):
    trained = []

    class Pool:

        def __init__(self, *args):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def submit(self, function, cell):
            trained.append(cell)
            future = study.Future()
            future.set_result(_made_up(cell))
            return future

    monkeypatch.setattr(study, 'ProcessPoolExecutor', Pool)
    return trained


def _cells(*names):
    """How many cells settings have in a regime that has no ablations."""
    return sum(name in names for line in study.LINES[:2] for name, _ in line)


def test_it_goes_on_where_it_stopped(made_up, tmp_path, capsys):
    args = ['--regimes', 'plain', '--settings', 'BN', 'CBN', '--out',
            str(tmp_path)]
    study.main([*args, '--seeds', '1'])
    first = len(made_up)
    assert first == _cells('BN', 'CBN')
    assert len(study.cells(study.parse_args(
        [*args, '--images', '16', '--seeds', '1']))) == 1
    study.main([*args, '--seeds', '2'])
    assert len(made_up) == len(set(made_up)) == 2 * first
    assert f'0 of {2 * first} trainings' in capsys.readouterr().out
    study.main([*args, '--seeds', '3', '--minutes', '0'])
    study.main([*args, '--seeds', '3', '--report'])
    assert len(made_up) == 2 * first
    assert f'{first} of {3 * first} trainings' in capsys.readouterr().out
    kept = json.loads((tmp_path / 'plain.json').read_text())
    assert len(kept['runs']) == 2 * first
    for picture in ('study', 'example_weight'):
        assert (tmp_path / f'{picture}.png').stat().st_size > 5000
    assert '| CBN |  | 85.' in (tmp_path / 'README.md').read_text()


def test_the_tables_say_what_was_closed(made_up, tmp_path):
    study.main(['--regimes', 'plain', '--settings', 'BN', 'CBN', '--seeds',
                '2', '--out', str(tmp_path)])
    results = study.Results(tmp_path)
    head, row, _ = study.summary(results)
    assert row[:5] == ['plain', '2', '90.5 ± 0.7', '70.5 ± 0.7', '20.0']
    # Less the deviation of a difference: the root of 0.7² + 0.7².
    assert row[head.index('beyond the deviation')] == '19.0'
    assert row[head.index('CBN closes (seeds)')] == '75% (2)'
    assert row[head.index('MABN closes (seeds)')] == ''
    rows = {name: cells for name, *cells in study.table(results, 'plain')}
    assert rows['CBN'] == ['', *['85.5 ± 0.7'] * 3]
    assert rows['BN, PreciseBN'][0] == '91.0 ± 0.0'
    assert rows['BN, the best example weight'][0] == '91.0 ± 0.0'


def test_a_fall_within_the_deviation_is_not_closed(tmp_path):
    results = study.Results(tmp_path)
    for images, scores in ((16, (90., 92.)), (2, (88., 92.)), (1, (9., 9.))):
        for seed, score in enumerate(scores):
            for setting in ('BN', 'CBN'):
                results.add(dict(regime='plain', setting=setting,
                                 images=images, seed=seed, score=score))
    head, two, one = study.summary(results)
    assert two[4:] == ['1.0', '0.0', '', '', '', '']
    assert one[head.index('CBN closes (seeds)')] == '0% (2)'


def test_ablations_run_in_their_regimes_alone(made_up, tmp_path):
    name = 'MABN, EMA, batch'
    study.main(['--settings', name, '--seeds', '1', '--out', str(tmp_path)])
    assert {cell.regime for cell in made_up} == {
        'head', 'detector'}
    title = next(iter(study.ABLATIONS))
    assert not (tmp_path / 'ablations.png').exists()  # of one row
    study.main(['--settings', *SETTINGS, '--regimes', 'head', '--seeds', '1',
                '--out', str(tmp_path / 'all')])
    assert (tmp_path / 'all' / 'ablations.png').stat().st_size > 5000
    assert study.ablation(study.Results(tmp_path), title)[1:] == [
        ['4: EMA, batch, yes', *['60.0'] * 2]]


def test_what_is_closed_is_of_the_same_seeds(tmp_path):
    results = study.Results(tmp_path)
    scores = {('BN', 16): (90., 80.), ('BN', 2): (50., 10.),
              ('CBN', 2): (70., )}
    for (setting, images), values in scores.items():
        for seed, score in enumerate(values):
            results.add(dict(regime='plain', setting=setting, images=images,
                             seed=seed, score=score))
    assert study.closed(results, 'plain', 'CBN', 2) == '50% (1)'
    assert study.closed(results, 'plain', 'MABN', 2) == ''


def test_two_processes_keep_each_others_trainings(tmp_path):
    first, second = study.Results(tmp_path), study.Results(tmp_path)
    for seed, results in enumerate((first, second, first)):
        results.add(dict(regime='plain', setting='BN', images=2, seed=seed,
                         score=1.))
    assert len(study.Results(tmp_path).rows) == 3


@pytest.mark.slow
def test_frozen_norms_keep_their_statistics(short):
    """Frozen from the start they are the identity, and no batch matters."""
    scores = {regimes.run('plain', 'BN, frozen', n, 0)['score']
              for n in (16, 4)}
    assert len(scores) == 1


@pytest.mark.slow
def test_late_frozen_norms_train_until_then(short):
    regime = regimes.REGIMES['plain']._replace(steps=8)
    for name, batches in (('BN, frozen late', 24), ('BN', 32)):
        setting = setting_of(name, 4)
        model = regime.build(setting.norm)
        train(model, regime, setting, regime.splits()[0], 4, 0)
        seen = [value.item() for key, value in model.state_dict().items()
                if key.endswith('num_batches_tracked')]
        assert len(seen) == 11 and set(seen) == {batches}


@pytest.mark.slow
def test_what_is_gathered_before_a_step_changes_the_training(
        short, monkeypatch):
    longer = regimes.REGIMES['video']._replace(steps=25)
    monkeypatch.setitem(regimes.REGIMES, 'video', longer)
    fresh, borrowed = (regimes.run('video', name, 4, 0)['score'] for name in (
        'CBN, fresh window', 'CBN'))
    assert fresh != borrowed


def test_a_training_of_another_regime_is_not_kept(made_up, tmp_path,
                                                  monkeypatch):
    """The name is the same, what it stands for is not."""
    args = ['--regimes', 'plain', '--settings', 'CBN', '--seeds', '1', '--out',
            str(tmp_path)]
    study.main(args)
    first = len(made_up)
    study.main(args)
    assert len(made_up) == first
    monkeypatch.setitem(regimes.REGIMES, 'plain',
                        regimes.REGIMES['plain']._replace(steps=99))
    study.main(args)
    assert len(made_up) == 2 * first


def test_in_short_each_small_batch_has_a_row(made_up, tmp_path):
    study.main(['--regimes', 'plain', '--settings', 'BN', 'CBN', '--seeds',
                '1', '--out', str(tmp_path)])
    head, two, one = study.in_short(study.Results(tmp_path))
    assert two == ['plain, 2', '90.0', '70.0', '71.0', '', '', '85.0', '',
                   '']
    assert one[0] == 'plain, 1' and len(head) == len(one)


def test_unknown_names_are_said(capsys):
    with pytest.raises(SystemExit):
        study.main(['--regimes', 'heads'])
    assert "--regimes 'heads' is not known. Did you mean head?" in (
        capsys.readouterr().err)
    with pytest.raises(SystemExit):
        study.main(['--jobs', '0'])
    assert '--jobs must be at least 1' in capsys.readouterr().err
