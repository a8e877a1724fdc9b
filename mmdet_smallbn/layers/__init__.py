"""The norms. Importing this registers them in mmengine's root registry."""
from .base import SmallBatchNorm
from .batch_group_norm import BatchGroupNorm, GhostBN
from .batch_renorm import BRN
from .cbn import CBN, NaiveCBN, suggested_window_size
from .cen_conv import CenConv2d
from .mabn import MABN

__all__ = [
    'BRN', 'BatchGroupNorm', 'CBN', 'CenConv2d', 'GhostBN', 'MABN', 'NaiveCBN',
    'SmallBatchNorm', 'suggested_window_size'
]
