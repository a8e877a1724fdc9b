"""What a COCO-format folder may not do to the machine that reads it."""
import math
import re
from pathlib import Path

# What mmdet's data set takes to read its annotations, in sizes of the file.
MEMORY = 8


def check_printable(path: Path) -> None:
    """Refuse a name with a line break, or another control character.

    Raises:
        ValueError: If it has one.
    """
    if re.search(r'[\x00-\x1f\x7f-\x9f]', str(path)):
        raise ValueError(f'{str(path)!r} has a control character in its name, '
                         'which a message cannot show: rename it')


def check_memory(path: Path) -> None:
    """Refuse what would end in a process that is killed without a word.

    Args:
        path (Path): An annotation file, before it is read.

    Raises:
        ValueError: If reading it takes more memory than is free.
    """
    size, free = path.stat().st_size, _free_memory()
    if MEMORY * size > free:
        raise ValueError(
            f'{path} has {size / 1e9:.1f} GB. To read it takes about '
            f'{MEMORY * size / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB '
            'are free: take a part of the data, or a machine with more')


def _free_memory() -> float:
    """Bytes that are free or can be made so; infinite if unknown."""
    try:
        said = Path('/proc/meminfo').read_text()
    except OSError:  # not Linux
        return math.inf
    return 1024 * int(re.search(r'MemAvailable:\s*(\d+)', said)[1])


def leads_out(name: Path, root: Path, folder: Path) -> bool:
    """Whether annotations name an image outside of the data set.

    A link is of who made the folder, and images may lie on another disk. A
    ``..`` or an absolute name is of who wrote the annotations, which may be
    anyone: a training would read, and its pictures show, any image of the
    machine.

    Args:
        name (Path): What stands in the annotations.
        root (Path): The data set.
        folder (Path): The folder of images in it.
    """
    if not name.is_absolute() and '..' not in name.parts:
        return False
    return root.resolve() not in (folder / name).resolve().parents
