"""Normalisation layers; an import adds them to mmengine's root registry."""
from .base import SmallBatchNorm, norms_of
from .batch_group_norm import BGN, GhostBN
from .batch_renorm import BRN
from .calibration import calibrate_group_norms
from .cbn import CBN, NaiveCBN, suggested_window_size
from .cen_conv import CenConv, CenConv2d
from .cmbn import CmBN
from .checks import (check_example_weight, check_positive_int, check_settings,
                     is_batch_norm, is_under, matches_none)
from .conv_call import remember_calls
from .example_weight import (lacks_averages, set_example_weight,
                             weights_as_trained)
from .forward_pass import ForwardPass, in_backward
from .mabn import MABN
from .remembering import RememberingNorm
from .running_norm import RunningNorm
from .statistics import Batch, Statistics, TrainingStep
from .training_loop import TrainingLoop

__all__ = [
    'BGN', 'BRN', 'Batch', 'CBN', 'CenConv', 'CenConv2d', 'CmBN',
    'ForwardPass', 'GhostBN', 'MABN', 'NaiveCBN', 'RememberingNorm',
    'RunningNorm', 'SmallBatchNorm', 'Statistics', 'TrainingLoop',
    'TrainingStep', 'calibrate_group_norms',
    'check_example_weight', 'check_positive_int', 'check_settings',
    'in_backward', 'is_batch_norm', 'is_under', 'lacks_averages',
    'matches_none', 'norms_of', 'remember_calls', 'set_example_weight',
    'suggested_window_size', 'weights_as_trained'
]
