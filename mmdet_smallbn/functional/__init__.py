"""The mathematics: tensors in, tensors out. Imports torch alone."""
from .calls import ConvCall, DeformCall, LinearCall
from .compensate import (factors_are_smaller, inner_products, is_sampled,
                         moment_derivatives, patch_values, sample_products,
                         sample_weights, variance_about)
from .moments import (Moments, average_groups, batch_moments, example_moments,
                      mix_moments, pool_groups, pool_moments,
                      statistics_dtype)
from .normalize import (GradientStatistics, fold_groups, normalize,
                        normalize_for_inference, renormalization)
from .sync import Processes

__all__ = [
    'ConvCall', 'DeformCall', 'GradientStatistics', 'LinearCall', 'Moments',
    'Processes', 'average_groups', 'batch_moments', 'example_moments',
    'factors_are_smaller', 'fold_groups', 'inner_products', 'is_sampled',
    'mix_moments', 'moment_derivatives', 'normalize',
    'normalize_for_inference', 'patch_values', 'pool_groups', 'pool_moments',
    'renormalization', 'sample_products', 'sample_weights',
    'statistics_dtype', 'variance_about'
]
