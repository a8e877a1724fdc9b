"""The papers' analyses, on few images."""
import json

import pytest
import torch
import torch.nn.functional as F

from mmdet_smallbn.cli import analyses
from mmdet_smallbn.study import regimes
from mmdet_smallbn.study.settings import setting_of
from mmdet_smallbn.study.training import train


@pytest.fixture
def short():
    """The head's regime with few steps, on few images."""
    train, val = regimes.REGIMES['head'].splits()
    few = train.of(torch.arange(200)), val.of(torch.arange(40))
    return regimes.REGIMES['head']._replace(
        examples=lambda strength: few, steps=20)


def test_ratios_are_those_of_jacobians():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    weights = [torch.randn(4, 3, 3, 3), torch.randn(5, 4, 3, 3),
               torch.randn(3, 5, 1, 1)]

    def run(*weights):
        outputs = []
        y = x
        for w in weights:
            y = F.conv2d(y, w)
            outputs.append(y)
            y = y.tanh()
        return outputs

    for w in weights:
        w.requires_grad_()
    found = analyses.gradient_ratios(run(*weights), weights)

    def jacobian_norms(layer, statistic):
        jacobians = torch.autograd.functional.jacobian(
            lambda *w: statistic(run(*w)[layer]), tuple(weights))
        return [jacobian.norm() for jacobian in jacobians]

    for name, statistic in (
            ('mean', lambda y: y.mean((0, 2, 3))),
            ('mean square', lambda y: y.square().mean((0, 2, 3)))):
        second = jacobian_norms(1, statistic)
        third = jacobian_norms(2, statistic)
        one = (second[0] / second[1] + third[1] / third[2]) / 2
        assert found[f'{name}, l - 1'] == pytest.approx(one.item(), rel=1e-4)
        assert found[f'{name}, l - 2'] == pytest.approx(
            (third[0] / third[2]).item(), rel=1e-4)


@pytest.mark.slow
def test_looking_at_gradients_changes_no_training(short):
    """Backward passes for the Jacobians leave the training's as they were."""
    found = analyses.watch_gradients(short, 0)
    assert list(found) == ['10', '25', '50', '75', '99']
    assert all(0 < value < 10 for v in found.values() for value in v.values())

    def weights(regime, watch):
        torch.manual_seed(0)
        setting = setting_of('CBN', 4)
        model = regime.build(setting.norm)

        def loss(model, batch):
            with analyses._Calls(model, torch.nn.Conv2d) as calls:
                value = regime.loss(model, batch)
            if watch:  # again and again through one graph
                analyses.gradient_ratios(
                    calls.outputs, [c.weight for c in calls.modules])
            return value

        train(model, regime._replace(loss=loss, steps=4), setting,
              regime.splits()[0], 4, 0)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert (weights(short, True) == weights(short, False)).all()


@pytest.mark.slow
def test_training_is_bound_and_evaluation_is_not(short):
    ranges = analyses.output_ranges(short, 1, 0, steps=3)
    bound = ranges['bound']
    assert bound == 35**0.5  # the last maps are of 6 x 6
    assert -bound <= ranges['least in training'] < 0
    assert 0 < ranges['largest in training'] <= bound
    assert ranges['largest in evaluation'] > ranges['largest in training']


@pytest.mark.slow
def test_the_tool_goes_on_and_draws(short, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(analyses.REGIMES, 'head', short)
    out = tmp_path / 'found.json'
    args = ['--parts', 'ranges', '--out', str(out)]
    analyses.main([*args, '--seeds', '0'])
    first = json.loads(out.read_text())['ranges']
    monkeypatch.setitem(analyses.PARTS, 'ranges', analyses.Part(
        lambda regime, seed: {'1': dict(bound=float(seed))}, '', '', ''))
    analyses.main([*args, '--seeds', '0', '1'])
    kept = json.loads(out.read_text())['ranges']
    assert kept == dict(first, **{'1': {'1': {'bound': 1.}}})
    assert (tmp_path / 'ranges.png').stat().st_size > 3000
    assert 'bound' in capsys.readouterr().out
