"""Small-batch normalisation for the OpenMMLab toolboxes.

Importing the package registers its norms and hooks in mmengine's root
registries, where every toolbox finds them.
"""
from .version import __version__, check_versions

check_versions()

from .hooks import BurnInHook  # noqa: E402
from .layers import CBN, NaiveCBN, suggested_window_size  # noqa: E402

__all__ = [
    'BurnInHook', 'CBN', 'NaiveCBN', '__version__', 'suggested_window_size'
]
