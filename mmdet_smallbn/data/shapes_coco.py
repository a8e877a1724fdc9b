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
    # The 1 makes it differ from all seeds of images, which numpy pads with 0.
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
    """Write the data set ShapesCOCO, unless the folder already has it.

    A ShapesCOCO with other arguments is replaced. Other files are not changed.
    The layout is that of COCO: ``train/``, ``val/`` and
    ``annotations/instances_{train,val}.json``.

    Args:
        root (str | Path): Folder to write to. It is created if missing.
        train (int): Number of training images.
        val (int): Number of validation images. They differ from the training
            images.
        size (int): Height and width of the images in pixels, at least 64.
        seed (int): Random seed. Equal arguments give an equal data set.
        conditions (float): Strength of the differences in light and weather,
            from 0 to 1; see :func:`mmdet_smallbn.data.shapes.make_image`.
        workers (int, optional): Number of processes. None: one per core.
        frames (int): Number of consecutive images with the same conditions,
            like the frames of a scene.

    Returns:
        Path: The folder.

    Raises:
        ValueError: If a count is not positive, the size is too small,
            ``conditions`` is out of range, or ``frames`` is above 1 without
            conditions.
        FileExistsError: If the folder contains something else.
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
        raise ValueError(f'frames={frames} needs conditions above 0, but got '
                         f'conditions={conditions}')
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
            f'{root} contains something other than ShapesCOCO, which is not '
            'changed. Choose another folder, or empty this one')
    root.mkdir(parents=True, exist_ok=True)
    # The marker identifies the folder as ShapesCOCO. It is marked complete
    # after all other files are written.
    marker.write_text(json.dumps(dict(recipe, complete=False)))
    workers = workers or os.cpu_count()
    for index, (name, count) in enumerate((('train', train), ('val', val))):
        _write_split(root, name, count, (seed, index), size, conditions,
                     frames, workers)
    marker.write_text(json.dumps(dict(recipe, complete=True)))
    return root
