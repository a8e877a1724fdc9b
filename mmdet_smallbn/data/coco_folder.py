"""Find the splits of a COCO-format folder, however it is laid out."""
import json
from pathlib import Path
from typing import List, NamedTuple, Tuple, Union

_NAMES = {'train': ('train', ), 'val': ('val', 'valid', 'test')}


class CocoSplit(NamedTuple):
    """One split of a COCO-format data set.

    Attributes:
        ann_file (Path): The annotations.
        image_dir (Path): The folder that their file names are relative to.
        classes (tuple[str]): Names of the categories, in the file's order.
        num_images (int): Number of images.
        has_masks (bool): Whether every object has a segmentation.
    """
    ann_file: Path
    image_dir: Path
    classes: Tuple[str, ...]
    num_images: int
    has_masks: bool


def find_coco_split(root: Union[str, Path], split: str) -> CocoSplit:
    """Find the annotations and images of a split.

    Looks for ``annotations/instances_train2017.json`` and
    ``train2017/`` as in COCO, the same names without the year or
    ``instances_``, images under ``images/``, and
    ``train/_annotations.coco.json`` with the images beside it.

    Args:
        root (str | Path): The data set's folder.
        split (str): ``'train'`` or ``'val'``.

    Returns:
        CocoSplit: What was found; the first image is known to exist.

    Raises:
        FileNotFoundError: Naming what was looked for.
        ValueError: If an annotation file is not COCO's detection format.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f'no data set folder at {root}')
    files = _annotation_files(root, split)
    if not files:
        raise FileNotFoundError(
            f'no {split} annotations in {root}: looked for annotations/'
            f'instances_{split}*.json, annotations/{split}*.json and '
            f'{split}*/_annotations.coco.json')
    without_images = []
    for path in files:
        content = _read(path)
        first = content['images'][0]['file_name']
        for folder in _image_folders(root, path, split):
            if (folder / first).is_file():
                return CocoSplit(
                    path, folder,
                    tuple(c['name'] for c in content['categories']),
                    len(content['images']),
                    all(a.get('segmentation')
                        for a in content['annotations']))
        without_images.append(f'{first!r} of {path}')
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


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
        wanted = ('images', 'annotations', 'categories')
        missing = [key for key in wanted if not content.get(key)]
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f'{path} is not a COCO annotation file') from error
    if missing:
        raise ValueError(f'{path} is not a COCO detection annotation file: it '
                         f'has no {" and no ".join(missing)}')
    return content
