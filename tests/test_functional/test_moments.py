import pytest
import torch

from mmdet_smallbn.functional import (average_groups, batch_moments,
                                      example_moments, mix_moments,
                                      pool_moments)


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
    assert batch_moments(torch.ones(1, 2, 1, 1)).unbiased_var().isnan().all()


def test_pool_equals_the_moments_of_the_concatenation():
    batches = [torch.randn(2, 4, 3, 5).double() + i for i in range(3)]
    parts = [batch_moments(b) for b in batches]
    mean, var = pool_moments(
        torch.stack([p.mean for p in parts]),
        torch.stack([p.var for p in parts]),
        torch.ones(3, 1).double())
    joined = batch_moments(torch.cat(batches))
    torch.testing.assert_close(mean, joined.mean)
    torch.testing.assert_close(var, joined.var)


def test_pool_by_counts_equals_the_concatenation_of_unequal_batches():
    batches = [torch.randn(n, 4, 3, 5).double() + n for n in (1, 4, 2)]
    parts = [batch_moments(b) for b in batches]
    mean, var = pool_moments(
        torch.stack([p.mean for p in parts]),
        torch.stack([p.var for p in parts]),
        torch.tensor([[p.count] for p in parts]))
    joined = batch_moments(torch.cat(batches))
    torch.testing.assert_close(mean, joined.mean)
    torch.testing.assert_close(var, joined.var)


def test_pool_ignores_what_has_no_weight_even_nan():
    means = torch.tensor([[1., 2.], [float('nan'), 4.]])
    variances = torch.tensor([[1., 1.], [float('inf'), 3.]])
    weights = torch.tensor([[1., 2.], [0., 2.]])
    mean, var = pool_moments(means, variances, weights)
    torch.testing.assert_close(mean, torch.tensor([1., 3.]))
    torch.testing.assert_close(var, torch.tensor([1., 3.]))


def test_a_mixture_of_two_is_pooling_with_weights():
    means, variances = torch.randn(2, 4).double(), torch.rand(2, 4).double()
    for weight in (0., 0.3, 1.):
        weights = torch.tensor([[1 - weight], [weight]]).double()
        both = torch.stack([means, variances], 1)
        found = mix_moments(*both, weight)
        for a, b in zip(found, pool_moments(means, variances, weights)):
            torch.testing.assert_close(a, b)


def test_example_moments_are_those_of_each_example():
    x = torch.randn(3, 5, 4, 6).double()
    moments = example_moments(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(moments.mean, x.mean((2, 3)))
    torch.testing.assert_close(moments.var, x.var((2, 3), unbiased=False))
    assert moments.count == 24
    batch, expected = moments.over_examples(), batch_moments(x)
    for found, wanted in zip(batch, expected):
        torch.testing.assert_close(found, wanted)


def test_an_empty_batch_has_zeros():
    for x in (torch.ones(0, 3, 2, 2), torch.ones(2, 3, 0, 2)):
        for moments in (batch_moments(x), example_moments(x).over_examples()):
            assert moments.count == 0 and moments.mean.shape == (3, )
            assert (moments.mean == 0).all() and (moments.var == 0).all()


@pytest.mark.parametrize('examples', [1, 2, 3, 5, 8])
@pytest.mark.parametrize('num_groups', [1, 2, 6])
def test_group_averages(examples, num_groups):
    """By loops, with a last group that may be smaller."""
    values = torch.randn(5, 6).double()
    found = average_groups(values, num_groups, examples)
    size = 6 // num_groups
    for n in range(5):
        for c in range(6):
            first, left = n // examples * examples, c // size * size
            group = values[first:first + examples, left:left + size]
            torch.testing.assert_close(found[n, c], group.mean())


def test_pool_with_equal_weights_is_the_papers_average():
    # N = 2 and N = 1: the paper's average over iterations, Eq. (9)-(11).
    big, small = torch.randn(2, 3, 4, 4).double(), torch.randn(1, 3, 4, 4)
    parts = [batch_moments(big), batch_moments(small.double())]
    mean, var = pool_moments(
        torch.stack([p.mean for p in parts]),
        torch.stack([p.var for p in parts]),
        torch.ones(2, 1).double())
    mu = [big.mean((0, 2, 3)), small.double().mean((0, 2, 3))]
    nu = [(big**2).mean((0, 2, 3)), (small.double()**2).mean((0, 2, 3))]
    torch.testing.assert_close(mean, (mu[0] + mu[1]) / 2)
    torch.testing.assert_close(var, (nu[0] + nu[1]) / 2 - mean**2)
