"""How far a converted model is from what it stands for."""
import math

from torch import Tensor


def difference(found: Tensor,
               wanted: Tensor,
               at_least: float = 0.,
               by_channel: bool = False) -> float:
    """Largest difference, as a part of the largest output.

    Args:
        found, wanted (Tensor): Outputs of the two.
        at_least (float): The largest output is taken to be no less.
        by_channel (bool): Whether each channel has a largest output of its
            own, which is no less than a thousandth of all channels'.

    Returns:
        float: Infinite if shapes differ, or a difference is not finite.
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
    # What is right to the last digit may be 0.
    ratio = ratio.masked_fill(error == 0, 0).max().item()
    return math.inf if math.isnan(ratio) else ratio
