"""The mathematics: tensors in, tensors out. Imports torch alone."""
from .compensate import (AffineMoments, ConvCall, affine_moments,
                         moments_at_weight)
from .moments import (Moments, batch_moments, pool_moments,
                      statistics_dtype)
from .normalize import normalize

__all__ = [
    'AffineMoments', 'ConvCall', 'Moments', 'affine_moments', 'batch_moments',
    'moments_at_weight', 'normalize', 'pool_moments', 'statistics_dtype'
]
