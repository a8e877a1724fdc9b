"""ShapesCOCO: a small COCO-format detection and segmentation data set."""
import json
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Union

import cv2

from ..processes import end_with_parent
from ..progress import track
from .shapes import CLASSES, VERSION, make_image


def _write_image(index: int, folder: Path, seed: Sequence[int],
                 size: int, conditions: float, frames: int) -> List[Dict]:
    # Not an image's seed, also if numpy pads that with zeros.
    scene = None if frames == 1 else (*seed, index // frames, 1)
    image, annotations = make_image((*seed, index), size, conditions, scene)
    cv2.imwrite(
        str(folder / _file_name(index)), image,
        [cv2.IMWRITE_JPEG_QUALITY, 95])
    return annotations


def _file_name(index: int) -> str:
    return f'{index:06d}.jpg'


def _begin() -> None:
    # One thread each: the processes are as many as the cores.
    cv2.setNumThreads(0)
    end_with_parent()


def _write_split(root: Path, name: str, count: int, seed: Sequence[int],
                 size: int, conditions: float, frames: int,
                 workers: int) -> None:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    draw = partial(
        _write_image,
        folder=folder,
        seed=seed,
        size=size,
        conditions=conditions,
        frames=frames)
    with ProcessPoolExecutor(workers, initializer=_begin) as pool:
        drawn = list(
            track(
                pool.map(draw, range(count), chunksize=8),
                f'drawing {count} {name} images of ShapesCOCO', count))
    images, annotations = [], []
    for index, found in enumerate(drawn):
        images.append(
            dict(
                id=index + 1,
                file_name=_file_name(index),
                height=size,
                width=size))
        for annotation in found:
            annotations.append(
                dict(
                    id=len(annotations) + 1, image_id=index + 1, **annotation))
    categories = [
        dict(id=i + 1, name=c, supercategory='shape')
        for i, c in enumerate(CLASSES)
    ]
    path = root / 'annotations' / f'instances_{name}.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps(
            dict(
                info=dict(description='ShapesCOCO', version=VERSION),
                licenses=[],
                images=images,
                annotations=annotations,
                categories=categories)))


def make_shapes_coco(root: Union[str, Path],
                     train: int = 1200,
                     val: int = 150,
                     size: int = 192,
                     seed: int = 0,
                     conditions: float = 0.,
                     workers: Optional[int] = None,
                     frames: int = 1) -> Path:
    """Write a data set, or keep it where the same one already is.

    Another ShapesCOCO in the folder is replaced, anything else is not touched.

    The layout is COCO's: ``train/``, ``val/`` and
    ``annotations/instances_{train,val}.json``.

    Args:
        root (str | Path): Folder to write to. Made if missing.
        train (int): Number of training images.
        val (int): Number of validation images, none of them in training.
        size (int): Height and width of the images in pixels, at least 64.
        seed (int): The data set is a function of these numbers alone.
        conditions (float): How much images differ in light and weather, from
            0 to 1; see :func:`mmdet_smallbn.data.shapes.make_image`.
        workers (int, optional): Processes that draw. None: one a core.
        frames (int): Images that follow each other under one condition, as
            the frames of a scene do.

    Returns:
        Path: The folder.

    Raises:
        ValueError: If a count is not positive, the size is too small, or
            conditions are out of range.
        FileExistsError: If the folder holds something else.
    """
    if min(train, val, frames) < 1:
        raise ValueError('train, val and frames must be at least 1, but got '
                         f'train={train}, val={val}, frames={frames}')
    if size < 64:
        raise ValueError(f'size must be at least 64 pixels, but got {size}')
    if not 0 <= conditions <= 1:
        raise ValueError('conditions must be a number from 0 to 1, but got '
                         f'{conditions}')
    if frames > 1 and not conditions:
        raise ValueError(f'frames={frames} share a condition, and there is '
                         'none: give conditions above 0')
    root = Path(root)
    recipe = dict(
        version=VERSION,
        train=train,
        val=val,
        size=size,
        seed=seed,
        conditions=conditions,
        frames=frames)
    marker = root / 'shapes_coco.json'
    if marker.exists():
        if json.loads(marker.read_text()) == dict(recipe, complete=True):
            return root
        for name in ('train', 'val', 'annotations'):
            shutil.rmtree(root / name, ignore_errors=True)
    elif root.exists() and any(root.iterdir()):
        raise FileExistsError(
            f'{root} holds something other than ShapesCOCO, which is not '
            'touched: choose another folder, or empty it')
    root.mkdir(parents=True, exist_ok=True)
    # The marker claims the folder; it is complete when all else is.
    marker.write_text(json.dumps(dict(recipe, complete=False)))
    workers = workers or os.cpu_count()
    for index, (name, count) in enumerate((('train', train), ('val', val))):
        _write_split(root, name, count, (seed, index), size, conditions,
                     frames, workers)
    marker.write_text(json.dumps(dict(recipe, complete=True)))
    return root
