"""The norms. Importing this registers them in mmengine's root registry."""
from .base import SmallBatchNorm
from .cbn import CBN, NaiveCBN, suggested_window_size

__all__ = ['CBN', 'NaiveCBN', 'SmallBatchNorm', 'suggested_window_size']
