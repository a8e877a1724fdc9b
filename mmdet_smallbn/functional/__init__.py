"""The mathematics: tensors in, tensors out. Imports torch alone."""
from .calls import ConvCall, DeformCall, LinearCall
from .moments import (Moments, average_groups, batch_moments, example_moments,
                      mix_moments, pool_groups, pool_moments,
                      statistics_dtype)
from .normalize import (GradientStatistics, fold_groups, normalize,
                        normalize_for_inference, renormalization)
from .replay import (Memory, Pooled, Replay, apply_filters, follow_filters,
                     pool, replay)
from .sync import Processes

__all__ = [
    'ConvCall', 'DeformCall', 'GradientStatistics', 'LinearCall', 'Memory',
    'Moments', 'Pooled', 'Processes', 'Replay', 'apply_filters',
    'average_groups', 'batch_moments', 'example_moments', 'fold_groups',
    'follow_filters', 'mix_moments', 'normalize', 'normalize_for_inference',
    'pool', 'pool_groups', 'pool_moments', 'renormalization', 'replay',
    'statistics_dtype'
]
