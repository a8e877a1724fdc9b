"""Safety checks of a COCO-format folder before it is read."""
import math
import re
from pathlib import Path

# Memory that mmdet needs to read annotations, in multiples of the file size.
MEMORY = 8


def check_printable(path: Path) -> None:
    """Refuse a path with a line break or another control character.

    Raises:
        ValueError: If the path has a control character.
    """
    if re.search(r'[\x00-\x1f\x7f-\x9f]', str(path)):
        raise ValueError(f'{str(path)!r} has a control character in its name, '
                         'which log lines cannot show: rename it')


def check_memory(path: Path) -> None:
    """Refuse a file for which the system would kill the process.

    Args:
        path (Path): Annotation file, not read yet.

    Raises:
        ValueError: If reading it needs more memory than is free.
    """
    size, free = path.stat().st_size, _free_memory()
    if MEMORY * size > free:
        raise ValueError(
            f'{path} has {size / 1e9:.1f} GB. Reading it needs about '
            f'{MEMORY * size / 1e9:.0f} GB of memory, but only '
            f'{free / 1e9:.0f} GB are free: use a part of the data, or a '
            'machine with more memory')


def _free_memory() -> float:
    """Return the available memory in bytes, or infinity if unknown."""
    try:
        told = re.search(r'MemAvailable:\s*(\d+)',
                         Path('/proc/meminfo').read_text())
    except OSError:  # not Linux
        return math.inf
    return 1024 * int(told[1]) if told else math.inf


def leads_out(name: Path, root: Path, folder: Path) -> bool:
    """True if an image name in the annotations leaves the data set's folder.

    Links are allowed: the folder's owner made them, and images may be on
    another disk. A ``..`` or an absolute name comes from the author of the
    annotations, who may be anyone. With it, a training could read any image
    on the machine and show it in its pictures.

    Args:
        name (Path): Image name in the annotations.
        root (Path): Folder of the data set.
        folder (Path): Folder of the images in it.
    """
    if not name.is_absolute() and '..' not in name.parts:
        return False
    return root.resolve() not in (folder / name).resolve().parents
