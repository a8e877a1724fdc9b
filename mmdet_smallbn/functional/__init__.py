"""The mathematics: tensors in, tensors out. Imports torch alone."""
from .calls import ConvCall, DeformCall, Filters, LinearCall
from .inference import fold_groups, normalize_for_inference
from .moments import (GradientStatistics, Moments, average_groups,
                      batch_moments, example_moments, mix_moments,
                      pool_groups, pool_moments, statistics_dtype)
from .normalize import normalize, renormalization
from .replay import (Follower, Memory, Past, Pooled, Replay, apply_filters,
                     follow_filters, pool, replay)
from .sync import Processes

__all__ = [
    'ConvCall', 'DeformCall', 'Filters', 'Follower', 'GradientStatistics',
    'LinearCall', 'Memory', 'Moments', 'Past', 'Pooled', 'Processes', 'Replay',
    'apply_filters', 'average_groups', 'batch_moments', 'example_moments',
    'fold_groups', 'follow_filters', 'mix_moments', 'normalize',
    'normalize_for_inference', 'pool', 'pool_groups', 'pool_moments',
    'renormalization', 'replay', 'statistics_dtype'
]
