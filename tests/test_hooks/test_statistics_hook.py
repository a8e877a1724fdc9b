import json

import pytest
import torch
from mmengine.optim import OptimWrapper
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmdet_smallbn import MABN, StatisticsHook
from mmdet_smallbn.errors import SetupError
from mmdet_smallbn.pictures import draw_statistics
from tests.toy import Images, LossScale, Toy, read_log, toy_runner


def _run(tmp_path, model, accumulate=1, lr=0., **settings):
    runner = toy_runner(
        tmp_path, [dict(type='StatisticsHook', **settings)],
        model,
        optim_wrapper=dict(
            optimizer=dict(type='SGD', lr=lr),
            accumulative_counts=accumulate))
    runner.train()
    path, = tmp_path.rglob('statistics.jsonl')
    return runner, [json.loads(line) for line in path.open()]


def _by_autograd(model, images):
    """Statistics of the head's norm with every step spelt out."""
    conv, norm = model.head
    x = conv(model.backbone(images)).detach()
    mean = x.mean((0, 2, 3))
    var = x.var((0, 2, 3), unbiased=False)
    z = ((x - mean.view(1, -1, 1, 1)) /
         (var + norm.eps).sqrt().view(1, -1, 1, 1)).requires_grad_()
    out = z * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)
    g, = torch.autograd.grad(out.square().mean(), z)
    return dict(
        mean=mean,
        var=var,
        mean_square=x.square().mean((0, 2, 3)),
        gradient=g.mean((0, 2, 3)),
        psi=(g * z).mean((0, 2, 3)))


def _norms(statistics):
    return {
        key: pytest.approx(value.norm().item(), rel=1e-4)
        for key, value in statistics.items()
    }


def test_small_batches_and_large_ones(tmp_path):
    """Weights that stand still: what is recorded can be computed anew."""
    model = Toy(nn.BatchNorm2d)
    nn.init.uniform_(model.head[1].weight, 0.5, 1.5)
    nn.init.normal_(model.head[1].bias)
    _, rows = _run(
        tmp_path, model, accumulate=2, layers='head.1', regular=2)
    assert [row['iter'] for row in rows] == list(range(6))
    images = torch.stack([Images()[i]['inputs'] for i in range(8)])
    seen = [_by_autograd(model, part) for part in images.split(4)]
    for row in rows:
        assert row['layer'] == 'head.1'
        assert row['batch'] == _norms(seen[row['iter'] % 2])
        assert ('regular' in row) == (row['iter'] % 2 == 1)
    # Gradients of the small batches' own normalisation, averaged.
    large = {key: (seen[0][key] + seen[1][key]) / 2 for key in seen[0]}
    large['var'] = large['mean_square'] - large['mean'].square()
    assert rows[1]['regular'] == _norms(large)
    assert rows[-1]['moving']['ema_mean'] == pytest.approx(
        model.head[1].running_mean.norm().item())


def test_mabns_averages_are_recorded(tmp_path):
    model = Toy(lambda c: MABN(c, buffer_size=3))
    _, rows = _run(tmp_path, model, lr=0.01, layers=['*.1'], interval=2)
    assert [(row['iter'], row['layer']) for row in rows] == [
        (i, name) for i in (0, 2, 4) for name in ('backbone.1', 'head.1')
    ]
    assert rows[-1]['moving'].keys() == {
        'ema_mean_square', 'sma_mean_square', 'sma_psi'
    }
    for average in model.head[1].rings.values():
        assert average.turn + 1 == 6
    assert all(value > 0 for value in rows[-1]['batch'].values())


def test_mabns_averages_are_those_of_its_batches(tmp_path):
    """A block as long as the buffer: the same mean squares, and Psis."""
    model = Toy(lambda c: MABN(c, buffer_size=3))
    nn.init.uniform_(model.head[1].weight, 0.5, 1.5)
    _, rows = _run(tmp_path, model, lr=0.05, layers='head.1', regular=3)
    for row in rows[2::3]:
        moving = row['moving']
        assert moving['sma_psi'] == pytest.approx(row['regular']['psi'])
        assert moving['sma_mean_square'] == pytest.approx(
            row['regular']['mean_square'])
    averages = model.head[1].states[0]
    for key, average in (('mean_square', averages.forward),
                         ('psi', averages.backward)):
        assert rows[-1]['moving'][f'sma_{key}'] == pytest.approx(
            average.mean()[-1].norm().item())
    assert rows[-1]['moving']['ema_mean_square'] == pytest.approx(
        model.head[1].running_var.norm().item())


def test_a_loss_scale_leaves_no_trace(tmp_path):
    seen = []
    for kind in (OptimWrapper, LossScale):
        torch.manual_seed(0)
        model = Toy(nn.BatchNorm2d)
        folder = tmp_path / kind.__name__
        folder.mkdir()
        runner = toy_runner(
            folder, [dict(type='StatisticsHook', layers='head.1')],
            model,
            optim_wrapper=kind(torch.optim.SGD(model.parameters(), lr=0.05)))
        runner.train()
        path, = folder.rglob('statistics.jsonl')
        seen.append([json.loads(line)['batch'] for line in path.open()])
    for plain, scaled in zip(*seen):
        assert scaled == pytest.approx(plain, rel=1e-4)
    assert runner.optim_wrapper.loss_scaler.get_scale() == 2**15


class Checkpointed(Toy):

    def forward(self, inputs, mode='tensor'):
        out = checkpoint(
            self.head, self.backbone(torch.stack(inputs)),
            use_reentrant=False)
        return dict(loss=out.square().mean()) if mode == 'loss' else out


def test_a_recomputed_forward_does_not_count(tmp_path):
    rows = []
    for cls in (Toy, Checkpointed):
        torch.manual_seed(0)
        folder = tmp_path / cls.__name__
        folder.mkdir()
        rows.append(
            _run(folder, cls(nn.BatchNorm2d), lr=0.05, layers='head.1')[1])
    for plain, twice in zip(*rows):
        assert twice['batch'] == pytest.approx(plain['batch'], abs=1e-7)


class Asleep(Toy):

    def train(self, mode=True):
        super().train(mode)
        self.backbone[1].eval()
        return self


def test_layers_without_a_training_forward_are_told(tmp_path):
    _, rows = _run(tmp_path, Asleep(nn.BatchNorm2d), layers='*.1')
    assert {row['layer'] for row in rows} == {'head.1'}
    assert "1 of 2 norms (first: 'backbone.1')" in read_log(tmp_path)
    with pytest.raises(SetupError, match='1 of 1 norms.*norm_eval'):
        _run(tmp_path, Asleep(nn.BatchNorm2d), layers='backbone.1')


class Poisoned(Images):

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return dict(inputs=sample['inputs'] * (float('inf') if index else 1))


def test_a_batch_that_is_not_finite_is_left_out(tmp_path):
    hook = dict(type='StatisticsHook', layers='backbone.1', regular=2)
    toy_runner(
        tmp_path, [hook],
        Toy(nn.BatchNorm2d),
        train_dataloader=dict(
            dataset=Poisoned(),
            batch_size=4,
            sampler=dict(type='DefaultSampler', shuffle=False))).train()
    path, = tmp_path.rglob('statistics.jsonl')
    rows = [json.loads(line) for line in path.open()]
    assert len(rows) == 6 and not any('regular' in row for row in rows)
    assert all('var' not in row['batch'] for row in rows)


def test_values_go_to_the_visualisation_backends(tmp_path):
    runner, rows = _run(tmp_path, Toy(nn.BatchNorm2d), layers='head.1')
    path, = tmp_path.rglob('vis_data/scalars.json')
    scalars = [json.loads(line) for line in path.open()]
    psi = [s['statistics/head.1/batch_psi'] for s in scalars
           if 'statistics/head.1/batch_psi' in s]
    assert psi == [pytest.approx(row['batch']['psi']) for row in rows]


def test_frozen_scale_has_no_gradient_statistics(tmp_path):
    model = Toy(nn.BatchNorm2d)
    model.head[1].requires_grad_(False)
    _, rows = _run(tmp_path, model, layers='head.1', regular=2)
    for row in (rows[0]['batch'], rows[1]['regular']):
        assert row.keys() == {'mean', 'var', 'mean_square'}


def test_the_layers_are_left_alone_after_training(tmp_path):
    model = Toy(nn.BatchNorm2d)
    _run(tmp_path, model, layers='head.1')
    assert not model.head[1]._forward_hooks
    assert not model.head[1].weight._backward_hooks


@pytest.fixture
def plot_statistics():
    return pytest.importorskip(
        'mmdet_smallbn.cli.plot_statistics', exc_type=ImportError)


def _record_mabn(tmp_path):
    _run(
        tmp_path,
        Toy(lambda c: MABN(c, buffer_size=3)),
        layers='*.1',
        regular=2)
    path, = tmp_path.rglob('statistics.jsonl')
    return path


def test_the_figure_is_drawn(tmp_path, plot_statistics, capsys):
    path = _record_mabn(tmp_path)
    plot_statistics.main([str(path), '--layers', 'head.1'])
    picture = path.with_suffix('.png')
    assert str(picture) in capsys.readouterr().out
    assert picture.read_bytes().startswith(b'\x89PNG')


def test_the_figure_has_the_recorded_lines(tmp_path, plot_statistics):
    path = _record_mabn(tmp_path)
    rows = plot_statistics.read_rows([str(path)])
    figure = draw_statistics(rows, ['head.1'])
    labels = [[line.get_label() for line in ax.lines] for ax in figure.axes]
    small_large = ['batch', 'large batch']
    assert labels == [
        small_large, small_large, [*small_large, 'EMA', 'SMA'], small_large,
        [*small_large, 'SMA']
    ]
    psi = figure.axes[4].lines[2]
    assert list(psi.get_ydata()) == [
        row['moving']['sma_psi'] for row in rows if row['layer'] == 'head.1'
    ]


def test_a_resumed_runs_files_are_one(tmp_path, plot_statistics):
    """And a line that was cut off is none."""
    first, second = tmp_path / 'a.jsonl', tmp_path / 'b.jsonl'

    def rows(first, last, value):
        return '\n'.join(
            json.dumps(dict(iter=i, layer='n', batch=dict(mean=value)))
            for i in range(first, last))

    first.write_text(rows(0, 4, 1.) + '\n{"iter": 4, "la')
    second.write_text(rows(3, 6, 2.))
    found = plot_statistics.read_rows([str(first), str(second)])
    assert [(row['iter'], row['batch']['mean']) for row in found] == [
        (0, 1.), (1, 1.), (2, 1.), (3, 2.), (4, 2.), (5, 2.)
    ]


@pytest.mark.parametrize('arguments, message', [
    (['nothing.jsonl'], 'no file nothing.jsonl'),
    (['README.md'], 'README.md has no records'),
])
def test_the_plot_says_what_is_wrong(arguments, message, plot_statistics,
                                     capsys):
    with pytest.raises(SystemExit):
        plot_statistics.main(arguments)
    assert message in capsys.readouterr().err


def test_unknown_layers_are_refused(tmp_path):
    hook = dict(type='StatisticsHook', layers='heads.1')
    with pytest.raises(SetupError, match="'heads.1'.*Did you mean head.1"):
        toy_runner(tmp_path, [hook]).train()


@pytest.mark.parametrize('settings, message', [
    (dict(interval=0), 'interval.*at least 1.*0'),
    (dict(regular=2.5), r'regular.*2\.5'),
])
def test_bad_arguments_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        StatisticsHook('head.1', **settings)
