"""Faster and Mask R-CNN as one ONNX graph with standard operators."""
import math
from functools import reduce
from typing import Any, Dict, List, Sequence, Tuple

import torch
from mmcv.ops import RoIAlign
from mmcv.ops.nms import NMSop
from mmcv.ops.roi_align import RoIAlignFunction
from mmdet.models.dense_heads import RPNHead
from mmdet.models.detectors import TwoStageDetector
from mmdet.models.roi_heads import (ConvFCBBoxHead, FCNMaskHead,
                                    Shared2FCBBoxHead, Shared4Conv1FCBBoxHead,
                                    SingleRoIExtractor, StandardRoIHead)
from mmdet.models.task_modules import DeltaXYWHBBoxCoder
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox2roi
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import SetupError

# Supported detectors: allowed types of the parts and values of settings.
_ALLOWED = {
    'rpn_head': (RPNHead, ),
    'rpn_head.bbox_coder': (DeltaXYWHBBoxCoder, ),
    'rpn_head.test_cfg.nms.type': ('nms', None),
    'roi_head': (StandardRoIHead, ),
    'roi_head.shared_head': (None, ),
    'roi_head.bbox_roi_extractor': (SingleRoIExtractor, ),
    'roi_head.bbox_roi_extractor.roi_layers.0': (RoIAlign, ),
    'roi_head.bbox_head':
    (ConvFCBBoxHead, Shared2FCBBoxHead, Shared4Conv1FCBBoxHead),
    'roi_head.bbox_head.bbox_coder': (DeltaXYWHBBoxCoder, ),
    'roi_head.bbox_head.custom_cls_channels': (False, ),
    'roi_head.test_cfg.nms.type': ('nms', None),
    'roi_head.mask_roi_extractor': (SingleRoIExtractor, None),
    'roi_head.mask_roi_extractor.roi_layers.0': (RoIAlign, None),
    'roi_head.mask_head': (FCNMaskHead, None)
}
OUTPUTS = ('boxes', 'scores', 'labels', 'masks')
# First opset whose RoiAlign supports mmcv's coordinates.
_OPSET = 16


class TwoStage(nn.Module):
    """Faster or Mask R-CNN from one image to its detections.

    During an export it follows the steps of mmdet's ``predict``, without
    branches that depend on the detections. Otherwise it calls mmdet, so a
    comparison of the two is a comparison with mmdet.

    Args:
        detector (TwoStageDetector): Detector to export.

    Raises:
        SetupError: If the detector has parts that are not supported.
    """

    def __init__(self, detector: TwoStageDetector) -> None:
        super().__init__()
        _check_parts(detector)
        self.detector = detector

    @staticmethod
    def examples(shape: Sequence[int], dynamic: Sequence[str],
                 opset: int) -> List[Dict[str, Tensor]]:
        """Return two random inputs, one without and one with padding.

        Args:
            shape (Sequence[int]): Shape of the image, (1, 3, H, W).
            dynamic (Sequence[str]): Dynamic axes; must be empty.
            opset (int): Version of ONNX's operator set.

        Raises:
            SetupError: If the shape, the axes or the opset is not supported.
        """
        if dynamic or shape[0] != 1 or opset < _OPSET:
            raise SetupError(
                'a two-stage detector can only be exported for one image of a '
                f'fixed shape and opset {_OPSET} or above, but got {shape[0]} '
                f'images, dynamic axes [{", ".join(dynamic)}], opset {opset}')
        # Detectors detect objects in coloured squares, but not in noise.
        squares = torch.randn(
            (1, shape[1], *(-(-side // 32) for side in shape[2:])),
            generator=torch.Generator().manual_seed(0))
        image = F.interpolate(squares, tuple(shape[2:]))
        height, width = (side - side // 4 for side in shape[2:])
        padded = torch.zeros_like(image)
        padded[:, :, :height, :width] = image[:, :, :height, :width]
        return [
            dict(input=image, size=torch.tensor(shape[2:])),
            dict(input=padded, size=torch.tensor([height, width]))
        ]

    @staticmethod
    def onnx_names(outputs: Tuple[Tensor, ...]) -> Sequence[str]:
        """Return the names of the outputs."""
        return OUTPUTS[:len(outputs)]

    @staticmethod
    def onnx_difference(found: Dict[str, Tensor],
                        wanted: Dict[str, Tensor]) -> float:
        """Return the largest difference between detections in any order.

        Rounding decides between almost equal scores, and about overlaps near
        the threshold. So the 5% with the largest difference are left out.
        """
        counts = [len(outputs['boxes']) for outputs in (found, wanted)]
        if 0 in counts:
            return math.inf if any(counts) else 0.
        size = wanted['boxes'].max().clamp(min=1)
        rows = [
            torch.cat([
                (x / size if name == 'boxes' else x).reshape(len(x), -1)
                for name, x in outputs.items()
            ], 1) for outputs in (found, wanted)
        ]
        distances = torch.cdist(*rows, p=math.inf)
        nearest = torch.cat([distances.amin(0), distances.amin(1)])
        return nearest.quantile(0.95, interpolation='lower').item()

    def forward(self, image: Tensor, size: Tensor) -> Tuple[Tensor, ...]:
        """Detect objects in one image.

        Args:
            image (Tensor): Normalised image, (1, 3, H, W), padded with zeros
                at the right and the bottom.
            size (Tensor): Height and width without padding, (2, ), int64.

        Returns:
            tuple[Tensor]: For N detections: boxes (N, 4), scores (N, ),
            labels (N, ), and with a mask head masks (N, h, w).
        """
        head = self.detector.roi_head
        exporting = torch.onnx.is_in_onnx_export()
        features = self.detector.extract_feat(image)
        if exporting:
            limits = size.to(image).index_select(
                0, torch.tensor([1, 0, 1, 0]))
            regions = self._propose(features, limits)
            boxes, scores, labels = self._classify(features, regions, limits)
        else:
            boxes, scores, labels = self._predict(features, size)
        if not head.with_mask:
            return boxes, scores, labels
        if exporting:
            regions = _align(head.mask_roi_extractor, features, boxes)
            masks = head.mask_head(regions)[:-1]
        else:
            rois = bbox2roi([boxes])
            masks = head._mask_forward(features, rois)['mask_preds']
        if head.mask_head.class_agnostic:
            masks = masks[:, 0]
        else:
            masks = masks[torch.arange(labels.shape[0]), labels]
        return boxes, scores, labels, masks.sigmoid()

    def _predict(self, features: Sequence[Tensor],
                 size: Tensor) -> Tuple[Tensor, ...]:
        head, meta = self.detector.roi_head, dict(
            img_shape=tuple(size.tolist()))
        proposals = self.detector.rpn_head.predict(
            features, [DetDataSample(metainfo=meta)])
        [found] = head.predict_bbox(features, [meta], proposals, head.test_cfg)
        return found.bboxes, found.scores, found.labels

    def _propose(self, features: Sequence[Tensor], limits: Tensor) -> Tensor:
        """Return the RPN's boxes, computed as in RPNHead."""
        head = self.detector.rpn_head
        cfg = head.test_cfg
        outputs = list(zip(*head(features)))
        anchors = head.prior_generator.grid_priors(
            [[int(n) for n in logits.shape[2:]] for logits, _ in outputs],
            device=limits.device)
        found = []
        for level, (maps, priors) in enumerate(zip(outputs, anchors)):
            logits, deltas = (
                out[0].permute(1, 2, 0).reshape(len(priors), -1)
                for out in maps)
            scores = (
                logits.sigmoid()
                if head.use_sigmoid_cls else logits.softmax(1))[:, 0]
            if 0 < cfg.get('nms_pre', -1) < len(priors):
                scores, order = (
                    out[:cfg.nms_pre] for out in scores.sort(descending=True))
                deltas, priors = deltas[order], priors[order]
            found.append((scores, deltas, priors,
                          torch.full((len(priors), ), level)))
        scores, deltas, priors, levels = map(torch.cat, zip(*found))
        boxes = _clip(head.bbox_coder.decode(priors, deltas), limits)
        if cfg.get('min_bbox_size', -1) >= 0:
            large = boxes[:, 2:] - boxes[:, :2] > cfg.min_bbox_size
            kept = large.all(1).nonzero().squeeze(1)
            boxes, scores, levels = boxes[kept], scores[kept], levels[kept]
        return boxes[_nms(boxes, scores, levels, cfg)]

    def _classify(self, features: Sequence[Tensor], boxes: Tensor,
                  limits: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """Return the box head's detections, computed as in BBoxHead."""
        head, cfg = (self.detector.roi_head.bbox_head,
                     self.detector.roi_head.test_cfg)
        regions = _align(self.detector.roi_head.bbox_roi_extractor, features,
                         boxes)
        logits, deltas = (out[:-1] for out in head(regions))
        boxes = head.bbox_coder.decode(boxes, deltas)
        boxes = _clip(boxes.reshape(-1, deltas.shape[1] // 4, 4), limits)
        scores = logits.softmax(1)[:, :-1]
        rows, labels = (scores > cfg.score_thr).nonzero().unbind(1)
        boxes = boxes[rows, 0 if head.reg_class_agnostic else labels]
        scores = scores[rows, labels]
        kept = _nms(boxes, scores, labels, cfg)
        return boxes[kept], scores[kept], labels[kept]


def _clip(boxes: Tensor, limits: Tensor) -> Tensor:
    return torch.minimum(boxes.clamp(min=0), limits)


def _nms(boxes: Tensor, scores: Tensor, groups: Tensor, cfg: Any) -> Tensor:
    """Return the kept indices of NMS per group, as ``batched_nms``."""
    # The appended zero gives max() a value if there are no boxes.
    largest = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max()
    boxes = boxes + (groups.to(boxes) * (largest + 1))[:, None]
    return _NMS.apply(boxes, scores, cfg.nms.iou_threshold, 0, 0.,
                      cfg.max_per_img)


def _align(extractor: nn.Module, features: Sequence[Tensor],
           boxes: Tensor) -> Tensor:
    """Extract each box's features from its level, as SingleRoIExtractor.

    The last row belongs to an extra box. Without it there may be no rows, and
    operators that divide channels into groups fail on an empty input.
    """
    rois = F.pad(boxes, (1, 0, 0, 1))
    levels = extractor.map_roi_levels(rois, extractor.num_inputs)
    order, aligned = [], []
    for level, layer in enumerate(extractor.roi_layers):
        index = (levels == level).nonzero().squeeze(1)
        order.append(index)
        aligned.append(
            _RoIAlign.apply(features[level], rois[index], layer.output_size,
                            layer.spatial_scale, layer.sampling_ratio,
                            layer.pool_mode, layer.aligned))
    return torch.cat(aligned)[torch.cat(order).argsort()]


class _NMS(NMSop):
    """mmcv's NMS, exported as ONNX's NonMaxSuppression."""

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any, iou_threshold: float,
                 offset: int, score_threshold: float, most: int) -> Any:
        rows = g.op('NonMaxSuppression',
                    g.op('Unsqueeze', boxes, _constant(g, [0])),
                    g.op('Unsqueeze', scores, _constant(g, [0, 1])),
                    _constant(g, [most if most > 0 else 2**31 - 1]),
                    _constant(g, [iou_threshold]))
        # A row holds the indices of image, class and box.
        return g.op('Gather', rows, _constant(g, 2), axis_i=1)


class _RoIAlign(RoIAlignFunction):
    """mmcv's RoIAlign, exported as ONNX's RoiAlign."""

    @staticmethod
    def symbolic(g: Any, feature: Any, rois: Any, size: Tuple[int, int],
                 scale: float, samples: int, mode: str, aligned: bool) -> Any:
        image = g.op('Gather', rois, _constant(g, 0), axis_i=1)
        boxes = g.op('Gather', rois, _constant(g, [1, 2, 3, 4]), axis_i=1)
        return g.op(
            'RoiAlign',
            feature,
            boxes,
            g.op('Cast', image, to_i=torch.onnx.TensorProtoDataType.INT64),
            coordinate_transformation_mode_s=(
                'half_pixel' if aligned else 'output_half_pixel'),
            mode_s=mode,
            output_height_i=size[0],
            output_width_i=size[1],
            sampling_ratio_i=max(samples, 0),
            spatial_scale_f=scale)


def _constant(g: Any, value: Any) -> Any:
    return g.op('Constant', value_t=torch.tensor(value))


def _check_parts(detector: TwoStageDetector) -> None:
    """Refuse a detector that the export would compute unlike mmdet.

    Raises:
        SetupError: If a part or setting is not supported. It names the part.
    """
    for path, allowed in _ALLOWED.items():
        found = reduce(lambda part, name: getattr(part, name, None),
                       path.split('.'), detector)
        if found not in allowed and type(found) not in allowed:
            plain = found is None or isinstance(found, (bool, str))
            name = repr(found) if plain else type(found).__name__
            raise _unsupported(detector, f'{path} is {name}')
    for part in ('rpn_head', 'roi_head'):
        nms = getattr(detector, part).test_cfg.nms
        for key in set(nms) - {'type', 'iou_threshold'}:
            raise _unsupported(
                detector, f'{part}.test_cfg.nms has {key}={nms[key]!r}')


def _unsupported(detector: TwoStageDetector, what: str) -> SetupError:
    return SetupError(
        'the only two-stage detectors to export are Faster and Mask R-CNN '
        f'with plain NMS, but in this {type(detector).__name__} {what}. Export '
        'its parts: backbone and neck as nn.Sequential, and its heads')
