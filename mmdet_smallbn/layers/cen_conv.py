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
    r"""``nn.Conv2d`` whose filters are used without their means.

    .. math::
        \bar w_{o} = \text{mean}_{i, h, w}(w_{oihw}), \qquad
        \text{out} = x * (w - \bar w) + b.

    It makes up for the mean that MABN does not subtract. Arguments, state
    dict and initialisation are those of ``nn.Conv2d``; a checkpoint holds the
    weight as it is trained, not centred. Centring is in float32 under
    autocast and with half-precision weights.

    Raises:
        ValueError: If a filter has one weight (1 x 1 and depthwise): nothing
            is left of it.

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
                'one weight a filter, which centring makes 0. Take nn.Conv2d '
                'there')

    def _conv_forward(self, input: Tensor, weight: Tensor,
                      bias: Optional[Tensor]) -> Tensor:
        # Of the weight that is given: fused evaluation passes a scaled one.
        return super()._conv_forward(input, centred(weight), bias)


def centred(weight: Tensor) -> Tensor:
    """Each filter less its mean, Eq. (18).

    Args:
        weight (Tensor): Shape (C_out, C_in / groups, kh, kw).

    Returns:
        Tensor: Same shape and dtype; computed in float32 at least.
    """
    # Autocast leaves these operations alone: they follow their input.
    wide = weight
    if weight.dtype in (torch.float16, torch.bfloat16):
        wide = weight.float()
    return (wide - wide.mean((1, 2, 3), keepdim=True)).to(weight.dtype)


def effective_weight(conv: nn.Module) -> Tensor:
    """The weight that a convolution uses: centred if it is a CenConv2d.

    Args:
        conv (nn.Module): With a ``weight``.

    Returns:
        Tensor: Same shape and dtype as the weight, live to autograd. Centring
        is in float32 at least.
    """
    if isinstance(conv, CenConv2d):
        return centred(conv.weight)
    return conv.weight


# The short name is the one of configs; the long one says what it stands for,
# as torch's do.
CenConv = CenConv2d
