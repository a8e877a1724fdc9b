"""Small FCOS detector of mmdet for the study's plain training loop."""
import io
from contextlib import redirect_stdout
from typing import List

import mmdet.models  # noqa: F401
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from ..benchmark.classifier import KINDS
from .examples import Examples


def build_detector(norm: dict) -> nn.Module:
    """Build FCOS on three stages of a thin ResNet-18, with one level."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(ConfigDict(
            type='FCOS',
            backbone=dict(
                type='ResNet', depth=18, base_channels=16, num_stages=3,
                strides=(1, 1, 1), dilations=(1, 1, 1), out_indices=(2, ),
                frozen_stages=-1, norm_eval=False, **norm),
            neck=None,
            bbox_head=dict(
                type='FCOSHead', num_classes=len(KINDS), in_channels=64,
                feat_channels=32, stacked_convs=2, strides=(4, ),
                regress_ranges=((-1, 1e8), ), center_sampling=True,
                norm_on_bbox=True, centerness_on_reg=True,
                loss_bbox=dict(type='GIoULoss', loss_weight=1.), **norm),
            test_cfg=dict(
                nms_pre=200, score_thr=0.05, max_per_img=50,
                nms=dict(type='nms', iou_threshold=0.6))))
    model.init_weights()
    return model


def _samples(examples: Examples) -> List[DetDataSample]:
    shape = tuple(examples.pixels.shape[-2:])
    samples = []
    for labels in examples.labels:
        found = labels[labels[:, 4] >= 0]
        sample = DetDataSample(metainfo=dict(
            img_shape=shape, ori_shape=shape, batch_input_shape=shape,
            scale_factor=(1., 1.)))
        sample.gt_instances = InstanceData(
            bboxes=found[:, :4], labels=found[:, 4].long())
        samples.append(sample)
    return samples


def detection_loss(model: nn.Module, examples: Examples) -> Tensor:
    """Return the sum of FCOS's three losses."""
    return sum(model.loss(examples.pixels, _samples(examples)).values())


def _coco(examples: Examples) -> COCO:
    annotations = []
    for image, labels in enumerate(examples.labels):
        for x1, y1, x2, y2, label in labels[labels[:, 4] >= 0].tolist():
            annotations.append(dict(
                id=len(annotations) + 1, image_id=image, iscrowd=0,
                category_id=int(label), bbox=[x1, y1, x2 - x1, y2 - y1],
                area=(x2 - x1) * (y2 - y1)))
    coco = COCO()
    coco.dataset = dict(
        info={}, images=[dict(id=i) for i in range(len(examples.labels))],
        annotations=annotations,
        categories=[dict(id=i, name=n) for i, n in enumerate(KINDS)])
    coco.createIndex()
    return coco


@torch.no_grad()
def average_precision(model: nn.Module, examples: Examples) -> float:
    """Return COCO's box AP, from 0 to 1."""
    model.eval()
    rows = []
    for start in range(0, len(examples.labels), 50):
        batch = examples.of(
            torch.arange(start, min(start + 50, len(examples.labels))))
        for image, sample in enumerate(
                model.predict(batch.pixels, _samples(batch), rescale=False),
                start):
            found = sample.pred_instances
            for (x1, y1, x2, y2), score, label in zip(
                    found.bboxes.tolist(), found.scores.tolist(),
                    found.labels.tolist()):
                rows.append(dict(
                    image_id=image, category_id=label, score=score,
                    bbox=[x1, y1, x2 - x1, y2 - y1]))
    if not rows:
        return 0.
    with redirect_stdout(io.StringIO()):
        truth = _coco(examples)
        judge = COCOeval(truth, truth.loadRes(rows), 'bbox')
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return float(judge.stats[0])
