"""Use of a COCO-format folder as the data of any config (``--data``)."""
from pathlib import Path
from typing import Any, Iterator, Union

from mmdet.visualization import get_palette
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log

from ..data.coco_folder import CocoSplit, find_coco_split
from ..errors import SetupError


def use_data(cfg: Config,
             folder: Union[str, Path],
             training: bool = True,
             check: bool = False) -> None:
    """Set a config's files, classes and number of classes from a folder.

    Training uses the folder's training images. Validation and testing use its
    validation images.

    Args:
        cfg (Config): Config of a detector on COCO.
        folder (str | Path): Folder, as :func:`find_coco_split` takes it.
        training (bool): True if the folder must have training images. If
            False, they are optional: some tests gather statistics from them.
        check (bool): True to open and check every image.

    Raises:
        FileNotFoundError: If the folder lacks annotations or images.
        ValueError: If the splits do not have the same classes, or if the
            check found images that cannot be used.
        SetupError: If the config does not read COCO annotations, reads more
            than the folder holds, has no ``num_classes``, or trains masks
            that the folder does not have.
    """
    folder = Path(folder).expanduser().resolve()
    val = find_coco_split(folder, 'val', check)
    splits = dict(val=val, test=val)
    try:
        splits['train'] = train = find_coco_split(folder, 'train',
                                                  check and training)
    except FileNotFoundError:
        if training:
            raise
        train = val
    if train.classes != val.classes:
        raise ValueError(
            f'{train.ann_file} and {val.ann_file} must list the same '
            'categories in the same order, because labels are indices into '
            f'that list, but they list {train.classes} and {val.classes}')
    for said in dict.fromkeys(split.filled for split in splits.values()):
        if said:
            print_log(said, 'current')
    for name, split in splits.items():
        loader = cfg.get(f'{name}_dataloader')
        if loader is not None:
            _use_split(innermost_dataset(loader), f'{name}_dataloader', split)
    for name in ('val_evaluator', 'test_evaluator'):
        evaluators = cfg.get(name) or []
        if isinstance(evaluators, dict):
            evaluators = [evaluators]
        for evaluator in evaluators:
            if 'ann_file' in evaluator:
                evaluator.ann_file = str(val.ann_file)
    heads = list(_heads(cfg.get('model')))
    if not heads:
        raise SetupError(
            '--data: the model has no num_classes to set to '
            f'{len(val.classes)}. Use a detector whose head has num_classes, '
            'or write your own config')
    for head in heads:
        head.num_classes = len(val.classes)


def innermost_dataset(loader: ConfigDict) -> ConfigDict:
    """Return a loader's data set without wrappers that repeat or mix it."""
    data = loader.dataset
    while 'dataset' in data:
        data = data.dataset
    return data


def _use_split(data: ConfigDict, where: str, split: CocoSplit) -> None:
    kind = data.get('type')
    kind = kind if isinstance(kind, str) else getattr(kind, '__name__', kind)
    if kind not in ('CocoDataset', 'mmdet.CocoDataset'):
        raise SetupError(
            f'--data replaces one CocoDataset, but {where} reads a {kind}: '
            'use a config that reads only COCO boxes or masks')
    more = [k for k in ('proposal_file', 'seg_map_suffix') if data.get(k)]
    more += [k for k in data.get('data_prefix', {}) if k != 'img']
    if more:
        raise SetupError(
            f"--data: {where} reads more than images and annotations "
            f'({", ".join(more)}), which the folder does not have. Use a '
            'config without them')
    for transform in _transforms(data.get('pipeline', [])):
        if transform.get('with_mask') and not split.has_masks:
            raise SetupError(
                f'the config has masks ({where}: with_mask=True), but not '
                f'every object in {split.ann_file} has a segmentation: use a '
                'box detector, such as Faster R-CNN')
    data.update(
        data_root='',
        ann_file=str(split.ann_file),
        data_prefix=dict(img=f'{split.image_dir}/'),
        # The config's palette has COCO's number of colours.
        metainfo=dict(
            classes=split.classes,
            palette=[
                tuple(map(int, colour))
                for colour in get_palette('random', len(split.classes))
            ]))


def _transforms(node: Any) -> Iterator[dict]:
    """Yield the transforms of a pipeline, including nested ones."""
    if isinstance(node, (list, tuple)):
        for value in node:
            yield from _transforms(value)
    elif isinstance(node, dict):
        yield node
        for value in node.values():
            yield from _transforms(value)


def _heads(node: Any) -> Iterator[ConfigDict]:
    """Yield the parts of a model's config that have ``num_classes``.

    The RPN head is left out: it only separates objects from background.
    """
    if isinstance(node, (list, tuple)):
        for value in node:
            yield from _heads(value)
    elif isinstance(node, dict):
        if 'num_classes' in node:
            yield node
        for key, value in node.items():
            if key != 'rpn_head':
                yield from _heads(value)
