"""The mathematics: tensors in, tensors out. Imports torch alone."""
from .calls import ConvCall, DeformCall, LinearCall
from .compensate import (AffineMoments, affine_moments, inner_products,
                         moment_derivatives, moments_at_weight,
                         variance_about)
from .moments import (Moments, average_groups, batch_moments, example_moments,
                      mix_moments, pool_groups, pool_moments,
                      statistics_dtype)
from .normalize import (GradientStatistics, fold_groups, normalize,
                        normalize_for_inference, renormalization)
from .sync import Processes

__all__ = [
    'AffineMoments', 'ConvCall', 'DeformCall', 'GradientStatistics',
    'LinearCall', 'Moments', 'Processes', 'affine_moments',
    'average_groups', 'batch_moments', 'example_moments', 'fold_groups',
    'inner_products', 'mix_moments', 'moment_derivatives',
    'moments_at_weight', 'normalize', 'normalize_for_inference',
    'pool_groups', 'pool_moments', 'renormalization', 'statistics_dtype',
    'variance_about'
]
