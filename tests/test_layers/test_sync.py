"""``sync=True`` in two processes equals one process on the joined batch."""
import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from mmdet_smallbn import (BRN, CBN, MABN, BatchGroupNorm, GhostBN, NaiveCBN,
                           functional)
from tests.reference import relative_error

# Examples of each process in each step: unequal, and none at all.
PARTS = [(2, 1), (1, 3), (0, 2), (2, 2), (3, 0), (1, 1), (1, 4), (2, 3)]
CASES = {
    'CBN, window 1': (CBN, dict(window_size=1), False),
    'CBN': (CBN, dict(window_size=4), False),
    'CBN, convolution with a bias': (CBN, dict(window_size=3), True),
    'NaiveCBN': (NaiveCBN, dict(window_size=3), True),
    'BRN': (BRN, dict(r_max=1.1, d_max=0.2, momentum=0.2), False),
    'BRN without affine': (BRN, dict(affine=False), False),
    'MABN': (MABN, dict(buffer_size=3, momentum=0.2), False),
    'BGN': (BatchGroupNorm, dict(num_groups=2), False),
    'BGN, groups across processes': (BatchGroupNorm,
                                     dict(num_groups=4,
                                          examples_per_group=3), False),
    'GhostBN': (GhostBN, dict(ghost_size=2), False),
}


def _model(case):
    cls, settings, bias = CASES[case]
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, padding=1, bias=bias)
    norm = cls(8, sync=True, **settings)
    for p in norm.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    return nn.Sequential(conv, norm).double()


def _batches():
    generator = torch.Generator().manual_seed(1)
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
    for parts, x, grad in _batches():
        if rank is not None:
            x, grad = x.split(parts)[rank], grad.split(parts)[rank]
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


def _work(rank, folder):
    dist.init_process_group(
        'gloo',
        init_method=f'file://{folder}/store',
        rank=rank,
        world_size=2)
    torch.set_num_threads(1)
    results = {case: _train(case, rank) for case in CASES}
    torch.save(results, folder / f'{rank}.pth')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sync')
    mp.spawn(_work, (folder, ), nprocs=2)
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


def test_alone_it_is_the_same_layer():
    assert functional.Processes.current() is None
    layers = [CBN(4, sync=sync).double() for sync in (True, False)]
    conv = nn.Conv2d(3, 4, 1).double()
    for _ in range(3):
        y = conv(torch.randn(2, 3, 4, 4).double())
        torch.testing.assert_close(layers[0](y), layers[1](y), rtol=0, atol=0)
    assert 'sync=True' in repr(layers[0]) and 'sync' not in repr(layers[1])
