"""The norms in modules of mmdet and mmcv, beside BatchNorm in the same.

What holds for every module with a ``norm_cfg``: it builds and initialises as
with BatchNorm, state dicts load both ways, evaluation and burn-in are
BatchNorm's, frozen norms do not move. In training every norm does what it is
for, or is one of those that are known not to.
"""
import copy
import functools
import logging
import re
import warnings
from typing import Dict, List, NamedTuple, Optional

import pytest
import torch
from mmcv.cnn import ConvModule, DepthwiseSeparableConvModule, NonLocal2d
from mmdet.models.backbones import Darknet, EfficientNet
from mmdet.models.backbones.trident_resnet import TridentConv
from mmdet.models.dense_heads import (condinst_head, corner_head,
                                      rtmdet_ins_head, solov2_head)
from mmdet.models.layers import PixelDecoder
from mmdet.models.necks import dilated_encoder
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from mmdet_smallbn.layers import SmallBatchNorm

pytestmark = [
    pytest.mark.filterwarnings('ignore:.*loaded the statistics'),
    pytest.mark.filterwarnings('ignore:.*follows no convolution'),
    pytest.mark.filterwarnings('ignore:.*called several times')
]

# Momenta are BatchNorm's, where running statistics are to be its too.
NORM_CFGS = {
    'BN': dict(type='BN'),
    'CBN': dict(type='CBN'),
    'NaiveCBN': dict(type='NaiveCBN'),
    'MABN': dict(type='MABN'),
    'CmBN': dict(type='CmBN'),
    'BRN': dict(type='BRN', momentum=0.1),
    'BGN': dict(type='BGN', num_groups=4),
    'GhostBN': dict(type='GhostBN', ghost_size=1)
}
# MABN's evaluation divides by the mean square, BGN's averages groups.
STOCK_EVALUATION = {'CBN', 'CmBN', 'NaiveCBN', 'BRN', 'GhostBN'}

NORM = object()  # In a config: the norm_cfg.


@pytest.fixture(autouse=True, scope='module')
def _quiet():
    """No line of log for every parameter that is initialised."""
    logging.disable(logging.INFO)
    yield
    logging.disable(logging.NOTSET)


class Case(NamedTuple):
    """A module of the toolboxes.

    Attributes:
        cfg (dict): Of the module.
        inputs (tuple): Shape, or list of shapes, of every argument.
        alone (str): Pattern of the norms that follow no convolution, which
            CBN normalises with the present batch.
        shared (str): Pattern of those that are called several times in an
            iteration.
    """
    cfg: dict
    inputs: tuple
    alone: str = ''
    shared: str = ''


def _module(kind, *inputs, alone='', shared='', **cfg):
    return Case(
        dict(dict(type=kind, norm_cfg=NORM), **cfg), inputs, alone, shared)


def _backbone(kind, **cfg):
    return _module(kind, (2, 3, 32, 32), **cfg)


def _resnet(kind='ResNet', **cfg):
    """Of the first two stages of 50 layers."""
    return _backbone(
        kind,
        **dict(
            dict(
                depth=50,
                base_channels=8,
                num_stages=2,
                strides=(1, 2),
                dilations=(1, 1),
                out_indices=(0, 1),
                norm_eval=False), **cfg))


def _maps(*channels, size=16):
    """Levels of a pyramid, each of half the size of the one before."""
    return [(2, c, size >> i, size >> i) for i, c in enumerate(channels)]


def _neck(kind, *channels, size=16, **cfg):
    return _module(
        kind, _maps(*channels, size=size),
        **dict(dict(in_channels=list(channels), out_channels=8), **cfg))


def _head(kind, levels=2, size=16, **cfg):
    """A head of two convolutions on some levels."""
    return _module(
        kind, _maps(*[8] * levels, size=size),
        **dict(
            dict(
                num_classes=3, in_channels=8, feat_channels=8,
                stacked_convs=2), **cfg))


def _roi_head(kind, arguments=1, size=7, **cfg):
    return _module(
        kind, *[(3, 8, size, size)] * arguments,
        **dict(dict(in_channels=8, conv_out_channels=8, num_classes=3), **cfg))


def _semantic_head(kind, **cfg):
    return _module(
        kind, _maps(8, 8),
        **dict(
            dict(
                in_channels=8, conv_out_channels=8, num_convs=2,
                num_classes=3), **cfg))


def _block(kind, **cfg):
    return _module(kind, (2, 8, 6, 6), in_channels=8, **cfg)


def _conv(**cfg):
    return _block(ConvModule, out_channels=8, kernel_size=3, **cfg)


def _hrnet_stage(branches):
    return dict(
        num_modules=1,
        num_branches=branches,
        block='BOTTLENECK' if branches == 1 else 'BASIC',
        num_blocks=(1, ) * branches,
        num_channels=(8, 12, 16, 20)[:branches])


def _fpg_path(kind, **cfg):
    return dict(
        type=kind,
        norm_cfg=NORM,
        order=('act', 'conv', 'norm'),
        inplace=False,
        **cfg)


class NarrowDarknet(Darknet):
    arch_settings = {
        53: ((1, 1, 2, 1, 1), ((32, 8), (8, 8), (8, 16), (16, 16), (16, 24)))
    }


class NarrowEfficientNet(EfficientNet):
    layer_settings = {
        'b': [[[3, 8, 0, 2, 0, -1]], [[3, 8, 4, 1, 1, 0]],
              [[3, 8, 4, 2, 6, 0], [3, 8, 4, 1, 6, 0]], [[1, 16, 0, 1, 0, -1]]]
    }


DCN = dict(type='DCNv2', deform_groups=2)
ANCHORS = dict(
    type='AnchorGenerator', ratios=[1.], scales=[8], strides=[8, 16])
OCTAVES = dict(
    type='AnchorGenerator',
    ratios=[.5, 1., 2.],
    octave_base_scale=8,
    scales_per_octave=3,
    strides=[8, 16])
POINTS = dict(type='MlvlPointGenerator', strides=[8, 16])
TOWERS = r'(cls|reg)_convs\..*'

CASES = {
    # Backbones.
    'ResNet-18':
    _resnet(depth=18),
    'ResNet, caffe':
    _resnet(style='caffe'),
    'ResNetV1d':
    _resnet('ResNetV1d', stem_channels=8),
    'ResNet, deformable':
    _resnet(dcn=DCN, stage_with_dcn=(False, True)),
    'ResNet, plugins':
    _resnet(plugins=[
        dict(
            cfg=dict(type='NonLocal2d', norm_cfg=NORM),
            stages=(False, True),
            position='after_conv2'),
        dict(
            cfg=dict(type='ContextBlock', ratio=0.25),
            stages=(True, True),
            position='after_conv3')
    ]),
    'ResNeXt':
    _resnet('ResNeXt', groups=2, base_width=8),
    'Res2Net':
    _resnet('Res2Net', scales=4, base_width=4, stem_channels=8),
    'ResNeSt':
    _resnet('ResNeSt', stem_channels=8),
    'RegNet':
    _backbone(
        'RegNet',
        arch=dict(w0=8, wa=8., wm=2., group_w=8, depth=2, bot_mul=1.),
        strides=(1, 2),
        dilations=(1, 1),
        out_indices=(0, 1),
        stem_channels=8,
        norm_eval=False),
    'HRNet':
    _backbone(
        'HRNet',
        extra={f'stage{i}': _hrnet_stage(i)
               for i in (1, 2, 3, 4)},
        norm_eval=False),
    'DetectoRS_ResNet':
    _resnet('DetectoRS_ResNet', conv_cfg=dict(type='ConvAWS')),
    # Switchable atrous convolution is a sum of two.
    'DetectoRS_ResNet, SAC':
    _resnet(
        'DetectoRS_ResNet',
        conv_cfg=dict(type='ConvAWS'),
        sac=dict(type='SAC', use_deform=True),
        stage_with_sac=(False, True),
        alone=r'layer2\.\d\.bn2'),
    'TridentResNet':
    _resnet(
        'TridentResNet',
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(2, ),
        num_branch=3,
        test_branch_idx=1,
        trident_dilations=(1, 2, 3),
        shared=r'layer3\..*'),
    'CSPDarknet':
    _backbone('CSPDarknet', deepen_factor=0.1, widen_factor=0.125),
    'CSPDarknet, depthwise':
    _backbone(
        'CSPDarknet',
        deepen_factor=0.1,
        widen_factor=0.125,
        use_depthwise=True),
    'CSPNeXt':
    _backbone('CSPNeXt', deepen_factor=0.1, widen_factor=0.125),
    'Darknet':
    _backbone(NarrowDarknet, norm_eval=False),
    'MobileNetV2':
    _backbone('MobileNetV2', widen_factor=0.1, out_indices=(1, 4, 7)),
    'EfficientNet':
    _backbone(NarrowEfficientNet, out_indices=(1, 2)),
    'HourglassNet':
    _backbone(
        'HourglassNet',
        downsample_times=2,
        num_stacks=2,
        stage_channels=(8, 8, 8),
        stage_blocks=(1, 1, 1),
        feat_channel=8),
    'ResLayer':
    _module(
        'mmdet.ResLayer', (2, 64, 4, 4), depth=18, stage=1, norm_eval=False),
    # Necks.
    'FPN':
    _neck('FPN', 8, 16, 24, num_outs=4, add_extra_convs='on_output'),
    'FPN, laterals without':
    _neck('FPN', 8, 16, num_outs=2, no_norm_on_lateral=True),
    'PAFPN':
    _neck('PAFPN', 8, 16, 24, num_outs=4, add_extra_convs='on_input'),
    'NASFPN':
    _neck('NASFPN', 8, 8, 8, size=32, num_outs=5, stack_times=2),
    'NASFCOS_FPN':
    _neck('NASFCOS_FPN', 8, 8, 8, 8, size=32, num_outs=5),
    'NASFCOS_FPN, deformable':
    _neck(
        'NASFCOS_FPN',
        *(8, 8, 8, 8),
        size=32,
        num_outs=5,
        conv_cfg=DCN),
    'BFP':
    _module(
        'BFP',
        _maps(8, 8, 8),
        in_channels=8,
        num_levels=3,
        refine_level=1,
        refine_type='conv'),
    'BFP, non-local':
    _module(
        'BFP',
        _maps(8, 8, 8),
        in_channels=8,
        num_levels=3,
        refine_level=1,
        refine_type='non_local'),
    'FPG':
    _neck(
        'FPG',
        *(8, 8, 8),
        num_outs=3,
        stack_times=2,
        paths=['bu', 'bu'],
        same_up_trans=_fpg_path('conv', kernel_size=3, stride=2, padding=1),
        across_lateral_trans=_fpg_path('conv', kernel_size=1),
        across_down_trans=_fpg_path('interpolation_conv', kernel_size=3),
        across_skip_trans=_fpg_path('conv', kernel_size=1),
        output_trans=_fpg_path('last_conv', kernel_size=3),
        skip_inds=[(0, ), (), ()]),
    'FPN_CARAFE':
    _neck(
        'FPN_CARAFE', 8, 16, 24, num_outs=4,
        upsample_cfg=dict(type='nearest')),
    'RFP':
    _module(
        'RFP', [(2, 3, 32, 32), *_maps(32, 64, size=8)],
        in_channels=[32, 64],
        out_channels=16,
        num_outs=2,
        rfp_steps=2,
        aspp_out_channels=4,
        rfp_backbone=_resnet('DetectoRS_ResNet', rfp_inplanes=16).cfg,
        shared=r'(lateral|fpn)_convs\..*'),
    'ChannelMapper':
    _neck('ChannelMapper', 8, 16, num_outs=3),
    'YOLOV3Neck':
    _module(
        'YOLOV3Neck',
        _maps(8, 16, 24),
        num_scales=3,
        in_channels=[24, 16, 8],
        out_channels=[16, 8, 8]),
    'YOLOXPAFPN':
    _neck('YOLOXPAFPN', 8, 16, 24, num_csp_blocks=1),
    'YOLOXPAFPN, depthwise':
    _neck('YOLOXPAFPN', 8, 16, num_csp_blocks=1, use_depthwise=True),
    'CSPNeXtPAFPN':
    _neck('CSPNeXtPAFPN', 8, 16, 24, num_csp_blocks=1),
    'SSDNeck':
    _neck(
        'SSDNeck',
        *(8, 16),
        out_channels=[8, 16, 16, 16],
        level_strides=[2, 1],
        level_paddings=[1, 1],
        l2_norm_scale=None,
        use_depthwise=True),
    'SSH':
    _neck('SSH', 8, 16, num_scales=2, out_channels=[16, 16]),
    'DilatedEncoder, a block':
    _block(dilated_encoder.Bottleneck, mid_channels=8, dilation=2),
    'PixelDecoder':
    _module(
        PixelDecoder,
        _maps(8, 16, 24),
        None,
        in_channels=[8, 16, 24],
        feat_channels=8,
        out_channels=8),
    # Dense heads.
    'RetinaHead':
    _head('RetinaHead', anchor_generator=ANCHORS, shared=TOWERS),
    'RetinaSepBNHead':
    _head('RetinaSepBNHead', num_ins=2, anchor_generator=ANCHORS),
    'FreeAnchorRetinaHead':
    _head('FreeAnchorRetinaHead', anchor_generator=ANCHORS, shared=TOWERS),
    'SABLRetinaHead':
    _head(
        'SABLRetinaHead',
        approx_anchor_generator=OCTAVES,
        square_anchor_generator=ANCHORS,
        shared=TOWERS),
    'FCOSHead':
    _head('FCOSHead', strides=[8, 16], shared=TOWERS),
    'FCOSHead, deformable':
    _head(
        'FCOSHead',
        strides=[8, 16],
        dcn_on_last_conv=True,
        shared=TOWERS),
    'ATSSHead':
    _head('ATSSHead', anchor_generator=ANCHORS, shared=TOWERS),
    'DDODHead':
    _head('DDODHead', anchor_generator=ANCHORS, shared=TOWERS),
    # Task decomposition is a product of matrices.
    'TOODHead':
    _head(
        'TOODHead',
        anchor_generator=ANCHORS,
        alone=r'\w+_decomp\.reduction_conv\.bn',
        shared='.*'),
    'GFLHead':
    _head('GFLHead', anchor_generator=ANCHORS, shared=TOWERS),
    'FoveaHead':
    _head(
        'FoveaHead',
        strides=[8, 16],
        base_edge_list=(16, 32),
        scale_ranges=((8, 32), (16, 64)),
        with_deform=True,
        deform_groups=2,
        shared=TOWERS),
    'RepPointsHead':
    _head(
        'RepPointsHead',
        point_feat_channels=8,
        point_strides=[8, 16],
        shared=TOWERS),
    'NASFCOSHead':
    _head('NASFCOSHead', strides=[8, 16], shared=TOWERS),
    'VFNetHead':
    _head(
        'VFNetHead',
        strides=[1, 2],
        regress_ranges=((-1, 1), (1, 2)),
        anchor_generator=dict(ANCHORS, strides=[1, 2], center_offset=0.),
        shared=TOWERS + r'|vfnet_reg_conv\.bn'),
    'CenterNetUpdateHead':
    _head('CenterNetUpdateHead', strides=[8, 16], shared=TOWERS),
    'YOLOXHead':
    _head('YOLOXHead', strides=[8, 16]),
    'YOLOFHead':
    _module(
        'YOLOFHead',
        _maps(8),
        num_classes=3,
        in_channels=8,
        feat_channels=8,
        num_cls_convs=1,
        num_reg_convs=2,
        anchor_generator=dict(ANCHORS, strides=[32])),
    'YOLOV3Head':
    _module(
        'YOLOV3Head',
        _maps(8, 8),
        num_classes=3,
        in_channels=[8, 8],
        out_channels=[8, 8],
        anchor_generator=dict(
            type='YOLOAnchorGenerator',
            base_sizes=[[(8, 8)], [(4, 4)]],
            strides=[16, 8]),
        featmap_strides=[16, 8]),
    'SSDHead':
    _module(
        'SSDHead',
        _maps(8, 8, 8),
        num_classes=3,
        in_channels=(8, 8, 8),
        use_depthwise=True,
        anchor_generator=dict(
            type='SSDAnchorGenerator',
            scale_major=False,
            input_size=64,
            strides=[8, 16, 32],
            ratios=([2], [2], [2]),
            min_sizes=[8, 16, 32],
            max_sizes=[16, 32, 64])),
    'RTMDetHead':
    _head('RTMDetHead', anchor_generator=POINTS, shared=TOWERS),
    'RTMDetSepBNHead':
    _head('RTMDetSepBNHead', anchor_generator=POINTS),
    # Its two towers are one, in mmdet 3.3.
    'RTMDetInsSepBNHead':
    _head('RTMDetInsSepBNHead', anchor_generator=POINTS, shared=TOWERS),
    'SOLOHead':
    _head(
        'SOLOHead',
        levels=5,
        size=32,
        num_grids=[8, 6, 4, 4, 4],
        shared=r'(mask|cls)_convs\..*'),
    'DecoupledSOLOHead':
    _head(
        'DecoupledSOLOHead',
        levels=5,
        size=32,
        num_grids=[8, 6, 4, 4, 4],
        shared=r'(mask_convs_[xy]|cls_convs)\..*'),
    'CornerHead, its pooling':
    _block(
        corner_head.BiCornerPool,
        directions=['top', 'left'],
        feat_channels=8,
        out_channels=8),
    'SOLOV2Head, its masks':
    _module(
        solov2_head.MaskFeatModule,
        _maps(8, 8),
        in_channels=8,
        feat_channels=8,
        start_level=0,
        end_level=1,
        out_channels=8),
    'CondInstHead, its masks':
    _module(
        condinst_head.MaskFeatModule,
        _maps(8, 8),
        in_channels=8,
        feat_channels=8,
        start_level=0,
        end_level=1,
        out_channels=8),
    'RTMDetInsHead, its masks':
    _module(
        rtmdet_ins_head.MaskFeatModule,
        _maps(8, 8),
        in_channels=8,
        feat_channels=8,
        num_levels=2),
    # RoI heads.
    'Shared4Conv1FCBBoxHead':
    _roi_head('Shared4Conv1FCBBoxHead', fc_out_channels=8),
    'ConvFCBBoxHead':
    _roi_head('ConvFCBBoxHead', num_cls_convs=1, num_reg_convs=1),
    'DoubleConvFCBBoxHead':
    _roi_head(
        'DoubleConvFCBBoxHead',
        arguments=2,
        conv_out_channels=32,
        fc_out_channels=8,
        num_convs=2,
        num_fcs=1),
    'SCNetBBoxHead':
    _roi_head('SCNetBBoxHead', num_shared_convs=1),
    'SABLHead':
    _module(
        'SABLHead', (3, 8, 7, 7),
        num_classes=3,
        cls_in_channels=8,
        reg_in_channels=8,
        cls_out_channels=8,
        reg_offset_out_channels=8,
        reg_cls_out_channels=8),
    'FCNMaskHead':
    _roi_head('FCNMaskHead', num_convs=2),
    'HTCMaskHead':
    _roi_head('HTCMaskHead', arguments=2, num_convs=2),
    'SCNetMaskHead':
    _roi_head('SCNetMaskHead', num_convs=2, conv_to_res=True),
    'CoarseMaskHead':
    _roi_head(
        'CoarseMaskHead', num_convs=1, roi_feat_size=7, fc_out_channels=8),
    'GridHead':
    _module(
        'GridHead', (3, 8, 8, 8),
        num_convs=2,
        roi_feat_size=8,
        in_channels=8,
        point_feat_channels=8),
    'GlobalContextHead':
    _semantic_head('GlobalContextHead'),
    'GlobalContextHead, residual':
    _semantic_head('GlobalContextHead', conv_to_res=True),
    'FusedSemanticHead':
    _semantic_head('FusedSemanticHead', num_ins=2, fusion_level=0),
    'SCNetSemanticHead':
    _semantic_head('SCNetSemanticHead', num_ins=2, fusion_level=0),
    'PanopticFPNHead':
    _module(
        'PanopticFPNHead',
        _maps(8, 8, 8),
        in_channels=8,
        inner_channels=8,
        end_level=3,
        num_things_classes=2,
        num_stuff_classes=2),
    # mmcv's blocks.
    'conv, norm, act':
    _conv(),
    'norm, conv, act':
    _conv(order=('norm', 'conv', 'act'), alone='bn'),
    'act, conv, norm':
    _conv(order=('act', 'conv', 'norm'), inplace=False),
    'conv, act, norm':
    _conv(order=('conv', 'act', 'norm'), alone='bn'),
    'standardised weight':
    _conv(conv_cfg=dict(type='ConvWS')),
    'centred weight':
    _conv(conv_cfg=dict(type='CenConv')),
    'spectral norm':
    _conv(with_spectral_norm=True),
    'padding by reflection':
    _conv(padding=1, padding_mode='reflect'),
    'transposed convolution':
    _conv(conv_cfg=dict(type='deconv')),
    'DepthwiseSeparableConvModule':
    _block(DepthwiseSeparableConvModule, out_channels=8, kernel_size=3),
    'NonLocal2d':
    _block(NonLocal2d)
}
# The other norms differ little in what modules see of them.
WITH_EVERY_NORM = ('ResNet-18', 'FPN', 'RetinaHead', 'RetinaSepBNHead',
                   'Shared4Conv1FCBBoxHead', 'HTCMaskHead', 'conv, norm, act')


def _pairs(kinds=tuple(NORM_CFGS)[1:], names=tuple(CASES)):
    """Modules and norms, of which most modules meet three."""
    few = {'CBN', 'MABN', 'BGN'}
    return pytest.mark.parametrize(
        'name, kind',
        [(name, kind) for name in names
         for kind in kinds if name in WITH_EVERY_NORM or kind in few])


def _seed(seed):
    # Of torch.manual_seed's time the most goes to what it does for a GPU.
    torch.default_generator.manual_seed(seed)


def _fill(cfg, norm_cfg):
    if cfg is NORM:
        return dict(norm_cfg)
    if isinstance(cfg, dict):
        return {key: _fill(value, norm_cfg) for key, value in cfg.items()}
    if isinstance(cfg, (list, tuple)):
        return type(cfg)(_fill(value, norm_cfg) for value in cfg)
    return cfg


def _build(name, kind, **changes):
    _seed(0)
    # Another test may have left another toolbox's.
    init_default_scope('mmdet')
    cfg = _fill(dict(CASES[name].cfg, **changes), NORM_CFGS[kind])
    model = MODELS.build(cfg).double()
    model.train()
    for key, norm in _norms(model).items():
        norm.layer_name = key
    for module in model.modules():
        if isinstance(module, TridentConv):  # mmdet does not initialise it
            nn.init.kaiming_normal_(module.weight)
    return model


def _norms(model) -> Dict[str, nn.BatchNorm2d]:
    return {
        key: module
        for key, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    }


def _ours(model) -> Dict[str, SmallBatchNorm]:
    """mmdet puts BatchNorm of its own accord into some modules."""
    return {
        key: norm
        for key, norm in _norms(model).items()
        if isinstance(norm, SmallBatchNorm)
    }


def _named(model, pattern) -> set:
    names = {key for key in _ours(model) if re.fullmatch(pattern, key)}
    assert bool(names) == bool(pattern), f'nothing is called {pattern}'
    return names


def _told(caught, what) -> List[str]:
    """The norms that a warning is about."""
    found = (
        re.match(rf"\w+ '(\S+)' {what}", str(warning.message))
        for warning in caught)
    return sorted(match[1] for match in found if match)


def _tensors(values) -> List[Tensor]:
    """All in nested sequences and dicts."""
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, (list, tuple)):
        return [tensor for value in values for tensor in _tensors(value)]
    return [] if values is None else [values]


def _inputs(shapes):
    """Features, which have a gradient, or images, of 3 channels."""
    if isinstance(shapes, list):
        return [_inputs(shape) for shape in shapes]
    if shapes is None:
        return None
    x = torch.randn(shapes, dtype=torch.float64)
    return x.requires_grad_(shapes[1] != 3)


def _stock(name):
    """The module with BatchNorm: some scales and shifts, true statistics."""
    model = _build(name, 'BN')
    _initialise(model)
    norms = _norms(model).values()
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
        norm.momentum = None
    with torch.no_grad():
        for _ in range(2):
            model(*map(_inputs, CASES[name].inputs))
    for norm in norms:
        norm.momentum = 0.1
    return model


def _initialise(model):
    if hasattr(model, 'init_weights'):  # not in plain modules
        model.init_weights()


class Step(NamedTuple):
    outputs: List[Tensor]
    gradients: Dict[str, Optional[Tensor]]


def _train(model, name, iterations=2) -> List[Step]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    steps = []
    for iteration in range(iterations):
        _seed(iteration)
        inputs = [_inputs(shapes) for shapes in CASES[name].inputs]
        leaves = [x for x in _tensors(inputs) if x.requires_grad]
        for norm in _norms(model).values():
            norm.iteration = iteration
        outputs = _tensors(model(*inputs))
        optimizer.zero_grad()
        sum((out * torch.randn_like(out)).sum() / out.numel()**0.5
            for out in outputs).backward()
        gradients = dict(model.named_parameters())
        gradients.update((f'input {i}', x) for i, x in enumerate(leaves))
        steps.append(
            Step(
                [out.detach() for out in outputs], {
                    key: None if x.grad is None else x.grad.clone()
                    for key, x in gradients.items()
                }))
        optimizer.step()
    return steps


def _assert_same_step(found, wanted):
    assert len(found.outputs) == len(wanted.outputs)
    for a, b in zip(found.outputs, wanted.outputs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    for key, gradient in wanted.gradients.items():
        torch.testing.assert_close(
            found.gradients[key], gradient, rtol=1e-5, atol=1e-8)


class Training(NamedTuple):
    """What there is to know of the module with BatchNorm."""
    model: nn.Module
    before: Dict[str, Tensor]
    steps: List[Step]
    after: Dict[str, Tensor]


@functools.lru_cache(maxsize=None)
def _trained_stock(name) -> Training:
    model = _stock(name)
    before = copy.deepcopy(model.state_dict())
    steps = _train(model, name)
    return Training(model, before, steps, copy.deepcopy(model.state_dict()))


def _initial_state(name, kind):
    model = _build(name, kind)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    _seed(0)
    _initialise(model)
    return model.state_dict()


@functools.lru_cache(maxsize=None)
def _stock_initial_state(name) -> Dict[str, Tensor]:
    return _initial_state(name, 'BN')


def _assert_evaluates_as_batch_norm(model, name, kind):
    """As the module with BatchNorm does with its state dict."""
    stock = _trained_stock(name).model
    stock.load_state_dict(model.state_dict())
    inputs = [_inputs(shapes) for shapes in CASES[name].inputs]
    outputs = []
    for module in (model, stock):
        module.eval()
        with torch.no_grad():
            outputs.append(_tensors(module(*inputs)))
        module.train()
    assert len(outputs[0]) == len(outputs[1]) > 0
    for found, wanted in zip(*outputs):
        assert found.shape == wanted.shape and found.isfinite().all()
        if kind in STOCK_EVALUATION:
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)


@_pairs()
def test_initialised_as_with_batch_norm(name, kind):
    """Every value, with the same random numbers."""
    wanted = _stock_initial_state(name)
    found = _initial_state(name, kind)
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0)


@_pairs()
def test_takes_a_state_dict_trains_and_gives_it_back(name, kind):
    stock = _trained_stock(name)
    model = _build(name, kind)
    model.load_state_dict(stock.before)
    _assert_evaluates_as_batch_norm(model, name, kind)
    steps = _train(model, name)
    for found, wanted in zip(steps, stock.steps):
        assert [out.shape for out in found.outputs
                ] == [out.shape for out in wanted.outputs]
        assert all(out.isfinite().all() for out in found.outputs)
        for key, gradient in wanted.gradients.items():
            if gradient is None:
                assert found.gradients[key] is None, key
            else:
                assert found.gradients[key].isfinite().all(), key
    for key, norm in _ours(model).items():
        tracked = f'{key}.num_batches_tracked'
        assert norm.num_batches_tracked == stock.after[tracked] >= 4
        assert steps[-1].gradients[f'{key}.weight'].any()
    # CmBN is BatchNorm where every part is a step, and CBN where it follows
    # no convolution.
    same = kind == 'CmBN' or kind == 'CBN' and (
        set(_ours(model)) == _named(model, CASES[name].alone))
    if not same:
        assert not all(
            torch.allclose(a, b, rtol=1e-4, atol=1e-6)
            for a, b in zip(steps[-1].outputs, stock.steps[-1].outputs))
    _assert_evaluates_as_batch_norm(model, name, kind)


@_pairs(['CBN', 'NaiveCBN', 'BRN'])
def test_burn_in_is_batch_norm(name, kind):
    """Outputs, gradients and state dicts of two iterations."""
    stock = _trained_stock(name)
    model = _build(name, kind)
    model.load_state_dict(stock.before)
    for norm in _ours(model).values():
        assert norm.burns_in
        norm.burning_in = True
    for found, wanted in zip(_train(model, name), stock.steps):
        _assert_same_step(found, wanted)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(
            value, stock.after[key], rtol=1e-5, atol=1e-8)


@_pairs(['CBN', 'NaiveCBN', 'MABN'])
def test_says_which_norms_follow_no_convolution_or_are_shared(name, kind):
    """Once each; the others have what they gather, of each of their calls."""
    model = _build(name, kind)
    model.load_state_dict(_trained_stock(name).before)
    tracked = [int(n.num_batches_tracked) for n in _ours(model).values()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        _train(model, name)
    case = CASES[name]
    alone = _named(model, case.alone) if kind == 'CBN' else set()
    shared = _named(model, case.shared)
    assert _told(caught, 'follows no convolution') == sorted(alone)
    assert _told(caught, 'is called several times') == sorted(shared)
    for (key, norm), before in zip(_ours(model).items(), tracked):
        calls = (int(norm.num_batches_tracked) - before) // 2
        assert (calls > 1) == (key in shared), key
        assert len(norm.held_iterations) == (0 if key in alone else calls), key
        if kind != 'MABN':
            assert all(count == 2 for count in norm.held_iterations), key


@pytest.mark.parametrize('name', [
    'conv, norm, act', 'act, conv, norm', 'standardised weight',
    'centred weight', 'spectral norm', 'padding by reflection',
    'transposed convolution'
])
def test_the_past_is_brought_to_the_weight_that_a_block_computes(name):
    """On one batch, compensation comes close to the present batch alone."""
    outputs = []
    for kind in ('BN', 'CBN', 'NaiveCBN'):
        model = _build(name, kind)
        model.load_state_dict(_trained_stock(name).before)
        for norm in _ours(model).values():
            # Inputs without a mean: what 32 positions tell is mostly noise.
            norm.derivative_positions = None
        _seed(1)
        x, = (_inputs(shape) for shape in CASES[name].inputs)
        model(x)
        weights = [p for p in model.conv.parameters() if p.dim() == 4]
        with torch.no_grad():
            for weight in weights:
                weight.add_(torch.randn_like(weight) * weight.std() * 0.03)
        outputs.append(model(x))
    compensated, naive = ((out - outputs[0]).norm() for out in outputs[1:])
    assert 0 < compensated < 0.2 * naive


# What freezes a part of a backbone, and the norms in it.
FREEZING = {
    'ResNet-18': (dict(frozen_stages=1), r'bn1|layer1\..*'),
    'ResNetV1d': (dict(frozen_stages=1), r'stem\..*|layer1\..*'),
    'ResNeXt': (dict(frozen_stages=0), 'bn1'),
    'ResNeSt': (dict(frozen_stages=1), r'stem\..*|layer1\..*'),
    'RegNet': (dict(frozen_stages=1), r'bn1|layer1\..*'),
    'DetectoRS_ResNet': (dict(frozen_stages=1), r'bn1|layer1\..*'),
    'Darknet': (dict(frozen_stages=2), r'conv1\..*|conv_res_block1\..*'),
    'CSPDarknet': (dict(frozen_stages=1), r'stem\..*|stage1\..*'),
    'CSPNeXt': (dict(frozen_stages=1), r'stem\..*|stage1\..*'),
    'EfficientNet': (dict(frozen_stages=2), r'layers\.[01]\..*')
}


@pytest.mark.filterwarnings('error:.*follows no convolution')
@pytest.mark.parametrize('kind', ['CBN', 'MABN', 'BGN'])
@pytest.mark.parametrize('name', FREEZING)
def test_frozen_stages_stay_as_they_are(name, kind):
    changes, pattern = FREEZING[name]
    model = _build(name, kind, **changes)
    norms = _ours(model)
    frozen = _named(model, pattern)
    assert set(norms) > frozen
    for _ in range(2):
        model.eval()
        assert not any(norm.training for norm in norms.values())
        model.train()
        assert frozen == {
            key
            for key, norm in norms.items() if not norm.training
        }
        before = copy.deepcopy(norms)
        step, = _train(model, name, iterations=1)
        for key, norm in norms.items():
            for entry in ('weight', 'bias'):
                gradient = step.gradients[f'{key}.{entry}']
                assert (gradient is None) == (key in frozen), key
            # running_mean apart, which MABN does not move.
            for entry in ('weight', 'bias', 'running_var',
                          'num_batches_tracked'):
                same = torch.equal(
                    getattr(norm, entry), getattr(before[key], entry))
                assert same == (key in frozen), (key, entry)


@_pairs(names=[
    'ResNet-18', 'ResNetV1d', 'RegNet', 'HRNet', 'DetectoRS_ResNet',
    'TridentResNet', 'Darknet', 'CSPDarknet', 'CSPNeXt', 'MobileNetV2',
    'EfficientNet', 'ResLayer'
])
def test_norm_eval_evaluates_in_training(name, kind):
    """Scales and shifts learn, nothing else of the norms moves."""
    steps = []
    for built_with in (kind, 'BN'):
        model = _build(name, built_with, norm_eval=True)
        model.load_state_dict(_trained_stock(name).before)
        model.eval()
        model.train()
        assert model.training
        before = copy.deepcopy(_norms(model))
        steps += _train(model, name, iterations=1)
        for key, norm in _norms(model).items():
            assert not norm.training
            for entry, value in before[key].named_buffers():
                assert torch.equal(norm.get_buffer(entry), value)
            assert not torch.equal(norm.weight, before[key].weight)
    if kind in STOCK_EVALUATION:
        _assert_same_step(*steps)


@pytest.mark.parametrize('kind', ['CBN', 'MABN', 'BGN'])
@pytest.mark.parametrize('name, last', [('ResNet-18', 2), ('ResNet, caffe', 3),
                                        ('ResNetV1d', 3), ('RegNet', 3)])
@pytest.mark.parametrize('zero', [True, False])
def test_zero_init_residual(name, last, kind, zero):
    model = _build(name, kind, zero_init_residual=zero)
    for norm in _ours(model).values():
        nn.init.constant_(norm.weight, 0.5)
    model.init_weights()
    zeros = {
        key
        for key, norm in _ours(model).items() if not norm.weight.any()
    }
    assert zeros == _named(model,
                           rf'(layer|stage).*\.bn{last}' if zero else '')
