"""Training in two processes: mmengine's wrapper, its hooks and its Runner."""
import os
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.hooks import Hook, SyncBuffersHook
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from torch import nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh

from mmdet_smallbn import (BGN, BRN, CBN, MABN, BurnInHook, CmBN, GhostBN,
                           NaiveCBN)
from tests.device import device, device_type, seeded
from tests.toy import Toy, toy_runner

NORMS = {
    'CBN': partial(CBN, window_size=3),
    'NaiveCBN': partial(NaiveCBN, window_size=3),
    'MABN': partial(MABN, buffer_size=3, momentum=0.2),
    'CmBN': CmBN,
    'BRN': partial(BRN, r_max=1.1, d_max=0.2),
    'BGN': partial(BGN, num_groups=2),
    'GhostBN': partial(GhostBN, ghost_size=2)
}
REMEMBER = ['CBN', 'NaiveCBN', 'MABN']
BURN_IN = [*REMEMBER, 'BRN']

# Arguments of the wrapper; examples of the processes in each step; steps
# whose gradients are gathered.
SETUPS = {
    'plain': dict(),
    'unused parameter': dict(wrapper=dict(find_unused_parameters=True)),
    'static graph': dict(wrapper=dict(static_graph=True)),
    'buffers of the first': dict(wrapper=dict(broadcast_buffers=True)),
    'a bucket a parameter': dict(wrapper=dict(bucket_cap_mb=1e-5)),
    'accumulation': dict(accumulate=2),
    'Runner': dict(accumulate=2),
    'empty part': dict(parts=[(2, 2), (2, 0), (2, 2)]),
    'empty part at first': dict(parts=[(2, 0), (2, 2), (2, 0)]),
    'all parts empty': dict(parts=[(2, 2), (0, 0), (2, 2), (2, 2)]),
    'last partial batch': dict(parts=[(2, 2), (2, 2), (2, 1)]),
}
if hasattr(fsdp, 'fully_shard'):
    SETUPS['shards of blocks'] = dict()
SYNC_HOOKS = {
    'SyncBuffersHook': SyncBuffersHook,
    'SyncNormHook': pytest.importorskip('mmdet.engine.hooks').SyncNormHook
}
LR = 0.1
CASES = [(norm, sync) for norm in NORMS for sync in (False, True)]

every_case = pytest.mark.parametrize('norm, sync', CASES)
every_setup = pytest.mark.parametrize('setup', SETUPS)


class Parts(Toy):
    """The toy model, whose loss is 0 where there are no examples."""

    def forward(self, inputs, mode='tensor'):
        out = self.head(self.backbone(inputs))
        return dict(loss=out.exp().sum() / max(out.numel(), 1))


def _model(norm, sync, setup='plain'):
    torch.manual_seed(0)
    model = Parts(partial(NORMS[norm], sync=sync))
    if setup == 'unused parameter':
        model.unused = nn.Linear(2, 2)
    return model.double()


def _norms(model):
    return model.backbone[1], model.head[1]


def _examples(rank, step, n=2):
    generator = seeded(2 * step + rank)
    x = torch.randn((n, 3, 8, 8), generator=generator, dtype=torch.float64)
    return (rank + 1) * x + rank


def _parts(setup):
    return SETUPS[setup].get('parts', [(2, 2)] * 6)


def _copies(named):
    return {
        name: getattr(value, 'full_tensor', value.clone)().detach()
        for name, value in named
    }


def _states(model, names=None):
    return [norm.export_states(names) for norm in _norms(model)]


def _record(model, losses=()):
    return dict(
        losses=[loss.detach() for loss in losses],
        weights=_copies(model.named_parameters()),
        buffers=_copies(model.named_buffers()),
        states=_states(model))


def _sharded(model):
    mesh = init_device_mesh(device_type(), (2, ))
    for part in (model.backbone, model.head, model):
        fsdp.fully_shard(part, mesh=mesh)
    return model


def _step_by_step(rank, norm, sync, setup='plain'):
    """Train, and give the wrapped model, too."""
    settings = SETUPS[setup]
    model = _model(norm, sync, setup)
    if setup == 'shards of blocks':
        wrapped = _sharded(model)
    else:
        wrapper = dict(broadcast_buffers=False)
        wrapper.update(settings.get('wrapper', {}))
        wrapped = MMDistributedDataParallel(model, **wrapper)
    optimizer = OptimWrapper(
        torch.optim.SGD(model.parameters(), lr=LR),
        accumulative_counts=settings.get('accumulate', 1))
    losses = []
    for step, part in enumerate(_parts(setup)):
        data = dict(inputs=_examples(rank, step, part[rank]))
        losses.append(wrapped.train_step(data, optimizer)['loss'])
    return _record(model, losses), wrapped


def _by_hand(rank, norm, sync, setup):
    """The same with gradients that are averaged here."""
    accumulate = SETUPS[setup].get('accumulate', 1)
    model = _model(norm, sync, setup)
    losses = []
    for step, part in enumerate(_parts(setup)):
        if setup == 'Runner':
            for layer in _norms(model):
                layer.iteration = step
                layer.burning_in = layer.burns_in and step < 2
                layer.gradient_scale = 1 / accumulate
            step %= 2  # of an epoch
        if setup == 'buffers of the first':
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        loss = model(_examples(rank, step, part[rank]))['loss']
        (loss / accumulate).backward()
        losses.append(loss)
        if len(losses) % accumulate:
            continue
        for p in model.parameters():
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(grad)
            p.data -= LR * grad / dist.get_world_size()
            p.grad = None
    return _record(model, losses)


class Recorder(Hook):
    """The states that a training begins with, and its losses."""
    priority = 'LOW'

    def __init__(self):
        self.states, self.losses = [], []

    def before_train(self, runner):
        model = runner.model.module
        names = {p: name for name, p in model.named_parameters()}
        self.states = _states(model, names)

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        self.losses.append(outputs['loss'])


def _run(norm, sync, folder, **kwargs):
    """3 epochs of 2 iterations, one update each."""
    recorder = Recorder()
    hooks = [dict(type='EMAHook', momentum=0.1), recorder]
    if norm in BURN_IN:
        hooks.append(dict(type='BurnInHook', iters=2))
    # Every second image is the first process's.
    images = [
        dict(inputs=_examples(i % 2, i // 4)[i // 2 % 2]) for i in range(8)
    ]
    runner = toy_runner(
        folder,
        hooks,
        _model(norm, sync),
        train_dataloader=dict(
            dataset=images,
            batch_size=2,
            collate_fn=dict(type='default_collate'),
            sampler=dict(type='DefaultSampler', shuffle=False)),
        optim_wrapper=dict(
            optimizer=dict(type='SGD', lr=LR), accumulative_counts=2),
        launcher='pytorch',
        cfg=dict(
            model_wrapper_cfg=dict(broadcast_buffers=False, device_ids=None)),
        **kwargs)
    runner.train()
    ema, = (h for h in runner.hooks if type(h).__name__ == 'EMAHook')
    return dict(
        _record(runner.model.module, recorder.losses),
        began_with=recorder.states,
        average=_copies(ema.ema_model.module.named_parameters()))


def _run_and_resume(norm, sync, folder):
    folder = folder / f'{norm}, {sync}'
    folder.mkdir(exist_ok=True)
    whole = _run(norm, sync, folder)
    dist.barrier()  # the first process has saved
    path = folder / 'epoch_2.pth'
    saved = torch.load(path, weights_only=False).get('smallbn_states')
    resumed = _run(norm, sync, folder, resume=True, load_from=str(path))
    return dict(whole=whole, resumed=resumed, saved=saved)


def _before_and_after(rank, norm, sync, hook):
    """What a hook makes of a model, beside ours, until after validation."""
    before, wrapped = _step_by_step(rank, norm, sync)
    runner = SimpleNamespace(model=wrapped)
    hooks = [SYNC_HOOKS[hook]()]
    if norm in BURN_IN:
        hooks.insert(0, BurnInHook(iters=0))
        hooks[0].find_layers(wrapped.module)
    for event in ('after_train_epoch', 'before_val_epoch', 'after_val_epoch'):
        for hook in hooks:
            getattr(hook, event)(runner)
    return before, _record(wrapped.module)


def _results_of(rank, norm, sync, folder):
    runs = _run_and_resume(norm, sync, folder)
    yield 'runs', runs
    for setup in SETUPS:
        yield (setup, 'by hand'), _by_hand(rank, norm, sync, setup)
        yield setup, (
            runs['whole'] if setup == 'Runner' else _step_by_step(
                rank, norm, sync, setup)[0])
    for hook in SYNC_HOOKS:
        yield hook, _before_and_after(rank, norm, sync, hook)


def _work(rank, folder, device):
    torch.set_default_device(device)
    os.environ['LOCAL_RANK'] = str(rank)
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo',
        init_method=f'file://{folder}/store',
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60))
    results, key = {}, None
    for case in CASES:
        try:
            for key, result in _results_of(rank, *case, folder):
                results[(*case, key)] = result
        except Exception as error:
            raise RuntimeError(f'in {case}, after {key!r}') from error
    torch.save(results, folder / f'{rank}.pth')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp('processes')
    mp.spawn(_work, (folder, device()), nprocs=2)
    return [torch.load(folder / f'{rank}.pth') for rank in range(2)]


def _flat(values):
    """The numbers and tensors in nested dicts and lists."""
    if isinstance(values, (dict, list, tuple)):
        inner = values.values() if isinstance(values, dict) else values
        return [leaf for value in inner for leaf in _flat(value)]
    numbers = isinstance(values, (int, float, torch.Tensor))
    return [torch.as_tensor(values)] if numbers else []


def _same(*records):
    """Whether they are, to the last bit."""
    first, second = map(_flat, records)
    return len(first) == len(second) and all(map(torch.equal, first, second))


def _finite(values):
    return all(leaf.isfinite().all() for leaf in _flat(values))


def _of_both(ranks, key, what):
    return [results[key][what] for results in ranks]


@every_case
@every_setup
def test_trains_as_with_gradients_averaged_by_hand(ranks, setup, norm, sync):
    """Losses, weights, buffers, and what is gathered for later."""
    begin = _model(norm, sync, setup).head[0].weight
    for results in ranks:
        found = results[norm, sync, setup]
        wanted = results[norm, sync, (setup, 'by hand')]
        assert len(found['losses']) == len(_parts(setup))
        for what, values in wanted.items():
            torch.testing.assert_close(
                _flat(found[what]),
                _flat(values),
                rtol=1e-9,
                atol=1e-12,
                equal_nan=what == 'states')
        change = found['weights']['head.0.weight'] - begin
        assert change.abs().max() > 1e-3


@every_case
@every_setup
def test_processes_keep_in_step(ranks, setup, norm, sync):
    """One model to the last bit, and everything finite.

    But for what a window holds of an iteration that is empty in all.
    """
    key = norm, sync, setup
    assert _same(*_of_both(ranks, key, 'weights'))
    if setup == 'Runner':
        first, second = _of_both(ranks, key, 'average')
        assert _same(first, second)
        assert not _same(first, ranks[0][key]['weights'])
    for results in ranks:
        for what, values in results[key].items():
            if (setup, what) != ('all parts empty', 'states'):
                assert _finite(values)


@every_case
@pytest.mark.parametrize('setup', ['plain', 'buffers of the first'])
def test_each_process_has_a_past_of_its_own(ranks, setup, norm, sync):
    """Of a synchronised CBN it is a part; moments alone are the whole's."""
    states = _of_both(ranks, (norm, sync, setup), 'states')
    for of_norms in states:
        filled = [bool(_flat(state)) for state in of_norms]
        assert filled == [norm in REMEMBER] * 2
    one = norm not in REMEMBER or (sync and norm in ('MABN', 'NaiveCBN'))
    assert _same(*states) == one
    assert _same(*_of_both(ranks, (norm, sync, setup), 'buffers')) == sync


@every_case
@pytest.mark.parametrize('hook', SYNC_HOOKS)
def test_hooks_average_the_running_statistics(ranks, hook, norm, sync):
    befores, afters = zip(*(results[norm, sync, hook] for results in ranks))
    first, second = (before['buffers'] for before in befores)
    for name, value in first.items():
        mean = (value + second[name]) / 2
        if name.endswith('num_batches_tracked'):
            mean = torch.tensor(6)
        for after in afters:
            # One of the hooks averages in float32.
            torch.testing.assert_close(
                after['buffers'][name], mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('hook', ['SyncBuffersHook', 'SyncNormHook'])
@pytest.mark.parametrize('sync', [False, True])
@pytest.mark.parametrize('norm', REMEMBER)
def test_hooks_leave_the_past_alone(ranks, hook, norm, sync):
    for results in ranks:
        before, after = results[norm, sync, hook]
        assert _same(before['states'], after['states'])


@every_case
def test_a_resume_takes_up_the_past_of_the_main_process(ranks, norm, sync):
    """Where the past is one for each process. That of others fills anew."""
    kept = norm in REMEMBER and not sync
    for rank, results in enumerate(ranks):
        whole, resumed, saved = results[norm, sync, 'runs'].values()
        if norm in BURN_IN:
            assert list(saved) == (['backbone.1', 'head.1'] if kept else [])
        else:
            assert saved is None
        began_with = resumed['began_with']
        if kept and rank == 0:
            assert _same(began_with, list(saved.values())) and began_with[0]
        else:
            assert began_with == [[], []]
        if norm in ('CBN', 'NaiveCBN'):
            # Of a window of 3; others have seen the two after the resume.
            turns = 4 if kept and rank == 0 else 2
            assert [s['state']['turn'] + 1
                    for s, in resumed['states']] == [turns] * 2
        assert _finite(resumed)
    runs = [results[norm, sync, 'runs'] for results in ranks]
    assert _same(*(run['resumed']['weights'] for run in runs))
    assert _same(*(run['resumed']['average'] for run in runs))
    # Before the next update the main process goes on as if never stopped.
    # MABN's forward pass goes on in any case: r takes out what it averages.
    whole, resumed = runs[0]['whole'], runs[0]['resumed']
    same = _same(whole['losses'][4:], resumed['losses'])
    if norm == 'MABN' and not kept:
        torch.testing.assert_close(whole['losses'][4:], resumed['losses'])
    else:
        assert same == (kept or norm not in REMEMBER)
