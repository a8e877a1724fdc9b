"""Statistics that a trained norm uses at inference."""
from typing import Tuple

import torch
from torch import Tensor, nn

from ..errors import SetupError
from ..functional import fold_groups


def fixed_statistics(name: str, norm: nn.Module) -> Tuple[Tensor, Tensor]:
    """Return the mean and variance that a norm uses in evaluation.

    Args:
        name (str): Name of the norm in the model, for the error message.
        norm (nn.Module): A norm with BatchNorm's buffers.

    Returns:
        tuple[Tensor, Tensor]: Mean and variance, shape (C,), float64. BGN's
        are averaged over its groups. MABN's mean is 0, and its variance is
        the mean square.

    Raises:
        SetupError: If the statistics depend on the image.
    """
    weight = getattr(norm, 'example_weight', 0.)
    if weight:
        raise SetupError(
            f'{type(norm).__name__} {name!r} has the example weight '
            f'{weight:g}: it normalises each image with its own statistics, '
            'which a convolution or a BatchNorm cannot do. Use '
            'set_example_weight(model, 0), example_weight=0 in norm_cfg, or '
            '--example-weight 0 of tools/convert_to_stock.py. This changes '
            'the detections, so evaluate the model first')
    if norm.running_mean is None or norm.running_var is None:
        raise SetupError(
            f'{type(norm).__name__} {name!r} keeps no moving averages '
            '(track_running_stats=False). It normalises each batch with its '
            'own statistics, so it cannot be converted')
    with torch.no_grad():
        return fold_groups(norm.running_mean.double(),
                           norm.running_var.double(),
                           getattr(norm, 'num_groups', None))
