import re
from functools import partial

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from torch import nn

from mmdet_smallbn import BGN, BRN, CBN, MABN, BurnInHook, NaiveCBN
from mmdet_smallbn.errors import SetupError
from tests.toy import Images, LossScale, Toy, read_log, toy_runner


class Phases(Hook):
    """What the layers were told, iteration by iteration."""
    priority = 'VERY_LOW'

    def __init__(self):
        self.seen = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        model = runner.model
        self.seen.append(
            (runner.iter, *(getattr(block[1], 'burning_in', None)
                            for block in (model.backbone, model.head)),
             getattr(model.head[1], 'iteration', None)))


def _runner(tmp_path, hooks, model=None, **kwargs):
    phases = Phases()
    return toy_runner(tmp_path, [*hooks, phases], model, **kwargs), phases


def test_by_epoch(tmp_path):
    runner, phases = _runner(tmp_path, [dict(type='BurnInHook', epochs=2)])
    runner.train()  # 2 iterations an epoch
    assert [s[1] for s in phases.seen] == [True] * 4 + [False] * 2
    assert [s[3] for s in phases.seen] == list(range(6))
    text = read_log(tmp_path)
    assert 'burn-in of 2 epochs with the statistics of the current' in text
    assert '2 norms at iteration 4, epoch 2: burn-in is over' in text
    assert text.count('burn-in is over') == 1
    # Whoever uses the model next is not in the last iteration any more.
    assert runner.model.head[1].iteration is None
    assert runner.model.head[1].layer_name == 'head.1'


def test_a_second_training_of_a_model_begins_with_an_empty_past(tmp_path):
    model = Toy()
    hook = [dict(type='BurnInHook', epochs=0)]
    _runner(tmp_path, hook, model)[0].train()
    assert model.head[1].held_iterations == [4]
    _runner(
        tmp_path, hook, model,
        train_cfg=dict(by_epoch=True, max_epochs=1))[0].train()
    assert model.head[1].held_iterations == [2]


def test_by_iteration_and_prefix(tmp_path):
    runner, phases = _runner(
        tmp_path, [
            dict(type='BurnInHook', iters=3, prefix='head'),
            dict(type='BurnInHook', iters=1, prefix=['backbone'])
        ],
        by_epoch=False)
    runner.train()
    assert [s[1] for s in phases.seen] == [True] + [False] * 5
    assert [s[2] for s in phases.seen] == [True] * 3 + [False] * 3


@pytest.mark.parametrize('by_epoch', [True, False])
def test_resume_continues_where_it_was(tmp_path, by_epoch):
    hook = (
        dict(type='BurnInHook', epochs=2)
        if by_epoch else dict(type='BurnInHook', iters=4))
    first, whole = _runner(tmp_path, [hook], by_epoch=by_epoch)
    first.train()
    name = 'epoch_1.pth' if by_epoch else 'iter_2.pth'
    resumed, phases = _runner(
        tmp_path, [hook],
        by_epoch=by_epoch,
        resume=True,
        load_from=str(tmp_path / name))
    resumed.train()
    assert phases.seen == whole.seen[2:]
    assert [s[1] for s in phases.seen] == [True, True, False, False]
    fresh, phases = _runner(
        tmp_path, [hook], by_epoch=by_epoch, load_from=str(tmp_path / name))
    fresh.train()
    assert phases.seen == whole.seen


class Losses(Hook):

    def __init__(self):
        self.values = []

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        self.values.append(outputs['loss'].item())


# Norms, and whether they remember what a state dict does not hold.
KINDS = {
    'CBN': (CBN, True),
    'NaiveCBN': (NaiveCBN, True),
    'MABN': (MABN, True),
    'MABN, ema backward':
    (partial(MABN, backward_statistics='ema', centered=True), True),
    'BRN': (BRN, False),
    'BGN': (partial(BGN, num_groups=2), False),
}


@pytest.mark.parametrize('save', [True, False])
@pytest.mark.parametrize('kind', KINDS)
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path, kind, save):
    """To the last bit of the losses, weights and buffers."""
    norm, remembers = KINDS[kind]
    hooks = [] if kind == 'BGN' else [
        dict(type='BurnInHook', iters=2, save_states=save)
    ]
    runs = []
    for resumed in (False, True):
        torch.manual_seed(0)
        losses = Losses()
        kwargs = dict(
            resume=True,
            load_from=str(tmp_path / 'epoch_3.pth')) if resumed else {}
        with torch.device('cpu'):  # MABN with 'ema' diverges for some weights
            model = Toy(norm)
        runner = toy_runner(
            tmp_path, [*hooks, losses],
            model,
            train_cfg=dict(by_epoch=True, max_epochs=6),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.3)),
            randomness=dict(seed=0),
            **kwargs)
        runner.train()
        runs.append((losses.values, runner.model))
    (whole, first), (rest, second) = runs
    same = rest == whole[6:] and all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(),
                                          second.state_dict().values()))
    assert same == (save or not remembers)
    assert len(rest) == 6 and max(rest) - min(rest) > 0


def test_what_does_not_fit_fills_anew(tmp_path):
    hooks = [dict(type='BurnInHook', epochs=0)]
    toy_runner(tmp_path, hooks).train()
    runner = toy_runner(
        tmp_path,
        hooks,
        Toy(partial(CBN, window_size=3)),
        train_cfg=dict(by_epoch=True, max_epochs=4),
        resume=True,
        load_from=str(tmp_path / 'epoch_3.pth'))
    runner.train()
    assert re.search(
        '2 norms cannot restore their past statistics from the checkpoint and '
        "fill again. First: CBN 'backbone.1': .*window_size=4.* 3",
        read_log(tmp_path))
    assert runner.model.head[1].held_iterations == [2]


def test_states_in_a_checkpoint_load_safely_and_fine_tuning_forgets(tmp_path):
    hooks = [dict(type='BurnInHook', epochs=0)]
    runner = toy_runner(tmp_path, hooks)
    runner.train()
    path = tmp_path / 'epoch_3.pth'
    states = torch.load(path, weights_only=False)['smallbn_states']
    assert set(states) == {'backbone.1', 'head.1'}
    assert states['head.1'][0]['state']['turn'] == 5  # 6 iterations
    torch.save(states, tmp_path / 'states.pth')
    torch.load(tmp_path / 'states.pth', weights_only=True)
    # Copies: what training does next is not in them.
    layer = runner.model.head[1]
    exported, = layer.export_states()
    layer(runner.model.head[0](torch.randn(2, 4, 5, 5)))
    for held in (exported, states['head.1'][0]):
        assert held['state']['turn'] == 5
    for held in ('past', 'latest'):
        for name, tensor in exported['state'][held].items():
            torch.testing.assert_close(
                states['head.1'][0]['state'][held][name], tensor)
    tuned = toy_runner(
        tmp_path,
        hooks,
        load_from=str(path),
        train_cfg=dict(by_epoch=True, max_epochs=1))
    tuned.train()
    assert tuned.model.head[1].held_iterations == [2]


def test_states_in_the_format_of_an_older_version_are_refused(tmp_path):
    hooks = [dict(type='BurnInHook', epochs=0)]
    toy_runner(tmp_path, hooks, model=Toy(NaiveCBN)).train()
    path = tmp_path / 'epoch_3.pth'
    checkpoint = torch.load(path, weights_only=False)
    for state, in checkpoint['smallbn_states'].values():
        state.pop('version')
        state['state'] = dict(filled=4)
    torch.save(checkpoint, path)
    runner = toy_runner(
        tmp_path,
        hooks,
        model=Toy(NaiveCBN),
        resume=True,
        load_from=str(path),
        train_cfg=dict(by_epoch=True, max_epochs=4))
    runner.train()
    assert re.search(r'2 norms cannot restore.*format 1.* reads 3',
                     read_log(tmp_path))
    assert runner.model.head[1].held_iterations == [2]


def test_examples_and_suggestion_are_logged(tmp_path):
    _runner(tmp_path, [dict(type='BurnInHook', epochs=0)])[0].train()
    text = read_log(tmp_path)
    assert '2 CBN layers: 4 iterations x 4 images = 16 examples' in text
    assert 'suggests' not in text


class Mixed(Toy):
    """A norm of each kind: with a burn-in, without, and not of ours."""

    def __init__(self):
        super().__init__(BRN)
        self.head = nn.Sequential(
            nn.Conv2d(4, 4, 3), MABN(4, buffer_size=8), nn.Conv2d(4, 4, 1),
            BGN(4, num_groups=2), nn.BatchNorm2d(4))


def test_a_model_may_mix_norms(tmp_path):
    model = Mixed()
    runner, phases = _runner(
        tmp_path, [dict(type='BurnInHook', iters=2)], model, by_epoch=False)
    runner.train()
    assert [s[1:] for s in phases.seen] == [
        (i < 2, i < 2, i) for i in range(6)
    ]
    assert model.head[3].burning_in is False
    text = read_log(tmp_path)
    assert '2 norms at iteration 0' in text
    assert '1 MABN layers: 8 iterations x 4 images = 32 examples' in text
    # BRN averages nothing, and the suggestion is CBN's.
    assert 'BRN layers' not in text and 'suggests' not in text


def test_burn_in_is_what_the_norms_make_of_it(tmp_path):
    """BRN that burns in is BatchNorm, weights and buffers."""
    weights = []
    for norm in (BRN, nn.BatchNorm2d):
        torch.manual_seed(0)
        model = Toy(lambda c: norm(c, momentum=0.1))
        hooks = [dict(type='BurnInHook', iters=5)] if norm is BRN else []
        runner, _ = _runner(
            _folder(tmp_path, norm), hooks, model, by_epoch=False,
            train_cfg=dict(by_epoch=False, max_iters=5 + (norm is BRN)))
        runner.register_hook(Snapshot(weights, 5))
        runner.train()
    for a, b in zip(*weights):
        torch.testing.assert_close(a, b)


def _folder(tmp_path, norm):
    folder = tmp_path / norm.__name__
    folder.mkdir()
    return folder


class Snapshot(Hook):

    def __init__(self, into, iteration):
        self.into, self.iteration = into, iteration

    def after_train_iter(self, runner, *args, **kwargs):
        if runner.iter + 1 == self.iteration:
            self.into.append([
                v.clone() for v in runner.model.state_dict().values()])


@pytest.mark.parametrize('accumulate', [1, 4])
def test_a_loss_scale_and_accumulation_are_told(tmp_path, accumulate):
    """6 iterations: 4 and a remainder of 2. The scale grows on the way."""
    weights, scales = [], []
    for kind in (OptimWrapper, LossScale):
        torch.manual_seed(0)
        model = Toy(lambda c: MABN(c, buffer_size=3)).double()
        runner, _ = _runner(
            _folder(tmp_path, kind), [dict(type='BurnInHook', iters=1)],
            model,
            by_epoch=False,
            train_dataloader=dict(
                dataset=DoubleImages(),
                batch_size=4,
                sampler=dict(type='DefaultSampler', shuffle=False)),
            optim_wrapper=kind(
                torch.optim.SGD(model.parameters(), lr=0.05),
                accumulative_counts=accumulate))
        runner.register_hook(Snapshot(weights, 6))
        runner.register_hook(Scales(scales))
        runner.train()
    for a, b in zip(*weights):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=0)
    parts = [1.] * 6 if accumulate == 1 else [0.25] * 4 + [0.5] * 2
    assert scales[:6] == parts
    grown = [s / p / 2**12 for s, p in zip(scales[6:], parts)]
    assert grown == ([1, 1, 2, 2, 4, 4] if accumulate == 1 else [1] * 6)
    assert runner.model.head[1].gradient_scale == 1


class DoubleImages(Images):

    def __getitem__(self, index):
        return dict(inputs=super().__getitem__(index)['inputs'].double())


class Scales(Hook):
    priority = 'LOW'

    def __init__(self, into):
        self.into = into

    def before_train_iter(self, runner, *args, **kwargs):
        self.into.append(float(runner.model.head[1].gradient_scale))


def test_another_window_logs_the_papers(tmp_path):
    model = Toy(lambda c: CBN(c, window_size=2))
    _runner(tmp_path, [dict(type='BurnInHook', epochs=0)], model)[0].train()
    assert re.search(
        r'2 iterations x 4 images = 8 .*window_size=4 .*ceil\(16 / 4',
        read_log(tmp_path))


@pytest.mark.parametrize('settings, message', [
    (dict(), 'exactly one'),
    (dict(epochs=1, iters=1), 'exactly one'),
    (dict(epochs=-1), 'at least 0.*-1'),
    (dict(iters=1.5), 'at least 0.*1.5'),
])
def test_bad_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        BurnInHook(**settings)


@pytest.mark.parametrize('hook, model, extra, message', [
    (dict(epochs=1), Toy(nn.BatchNorm2d), {}, 'no layer that burns in'),
    (dict(epochs=1, prefix='neck'), None, {},
     "prefix='neck' matches no layer that burns in.*: backbone, head"),
    (dict(epochs=1, prefix=['head', 'neck']), None, {},
     "prefix='neck' matches no layer that burns in.*: backbone, head"),
    (dict(epochs=3), None, {}, 'epochs=3 is not shorter.*3 epochs'),
    (dict(epochs=1), None, dict(by_epoch=False), 'epochs=1.*Use iters'),
    (dict(iters=6), None, dict(by_epoch=False), 'iters=6 is not shorter'),
])
def test_what_does_not_fit_is_refused(tmp_path, hook, model, extra, message):
    runner, phases = _runner(tmp_path, [dict(type='BurnInHook', **hook)],
                             model, **extra)
    with pytest.raises(SetupError, match=message):
        runner.train()
    assert not phases.seen


@pytest.mark.parametrize('broadcasts, processes, sync, told', [
    (True, 2, False, True), (False, 2, False, False), (True, 1, False, False),
    (True, 2, True, False)
])
def test_a_wrapper_that_overwrites_buffers_is_told(tmp_path, monkeypatch,
                                                   broadcasts, processes,
                                                   sync, told):
    runner, _ = _runner(tmp_path, [dict(type='BurnInHook', epochs=1)],
                        Toy(lambda c: CBN(c, sync=sync)))
    runner.model.broadcast_buffers = broadcasts  # as torch's DDP
    monkeypatch.setattr(
        'mmdet_smallbn.hooks.norm_hook.get_world_size', lambda: processes)
    runner.train()
    assert ('Set broadcast_buffers=False' in read_log(tmp_path)) == told


@pytest.mark.parametrize('kind', ['torch', 'mmcv'])
def test_converted_norms_are_refused(tmp_path, kind):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(Toy())
    if kind == 'mmcv':  # which is no BatchNorm, and wants processes
        for block in (model.backbone, model.head):
            block[1] = type('SyncBatchNorm', (nn.Identity, ), {})()
    # Without processes mmengine turns SyncBatchNorm back: take its place.
    runner, _ = _runner(tmp_path, [dict(type='BurnInHook', epochs=1)])
    runner.model = model
    with pytest.raises(SetupError, match='but SyncBatchNorm.*sync_bn'):
        runner.train()


class Asleep(Toy):
    """Keeps some of its norms in evaluation, as norm_eval=True does."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = parts

    def train(self, mode=True):
        super().train(mode)
        for part in self.parts:
            getattr(self, part)[1].eval()
        return self


def test_norms_kept_in_evaluation_are_told(tmp_path):
    hook = dict(type='BurnInHook', epochs=1)
    _runner(tmp_path, [hook], Asleep('backbone'))[0].train()
    assert re.search(r'1 norm \(first: backbone.1\) should train, but the '
                     'model keeps them in evaluation.*norm_eval=False',
                     read_log(tmp_path))
    runner, _ = _runner(tmp_path, [hook], Asleep('backbone', 'head'))
    with pytest.raises(SetupError,
                       match=r'2 norms \(first: backbone.1\) should train'):
        runner.train()


def test_frozen_norms_are_not_asleep(tmp_path):
    model = Asleep('backbone')
    model.backbone.requires_grad_(False)
    _runner(tmp_path, [dict(type='BurnInHook', epochs=1)], model)[0].train()
    text = read_log(tmp_path)
    assert 'keeps them in evaluation' not in text
    assert '1 CBN layers: 4 iterations' in text
