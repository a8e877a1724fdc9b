"""Small-batch normalisation for the OpenMMLab toolboxes.

An import registers the package's norms and hooks in mmengine's root
registries, where every toolbox finds them.
"""
from .version import __version__, check_versions

check_versions()

from .conversion import convert_norms  # noqa: E402
from .deploy import fuse_norm  # noqa: E402
from .doctor import diagnose  # noqa: E402
from .hooks import (BurnInHook, ExampleWeightHook,  # noqa: E402
                    FreezeStatisticsHook, PlainCheckpointHook,
                    SmallBatchNormHook, StatisticsHook)
from .layers import (BGN, BRN, CBN, MABN, CenConv,  # noqa: E402
                     CenConv2d, CmBN, GhostBN, NaiveCBN, TrainingLoop,
                     calibrate_group_norms, set_example_weight,
                     suggested_window_size)

__all__ = [
    'BGN', 'BRN', 'BurnInHook', 'CBN', 'CenConv', 'CenConv2d', 'CmBN',
    'ExampleWeightHook', 'FreezeStatisticsHook', 'GhostBN', 'MABN', 'NaiveCBN',
    'PlainCheckpointHook', 'SmallBatchNormHook', 'StatisticsHook',
    'TrainingLoop', '__version__', 'calibrate_group_norms', 'convert_norms',
    'diagnose', 'fuse_norm', 'set_example_weight', 'suggested_window_size'
]
