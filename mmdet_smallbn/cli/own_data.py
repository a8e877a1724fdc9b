"""Point any config at a COCO-format folder of the user's."""
from pathlib import Path
from typing import Any, Iterator, Tuple, Union

from mmengine.config import Config, ConfigDict

from ..data.coco_folder import CocoSplit, find_coco_split
from ..errors import SetupError


def use_data(cfg: Config,
             folder: Union[str, Path]) -> Tuple[CocoSplit, CocoSplit]:
    """Write files, classes and the heads' number of classes to a config.

    Training reads the folder's training images, validation and testing its
    validation images.

    Args:
        cfg (Config): Of a detector on COCO.
        folder (str | Path): As :func:`find_coco_split` takes it.

    Returns:
        tuple[CocoSplit, CocoSplit]: The training and validation split.

    Raises:
        FileNotFoundError: If the folder lacks annotations or images.
        ValueError: If the splits do not have the same classes.
        SetupError: If the config does not read COCO annotations, has no
            classes to set, or trains masks that the annotations lack.
    """
    train, val = (find_coco_split(folder, name) for name in ('train', 'val'))
    if train.classes != val.classes:
        raise ValueError(
            f'{train.ann_file} and {val.ann_file} do not have the same '
            f'categories: {train.classes} and {val.classes}')
    for name, split in (('train', train), ('val', val), ('test', val)):
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
    heads = list(_heads(cfg.model))
    if not heads:
        raise SetupError('--data: the model has no num_classes to set to '
                         f'{len(train.classes)}')
    for head in heads:
        head.num_classes = len(train.classes)
    return train, val


def innermost_dataset(loader: ConfigDict) -> ConfigDict:
    """The data set that a loader reads, out of what repeats or mixes it."""
    data = loader.dataset
    while 'dataset' in data:
        data = data.dataset
    return data


def _use_split(data: ConfigDict, where: str, split: CocoSplit) -> None:
    if data.get('type') != 'CocoDataset':
        raise SetupError(f'--data replaces a CocoDataset, but {where} reads '
                         f'{data.get("type")}: take a config on COCO')
    for transform in data.pipeline:
        if transform.get('with_mask') and not split.has_masks:
            raise SetupError(
                f'the config has masks ({where}: with_mask=True), but not '
                f'every object in {split.ann_file} has a segmentation: take a '
                'detector of boxes, such as Faster R-CNN')
    data.update(
        data_root='',
        ann_file=str(split.ann_file),
        data_prefix=dict(img=f'{split.image_dir}/'),
        metainfo=dict(classes=split.classes))


def _heads(node: Any) -> Iterator[ConfigDict]:
    """Parts of a model's config that know the number of classes.

    Not a region proposal head: it tells objects from none.
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
