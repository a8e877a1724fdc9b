"""Checkpoints of the released codes evaluate here as they did there.

Those are made by an independent table, from this package's names back to the
released ones, and evaluated by a few lines that take them as they are.
"""
import re
import warnings

import pytest
import torch
from mmdet.models import ResNet
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch.nn import functional as F

from mmdet_smallbn import MABN
from mmdet_smallbn.cli.convert_from_stock import main, parse_args
from mmdet_smallbn.deploy.released import (BENCHMARK, IMAGENET, MMDET1,
                                           convert, layout_of)
from mmdet_smallbn.deploy.state_dict import find_state_dict
from mmdet_smallbn.errors import SetupError

CBN_CONFIG = 'configs/cbn/mask-rcnn_r50_fpn_4conv1fc_cbn-head_4xb4-1x_coco.py'
MABN_CONFIG = ('configs/mabn/mask-rcnn_r50-scratch_fpn_4conv1fc_mabn-all_'
               '8xb2-2x_coco.py')
CLASSES = 3


def _config(path, masks=True, retina=False):
    """A config's model, narrow."""
    cfg = Config.fromfile(path)
    model, width = cfg.model, 16
    model.backbone.update(base_channels=8, init_cfg=None)
    model.neck.update(in_channels=[32, 64, 128, 256], out_channels=width)
    if retina:
        model.bbox_head.update(
            in_channels=width, feat_channels=width, num_classes=CLASSES)
        return cfg
    model.rpn_head.update(in_channels=width, feat_channels=width)
    head = model.roi_head
    head.bbox_roi_extractor.out_channels = width
    head.bbox_head.update(
        in_channels=width,
        conv_out_channels=width,
        fc_out_channels=20,
        num_classes=CLASSES)
    head.mask_roi_extractor.out_channels = width
    head.mask_head.update(
        in_channels=width, conv_out_channels=width, num_classes=CLASSES)
    if not masks:
        model.type = 'FasterRCNN'
        del head.mask_head, head.mask_roi_extractor, model.test_cfg.rcnn[
            'mask_thr_binary']
    return cfg


def _model(cfg):
    init_default_scope('mmdet')
    return MODELS.build(cfg.model).eval()


def _trained(cfg):
    """Numbers as of a model that was trained: none is 0 or alike."""
    state = _model(cfg).state_dict()
    for key, value in state.items():
        if key.endswith('num_batches_tracked'):
            value.fill_(7)
        elif key.endswith('running_var'):
            value.uniform_(0.5, 2)
        else:
            value.normal_(std=0.3)
    return state


def _background_first(value):
    return torch.cat([value[-1:], value[:-1]])


def _with_background(value, rows):
    return torch.cat([torch.randn_like(value[:1]).expand(
        rows, *value.shape[1:]), value])


def _to_mmdet1(state):
    """As the released CBN leaves it."""
    old = {}
    for key, value in state.items():
        # CBN in neck and heads does not count; the backbone's BatchNorm does.
        if key.endswith('tracked') and not key.startswith('backbone.'):
            continue
        if '.fc_cls.' in key:
            value = _background_first(value)
        elif '.fc_reg.' in key:
            value = _with_background(value, 4)
        elif '.conv_logits.' in key:
            value = _with_background(value, 1)
        old[key.replace('roi_head.', '')] = value.clone()
    return old


# From mmdet's names to those of maskrcnn-benchmark.
BACK = [
    (r'backbone\.(conv1|bn1)', r'backbone.body.stem.\1'),
    (r'backbone\.layer', 'backbone.body.layer'),
    (r'neck\.lateral_convs\.(\d)\.', 'backbone.fpn.fpn_inner{1}.'),
    (r'neck\.fpn_convs\.(\d)\.', 'backbone.fpn.fpn_layer{1}.'),
    (r'rpn_head\.rpn_conv', 'rpn.head.conv'),
    (r'rpn_head\.rpn_cls', 'rpn.head.cls_logits'),
    (r'rpn_head\.rpn_reg', 'rpn.head.bbox_pred'),
    (r'roi_head\.bbox_head\.shared_convs\.(\d)\.conv',
     'roi_heads.box.feature_extractor.xconvs.{3}'),
    (r'roi_head\.bbox_head\.shared_convs\.(\d)\.bn',
     'roi_heads.box.feature_extractor.xconvs.{4}'),
    (r'roi_head\.bbox_head\.shared_fcs\.0',
     'roi_heads.box.feature_extractor.fc6'),
    (r'roi_head\.bbox_head\.fc_cls', 'roi_heads.box.predictor.cls_score'),
    (r'roi_head\.bbox_head\.fc_reg', 'roi_heads.box.predictor.bbox_pred'),
    (r'roi_head\.mask_head\.convs\.(\d)\.',
     'roi_heads.mask.feature_extractor.mask_fcn{1}.'),
    (r'roi_head\.mask_head\.upsample', 'roi_heads.mask.predictor.conv5_mask'),
    (r'roi_head\.mask_head\.conv_logits',
     'roi_heads.mask.predictor.mask_fcn_logits'),
]


def _benchmark_name(key, normed=True):
    for pattern, new in BACK:
        match = re.match(pattern, key)
        if not match:
            continue
        if '{' in new:
            n = int(match[1])
            step = 3 if normed else 2
            new = new.replace('{1}', str(n + 1)).replace(
                '{3}', str(step * n)).replace('{4}', str(step * n + 1))
            rest = key[match.end():]
            rest = rest.replace('conv.', '0.' if normed else '', 1) if (
                '_fcn' in new or 'fpn_' in new) else rest
            return new + rest.replace('bn.', '1.', 1)
        return match.expand(new) + key[match.end():]
    raise AssertionError(key)


def _to_benchmark(state):
    """As the released MABN leaves it."""
    old = {}
    for key, value in state.items():
        name, value = _benchmark_name(key), value.clone()
        module, _, leaf = name.rpartition('.')
        if leaf == 'running_mean':
            continue
        if leaf == 'num_batches_tracked':
            old[f'{module}.iters'] = value.reshape(1)
            continue
        if leaf == 'running_var':
            channels = len(value)
            value = value.view(1, -1, 1, 1)
            old[f'{module}.buffer_x2'] = torch.zeros(16, channels)
            old[f'{module}.buffer_gz'] = torch.zeros(16, channels)
        if '.cls_score.' in name:
            value = _background_first(value)
        elif '.bbox_pred.' in name and name.startswith('roi_heads.'):
            value = _with_background(value, 4)
        elif '.mask_fcn_logits.' in name:
            value = _with_background(value, 1)
        old[name] = value
    for level in range(5):
        old[f'rpn.anchor_generator.cell_anchors.{level}'] = torch.ones(3, 4)
    return {f'module.{key}': value for key, value in old.items()}


@pytest.fixture(scope='module')
def cbn():
    """A narrow Mask R-CNN's config, its state dict and the released one."""
    torch.manual_seed(1)
    cfg = _config(CBN_CONFIG)
    state = _trained(cfg)
    return cfg, state, _to_mmdet1(state)


@pytest.fixture(scope='module')
def mabn():
    torch.manual_seed(2)
    cfg = _config(MABN_CONFIG)
    state = _trained(cfg)
    for key in state:
        if key.endswith('running_mean'):
            state[key].zero_()
    return cfg, state, _to_benchmark(state)


def _assert_same(found, wanted):
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


# What the released layers do in evaluation, with their own tensors.


def _cbn(old, name, x):
    shape = (1, -1, 1, 1)
    x = x - old[f'{name}.running_mean'].view(shape)
    x = x / (old[f'{name}.running_var'].sqrt() + 1e-5).view(shape)
    return (x * old[f'{name}.weight'].view(shape) +
            old[f'{name}.bias'].view(shape))


def _mabn(old, name, x):
    x = x / (old[f'{name}.running_var'] + 1e-5).sqrt()
    return (x * old[f'{name}.weight'].view(1, -1, 1, 1) +
            old[f'{name}.bias'].view(1, -1, 1, 1))


def _cen_conv(old, name, x, **kwargs):
    weight = old[f'{name}.weight']
    return F.conv2d(x, weight - weight.mean((1, 2, 3), keepdim=True), **kwargs)


def _linear(old, name, x):
    return F.linear(x, old[f'{name}.weight'], old[f'{name}.bias'])


def _assert_class_rows(scores, boxes, old_scores, old_boxes):
    """Class c was c + 1 there, and the background was 0."""
    close = torch.testing.assert_close
    assert scores.shape == (5, CLASSES + 1) and boxes.shape == (5, 4 * CLASSES)
    for c in range(CLASSES):
        close(scores[:, c], old_scores[:, c + 1])
        close(boxes[:, 4 * c:4 * c + 4], old_boxes[:, 4 * c + 4:4 * c + 8])
    close(scores[:, -1], old_scores[:, 0])


def test_the_released_cbn_evaluates_alike(cbn):
    cfg, state, old = cbn
    assert layout_of(old) == MMDET1
    result = convert(old, MMDET1)
    model = _model(cfg)
    for key in result.added:
        state = {**state, key: torch.tensor(0)}
    _assert_same(result.state_dict, state)
    model.load_state_dict(convert(old, MMDET1, match_eps=True).state_dict)
    regions = torch.randn(5, 16, 7, 7)
    x = regions
    for i in range(4):
        name = f'bbox_head.shared_convs.{i}'
        x = F.conv2d(x, old[f'{name}.conv.weight'], padding=1)
        x = _cbn(old, f'{name}.bn', x).relu()
    x = _linear(old, 'bbox_head.shared_fcs.0', x.flatten(1)).relu()
    with torch.no_grad():
        found = model.roi_head.bbox_head(regions)
    _assert_class_rows(*found, _linear(old, 'bbox_head.fc_cls', x),
                       _linear(old, 'bbox_head.fc_reg', x))
    x = regions
    for i in range(4):
        name = f'mask_head.convs.{i}'
        x = F.conv2d(x, old[f'{name}.conv.weight'], padding=1)
        x = _cbn(old, f'{name}.bn', x).relu()
    x = F.conv_transpose2d(
        x, old['mask_head.upsample.weight'], old['mask_head.upsample.bias'],
        stride=2).relu()
    x = F.conv2d(x, old['mask_head.conv_logits.weight'],
                 old['mask_head.conv_logits.bias'])
    with torch.no_grad():
        torch.testing.assert_close(
            model.roi_head.mask_head(regions), x[:, 1:], rtol=1e-4, atol=1e-5)


def test_the_place_of_eps_matters_where_variances_are_small(cbn):
    """And the scales can make up for it; BatchNorm's stay."""
    old = dict(cbn[2])
    name = 'neck.lateral_convs.0.bn'
    old[f'{name}.running_var'] = torch.full((16, ), 1e-4)
    result = convert(old, MMDET1)
    note, = [note for note in result.notes if 'sqrt(var) + eps' in note]
    norms = 2 * 4 + 4 + 4
    # (0.01 + 1e-5) / sqrt(1e-4 + 1e-5) = 0.9544
    assert f'of {norms} norms differ by up to 4.56%' in note
    matched = convert(old, MMDET1, match_eps=True)
    assert not any('--match-eps' in note for note in matched.notes)
    x = torch.randn(2, 16, 3, 3)
    outputs = [
        F.batch_norm(x, *(r.state_dict[f'{name}.{leaf}']
                          for leaf in ('running_mean', 'running_var',
                                       'weight', 'bias')))
        for r in (result, matched)
    ]
    torch.testing.assert_close(outputs[1], _cbn(old, name, x))
    assert not torch.allclose(outputs[0], outputs[1], rtol=1e-2)
    assert torch.equal(matched.state_dict['backbone.bn1.weight'],
                       old['backbone.bn1.weight'])
    counted = {
        **old,
        **{k: v for k, v in cbn[1].items() if k.startswith('neck.')}
    }
    counted = {k: v for k, v in counted.items() if 'head.' not in k}
    with pytest.raises(SetupError, match='there is no CBN'):
        convert({**counted, 'bbox_head.retina_cls.weight': torch.ones(3)},
                MMDET1, match_eps=True)


def test_the_released_mabn_evaluates_alike(mabn):
    cfg, state, old = mabn
    bare = find_state_dict(dict(model=old), 'a.pth')
    assert layout_of(bare) == BENCHMARK
    result = convert(bare, BENCHMARK)
    _assert_same(result.state_dict, state)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model = _model(cfg)
        model.load_state_dict(result.state_dict)
    norm = model.backbone.layer1[0].bn1
    square = bare['backbone.body.layer1.0.bn1.running_var']
    assert isinstance(norm, MABN) and square.shape == (1, 8, 1, 1)
    assert torch.equal(norm.running_var, square.flatten())
    assert not norm.running_mean.any() and norm.num_batches_tracked == 7

    image = torch.randn(1, 3, 32, 32)
    x = _cen_conv(bare, 'backbone.body.stem.conv1', image, stride=2, padding=3)
    x = _mabn(bare, 'backbone.body.stem.bn1', x).relu()
    stages = []
    with torch.no_grad():
        stem = model.backbone.norm1(model.backbone.conv1(image)).relu()
        torch.testing.assert_close(stem, x, rtol=1e-4, atol=1e-5)
        stages = model.backbone(image)
        found = model.neck(stages)
    wanted = None
    for i in range(3, -1, -1):
        x = _cen_conv(bare, f'backbone.fpn.fpn_inner{i + 1}.0', stages[i])
        x = _mabn(bare, f'backbone.fpn.fpn_inner{i + 1}.1', x)
        if wanted is not None:
            x = x + F.interpolate(wanted, scale_factor=2)
        wanted = x
        x = _cen_conv(bare, f'backbone.fpn.fpn_layer{i + 1}.0', x, padding=1)
        x = _mabn(bare, f'backbone.fpn.fpn_layer{i + 1}.1', x)
        torch.testing.assert_close(found[i], x, rtol=1e-4, atol=1e-4)

    regions = torch.randn(5, 16, 7, 7)
    x = regions
    for place in (0, 3, 6, 9):
        name = 'roi_heads.box.feature_extractor.xconvs'
        x = _cen_conv(bare, f'{name}.{place}', x, padding=1)
        x = _mabn(bare, f'{name}.{place + 1}', x).relu()
    x = _linear(bare, 'roi_heads.box.feature_extractor.fc6', x.flatten(1))
    x = x.relu()
    with torch.no_grad():
        found = model.roi_head.bbox_head(regions)
    _assert_class_rows(*found,
                       _linear(bare, 'roi_heads.box.predictor.cls_score', x),
                       _linear(bare, 'roi_heads.box.predictor.bbox_pred', x))
    x = regions
    for i in range(1, 5):
        name = f'roi_heads.mask.feature_extractor.mask_fcn{i}'
        x = _cen_conv(bare, f'{name}.0', x, padding=1)
        x = _mabn(bare, f'{name}.1', x).relu()
    name = 'roi_heads.mask.predictor'
    x = F.conv_transpose2d(
        x,
        bare[f'{name}.conv5_mask.weight'],
        bare[f'{name}.conv5_mask.bias'],
        stride=2).relu()
    x = F.conv2d(x, bare[f'{name}.mask_fcn_logits.weight'],
                 bare[f'{name}.mask_fcn_logits.bias'])
    with torch.no_grad():
        torch.testing.assert_close(
            model.roi_head.mask_head(regions), x[:, 1:], rtol=1e-4, atol=1e-5)


def test_names_are_those_of_the_public_code(mabn):
    """So that the table back is not merely the rules turned round."""
    box, mask = 'roi_heads.box', 'roi_heads.mask'
    shapes = {
        'backbone.body.stem.conv1.weight': (8, 3, 7, 7),
        'backbone.body.layer2.0.downsample.1.running_var': (1, 64, 1, 1),
        'backbone.fpn.fpn_inner4.0.weight': (16, 256, 1, 1),
        'backbone.fpn.fpn_layer1.1.buffer_gz': (16, 16),
        'rpn.head.cls_logits.bias': (3, ),
        f'{box}.feature_extractor.xconvs.9.weight': (16, 16, 3, 3),
        f'{box}.feature_extractor.xconvs.10.iters': (1, ),
        f'{box}.predictor.bbox_pred.weight': (16, 20),
        f'{mask}.feature_extractor.mask_fcn4.0.weight': (16, 16, 3, 3),
        f'{mask}.predictor.mask_fcn_logits.bias': (4, ),
    }
    for key, shape in shapes.items():
        assert mabn[2][f'module.{key}'].shape == shape, key


def test_heads_without_norms_and_without_masks():
    """Of the baselines: the convolutions are by themselves."""
    cfg = _config(
        'configs/baselines/mask-rcnn_r50_fpn_4conv1fc_4xb4-1x_coco.py',
        masks=False)
    state = _trained(cfg)
    old = {}
    for key, value in state.items():
        name = _benchmark_name(key, normed=False)
        if name.startswith('roi_heads.box.predictor.cls_score'):
            value = _background_first(value)
        elif name.startswith('roi_heads.box.predictor.bbox'):
            value = _with_background(value, 4)
        if not name.endswith('num_batches_tracked'):  # FrozenBatchNorm2d
            old[name] = value
    assert 'roi_heads.box.feature_extractor.xconvs.6.bias' in old
    assert 'backbone.fpn.fpn_inner1.weight' in old
    result = convert(old, BENCHMARK)
    for key in state:
        if key.endswith('tracked'):
            state[key].zero_()
    _assert_same(result.state_dict, state)
    _model(cfg).load_state_dict(result.state_dict)


def test_affine_parameters_of_four_dimensions_and_half_precision(mabn):
    old = find_state_dict(mabn[2], 'a.pth')
    for key in old:
        norm = key.rpartition('.')[0]
        if f'{norm}.running_var' in old and key.endswith(('.weight', '.bias')):
            old[key] = old[key].view(1, -1, 1, 1).half()
    state = convert(old, BENCHMARK).state_dict
    for key, value in mabn[1].items():
        if f'{key.rpartition(".")[0]}.running_var' in mabn[
                1] and key.endswith(('.weight', '.bias')):
            value = value.half()
        assert torch.equal(state[key], value), key
        assert state[key].dtype == value.dtype, key


def test_boxes_and_masks_that_classes_share(cbn, mabn):
    def shared(state, boxes, masks, rows):
        state = dict(state)
        for leaf in ('weight', 'bias'):
            state[f'{boxes}.{leaf}'] = state[f'{boxes}.{leaf}'][:rows]
            state[f'{masks}.{leaf}'] = state[f'{masks}.{leaf}'][:1]
        return state

    for layout, state, boxes, masks, rows in [
        (MMDET1, cbn[2], 'bbox_head.fc_reg', 'mask_head.conv_logits', 4),
        (BENCHMARK, find_state_dict(mabn[2], 'a.pth'),
         'roi_heads.box.predictor.bbox_pred',
         'roi_heads.mask.predictor.mask_fcn_logits', 8)
    ]:
        old = shared(state, boxes, masks, rows)
        new = convert(old, layout).state_dict
        assert torch.equal(new['roi_head.bbox_head.fc_reg.bias'],
                           old[f'{boxes}.bias'][-4:])
        assert torch.equal(new['roi_head.mask_head.conv_logits.weight'],
                           old[f'{masks}.weight'])


def test_a_softmax_rpn_has_its_background_last(cbn):
    old = dict(cbn[2])
    old['rpn_head.rpn_cls.bias'] = torch.arange(6.)
    new = convert(old, MMDET1).state_dict['rpn_head.rpn_cls.bias']
    assert new.tolist() == [1, 0, 3, 2, 5, 4]
    assert torch.equal(
        convert(cbn[2], MMDET1).state_dict['rpn_head.rpn_cls.weight'],
        cbn[2]['rpn_head.rpn_cls.weight'])


def test_retinanet_of_mmdet1():
    """Its classes stay; its convolutions were bare."""
    cfg = _config(
        'configs/cbn/retinanet_r50_fpn_cbn-head_4xb4-1x_coco.py', retina=True)
    cfg.model.bbox_head = dict(
        type='RetinaHead',
        num_classes=CLASSES,
        in_channels=16,
        feat_channels=16,
        anchor_generator=cfg.model.bbox_head.anchor_generator)
    state = _trained(cfg)
    old = {
        re.sub(r'(_convs\.\d)\.conv(?=\.\w+$)', r'\1', key)
        if key.startswith('bbox_head.') else key: value
        for key, value in state.items()
    }
    assert 'bbox_head.cls_convs.3.weight' in old
    assert layout_of(old) is None
    assert layout_of(old, dict(mmdet_version='0.5.3+87551cc')) == MMDET1
    _assert_same(convert(old, MMDET1).state_dict, state)


def test_the_stem_bias_of_the_syncbn_baseline():
    """Batch normalisation takes it in."""
    conv = torch.randn(8, 3, 7, 7)
    old = {
        'backbone.body.stem.conv1.weight': conv,
        'backbone.body.stem.conv1.bias': torch.randn(8),
    }
    for leaf in ('weight', 'bias', 'running_mean'):
        old[f'backbone.body.stem.bn1.{leaf}'] = torch.randn(8)
    old['backbone.body.stem.bn1.running_var'] = torch.rand(8) + 1
    result = convert(old, BENCHMARK)
    x = torch.randn(2, 3, 16, 16)

    def evaluate(state, conv, bn):
        x_ = F.conv2d(x, state[f'{conv}.weight'], state.get(f'{conv}.bias'))
        return F.batch_norm(x_, *(state[f'{bn}.{leaf}'] for leaf in (
            'running_mean', 'running_var', 'weight', 'bias')))

    torch.testing.assert_close(
        evaluate(result.state_dict, 'backbone.conv1', 'backbone.bn1'),
        evaluate(old, 'backbone.body.stem.conv1', 'backbone.body.stem.bn1'))
    assert 'backbone.conv1.bias' not in result.state_dict
    assert list(result.dropped.values()) == [['backbone.body.stem.conv1.bias']]


def test_imagenet_weights_of_mabn():
    """The released classification code's names, with its buffers."""
    model = ResNet(
        18,
        base_channels=8,
        stem_channels=8,
        conv_cfg=dict(type='CenConv'),
        norm_cfg=dict(type='MABN'))
    old = {'fc.weight': torch.randn(10, 64), 'fc.bias': torch.randn(10)}
    for key, value in model.state_dict().items():
        norm = key.rpartition('.')[0]
        if key.endswith('running_mean'):
            continue
        if key.endswith('tracked'):
            old[f'{norm}.iters'] = torch.tensor([9.])
            old[f'{norm}.sta_matrix'] = torch.ones(16, 32)
            old[f'{norm}.pre_x2'] = torch.ones(16, 8)
            old[f'{norm}.pre_gz'] = torch.ones(16, 8)
        else:
            old[key] = torch.rand_like(value)
    assert layout_of(old) == IMAGENET
    result = convert(old, IMAGENET)
    new = {k[len('backbone.'):]: v for k, v in result.state_dict.items()}
    model.load_state_dict(new)
    assert torch.equal(model.bn1.running_var, old['bn1.running_var'])
    assert model.bn1.num_batches_tracked == 9
    assert sum(map(len, result.dropped.values())) == 2 + 3 * 20


@pytest.mark.parametrize('kind', ['CBN', 'BRN', 'BGN', 'MABN'])
def test_stock_weights_need_no_conversion(kind):
    """Of torchvision's layout, which mmdet's ResNet has."""
    stock = ResNet(18, base_channels=32).state_dict()
    for key, value in stock.items():
        if 'running' in key:
            value.uniform_(0.5, 2)
    assert layout_of(stock) is None
    model = ResNet(18, base_channels=32, norm_cfg=dict(type=kind))
    with warnings.catch_warnings(record=True) as caught:
        # As users have it: a message that repeats is shown once, and this
        # one names the layer by its width.
        warnings.simplefilter('default')
        model.load_state_dict(stock)
    if kind != 'MABN':
        assert not caught
        _assert_same(model.state_dict(), stock)
        return
    warning, = caught
    assert 'MABN loaded the statistics of a BatchNorm' in str(
        warning.message)
    torch.testing.assert_close(
        model.layer4[1].bn2.running_var, stock['layer4.1.bn2.running_var'] +
        stock['layer4.1.bn2.running_mean']**2)


# The program.


def _write(path, checkpoint):
    torch.save(checkpoint, path)
    return str(path)


def _fails(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith('error: ')
    return lines[0]


def test_writes_what_a_config_loads(cbn, mabn, tmp_path, capsys):
    released = [
        _write(
            tmp_path / 'cbn.pth',
            dict(
                state_dict=cbn[2],
                meta=dict(mmdet_version='0.6.0', CLASSES=('a', 'b', 'c')))),
        _write(
            tmp_path / 'mabn.pth', dict(model=mabn[2], iteration=180000))
    ]
    for path, (cfg, _, old) in zip(released, (cbn, mabn)):
        config, out = str(tmp_path / 'config.py'), tmp_path / 'new' / 'out.pth'
        cfg.dump(config)
        main([path, '-o', str(out), '--model', config])
        printed = capsys.readouterr().out
        assert ' -> ' not in printed and 'LegacyAnchorGenerator' in printed
        written = torch.load(out, weights_only=True)
        _model(cfg).load_state_dict(written['state_dict'])
        if old is cbn[2]:
            assert 'Dropped' not in printed and '--match-eps' in printed
            assert written['meta'] == dict(
                converted_from=MMDET1,
                dataset_meta=dict(classes=('a', 'b', 'c')))
        else:
            dropped = [
                line for line in printed.splitlines()
                if line.startswith('Dropped')
            ]
            assert len(dropped) == 2
            assert re.search(r'buffer_x2, .* more: .*fill again', dropped[0])
            assert 'cell_anchors.0' in dropped[1] and 'anchors,' in dropped[1]
            assert "style='caffe'" in printed
            assert written['meta'] == dict(converted_from=BENCHMARK)


def test_verbose_tells_every_key(cbn, tmp_path, capsys):
    path = _write(tmp_path / 'in.pth', cbn[2])
    main([path, '-o', str(tmp_path / 'out.pth'), '--verbose'])
    lines = capsys.readouterr().out.splitlines()
    assert ('bbox_head.fc_cls.bias -> roi_head.bbox_head.fc_cls.bias '
            '(background last)') in lines
    assert 'backbone.conv1.weight -> backbone.conv1.weight' in lines
    assert 'added neck.fpn_convs.0.bn.num_batches_tracked (0)' in lines
    assert sum(' -> ' in line for line in lines) == len(cbn[2])


def test_stock_checkpoints_are_left_alone(cbn, tmp_path, capsys):
    out = tmp_path / 'out.pth'
    for state in (cbn[1], ResNet(18, base_channels=8).state_dict()):
        path = _write(tmp_path / 'in.pth', dict(state_dict=state))
        main([path, '-o', str(out)])
        printed = capsys.readouterr().out
        assert printed.count('\n') == 1 and 'needs no conversion' in printed
    assert not out.exists()


def test_what_does_not_fit_the_model_is_not_written(cbn, tmp_path, capsys):
    cfg, _, old = cbn
    old = dict(old)
    del old['neck.fpn_convs.2.conv.weight']
    old['neck.extra'] = torch.ones(1)
    old['bbox_head.shared_fcs.0.bias'] = torch.ones(21)
    path, out = _write(tmp_path / 'in.pth', old), tmp_path / 'out.pth'
    config = str(tmp_path / 'config.py')
    cfg.dump(config)
    error = _fails(capsys, path, '-o', str(out), '--model', config)
    for part in ('1 missing (neck.fpn_convs.2.conv.weight)',
                 '1 unexpected (neck.extra)',
                 'shared_fcs.0.bias (21,) for (20,)', 'Nothing was written'):
        assert part in error
    assert not out.exists()


@pytest.mark.parametrize('checkpoint, message', [
    ([1, 2], 'no state dict.*found a list'),
    (dict(epoch=3), 'no state dict.*found a dict with epoch'),
    (dict(state_dict={}), 'no state dict'),
    ({'encoder.w': torch.ones(1)}, r'not known.*encoder\.w.*--layout'),
])
def test_wrong_files_end_in_one_line(checkpoint, message, tmp_path, capsys):
    path, out = _write(tmp_path / 'in.pth', checkpoint), tmp_path / 'out.pth'
    error = _fails(capsys, path, '-o', str(out))
    assert re.search(message, error) and path in error
    assert not out.exists()
    assert 'no checkpoint at' in _fails(capsys, 'none.pth', '-o', str(out))


def test_wrong_layouts_are_told(cbn, mabn):
    old = find_state_dict(mabn[2], 'a.pth')
    with pytest.raises(SetupError, match=r'no rule for rpn\.head\.cls_tower'):
        convert({**old, 'rpn.head.cls_tower.0.weight': torch.ones(1)},
                BENCHMARK)
    with pytest.raises(SetupError, match='no rule for.*Supported are ResNets'):
        convert(old, IMAGENET)
    with pytest.raises(SetupError, match='roi_head.*loads as it is'):
        convert(cbn[1], MMDET1)
    with pytest.raises(SetupError, match='for the released CBN'):
        convert(old, BENCHMARK, match_eps=True)
    with pytest.raises(SetupError, match='only RetinaNet is supported'):
        convert({'bbox_head.fcos_cls.weight': torch.ones(1)}, MMDET1)
    with pytest.raises(SetupError, match='12 rows, but 16 or 4'):
        convert({**cbn[2], 'bbox_head.fc_reg.bias': torch.ones(12)}, MMDET1)
    norm = 'backbone.body.layer1.0.bn1'
    with pytest.raises(SetupError, match='another key both become'):
        convert({**old, f'{norm}.num_batches_tracked': torch.tensor(1)},
                BENCHMARK)


def test_the_file_is_not_written_over():
    with pytest.raises(SystemExit):
        parse_args(['a.pth', '-o', './a.pth'])
