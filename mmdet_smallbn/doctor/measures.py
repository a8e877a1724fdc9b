"""Numbers about the statistics of a norm."""
import statistics
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .probe import Past, Seen, pooled


class Layer(NamedTuple):
    """A norm, in numbers. All are means over its channels.

    Attributes:
        name (str): The norm's name in the model.
        channels (int): C.
        calls (int): Calls in one forward pass.
        values (int): Values a channel in a batch, N * H * W.
        units (float): Examples in a batch, N: images, or regions in a RoI
            head.
        mean_noise (float): RMS distance of a batch's mean from that of all
            batches, in deviations.
        var_noise (float): RMS relative distance of a batch's variance.
        g_noise, psi_noise (float): The noise's part in the RMS value of a
            batch's g and Psi, 0 to 1. NaN without a backward pass.
        between (float): Part of the variance that is between examples, 0 to
            1; the rest is within them.
        effective (float): How many independent values the batch is worth,
            ``values / (1 + (values / units - 1) * between)``: values of one
            example are alike (Kish's design effect).
        disagreement (float): RMS change of the layer's output, in its
            deviations, when the statistics of all batches take the place of
            the batch's.
        agreement (float): Cosine of the gradients of the weight before the
            norm; see :class:`Diagnosis`. NaN if there is none.
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
    r"""Mean square change of a normalised output when statistics change.

    For x of the given moments, normalised by its own statistics and by those
    of ``truth``, the expectation of the squared difference is

    .. math::
        (1 - \sigma / \sigma')^2 + ((\mu - \mu') / \sigma')^2.

    Args:
        mean, var (Tensor): Shape (..., C).
        truth (tuple[Tensor, Tensor]): :math:`\mu', \sigma'^2`, shape (C,).
        eps (float): Added to the variances.

    Returns:
        Tensor: Shape (..., C).
    """
    spread = (truth[1] + eps).sqrt()
    return ((1 - (var + eps).sqrt() / spread).square() +
            ((mean - truth[0]) / spread).square())


def _noise_part(values: Tensor) -> float:
    """Part of the noise in the RMS of values of shape (K, C)."""
    square = values.square().mean(0).sum()
    if len(values) < 2 or square == 0:
        return float('nan')
    return (values.var(0).sum() / square).clamp(max=1).sqrt().item()


def _of_call(batches: List[Seen]) -> Optional[Dict[str, float]]:
    """The numbers that each call of a layer has by itself."""
    mean, var = pooled([seen.moments for seen in batches])
    alive = var > 1e-12  # channels that are more than a constant
    if len(batches) < 2 or not alive.any():
        return None
    means = torch.stack([seen.moments.mean for seen in batches])[:, alive]
    variances = torch.stack([seen.moments.var for seen in batches])[:, alive]
    mean, var = mean[alive], var[alive]
    examples = torch.cat([seen.examples for seen in batches])[:, alive]
    values = sum(seen.moments.count for seen in batches) / len(batches)
    units = len(examples) / len(batches)
    each = values / units
    # The means of independent values differ, too, by 1 / each of them.
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
    """A norm's numbers; None of one batch, or constants.

    Args:
        name (str): Of the norm.
        calls (list[list[Seen]]): The batches that each of its calls saw.
    """
    rows = [row for row in map(_of_call, calls) if row is not None]
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
    """Correlation of the examples of a batch, over all channels.

    Args:
        batches (list[Seen]): At one place.
        images (int): Of a batch. NaN if that is not the number of examples.
    """
    if images < 2 or len(batches) < 2 or len(batches[0].examples) != images:
        return float('nan')
    of_batches = torch.stack([seen.moments.mean for seen in batches]).var(0)
    of_examples = torch.cat([seen.examples for seen in batches]).var(0)
    alive = of_examples > 0
    ratio = (of_batches[alive] / of_examples[alive]).mean().item()
    return min(max((images * ratio - 1) / (images - 1), 0.), 1.)


# By window: with the moments as they were, and brought to today's weights
# (None if no convolution is known).
WindowErrors = Dict[int, Tuple[float, Optional[float]]]


def window_errors(past: Past, windows: Sequence[int],
                  batches: List[Seen]) -> WindowErrors:
    """How wrong the statistics of a window are, at one layer.

    Args:
        past (Past): The last iterations.
        windows (Sequence[int]): Iterations.
        batches (list[Seen]): What the layer sees at today's weights. All of
            them are the truth, one of them is BatchNorm, window 1.

    Returns:
        dict: RMS changes of the normalised output by window.
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
    """Means over layers; over those that are followed, if some are."""
    rows = [row for row in rows if row[1][1] is not None] or list(rows)

    def mean(values: List[Optional[float]]) -> Optional[float]:
        return None if None in values else statistics.mean(values)

    return {window: tuple(mean([row[window][kind] for row in rows])
                          for kind in (0, 1)) for window in rows[0]
            } if rows else {}
