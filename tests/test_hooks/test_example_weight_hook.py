import pytest
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import Hook
from torch import nn

from mmdet_smallbn import CBN
from mmdet_smallbn.errors import SetupError
from tests.toy import Images, Toy, read_log, toy_runner


class Count(BaseMetric):

    def process(self, data_batch, data_samples):
        self.results.append(len(data_batch['inputs']))

    def compute_metrics(self, results):
        return dict(images=sum(results))


class Weights(Hook):
    """The norms' weights, as training, validation and testing see them."""

    def __init__(self):
        self.seen = {}

    def _look(self, mode, runner):
        self.seen.setdefault(mode, set()).add(
            tuple(
                getattr(block[1], 'example_weight', None)
                for block in (runner.model.backbone, runner.model.head)))

    def before_train_iter(self, runner, *args, **kwargs):
        self._look('train', runner)

    def before_val_iter(self, runner, *args, **kwargs):
        self._look('val', runner)

    def before_test_iter(self, runner, *args, **kwargs):
        self._look('test', runner)


def _run(tmp_path, norm, **settings):
    weights = Weights()
    loader = dict(
        dataset=Images(),
        batch_size=4,
        sampler=dict(type='DefaultSampler', shuffle=False))
    runner = toy_runner(
        tmp_path, [dict(type='ExampleWeightHook', **settings), weights],
        Toy(norm),
        val_dataloader=loader,
        val_cfg=dict(),
        val_evaluator=Evaluator(Count()),
        test_dataloader=loader,
        test_cfg=dict(),
        test_evaluator=Evaluator(Count()))
    runner.train()
    runner.test()
    return runner, weights.seen


@pytest.mark.parametrize('norm, trained', [(nn.BatchNorm2d, None), (CBN, 0.)])
def test_in_validation_and_testing_alone(tmp_path, norm, trained):
    runner, seen = _run(tmp_path, norm, weight=0.2)
    assert seen == dict(
        train={(trained, trained)}, val={(0.2, 0.2)}, test={(0.2, 0.2)})
    assert type(runner.model.head[1]) is norm
    assert '2 norms use the example weight 0.2' in read_log(tmp_path)


def test_a_part_can_be_left_out(tmp_path):
    _, seen = _run(tmp_path, CBN, weight=0.2, exclude='backbone')
    assert seen['test'] == {(0., 0.2)}


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match='from 0 to 1'):
        toy_runner(tmp_path, [dict(type='ExampleWeightHook', weight=2)])
    with pytest.raises(SetupError, match="ExampleWeightHook: .*'neck'"):
        _run(tmp_path, CBN, weight=0.2, exclude='neck')
