"""Conversion of checkpoints of the papers' released code to mmdet 3.x.

The rules were derived from the code of public repositories: the norm,
backbone, heads and configs of Howal/Cross-iterationBatchNorm (a fork of
mmdetection from before 1.0) and of megvii-model/MABN (``det/``, a patch over
facebookresearch/maskrcnn-benchmark, and ``cls/``), and mmdetection's
``tools/model_converters/upgrade_model_version.py``. The released checkpoints
were not available, so the rules are not tested on them. Even the keys of
``R50-wc.pth``, MABN's ImageNet weights for detection, are unknown; the module
assumes the layout of ``cls/``.

Classes: both detectors have the background as the first class. In mmdet 3.x
the background is last among the scores and has no boxes or masks. The
conversion moves its row to the end of the scores, and removes its rows from
boxes and masks, in weight and bias (mmdetection's own tool keeps the first
rows of the bias instead). Sigmoid heads (RPN, RetinaNet) have no background
and do not change. In an RPN with softmax the two rows of each anchor are
exchanged.

Norms: the released CBN has only the running buffers. Its checkpoints contain
neither the window nor ``num_batches_tracked``; a norm without this key is
CBN, a norm with it is BatchNorm. The released CBN divides by ``sqrt(var) +
eps``, also in training, unless it has ``out_p=True``. This package divides by
``sqrt(var + eps)``. ``match_eps`` multiplies the scales by the quotient, so
that evaluation equals that of the released code. The released MABN stores the
mean square as ``running_var`` with shape (1, C, 1, 1), has no
``running_mean``, and counts iterations. Its momentum of 0.98 is not in the
state dict, and is 0.02 in this package. FrozenBatchNorm2d of
maskrcnn-benchmark has no eps; the conversion ignores this difference.

:attr:`Conversion.notes` lists settings that the state dict does not contain
and the config must have. maskrcnn-benchmark rounds anchors before it scales
them to their size, unlike all generators of mmdet. On the first levels the
sides of the anchors differ by up to about 6 % from those of mmdet.
"""
import re
from dataclasses import dataclass, field
from typing import Dict, List, Optional, Tuple

import torch
from torch import Tensor

from ..errors import SetupError
from ..words import some
from .state_dict import StateDict

MMDET1 = 'mmdet1'
BENCHMARK = 'maskrcnn-benchmark'
IMAGENET = 'mabn-imagenet'
LAYOUTS = (MMDET1, BENCHMARK, IMAGENET)

_EPS = 1e-5  # in the configs of both releases
_AVERAGES = ('buffer_x2', 'buffer_gz', 'pre_x2', 'pre_gz', 'sta_matrix')
_REFILLED = ("MABN's averages over the last iterations, which fill again in "
             'training')
_OLD_BOXES = (
    'the released code uses other conventions for boxes, anchors and regions '
    'of interest. Use LegacyAnchorGenerator, LegacyDeltaXYWHBBoxCoder and '
    "RoIAlign with aligned=False, as in mmdet's configs/legacy_1.x")
_BGR = 'bgr_to_rgb=False, std=[1, 1, 1] and mean='
_NOTES = {
    MMDET1: [_OLD_BOXES],
    BENCHMARK: [
        _OLD_BOXES + ' (small differences of the anchors remain)',
        "set backbone.style='caffe', unless STRIDE_IN_1X1 was False, and in "
        f'data_preprocessor {_BGR}[102.9801, 115.9465, 122.7717]'
    ],
    IMAGENET: [
        "set backbone.style='pytorch'. The released code uses BGR images from "
        f'0 to 255, so set in data_preprocessor {_BGR}[0, 0, 0]'
    ],
}


@dataclass
class Conversion:
    """State dict of mmdet 3.x, with a record of the changes.

    Attributes:
        state_dict: State dict for a model of mmdet 3.x.
        became: Old key, new key, and the change of the value, if any.
        dropped: Removed keys by reason; mmdet does not have them.
        added: Keys that the released code does not have.
        notes: Settings that the config needs, and remaining differences.
    """
    state_dict: StateDict = field(default_factory=dict)
    became: List[Tuple[str, str, str]] = field(default_factory=list)
    dropped: Dict[str, List[str]] = field(default_factory=dict)
    added: List[str] = field(default_factory=list)
    notes: List[str] = field(default_factory=list)

    def put(self, old: str, new: str, value: Tensor, done: str = '') -> None:
        if new in self.state_dict:
            raise SetupError(f'{old} and another key both become {new}. The '
                             'checkpoint mixes several layouts')
        self.state_dict[new] = value
        self.became.append((old, new, done))

    def drop(self, key: str, reason: str) -> None:
        self.dropped.setdefault(reason, []).append(key)


def layout_of(state: StateDict, meta: Optional[dict] = None) -> Optional[str]:
    """Find the layout of a state dict from its keys.

    Args:
        state (dict): State dict from :func:`find_state_dict`.
        meta (dict, optional): ``meta`` of the checkpoint. Its version of
            mmdet decides for RetinaNet, whose keys are the same in mmdet 1.x.

    Returns:
        str, optional: One of ``LAYOUTS``. None: the layout of torchvision or
        of mmdet 2.x and 3.x, which needs no conversion.

    Raises:
        SetupError: If the layout is unknown.
    """

    def has(*prefixes: str) -> bool:
        return any(key.startswith(prefixes) for key in state)

    if has('backbone.body.', 'roi_heads.'):
        return BENCHMARK
    if 'bn1.running_var' in state and 'bn1.running_mean' not in state:
        return IMAGENET
    version = str((meta or {}).get('mmdet_version', ''))
    if not has('roi_head.') and has('bbox_head.') and (
            has('rpn_head.', 'bbox_head.fc_cls.', 'bbox_head.0.')
            or version.startswith(('0.', '1.'))):
        return MMDET1
    if has('backbone.', 'roi_head.') or has('conv1.') and has('layer1.0.'):
        return None
    raise SetupError(
        f'its layout is not known. Its keys are {some(list(state))}. If it is '
        f'one of {", ".join(LAYOUTS)}, set it with --layout. Otherwise rename '
        'the keys to those of mmdet')


def convert(state: StateDict,
            layout: str,
            match_eps: bool = False) -> Conversion:
    """Convert a released state dict to the layout of mmdet 3.x.

    Args:
        state (dict): State dict from :func:`find_state_dict`. It does not
            change.
        layout (str): One of ``LAYOUTS``.
        match_eps (bool): Change the scales of CBN so that evaluation equals
            that of the released code, which adds eps outside the root.

    Returns:
        Conversion: The new state dict, with unchanged dtypes.

    Raises:
        SetupError: If the keys or shapes do not fit the layout.
    """
    result = Conversion(notes=list(_NOTES[layout]))
    {
        MMDET1: _convert_mmdet1,
        BENCHMARK: _convert_benchmark,
        IMAGENET: _convert_imagenet
    }[layout](result, state)
    if layout == MMDET1:
        _handle_eps(result, match_eps)
    elif match_eps:
        raise SetupError('--match-eps is for the released CBN, but the layout '
                         f'is {layout}. Remove the flag')
    _complete_norms(result, with_means=layout != MMDET1)
    return result


# mmdetection 1.x.

_ROI_HEADS = ('bbox_head', 'mask_head', 'semantic_head', 'grid_head',
              'mask_iou_head')


def _convert_mmdet1(result: Conversion, state: StateDict) -> None:
    newer = [key for key in state if key.startswith('roi_head.')]
    if newer:
        raise SetupError(f'it has {some(newer, 1)}, a key of mmdet 2.x and '
                         '3.x: it loads as it is')
    scores = [
        key for key in state if re.fullmatch(r'.*\bfc_cls\.weight', key)
    ]
    one_stage = not scores and any(
        key.startswith('bbox_head.') for key in state)
    if one_stage and 'bbox_head.retina_cls.weight' not in state:
        raise SetupError(
            'only RetinaNet is supported among the one-stage detectors of '
            'mmdet 1.x, but found '
            f'{some([k for k in state if k.startswith("bbox_head.")])}')
    rows = state[scores[0]].shape[0] if scores else 0
    for key, value in state.items():
        new, done = key, ''
        if one_stage:
            # Up to mmdet 0.5.3 they were convolutions without ConvModule.
            new = re.sub(r'^(bbox_head\.(?:cls|reg)_convs\.\d+)\.'
                         r'(?=(?:weight|bias)$)', r'\1.conv.', key)
        elif key.split('.')[0] in _ROI_HEADS:
            new = f'roi_head.{key}'
        leaf = key.split('.')[-2] if '.' in key else ''
        if leaf == 'fc_cls':
            value, done = _background_last(key, value, rows)
        elif leaf == 'fc_reg':
            value, done = _without_background(key, value, rows, 4)
        elif leaf == 'conv_logits' and rows:
            value, done = _without_background(key, value, rows, 1)
        elif leaf == 'rpn_cls':
            boxes = state.get(key.replace('rpn_cls', 'rpn_reg'))
            if boxes is not None and 2 * len(value) == len(boxes):
                value = value.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
                done = "each anchor's background last"
        result.put(key, new, value, done)


def _background_last(key: str, value: Tensor,
                     rows: int) -> Tuple[Tensor, str]:
    if len(value) != rows:
        raise _wrong_rows(key, value, f'{rows}')
    return torch.cat([value[1:], value[:1]]), 'background last'


def _without_background(key: str, value: Tensor, rows: int,
                        width: int) -> Tuple[Tensor, str]:
    """Remove the background's rows, unless all classes share their rows."""
    if len(value) == width * rows:
        return value[width:].clone(), 'background removed'
    if len(value) == width:
        return value, ''
    raise _wrong_rows(key, value, f'{width * rows} or {width}')


def _wrong_rows(key: str, value: Tensor, wanted: str) -> SetupError:
    return SetupError(
        f'{key} has {len(value)} rows, but {wanted} fit the class scores, '
        'background included. Was it converted before?')


def _handle_eps(result: Conversion, match: bool) -> None:
    """Match the released CBN's eps, or note how much it changes outputs."""
    state, largest, count = result.state_dict, 0., 0
    for key in [k for k in state if k.endswith('.running_var')]:
        name = key.rpartition('.')[0]
        if f'{name}.num_batches_tracked' in state:
            continue  # a BatchNorm
        var = state[key].double()
        quotient = (var + _EPS).sqrt() / (var.sqrt() + _EPS)
        largest = max(largest, (1 - 1 / quotient).abs().max().item())
        count += 1
        scale = state.get(f'{name}.weight')
        if match and scale is not None:
            state[f'{name}.weight'] = (scale.double() * quotient).to(
                scale.dtype)
    if match and not count:
        raise SetupError('--match-eps: there is no CBN. Every norm counts its '
                         'batches, as BatchNorm does. Remove the flag')
    if match:
        result.notes.append(
            f'the scales of {count} CBN layers compensate for the position of '
            'eps')
    elif count:
        result.notes.append(
            'the released CBN divides by sqrt(var) + eps, this package by '
            f'sqrt(var + eps). The outputs of {count} norms differ by up to '
            f'{largest:.2%}. --match-eps removes the difference')


# maskrcnn-benchmark with MABN's patch.

_BOX = 'roi_heads.box.'
_MASK = 'roi_heads.mask.'
_MODULES = {
    'rpn.head.conv': 'rpn_head.rpn_conv',
    'rpn.head.cls_logits': 'rpn_head.rpn_cls',
    'rpn.head.bbox_pred': 'rpn_head.rpn_reg',
    f'{_BOX}feature_extractor.fc6': 'roi_head.bbox_head.shared_fcs.0',
    f'{_BOX}feature_extractor.fc7': 'roi_head.bbox_head.shared_fcs.1',
    f'{_BOX}predictor.cls_score': 'roi_head.bbox_head.fc_cls',
    f'{_BOX}predictor.bbox_pred': 'roi_head.bbox_head.fc_reg',
    f'{_MASK}predictor.conv5_mask': 'roi_head.mask_head.upsample',
    f'{_MASK}predictor.mask_fcn_logits': 'roi_head.mask_head.conv_logits',
}
# Modules of a convolution, or of a convolution and a norm.
_PAIRS = (
    (r'backbone\.fpn\.fpn_inner(\d+)', 'neck.lateral_convs'),
    (r'backbone\.fpn\.fpn_layer(\d+)', 'neck.fpn_convs'),
    (r'roi_heads\.mask\.feature_extractor\.mask_fcn(\d+)',
     'roi_head.mask_head.convs'),
)
_BODY = re.compile(r'backbone\.body\.(?:stem\.(?=conv1$|bn1$)|(?=layer\d\.))'
                   r'(.+)')
_XCONVS = re.compile(r'roi_heads\.box\.feature_extractor\.xconvs\.(\d+)')


def _convert_benchmark(result: Conversion, state: StateDict) -> None:
    scores = state.get(f'{_BOX}predictor.cls_score.weight')
    rows = 0 if scores is None else len(scores)
    convs = sorted(
        int(match[1])
        for match in map(_XCONVS.match, state)
        if match and match.string == f'{match[0]}.weight'
        and _is_filter(state, match[0]))
    unknown = []
    for key, value in state.items():
        module, _, leaf = key.rpartition('.')
        if key.startswith('rpn.anchor_generator.'):
            result.drop(key, 'anchors, which the config defines')
            continue
        if _drop_averages(result, key):
            continue
        new = _benchmark_module(state, module, convs)
        if new is None:
            unknown.append(key)
            continue
        done = ''
        if new == 'roi_head.bbox_head.fc_cls':
            value, done = _background_last(key, value, rows)
        elif new == 'roi_head.bbox_head.fc_reg':
            # If the classes share one box, the background has one, too.
            if len(value) == 8:
                value, done = value[4:].clone(), 'background removed'
            else:
                value, done = _without_background(key, value, rows, 4)
        elif new == 'roi_head.mask_head.conv_logits':
            value, done = _without_background(key, value, rows, 1)
        _put_of_norm(result, state, key, f'{new}.{leaf}', value, done)
    if unknown:
        raise SetupError(
            f'no rule for {some(unknown)}. Supported are Faster and Mask '
            'R-CNN with ResNet, FPN and 4conv1fc or 2fc heads, as in the '
            "released MABN's configs")
    _fold_stem_bias(result)


def _is_filter(state: StateDict, module: str) -> bool:
    """Return True for a convolution: a norm has shape (C,) or (1, C, 1, 1)."""
    weight = state.get(f'{module}.weight')
    return (weight is not None and weight.dim() == 4
            and f'{module}.running_var' not in state)


def _norm_name(state: StateDict, module: str) -> str:
    return 'bn' if f'{module}.running_var' in state else 'gn'


def _benchmark_module(state: StateDict, module: str,
                      convs: List[int]) -> Optional[str]:
    """Return mmdet's name of a module; None if there is none."""
    if module in _MODULES:
        return _MODULES[module]
    match = _BODY.fullmatch(module)
    if match:
        return f'backbone.{match[1]}'
    match = _XCONVS.fullmatch(module)
    if match and any(i <= int(match[1]) for i in convs):
        # One sequence repeats convolution, norm (if any) and ReLU.
        place = sum(i <= int(match[1]) for i in convs) - 1
        part = 'conv' if int(match[1]) in convs else _norm_name(state, module)
        return f'roi_head.bbox_head.shared_convs.{place}.{part}'
    for pattern, new in _PAIRS:
        match = re.fullmatch(rf'{pattern}(?:\.([01]))?', module)
        if match:
            part = _norm_name(state, module) if match[2] == '1' else 'conv'
            return f'{new}.{int(match[1]) - 1}.{part}'
    return None


def _drop_averages(result: Conversion, key: str) -> bool:
    """Drop a key of MABN's averages; return True if it was one."""
    if key.rpartition('.')[2] not in _AVERAGES:
        return False
    result.drop(key, _REFILLED)
    return True


def _put_of_norm(result: Conversion, state: StateDict, key: str, new: str,
                 value: Tensor, done: str) -> None:
    """Add a key; give those of norms BatchNorm's names and shapes."""
    module, _, leaf = key.rpartition('.')
    if f'{module}.running_var' in state:
        if leaf == 'iters':
            new = new[:-len('iters')] + 'num_batches_tracked'
            value, done = value.long().reshape(()), 'counts the batches'
        elif value.dim() == 4:
            value, done = value.flatten(), f'{tuple(value.shape)} flattened'
    result.put(key, new, value, done)


def _fold_stem_bias(result: Conversion) -> None:
    """Fold the bias of the SyncBN baseline's conv1, which mmdet lacks."""
    state = result.state_dict
    mean = state.get('backbone.bn1.running_mean')
    if mean is None or 'backbone.conv1.bias' not in state:
        return
    state['backbone.bn1.running_mean'] = mean - state.pop(
        'backbone.conv1.bias').to(mean.dtype)
    result.drop('backbone.body.stem.conv1.bias',
                'subtracted from the running mean of bn1 instead')
    result.became = [b for b in result.became if b[1] != 'backbone.conv1.bias']


# ImageNet models of MABN's cls/.


def _convert_imagenet(result: Conversion, state: StateDict) -> None:
    unknown = []
    for key, value in state.items():
        if key.startswith('fc.'):
            result.drop(key, "ImageNet's classifier")
        elif not re.match(r'(conv1|bn1|layer\d\.\d+)\.', key):
            unknown.append(key)
        elif not _drop_averages(result, key):
            _put_of_norm(result, state, key, f'backbone.{key}', value, '')
    if unknown:
        raise SetupError(f'no rule for {some(unknown)}. Supported are ResNets')


def _complete_norms(result: Conversion, with_means: bool) -> None:
    """Add the buffers of mmdet's norms that the released norms lack."""
    state: StateDict = {}
    old = result.state_dict
    for key, value in old.items():
        state[key] = value
        name, _, leaf = key.rpartition('.')
        if leaf != 'running_var':
            continue
        buffers = dict(
            num_batches_tracked=torch.zeros((), dtype=torch.long))
        if with_means:
            buffers['running_mean'] = torch.zeros_like(value)
        for buffer, zeros in buffers.items():
            if f'{name}.{buffer}' not in old:
                state[f'{name}.{buffer}'] = zeros
                result.added.append(f'{name}.{buffer}')
    result.state_dict = state
