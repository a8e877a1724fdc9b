"""A detector under every pair of features, beside the plain training."""
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.small_training import (FEATURES, ITERATIONS, NEUTRAL, name_of,
                                  pairwise, plain, train)

pytestmark = pytest.mark.slow

COMBINATIONS = list(pairwise())
# Remember past iterations, which the processes but the first fill anew.
REMEMBER = ('CBN', 'NaiveCBN', 'MABN')
PLAIN = dict(NEUTRAL, accumulate=1, amp=False, processes=1, norm_eval=False)


def _key(features):
    return tuple(features[name] for name in FEATURES)


def _with_plain(processes):
    """Every training with so many processes, each of them once."""
    trainings = [f for f in COMBINATIONS if f['processes'] == processes]
    return {
        _key(features): features
        for features in (*trainings, *map(plain, trainings))
    }


def _work(rank, data, folder):
    os.environ['LOCAL_RANK'] = str(rank)
    dist.init_process_group(
        'gloo', f'file://{folder}/meeting', rank=rank, world_size=2)
    results = {
        key: train(data, folder / f'run{i}', features)
        for i, (key, features) in enumerate(_with_plain(2).items())
    }
    torch.save(results, folder / f'results{rank}.pth')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def pair(shapes, tmp_path_factory):
    """What the trainings in two processes gave to each."""
    folder = tmp_path_factory.mktemp('two')
    mp.spawn(_work, (shapes, folder), nprocs=2)
    return [
        torch.load(folder / f'results{rank}.pth', weights_only=False)
        for rank in range(2)
    ]


@pytest.fixture(scope='module')
def alone(shapes, tmp_path_factory):
    """Trains in one process, each training once."""
    results = {}

    def run(features):
        key = _key(features)
        if key not in results:
            results[key] = train(shapes, tmp_path_factory.mktemp('one'),
                                 features)
        return results[key]

    return run


def test_every_pair_of_values_occurs():
    names = list(FEATURES)
    for i, a in enumerate(names):
        for b in names[i + 1:]:
            seen = {(f[a], f[b]) for f in COMBINATIONS}
            assert len(seen) == len(FEATURES[a]) * len(FEATURES[b])


@pytest.mark.parametrize('features', COMBINATIONS, ids=name_of)
@pytest.mark.filterwarnings('ignore:.*use_reentrant.*')
def test_it_trains_as_without(features, request):
    if features['processes'] == 2:
        both = request.getfixturevalue('pair')
        result, other = (results[_key(features)] for results in both)
        wanted = both[0][_key(plain(features))]
        for name, weight in result['state'].items():
            if 'running' not in name:
                torch.testing.assert_close(
                    weight, other['state'][name], rtol=0, atol=0)
    else:
        alone = request.getfixturevalue('alone')
        result, wanted = alone(features), alone(plain(features))

    assert len(result['losses']) == result['iterations'] == ITERATIONS
    for state in (result['state'], result['ema'] or {}):
        assert all(v.isfinite().all() for v in state.values())
    assert (result['asleep'] > 0) == features['norm_eval']
    assert (result['ema'] is None) == (features['ema'] == 'none')
    counts = {
        int(value)
        for name, value in result['state'].items()
        if name.endswith('num_batches_tracked')
    }
    assert counts == ({0, ITERATIONS} if features['norm_eval'] else
                      {ITERATIONS})

    compared = ITERATIONS
    if (features['resume'] and features['processes'] == 2
            and features['norm'] in REMEMBER):
        compared = ITERATIONS // 2
    # bfloat16 rounds what differs in float32's last bit to steps of 2**-8.
    close = 0.05 if features['amp'] else 1e-3
    assert result['losses'][:5] == pytest.approx(wanted['losses'][:5], 1e-5)
    assert result['losses'][:compared] == pytest.approx(
        wanted['losses'][:compared], close)


@pytest.mark.parametrize('norm', FEATURES['norm'])
def test_mixed_precision_is_close_to_float32(norm, alone):
    features = dict(PLAIN, norm=norm)
    losses, half = (
        alone(dict(features, amp=amp))['losses'] for amp in (False, True))
    assert losses[-1] < losses[0] and half[-1] < half[0]
    assert sum(half) == pytest.approx(sum(losses), 0.05)
    assert half[0] == pytest.approx(losses[0], 0.01)


@pytest.mark.parametrize('norm', FEATURES['norm'])
def test_a_resumed_training_is_the_same_to_the_last_bit(norm, alone):
    features = dict(PLAIN, norm=norm)
    wanted, found = (
        alone(dict(features, resume=resume)) for resume in (False, True))
    assert found['losses'] == wanted['losses']
    for name, value in wanted['state'].items():
        torch.testing.assert_close(
            found['state'][name], value, rtol=0, atol=0)
