"""What a trained norm normalises with, as plain numbers."""
from typing import Tuple

import torch
from torch import Tensor, nn

from ..errors import SetupError
from ..functional import fold_groups


def fixed_statistics(name: str, norm: nn.Module) -> Tuple[Tensor, Tensor]:
    """Mean and variance of evaluation, the same for every image.

    Args:
        name (str): The norm's place in the model, for the message.
        norm (nn.Module): Of BatchNorm's form.

    Returns:
        tuple[Tensor, Tensor]: Shape (C,), float64. BGN's are averaged over
        its groups; MABN's mean is 0 and its variance the mean square.

    Raises:
        SetupError: If evaluation depends on the image.
    """
    weight = getattr(norm, 'example_weight', 0.)
    if weight:
        raise SetupError(
            f'{type(norm).__name__} {name!r} has the example weight '
            f'{weight:g}: it normalises each image with statistics of its '
            'own, which no convolution and no BatchNorm can do. '
            'set_example_weight(model, 0), example_weight=0 in norm_cfg, or '
            '--example-weight 0 of tools/convert_to_stock.py makes it an '
            'affine map, at the price of other detections: evaluate them '
            'before')
    if norm.running_mean is None or norm.running_var is None:
        raise SetupError(
            f'{type(norm).__name__} {name!r} keeps no moving averages '
            '(track_running_stats=False): it normalises each batch with its '
            'own statistics, and nothing can stand for that')
    with torch.no_grad():
        return fold_groups(norm.running_mean.double(),
                           norm.running_var.double(),
                           getattr(norm, 'num_groups', None))
