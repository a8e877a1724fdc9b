"""Difference between the outputs of a converted and an original model."""
import math

from torch import Tensor


def difference(found: Tensor,
               wanted: Tensor,
               at_least: float = 0.,
               by_channel: bool = False) -> float:
    """Return the largest difference, relative to the largest output.

    Args:
        found, wanted (Tensor): Outputs of the converted and the original
            model.
        at_least (float): Lower bound of the largest output.
        by_channel (bool): Compare each channel, of shape (N, C, H, W), with
            its own largest output. This has a lower bound, too: a thousandth
            of the largest output of all channels.

    Returns:
        float: The relative difference. It is infinite if the shapes differ,
        or if a difference is NaN.
    """
    if found.shape != wanted.shape:
        return math.inf
    if not wanted.numel():
        return 0.
    wanted = wanted.double()
    error, size = (found.double() - wanted).abs(), wanted.abs()
    if by_channel:
        error, size = error.amax((0, 2, 3)), size.amax((0, 2, 3))
        at_least = max(at_least, size.max().item() * 1e-3)
    else:
        error, size = error.max(), size.max()
    ratio = error / size.clamp(min=at_least)
    # Without a difference the ratio may be 0 / 0.
    ratio = ratio.masked_fill(error == 0, 0).max().item()
    return math.inf if math.isnan(ratio) else ratio
