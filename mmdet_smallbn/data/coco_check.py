"""Checks of a COCO-format folder's images, and filling of missing keys."""
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from PIL import Image

from ..progress import track

_SHOWN = 10
# Bytes near the end of a complete file, by format.
_ENDS = {'JPEG': b'\xff\xd9', 'PNG': b'IEND'}
_TAIL = 64


def check_images(image_dir: Path, images: List[Dict], title: str) -> None:
    """Check that every image is readable, complete and of the stated size.

    Args:
        image_dir (Path): Folder that the file names are relative to.
        images (list[dict]): Image entries of the annotation file.
        title (str): Title of the progress bar.

    Raises:
        ValueError: If images fail the check. It names the first ten.
    """
    with ThreadPoolExecutor() as pool:
        found = track(
            pool.map(partial(_fault_of, image_dir), images), title,
            len(images))
        faults = [fault for fault in found if fault]
    if faults:
        shown = '; '.join(faults[:_SHOWN])
        more = len(faults) - _SHOWN
        raise ValueError(
            f'{len(faults)} of the {len(images)} images in {image_dir} cannot '
            f'be used: {shown}{f"; and {more} more" if more > 0 else ""}. '
            'Repair them, or remove them and their annotations')


def _fault_of(image_dir: Path, image: Dict) -> Optional[str]:
    name = image['file_name']
    path = image_dir / name
    try:
        size = path.stat().st_size
        if size == 0:
            return f'{name!r} is empty'
        with Image.open(path) as opened:
            if not _ends_well(path, size, opened.format):
                opened.load()
            width, height = _size_of(opened)
    except Exception as error:  # a decoder can raise any error
        return f'{name!r} cannot be read ({error})'
    written = image.get('width'), image.get('height')
    if None not in written and written != (width, height):
        return (f'{name!r} has {width} x {height} pixels, but the annotations '
                f'say {written[0]} x {written[1]}')
    return None


def _size_of(image: Image.Image) -> Tuple[int, int]:
    """Return width and height after the rotation in the EXIF data."""
    turned = image.getexif().get(0x0112, 1) >= 5
    return image.size[::-1] if turned else image.size


def _ends_well(path: Path, size: int, kind: Optional[str]) -> bool:
    """True if the file ends as a complete one; decoding is slower."""
    end = _ENDS.get(kind)
    if end is None:
        return False
    with path.open('rb') as file:
        file.seek(max(size - _TAIL, 0))
        return end in file.read()


def complete(path: Path, content: Dict, image_dir: Path) -> Tuple[Path, str]:
    """Fill in missing keys of an annotation file.

    A missing ``area`` becomes that of the box, ``iscrowd`` becomes 0, and
    ``id`` becomes a running number. Missing image sizes are read from the
    images. The result is written to a cache file. The annotation file itself
    does not change.

    Args:
        path (Path): The annotation file.
        content (dict): Its content, which is changed in place.
        image_dir (Path): Folder of its images.

    Returns:
        tuple[Path, str]: The file to use, and a message about the filled
        keys. The message is empty if nothing was missing.

    Raises:
        ValueError: If an object has no box, or an image without a size cannot
            be read.
    """
    filled: Dict[str, int] = {}

    def fill(entry: Dict, key: str, value) -> None:
        if entry.get(key) is None:
            entry[key] = value
            filled[key] = filled.get(key, 0) + 1

    for index, annotation in enumerate(content['annotations']):
        box = annotation.get('bbox')
        if not box or len(box) != 4:
            raise ValueError(
                f'{path}: object {index} of image '
                f'{annotation.get("image_id")} needs a bbox of 4 numbers, but '
                f'has {box!r}')
        fill(annotation, 'area', box[2] * box[3])
        fill(annotation, 'iscrowd', 0)
        fill(annotation, 'id', index + 1)
    for image in content['images']:
        if image.get('width') is None or image.get('height') is None:
            try:
                with Image.open(image_dir / image['file_name']) as opened:
                    width, height = _size_of(opened)
            except OSError as error:
                raise ValueError(f'{image["file_name"]!r} of {path} cannot be '
                                 f'read ({error}): repair or remove it'
                                 ) from error
            fill(image, 'width', width)
            fill(image, 'height', height)
    if not filled:
        return path, ''
    cache = Path(os.environ.get('XDG_CACHE_HOME', '~/.cache')).expanduser()
    text = json.dumps(content)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    target = cache / 'mmdet_smallbn' / f'{path.stem}-{name}.json'
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        part = target.with_suffix(f'.{os.getpid()}')
        part.write_text(text)
        part.replace(target)
    what = ', '.join(f'{key} ({count})' for key, count in filled.items())
    return target, (f'{path} lacks {what}: filled in from boxes and images, '
                    f'in {target}')
