"""Measures of the noise in a norm's statistics."""
import statistics
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .probe import Past, Seen, pooled


class Layer(NamedTuple):
    """Measurements of a norm, as means over its channels.

    Attributes:
        name (str): Name of the norm in the model.
        channels (int): Number of channels, C.
        calls (int): Number of calls in one forward pass.
        values (int): Number of values per channel in a batch, N * H * W.
        units (float): Number of examples in a batch, N: images, or regions in
            a RoI head.
        mean_noise (float): RMS distance between a batch's mean and the mean
            of all batches, in standard deviations.
        var_noise (float): RMS relative distance between a batch's variance
            and the variance of all batches.
        g_noise, psi_noise (float): Fraction of noise in the RMS value of a
            batch's g and Psi, 0 to 1. NaN without a backward pass.
        between (float): Fraction of the variance that is between examples, 0
            to 1. The rest is within the examples.
        effective (float): Number of independent values that contain as much
            information as the batch, ``values / (1 + (values / units - 1) *
            between)``. It is smaller than ``values`` because the values of
            one example are correlated (Kish's design effect).
        disagreement (float): RMS change of the normalised output, in standard
            deviations, when the statistics of all batches replace those of
            the batch.
        agreement (float): Cosine of the gradients of the weight before the
            norm; see :class:`Diagnosis`. NaN if there is no such weight.
    """
    name: str
    channels: int
    calls: int
    values: int
    units: float
    mean_noise: float
    var_noise: float
    g_noise: float
    psi_noise: float
    between: float
    effective: float
    disagreement: float
    agreement: float = float('nan')


def output_change(mean: Tensor, var: Tensor, truth: Tuple[Tensor, Tensor],
                  eps: float = 1e-5) -> Tensor:
    r"""Return the mean square change of an output when statistics change.

    Let x have the given moments. It is normalised once by its own statistics
    and once by those of ``truth``. The expected squared difference is

    .. math::
        (1 - \sigma / \sigma')^2 + ((\mu - \mu') / \sigma')^2.

    Args:
        mean, var (Tensor): :math:`\mu, \sigma^2` of x, shape (..., C).
        truth (tuple[Tensor, Tensor]): :math:`\mu', \sigma'^2`, shape (C,).
        eps (float): Constant added to the variances.

    Returns:
        Tensor: Shape (..., C).
    """
    spread = (truth[1] + eps).sqrt()
    return ((1 - (var + eps).sqrt() / spread).square() +
            ((mean - truth[0]) / spread).square())


def _noise_part(values: Tensor) -> float:
    """Return the fraction of noise in the RMS of values, shape (K, C)."""
    square = values.square().mean(0).sum()
    if len(values) < 2 or square == 0:
        return float('nan')
    return (values.var(0).sum() / square).clamp(max=1).sqrt().item()


def _measure_call(batches: List[Seen]) -> Optional[Dict[str, float]]:
    """Measure one call of a layer; None if that is not possible."""
    mean, var = pooled([seen.moments for seen in batches])
    alive = var > 1e-12  # channels that are not constant
    if len(batches) < 2 or not alive.any():
        return None
    means = torch.stack([seen.moments.mean for seen in batches])[:, alive]
    variances = torch.stack([seen.moments.var for seen in batches])[:, alive]
    mean, var = mean[alive], var[alive]
    examples = torch.cat([seen.examples for seen in batches])[:, alive]
    values = sum(seen.moments.count for seen in batches) / len(batches)
    units = len(examples) / len(batches)
    each = values / units
    # Means of independent values vary, too: by the fraction 1 / each of the
    # variance, which is subtracted.
    between = (examples.var(0) / var).mean().item()
    between = min(max((each * between - 1) / max(each - 1, 1), 0.), 1.)
    found = dict(
        mean_noise=(means.var(0) / var).mean().sqrt().item(),
        var_noise=(variances / var - 1).square().mean().sqrt().item(),
        between=between,
        effective=values / (1 + (each - 1) * between))
    gradients = [seen.gradients[0] for seen in batches if seen.gradients]
    if gradients:
        g, psi = torch.stack(gradients, 1)
        found.update(g_noise=_noise_part(g), psi_noise=_noise_part(psi))
    return found


def measure_layer(name: str, calls: List[List[Seen]]) -> Optional[Layer]:
    """Measure a norm.

    Args:
        name (str): Name of the norm.
        calls (list[list[Seen]]): Batches of each of its calls.

    Returns:
        Layer, optional: The measurements. None if the norm saw only one
        batch, or only constant channels.
    """
    rows = [row for row in map(_measure_call, calls) if row is not None]
    if not rows:
        return None
    batches = [seen for call in calls for seen in call]
    truth = pooled([seen.moments for seen in batches])
    changes = torch.stack([
        output_change(*seen.moments[:2], truth) for seen in batches])

    def mean_of(key: str) -> float:
        values = [row[key] for row in rows if key in row]
        return statistics.mean(values) if values else float('nan')

    return Layer(
        name=name,
        channels=len(truth[0]),
        calls=len(calls),
        values=round(statistics.mean(s.moments.count for s in batches)),
        units=statistics.mean(len(s.examples) for s in batches),
        disagreement=changes.mean().sqrt().item(),
        **{key: mean_of(key) for key in (
            'mean_noise', 'var_noise', 'g_noise', 'psi_noise', 'between',
            'effective')})


def alikeness(batches: List[Seen], images: int) -> float:
    """Return the correlation of the examples of a batch, over all channels.

    Args:
        batches (list[Seen]): Batches in one call of a norm.
        images (int): Number of images in a batch.

    Returns:
        float: 0 to 1. NaN if the examples are not the images, if a batch has
        one image, or if there is only one batch.
    """
    if images < 2 or len(batches) < 2 or len(batches[0].examples) != images:
        return float('nan')
    of_batches = torch.stack([seen.moments.mean for seen in batches]).var(0)
    of_examples = torch.cat([seen.examples for seen in batches]).var(0)
    alive = of_examples > 0
    ratio = (of_batches[alive] / of_examples[alive]).mean().item()
    return min(max((images * ratio - 1) / (images - 1), 0.), 1.)


# Errors by window: with the past moments as they were, and with the past
# moments recomputed with the current weights (None if the convolution before
# the norm is unknown).
WindowErrors = Dict[int, Tuple[float, Optional[float]]]


def window_errors(past: Past, windows: Sequence[int],
                  batches: List[Seen]) -> WindowErrors:
    """Return the errors of a layer's statistics, by window.

    Args:
        past (Past): Moments of the last iterations.
        windows (Sequence[int]): Windows to measure, in iterations.
        batches (list[Seen]): Batches with the current weights. The truth is
            the statistics of all of them. Statistics of a single batch are
            those of BatchNorm, window 1.

    Returns:
        dict: RMS errors of the normalised output by window.
    """
    truth = pooled([seen.moments for seen in batches])

    def error(*moments: Tuple[Tensor, Tensor]) -> float:
        return statistics.mean(
            output_change(*m, truth).mean().item() for m in moments)**0.5

    alone = error(*(seen.moments[:2] for seen in batches))
    followed = past.followed()
    found = {1: (alone, None if followed is None else alone)}
    for window in windows:
        found[window] = (
            error(past.plain(window)), None if followed is None else error(
                pooled(followed[:window])))
    return found


def mean_errors(rows: Sequence[WindowErrors]) -> WindowErrors:
    """Return mean errors over the layers.

    If moments can be recomputed in some layers, the mean is over these layers
    alone.
    """
    rows = [row for row in rows if row[1][1] is not None] or list(rows)

    def mean(values: List[Optional[float]]) -> Optional[float]:
        return None if None in values else statistics.mean(values)

    return {window: tuple(mean([row[window][kind] for row in rows])
                          for kind in (0, 1)) for window in rows[0]
            } if rows else {}
