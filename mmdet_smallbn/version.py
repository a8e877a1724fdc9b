"""Version of the package, and the toolbox versions that it supports."""
from importlib.metadata import PackageNotFoundError, version
from typing import Optional, Sequence, Tuple

from packaging.version import Version

__version__ = '0.1.0'

# Import name: (distributions that provide it, lower bound (included), upper
# bound (excluded), True if the package also works without it).
BOUNDS = {
    'torch': (('torch', ), '2.0.0', None, False),
    'mmengine': (('mmengine', 'onedl-mmengine'), '0.8.0', '1.0.0', False),
    'mmcv': (('mmcv', 'onedl-mmcv'), '2.0.0', '3.0.0', True),
    'mmdet': (('mmdet', 'onedl-mmdetection'), '3.0.0', '4.0.0', True),
}


def installed(
        distributions: Sequence[str]) -> Tuple[str, Optional[Version]]:
    """Return the first installed distribution and its version.

    Without one: the first name and None.
    """
    for name in distributions:
        try:
            return name, Version(version(name))
        except PackageNotFoundError:
            continue
    return distributions[0], None


def check_versions(whole: bool = False) -> None:
    """Check that the installed packages are within :data:`BOUNDS`.

    mmcv and mmdet may be missing, because the layers work in any mmengine
    model.

    Args:
        whole (bool): If True, mmcv and mmdet must be installed, as the tools
            need them.

    Raises:
        ImportError: If a package is missing or its version is out of bounds.
            The message names the package, its version and the bounds.
    """
    for distributions, lower, upper, optional in BOUNDS.values():
        name, found = installed(distributions)
        if found is None and optional and not whole:
            continue
        wanted = f'>={lower}' + (f',<{upper}' if upper else '')
        if found is None:
            raise ImportError(
                f'mmdet_smallbn {__version__} needs {name}{wanted}, but it is '
                f'not installed. Remedy: pip install "{name}{wanted}"')
        if found < Version(lower) or (upper and found >= Version(upper)):
            raise ImportError(
                f'mmdet_smallbn {__version__} needs {name}{wanted}, but found '
                f'{name} {found}. Remedy: pip install "{name}{wanted}"')
