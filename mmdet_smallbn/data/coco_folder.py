"""Search for the splits of a COCO-format folder in its common layouts."""
import json
import os
from pathlib import Path
from typing import List, NamedTuple, Tuple, Union

from .coco_bounds import check_memory, check_printable, leads_out
from .coco_check import check_images, complete

_NAMES = {'train': ('train', ), 'val': ('val', 'valid', 'test')}


class CocoSplit(NamedTuple):
    """One split of a COCO-format data set.

    Attributes:
        ann_file (Path): Annotation file.
        image_dir (Path): Folder that its file names are relative to.
        classes (tuple[str]): Category names, in the file's order.
        num_images (int): Number of images.
        has_masks (bool): True if every object has a segmentation.
        filled (str): Message about filled keys; empty if none was missing.
    """
    ann_file: Path
    image_dir: Path
    classes: Tuple[str, ...]
    num_images: int
    has_masks: bool
    filled: str = ''


def find_coco_split(root: Union[str, Path],
                    split: str,
                    check: bool = False) -> CocoSplit:
    """Find the annotations and images of a split.

    Supported layouts: ``annotations/instances_train2017.json`` with
    ``train2017/`` as in COCO, the same names without the year or
    ``instances_``, images under ``images/``, and
    ``train/_annotations.coco.json`` with the images in the same folder.

    Args:
        root (str | Path): Folder of the data set.
        split (str): ``'train'`` or ``'val'``.
        check (bool): True to open and check every image.

    Returns:
        CocoSplit: The split. All its images exist.

    Raises:
        FileNotFoundError: If annotations or images are missing. It names the
            paths that were searched.
        ValueError: If an annotation file is not in COCO's detection format,
            is too large for the free memory, or names an image outside of the
            folder, or if the check found images that cannot be used.
    """
    root = Path(root)
    check_printable(root)
    if not root.is_dir():
        raise FileNotFoundError(f'no data set folder at {root}: check the '
                                'path')
    files = _annotation_files(root, split)
    if not files:
        raise FileNotFoundError(
            f'no {split} annotations in {root}: looked for annotations/'
            f'instances_{split}*.json, annotations/{split}*.json and '
            f'{split}*/_annotations.coco.json')
    without_images = []
    for path in files:
        check_printable(path)
        check_memory(path)
        content = _read(path)
        names = _file_names(path, content)
        for folder in _image_folders(root, path, split):
            if (folder / names[0]).is_file():
                _check_names(path, root, folder, names)
                if check:
                    check_images(folder, content['images'],
                                 f'checking {split} images')
                file, filled = complete(path, content, folder)
                return CocoSplit(file, folder, _classes(path, content),
                                 len(content['images']),
                                 all(map(_has_mask, content['annotations'])),
                                 filled)
        without_images.append(f'{str(names[0])!r} of {path}')
    raise FileNotFoundError(
        f'no image {" nor ".join(without_images)}: looked in '
        f'{", ".join(map(str, _image_folders(root, files[0], split)))}')


def _annotation_files(root: Path, split: str) -> List[Path]:
    found: List[Path] = []
    for name in _NAMES[split]:
        for pattern in (f'annotations/instances_{name}*.json',
                        f'annotations/{name}*.json', f'instances_{name}*.json',
                        f'{name}*.json', f'{name}*/_annotations.coco.json'):
            # The latest year first.
            found += sorted(root.glob(pattern), reverse=True)
    return found


def _image_folders(root: Path, ann_file: Path, split: str) -> List[Path]:
    stem = ann_file.stem.replace('instances_', '')
    names = dict.fromkeys((stem, *_NAMES[split]))
    folders = [ann_file.parent]
    for base in (root, root / 'images'):
        folders += [base / name for name in names]
    return [*folders, root / 'images', root]


def _file_names(path: Path, content: dict) -> List[Path]:
    names = [image.get('file_name') for image in content['images']]
    for index, name in enumerate(names):
        if not name or not isinstance(name, str):
            raise ValueError(f'{path}: image {index} needs a file_name, but '
                             f'has {name!r}')
    return list(map(Path, names))


def _check_names(path: Path, root: Path, folder: Path,
                 names: List[Path]) -> None:
    outside = [name for name in names if leads_out(name, root, folder)]
    if outside:
        raise ValueError(
            f'{path}: {str(outside[0])!r} is outside of {root}. Put the image '
            'or a link to its folder into the data set, and change the name '
            'to the path there')
    # Listing each folder is faster than a check of each file.
    held = {
        parent: set(os.listdir(folder / parent))
        for parent in {name.parent for name in names}
        if (folder / parent).is_dir()
    }
    missing = [n for n in names if n.name not in held.get(n.parent, ())]
    if missing:
        raise FileNotFoundError(
            f'{len(missing)} of the {len(names)} images of {path} are not in '
            f'{folder}. The first is {str(missing[0])!r}')


def _classes(path: Path, content: dict) -> Tuple[str, ...]:
    names = tuple(c.get('name') for c in content['categories'])
    if None in names or len(set(names)) < len(names):
        raise ValueError(f'{path}: every category needs a unique name, but '
                         f'got {names}')
    return names


def _has_mask(annotation: dict) -> bool:
    """True if an object has polygons or a run-length encoded mask."""
    mask = annotation.get('segmentation')
    return any(mask) if isinstance(mask, list) else bool(mask)


def _read(path: Path) -> dict:
    try:
        # Some tools write a byte order mark.
        content = json.loads(path.read_text(encoding='utf-8-sig'))
        wanted = ('images', 'annotations', 'categories')
        missing = [key for key in wanted if not content.get(key)]
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f'{path} is not a COCO annotation file') from error
    if missing:
        raise ValueError(f'{path} is not a COCO detection annotation file: it '
                         f'has no {" and no ".join(missing)}')
    return content
