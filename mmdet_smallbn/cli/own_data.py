"""Point any config at a COCO-format folder of the user's."""
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
    """Write files, classes and the heads' number of classes to a config.

    Training reads the folder's training images, validation and testing its
    validation images.

    Args:
        cfg (Config): Of a detector on COCO.
        folder (str | Path): As :func:`find_coco_split` takes it.
        training (bool): Whether the training images must be there. False:
            they are taken if they are, for what a test gathers from them.
        check (bool): Whether to look into every image.

    Raises:
        FileNotFoundError: If the folder lacks annotations or images.
        ValueError: If the splits do not have the same classes, or images
            were looked into and cannot be used.
        SetupError: If the config does not read COCO annotations, or more than
            they hold, has no classes to set, or trains masks that are not
            there.
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
            f'{train.ann_file} and {val.ann_file} do not have the same '
            'categories in the same order, which labels are numbers in: '
            f'{train.classes} and {val.classes}')
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
            f'{len(val.classes)}. Take a detector whose head has one, or '
            'write a config of your own')
    for head in heads:
        head.num_classes = len(val.classes)


def innermost_dataset(loader: ConfigDict) -> ConfigDict:
    """The data set that a loader reads, out of what repeats or mixes it."""
    data = loader.dataset
    while 'dataset' in data:
        data = data.dataset
    return data


def _use_split(data: ConfigDict, where: str, split: CocoSplit) -> None:
    kind = data.get('type')
    kind = kind if isinstance(kind, str) else getattr(kind, '__name__', kind)
    if kind not in ('CocoDataset', 'mmdet.CocoDataset'):
        raise SetupError(
            f'--data takes the place of one CocoDataset, but {where} reads a '
            f'{kind}: take a config that trains on COCO boxes or masks alone')
    more = [k for k in ('proposal_file', 'seg_map_suffix') if data.get(k)]
    more += [k for k in data.get('data_prefix', {}) if k != 'img']
    if more:
        raise SetupError(
            f"--data: {where} reads more than images and annotations "
            f'({", ".join(more)}), which the folder does not have. Take a '
            'config without')
    for transform in _transforms(data.get('pipeline', [])):
        if transform.get('with_mask') and not split.has_masks:
            raise SetupError(
                f'the config has masks ({where}: with_mask=True), but not '
                f'every object in {split.ann_file} has a segmentation: take a '
                'detector of boxes, such as Faster R-CNN')
    data.update(
        data_root='',
        ann_file=str(split.ann_file),
        data_prefix=dict(img=f'{split.image_dir}/'),
        # COCO's colours are for COCO's number of classes.
        metainfo=dict(
            classes=split.classes,
            palette=[
                tuple(map(int, colour))
                for colour in get_palette('random', len(split.classes))
            ]))


def _transforms(node: Any) -> Iterator[dict]:
    """The transforms of a pipeline, those within others too."""
    if isinstance(node, (list, tuple)):
        for value in node:
            yield from _transforms(value)
    elif isinstance(node, dict):
        yield node
        for value in node.values():
            yield from _transforms(value)


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
