"""Convolution with centred weights.

Paper: Towards Stabilizing Batch Statistics in Backward Propagation of Batch
Normalization, Yan et al., ICLR 2020, arXiv:2001.06838, Eq. (18).
"""
from typing import Optional

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module('CenConv')
@MODELS.register_module('CenConv2d')
class CenConv2d(nn.Conv2d):
    r"""``nn.Conv2d`` that subtracts each filter's mean from the filter.

    .. math::
        \bar w_{o} = \text{mean}_{i, h, w}(w_{oihw}), \qquad
        \text{out} = x * (w - \bar w) + b.

    It compensates for the mean that MABN does not subtract. Arguments, state
    dict and initialisation are those of ``nn.Conv2d``. A checkpoint holds the
    trained weight, not the centred one. Centring is in float32 under autocast
    and with half-precision weights.

    Raises:
        ValueError: If a filter has only one weight (1 x 1 and depthwise),
            because centring makes it 0.

    Example:
        >>> model = dict(backbone=dict(
        ...     conv_cfg=dict(type='CenConv'), norm_cfg=dict(type='MABN')))
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.weight[0].numel() == 1:
            raise ValueError(
                f'CenConv2d({self.in_channels}, {self.out_channels}, '
                f'kernel_size={self.kernel_size}, groups={self.groups}) has '
                'only one weight per filter, which centring makes 0. Use '
                'nn.Conv2d there')

    def _conv_forward(self, input: Tensor, weight: Tensor,
                      bias: Optional[Tensor]) -> Tensor:
        # Not of self.weight: fused evaluation passes a scaled weight here.
        return super()._conv_forward(input, centred(weight), bias)


def centred(weight: Tensor) -> Tensor:
    """Subtract each filter's mean from the filter, Eq. (18).

    Args:
        weight (Tensor): Shape (C_out, C_in / groups, kh, kw).

    Returns:
        Tensor: Same shape and dtype; computed at least in float32.
    """
    # Autocast does not cast these operations: they keep their input's dtype.
    wide = weight
    if weight.dtype in (torch.float16, torch.bfloat16):
        wide = weight.float()
    return (wide - wide.mean((1, 2, 3), keepdim=True)).to(weight.dtype)


def effective_weight(conv: nn.Module) -> Tensor:
    """Return the weight that a convolution uses, centred for a CenConv2d.

    Args:
        conv (nn.Module): A convolution with a ``weight``.

    Returns:
        Tensor: Same shape and dtype as the weight, part of the autograd
        graph. Centring is at least in float32.
    """
    if isinstance(conv, CenConv2d):
        return centred(conv.weight)
    return conv.weight


# Configs use the short name. The long name follows torch's names.
CenConv = CenConv2d
