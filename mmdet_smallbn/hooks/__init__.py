"""Hooks that connect the training loop with the layers."""
from .burn_in_hook import BurnInHook
from .example_weight_hook import ExampleWeightHook
from .freeze_statistics_hook import FreezeStatisticsHook
from .model import asleep_note, bare_model, calibrate, kept_asleep
from .norm_hook import SmallBatchNormHook
from .plain_checkpoint_hook import PlainCheckpointHook
from .statistics_hook import StatisticsHook

__all__ = [
    'BurnInHook', 'ExampleWeightHook', 'FreezeStatisticsHook',
    'PlainCheckpointHook', 'SmallBatchNormHook', 'StatisticsHook',
    'asleep_note', 'bare_model', 'calibrate', 'kept_asleep'
]
