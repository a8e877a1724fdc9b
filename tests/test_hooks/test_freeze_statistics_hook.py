"""Norms with running statistics from some point of the training on."""
import pytest
import torch
from mmengine.hooks import Hook
from torch import nn

from mmdet_smallbn import (BGN, BRN, CBN, MABN, FreezeStatisticsHook, GhostBN,
                           NaiveCBN)
from mmdet_smallbn.errors import SetupError
from tests.toy import Toy, read_log, toy_runner


class Watch(Hook):
    """Whether the norms train, and their means after each iteration."""
    priority = 'VERY_LOW'

    def __init__(self):
        self.training, self.means, self.scales = [], [], []

    def after_train_iter(self, runner, *args, **kwargs):
        norms = runner.model.backbone[1], runner.model.head[1]
        self.training.append([norm.training for norm in norms])
        self.means.append(norms[0].running_mean.clone())
        self.scales.append(norms[0].weight.detach().clone())


def _train(tmp_path, hook, norm=nn.BatchNorm2d, by_epoch=False):
    watch = Watch()
    toy_runner(tmp_path, [dict(type='FreezeStatisticsHook', **hook), watch],
               Toy(norm), by_epoch).train()
    return watch


@pytest.mark.parametrize(
    'norm', [nn.BatchNorm2d, CBN, NaiveCBN, BRN, BGN, GhostBN])
def test_statistics_stay_and_scales_train_on(tmp_path, norm):
    seen = _train(tmp_path, dict(iters=4), norm)
    assert seen.training == 4 * [[True, True]] + 2 * [[False, False]]
    before, last = seen.means[3], seen.means[5]
    assert torch.equal(before, last)
    assert not torch.equal(seen.means[2], before)
    assert not torch.equal(seen.scales[3], seen.scales[5])
    assert ('running statistics of 2 norms are frozen from iteration 4, epoch '
            '0' in read_log(tmp_path))


def test_an_epoch_does_not_wake_them(tmp_path):
    """The training loop puts the whole model into training mode."""
    seen = _train(tmp_path, dict(epochs=1, prefix='head'), by_epoch=True)
    assert seen.training == 2 * [[True, True]] + 4 * [[True, False]]
    assert read_log(tmp_path).count('norms are frozen') == 1


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path):
    hook = [dict(type='FreezeStatisticsHook', iters=2)]
    whole, resumed = Toy(), Toy()
    toy_runner(tmp_path, hook, whole, False).train()
    toy_runner(tmp_path, hook, resumed, False, resume=True,
               load_from=str(tmp_path / 'iter_4.pth')).train()
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key])


def test_averages_of_mabn_stay_too(tmp_path):
    model = Toy(MABN)
    states = []

    class States(Hook):

        def after_train_iter(self, runner, *args, **kwargs):
            states.append({k: v.clone() for k, v in model.state_dict().items()
                           if 'running' in k})

    toy_runner(tmp_path, [dict(type='FreezeStatisticsHook', iters=3),
                          States()], model, False).train()
    assert states[2] and all(
        torch.equal(value, states[5][key])
        for key, value in states[2].items())


@pytest.mark.parametrize('norm, hook, said', [
    (nn.BatchNorm2d, dict(iters=1, prefix='neck'),
     "FreezeStatisticsHook: prefix='neck' matches no norm with running "
     'statistics of the model.*backbone, head'),
    (nn.Identity, dict(iters=1), 'the model has no norm with running'),
    (nn.BatchNorm2d, dict(epochs=1), 'counts iterations. Use iters'),
    (nn.BatchNorm2d, dict(iters=6), 'the training ends after 6 iters'),
])
def test_where_there_is_none_it_says_so(tmp_path, norm, hook, said):
    model = Toy(lambda channels: norm(channels))
    runner = toy_runner(
        tmp_path, [dict(type='FreezeStatisticsHook', **hook)], model, False)
    with pytest.raises(SetupError, match=said):
        runner.train()


@pytest.mark.parametrize('hook', [{}, dict(iters=1, epochs=1),
                                  dict(iters=-1), dict(epochs=1.5)])
def test_one_unit_and_a_count(hook):
    with pytest.raises(ValueError, match='FreezeStatisticsHook'):
        FreezeStatisticsHook(**hook)
