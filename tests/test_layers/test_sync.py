"""``sync=True`` in two processes equals one process on the joined batch."""
import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from mmdet_smallbn import (BGN, BRN, CBN, MABN, CmBN, GhostBN, NaiveCBN,
                           calibrate_group_norms, functional)
from mmdet_smallbn.functional.sync import ExampleGroups
from mmdet_smallbn.layers import TrainingLoop, norms_of
from tests.device import device, device_type, seeded
from tests.reference import relative_error

# Examples of each process in each step: unequal, and none at all.
PARTS = [(2, 1), (1, 3), (0, 2), (2, 2), (3, 0), (1, 1), (1, 4), (2, 3)]
CASES = {
    'CBN, window 1': (CBN, dict(window_size=1), False),
    # All positions: the parts of a sample are another sample.
    'CBN': (CBN, dict(window_size=4, derivative_positions=None), False),
    'CBN, convolution with a bias':
    (CBN, dict(window_size=3, derivative_positions=None), True),
    'CBN, released': (CBN,
                      dict(
                          window_size=4,
                          gradient='released',
                          derivative_positions=None), False),
    'NaiveCBN': (NaiveCBN, dict(window_size=3), True),
    'CmBN': (CmBN, {}, False),
    'BRN': (BRN, dict(r_max=1.1, d_max=0.2, momentum=0.2), False),
    'BRN without affine': (BRN, dict(affine=False), False),
    'MABN': (MABN, dict(buffer_size=3, momentum=0.2), False),
    'BGN': (BGN, dict(num_groups=2), False),
    'BGN, groups across processes': (BGN, dict(
        num_groups=4, examples_per_group=3), False),
    'GhostBN': (GhostBN, dict(ghost_size=2), False),
}


GROUPED = [case for case in CASES if case.startswith(('BGN', 'GhostBN'))]


def _model(case):
    cls, settings, bias = CASES[case]
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, padding=1, bias=bias)
    norm = cls(8, sync=True, **settings)
    for p in norm.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    return nn.Sequential(conv, norm).double()


def _batches():
    generator = seeded(1)
    for step, parts in enumerate(PARTS):
        shape = (sum(parts), 3, 5 + step % 2, 4)
        x = torch.randn(shape, generator=generator, dtype=torch.float64) + 1
        grad = torch.randn((shape[0], 8, *shape[2:]),
                           generator=generator,
                           dtype=torch.float64)
        yield parts, x, grad


def _train(case, rank=None):
    """One record a step, of this process's part of the batches."""
    model = _model(case)
    records = []
    for index, (parts, x, grad) in enumerate(_batches()):
        if rank is not None:
            x, grad = x.split(parts)[rank], grad.split(parts)[rank]
        # Two parts a step, for CmBN.
        model[1].training_step.optimizer_steps = index // 2
        x = x.clone().requires_grad_()
        out = model(x)
        out.backward(grad)
        with torch.no_grad():
            for p in model.parameters():
                if rank is not None:
                    dist.all_reduce(p.grad)
                p -= 0.05 * p.grad
                p.grad = None
        records.append(
            dict(
                out=out.detach(),
                dx=x.grad,
                state=copy.deepcopy(model.state_dict())))
    return records


def _bfloat16():
    """Features whose mean is large against their deviation."""
    generator = seeded(2)
    return (torch.randn((3, 8, 6, 6), generator=generator) + 20).bfloat16()


def _in_autocast(case, x):
    cls, settings, _ = CASES[case]
    norm = cls(8, sync=True, **settings)
    with torch.autocast(device_type(), torch.bfloat16):
        return norm(x)


def _calibrate(x):
    norm = nn.GroupNorm(2, 8)
    with calibrate_group_norms(norm):
        for example in x.split(1):
            norm(example)
    return norm.running_mean, norm.running_var


def _refusal(x):
    try:
        GhostBN(8, sync=True, ghost_size=2)(x)
    except ValueError as error:
        return str(error)


def _many_beside_few(rank, prepared):
    """Means of a head's outputs; one process samples, the other takes all."""
    torch.manual_seed(0)
    norm = dict(window_size=3, sync=True)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), CBN(4, **norm), nn.Conv2d(4, 6, 2, 2),
        CBN(6, **norm)).double()
    loop = TrainingLoop(norms_of(model)) if prepared else None
    generator = seeded(rank)
    means = []
    for iteration in range(5):
        shape = ((100, 5)[rank], 3, 4, 4)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        if prepared:
            loop.begin(iteration)
        out = model(x)
        out.pow(3).mean().backward()
        if prepared:
            loop.end()
        means.append(out.detach().mean((0, 2, 3)))
    return torch.stack(means)


def _work(rank, folder, device):
    torch.set_default_device(device)
    dist.init_process_group(
        'gloo',
        init_method=f'file://{folder}/store',
        rank=rank,
        world_size=2)
    torch.set_num_threads(1)
    results = {case: _train(case, rank) for case in CASES}
    x = _bfloat16()
    for case in GROUPED:
        results[case, 'bfloat16'] = _in_autocast(case, x.split((2, 1))[rank])
    results['calibrated'] = _calibrate(x.float().split((3, 0))[rank])
    results['calibrated, unequal'] = _calibrate(
        x.float().split((1, 2))[rank])
    results['one value'] = _refusal(torch.randn((2, 1)[rank], 8, 1, 1))
    for prepared in (False, True):
        results['many beside few', prepared] = _many_beside_few(rank, prepared)
    torch.save(results, folder / f'{rank}.pth')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sync')
    mp.spawn(_work, (folder, device()), nprocs=2)
    return [torch.load(folder / f'{rank}.pth') for rank in range(2)]


@pytest.mark.parametrize('case', CASES)
def test_equals_one_process_on_the_joined_batch(ranks, case):
    """Outputs, input gradients, parameters and statistics, step by step."""
    for step, expected in enumerate(_train(case)):
        parts = [results[case][step] for results in ranks]
        for key in ('out', 'dx'):
            joined = torch.cat([part[key] for part in parts])
            assert relative_error(joined, expected[key]) < 1e-9, (step, key)
        for part in parts:
            for name, value in part['state'].items():
                assert relative_error(
                    value.double(),
                    expected['state'][name].double()) < 1e-9, (step, name)


def test_what_is_prepared_does_not_depend_on_a_processs_own_positions(ranks):
    """Collectives are the same in all, whoever has how many regions."""
    for results in ranks:
        torch.testing.assert_close(
            *(results['many beside few', prepared]
              for prepared in (False, True)))


@pytest.mark.parametrize('case', GROUPED)
def test_statistics_of_groups_are_in_float32_under_autocast(ranks, case):
    joined = torch.cat([results[case, 'bfloat16'] for results in ranks])
    assert joined.dtype == torch.bfloat16
    expected = _in_autocast(case, _bfloat16())
    torch.testing.assert_close(joined, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize('kind', ['calibrated', 'calibrated, unequal'])
def test_group_norms_are_calibrated_on_all_processes_images(ranks, kind):
    expected = _calibrate(_bfloat16().float())
    for results in ranks:
        for found, wanted in zip(results[kind], expected):
            torch.testing.assert_close(found, wanted)


def test_one_value_is_refused_by_all(ranks):
    for results in ranks:
        assert 'one value per channel' in results['one value']


class _Simulated:
    """Processes whose sums are known after each has said its part."""

    def __init__(self):
        self.said, self.total = [], None

    def sum(self, part):
        self.said.append(part)
        return part if self.total is None else self.total


@pytest.mark.parametrize('size', [1, 2, 3, 5, 20])
@pytest.mark.parametrize('parts', [
    [(2, 6), (1, 6)],
    [(0, 6), (3, 6)],
    [(3, 6), (0, 6), (4, 6)],
    [(1, 4), (1, 6), (1, 2), (5, 3)],
    [(4, 6), (4, 6)],
    [(0, 1), (0, 1)],
])
def test_groups_of_examples_across_any_processes(parts, size):
    """Against a loop over all examples, each with its number of values."""
    total = sum(n for n, _ in parts)
    values = torch.randn(total, 4).double()
    counts = [v for n, v in parts for _ in range(n)]
    processes = _Simulated()
    chunks = values.split([n for n, _ in parts])
    groups = [
        ExampleGroups(processes, parts, rank, size)
        for rank in range(len(parts))
    ]
    for own, chunk in zip(groups, chunks):
        own.average(chunk, 2)
    assert len(processes.said) in (0, len(parts))
    processes.total = sum(processes.said)
    found = torch.cat(
        [own.average(chunk, 2) for own, chunk in zip(groups, chunks)])
    for n in range(total):
        group = range(n // size * size, min(n // size * size + size, total))
        weights = torch.tensor([counts[i] for i in group]).double()
        rows = values[group.start:group.stop].view(-1, 2, 2).mean(2)
        wanted = (rows * weights[:, None]).sum(0) / weights.sum()
        torch.testing.assert_close(found[n], wanted.repeat_interleave(2))
    if total:
        last = range((total - 1) // size * size, total)
        assert groups[0].smallest == sum(counts[i] for i in last)


def test_alone_it_is_the_same_layer():
    assert functional.Processes.current() is None
    layers = [CBN(4, sync=sync).double() for sync in (True, False)]
    conv = nn.Conv2d(3, 4, 1).double()
    for _ in range(3):
        y = conv(torch.randn(2, 3, 4, 4).double())
        torch.testing.assert_close(layers[0](y), layers[1](y), rtol=0, atol=0)
    assert 'sync=True' in repr(layers[0]) and 'sync' not in repr(layers[1])


class _Twins(functional.Processes):
    """Two processes that have the same."""

    @classmethod
    def current(cls):
        return cls()

    @staticmethod
    def _gather(part):
        return torch.stack([part, part])

    def sum(self, values):
        return 2 * values


@pytest.mark.parametrize('gradient', ['whole', 'released'])
def test_a_sample_of_twins_is_that_of_one(gradient, monkeypatch):
    """Two processes with the same batch: as alone, from 32 positions."""
    torch.manual_seed(0)
    models = [
        nn.Sequential(
            nn.Conv2d(3, 8, 3), CBN(8, gradient=gradient, sync=sync)).double()
        for sync in (False, True)
    ]
    models[1].load_state_dict(models[0].state_dict())
    for _ in range(6):
        x = torch.randn(2, 3, 9, 9).double()
        results = []
        for model, processes in zip(models, (functional.Processes, _Twins)):
            monkeypatch.setattr('mmdet_smallbn.layers.base.Processes',
                                processes)
            model.zero_grad()
            out = model(x)
            out.pow(3).sum().backward()
            results.append([out, *(p.grad.clone()
                                   for p in model.parameters())])
            with torch.no_grad():
                for p in model.parameters():
                    p -= 1e-4 * p.grad
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize('cls', [BRN, CBN, NaiveCBN, MABN])
def test_what_is_empty_everywhere_leaves_the_running_statistics(
        cls, monkeypatch):
    monkeypatch.setattr('mmdet_smallbn.layers.base.Processes', _Twins)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), cls(8, sync=True)).double()
    model(torch.randn(2, 3, 5, 5).double()).sum().backward()
    before = copy.deepcopy(model[1].state_dict())
    model.zero_grad()
    model(torch.randn(0, 3, 5, 5).double()).sum().backward()
    for name in ('running_mean', 'running_var'):
        torch.testing.assert_close(
            getattr(model[1], name), before[name], rtol=0, atol=0)
    assert all((p.grad == 0).all() for p in model.parameters())
    model(torch.randn(2, 3, 5, 5).double()).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
