"""Mathematics of the norms as functions of tensors; needs torch alone."""
from .calls import ConvCall, Filters
from .deform_call import DeformCall, LinearCall
from .eager import run_eagerly
from .follow import Loan, Past, follow_filters
from .inference import fold_groups, normalize_for_inference
from .moments import (GradientStatistics, Moments, average_groups,
                      batch_moments, example_moments, mix_moments,
                      move_towards, pool_groups, pool_moments,
                      statistics_dtype)
from .normalize import normalize
from .renormalize import renormalization
from .replay import Memory, Pooled, Replay, apply_filters, pool, replay
from .sync import Processes

__all__ = [
    'ConvCall', 'DeformCall', 'Filters', 'GradientStatistics', 'LinearCall',
    'Loan', 'Memory', 'Moments', 'Past', 'Pooled', 'Processes', 'Replay',
    'apply_filters', 'average_groups', 'batch_moments', 'example_moments',
    'fold_groups', 'follow_filters', 'mix_moments', 'move_towards',
    'normalize', 'normalize_for_inference', 'pool', 'pool_groups',
    'pool_moments', 'renormalization', 'replay', 'run_eagerly',
    'statistics_dtype'
]
