"""What a COCO-format folder lacks, found before a training needs it."""
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
# What a whole file of a format has near its end.
_ENDS = {'JPEG': b'\xff\xd9', 'PNG': b'IEND'}
_TAIL = 64


def check_images(image_dir: Path, images: List[Dict], title: str) -> None:
    """Look at every image: readable, whole, of the size that is written.

    Args:
        image_dir (Path): The folder that the file names are relative to.
        images (list[dict]): Entries of the annotation file.
        title (str): Of the progress bar.

    Raises:
        ValueError: If there are images that are not. It names the first ten.
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
            'Mend or remove them, in the annotations too')


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
    except Exception as error:  # whatever a decoder may run into
        return f'{name!r} cannot be read ({error})'
    written = image.get('width'), image.get('height')
    if None not in written and written != (width, height):
        return (f'{name!r} has {width} x {height} pixels, the annotations say '
                f'{written[0]} x {written[1]}')
    return None


def _size_of(image: Image.Image) -> Tuple[int, int]:
    """Width and height after the turn that its orientation asks for."""
    turned = image.getexif().get(0x0112, 1) >= 5
    return image.size[::-1] if turned else image.size


def _ends_well(path: Path, size: int, kind: Optional[str]) -> bool:
    """Whether a file's end is that of a whole one; decoding it is slower."""
    end = _ENDS.get(kind)
    if end is None:
        return False
    with path.open('rb') as file:
        file.seek(max(size - _TAIL, 0))
        return end in file.read()


def complete(path: Path, content: Dict, image_dir: Path) -> Tuple[Path, str]:
    """Fill in what follows from the rest of an annotation file.

    ``area`` is that of the box, ``iscrowd`` is 0, ``id`` counts, sizes of
    images are read from them. The file itself stays as it is.

    Args:
        path (Path): The annotation file.
        content (dict): What is in it; is changed.
        image_dir (Path): Where its images are.

    Returns:
        tuple[Path, str]: The file to use, and what was filled in, in words;
        empty if nothing was.

    Raises:
        ValueError: If an object has no box.
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
                f'{annotation.get("image_id")} has no bbox of 4 numbers, but '
                f'{box!r}')
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
                                 f'read ({error})') from error
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
