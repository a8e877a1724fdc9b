import pytest
import torch

from mmdet_smallbn.functional import batch_moments, pool_moments


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('memory_format',
                         [torch.contiguous_format, torch.channels_last])
def test_batch_moments_are_mean_and_biased_variance(dtype, memory_format):
    x = torch.randn(3, 5, 4, 6).to(dtype, memory_format=memory_format) * 3 + 2
    moments = batch_moments(x)
    exact = x.double()
    torch.testing.assert_close(
        moments.mean, exact.mean((0, 2, 3)).to(dtype), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        moments.var,
        exact.var((0, 2, 3), unbiased=False).to(dtype),
        rtol=1e-6,
        atol=1e-6)
    assert moments.count == 3 * 4 * 6
    torch.testing.assert_close(moments.unbiased_var(),
                               exact.var((0, 2, 3)).to(dtype))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_gathered_in_float32(dtype):
    x = (torch.randn(4, 3, 16, 16) * 0.1 + 5).to(dtype)
    moments = batch_moments(x)
    assert moments.mean.dtype == moments.var.dtype == torch.float32
    exact = x.double()
    torch.testing.assert_close(
        moments.var.double(),
        exact.var((0, 2, 3), unbiased=False),
        rtol=1e-3,
        atol=0)


def test_variance_survives_a_large_mean():
    # E[x^2] - E[x]^2 gives 0 or worse here in float32.
    x = torch.randn(4, 3, 32, 32) * 0.1 + 1e3
    exact = x.double().var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(
        batch_moments(x).var.double(), exact, rtol=1e-2, atol=0)


def test_one_value_has_no_unbiased_variance():
    assert batch_moments(torch.ones(1, 2, 1, 1)).unbiased_var() is None


def test_pool_equals_the_moments_of_the_concatenation():
    batches = [torch.randn(2, 4, 3, 5).double() + i for i in range(3)]
    parts = [batch_moments(b) for b in batches]
    mean, var, share = pool_moments(
        torch.stack([p.mean for p in parts]),
        torch.stack([p.var for p in parts]), torch.ones(
            3, 4, dtype=torch.bool))
    joined = batch_moments(torch.cat(batches))
    torch.testing.assert_close(mean, joined.mean)
    torch.testing.assert_close(var, joined.var)
    torch.testing.assert_close(share, torch.full((4, ), 1 / 3).double())


def test_pool_ignores_invalid_entries_even_nan():
    means = torch.tensor([[1., 2.], [float('nan'), 4.]])
    variances = torch.tensor([[1., 1.], [float('inf'), 3.]])
    valid = torch.tensor([[True, True], [False, True]])
    mean, var, share = pool_moments(means, variances, valid)
    torch.testing.assert_close(mean, torch.tensor([1., 3.]))
    torch.testing.assert_close(var, torch.tensor([1., 3.]))
    torch.testing.assert_close(share, torch.tensor([1., 0.5]))


def test_pool_weighs_batches_equally_whatever_their_size():
    # N = 2 and N = 1: the paper's average over iterations, Eq. (9)-(11).
    big, small = torch.randn(2, 3, 4, 4).double(), torch.randn(1, 3, 4, 4)
    parts = [batch_moments(big), batch_moments(small.double())]
    mean, var, _ = pool_moments(
        torch.stack([p.mean for p in parts]),
        torch.stack([p.var for p in parts]), torch.ones(
            2, 3, dtype=torch.bool))
    mu = [big.mean((0, 2, 3)), small.double().mean((0, 2, 3))]
    nu = [(big**2).mean((0, 2, 3)), (small.double()**2).mean((0, 2, 3))]
    torch.testing.assert_close(mean, (mu[0] + mu[1]) / 2)
    torch.testing.assert_close(var, (nu[0] + nu[1]) / 2 - mean**2)
