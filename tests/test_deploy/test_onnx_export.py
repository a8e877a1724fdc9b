"""ONNX files do what the model does, in standard operators."""
import copy
import importlib.util
import warnings
from collections import Counter

import onnx
import onnxruntime
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmdet_smallbn import (BGN, CBN, MABN, CenConv2d, GhostBN,
                           set_example_weight)
from mmdet_smallbn.cli import export_onnx as cli
from mmdet_smallbn.deploy import onnx_export
from mmdet_smallbn.deploy.onnx_export import export_onnx
from mmdet_smallbn.errors import SetupError
from mmdet_smallbn.layers import SmallBatchNorm
from tests.small_training import model_cfg

NORMS = {
    'CBN': dict(type='CBN'),
    'NaiveCBN': dict(type='NaiveCBN'),
    'CmBN': dict(type='CmBN'),
    'MABN': dict(type='MABN'),
    'BRN': dict(type='BRN'),
    'BGN, weight 0': dict(type='BGN', num_groups=2, example_weight=0.),
    'BGN, weight 1': dict(type='BGN', num_groups=2),
    'GhostBN': dict(type='GhostBN')
}


def _retinanet_cfg(norm_cfg):
    """With a norm in backbone, neck and head, that all levels share."""
    cfg = model_cfg('BN')
    head = cfg['bbox_head']
    head.update(type='RetinaHead')
    del head['num_ins']
    for part in (cfg['backbone'], cfg['neck'], head):
        part['norm_cfg'] = norm_cfg
        if norm_cfg['type'] == 'MABN':
            part['conv_cfg'] = dict(type='CenConv')
    return cfg


def _retinanet(norm_cfg):
    init_default_scope('mmdet')
    return MODELS.build(_retinanet_cfg(norm_cfg))


def _train(model):
    """Norms with statistics, scales and shifts of their own."""
    for module in model.modules():
        if isinstance(module, SmallBatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # levels share the head's norms
            outputs = model.bbox_head(
                model.extract_feat(torch.randn(2, 3, 64, 64) * 2 + 1))
        sum(out.square().mean() for level in outputs
            for out in level).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope='module', params=NORMS.values(), ids=NORMS.keys())
def detector(request):
    torch.manual_seed(0)
    model = _retinanet(request.param)
    _train(model)
    model.eval()
    norms = [m for m in model.modules() if isinstance(m, SmallBatchNorm)]
    assert len(norms) > 20
    assert all((m.running_var - 1).abs().max() > 1e-3 for m in norms)
    return model


def _operators(path):
    """How often each operator is there; all are ONNX's own."""
    nodes = onnx.load(str(path)).graph.node
    assert {node.domain for node in nodes} <= {'', 'ai.onnx'}
    return Counter(node.op_type for node in nodes)


def _run(path, image):
    session = onnxruntime.InferenceSession(
        str(path), providers=['CPUExecutionProvider'])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {'input': image.numpy()})))


def _assert_same(found, expected):
    assert len(found) == len(expected)
    for out, wanted in zip(found, expected):
        torch.testing.assert_close(
            torch.from_numpy(out), wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def _head_outputs(model, image):
    return [
        out for outs in model.bbox_head(model.extract_feat(image))
        for out in outs
    ]


def test_backbone_and_neck(detector, tmp_path):
    network = nn.Sequential(detector.backbone, detector.neck)
    path = tmp_path / 'fpn.onnx'
    export = export_onnx(network, path, (1, 3, 64, 64))
    assert list(export.outputs) == [f'output_{i}' for i in range(5)]
    assert export.outputs['output_0'] == (1, 16, 8, 8)
    assert 0 < export.difference < 1e-4
    assert 'BatchNormalization' not in _operators(path)
    image = torch.randn(3, 3, 96, 160)
    with torch.no_grad():
        _assert_same(_run(path, image).values(), network(image))


def test_a_detectors_network(detector, tmp_path):
    before = copy.deepcopy(detector.state_dict())
    path = tmp_path / 'retinanet.onnx'
    export_onnx(detector, path, (1, 3, 64, 64))
    _operators(path)
    image = torch.randn(2, 3, 128, 96)
    found = _run(path, image)
    assert list(found) == [
        f'{name}_p{i}' for name in ('cls_score', 'bbox_pred')
        for i in range(3, 8)
    ]
    _assert_same(found.values(), _head_outputs(detector, image))
    for name, value in detector.state_dict().items():
        assert torch.equal(value, before[name])


def test_folded(detector, tmp_path, monkeypatch):
    from mmdet_smallbn.deploy import fuse
    folded = []

    def fuse_norm(model, *args):
        assert not any(m.training for m in model.modules())
        folded.append(fuse_real(model, *args))
        return folded[0]

    fuse_real = fuse.fuse_norm
    monkeypatch.setattr(fuse, 'fuse_norm', fuse_norm)
    path = tmp_path / 'folded.onnx'
    norms = [m for m in detector.modules() if isinstance(m, SmallBatchNorm)]
    if norms[0].example_weight:
        with pytest.raises(SetupError, match='example weight 1'):
            export_onnx(detector, path, (1, 3, 128, 128), fold=True)
        assert not path.exists()
        return
    export_onnx(detector, path, (1, 3, 128, 128), fold=True)
    assert not any(
        isinstance(m, (SmallBatchNorm, CenConv2d))
        for m in folded[0].modules())
    operators = _operators(path)
    assert not {'BatchNormalization', 'InstanceNormalization', 'ReduceMean'
                } & {*operators}
    convs = [m for m in detector.modules() if isinstance(m, nn.Conv2d)]
    # The head's are called for each of five levels.
    of_head = sum(m in set(detector.bbox_head.modules()) for m in convs)
    assert operators['Conv'] == len(convs) + 4 * of_head
    image = torch.randn(2, 3, 96, 64)
    _assert_same(
        _run(path, image).values(), _head_outputs(detector, image))
    # The model keeps its norms.
    assert norms == [
        m for m in detector.modules() if isinstance(m, SmallBatchNorm)
    ]


def _trained(norm, conv=nn.Conv2d):
    network = nn.Sequential(conv(3, 8, 3), norm, nn.ReLU())
    for _ in range(2):
        network(torch.randn(4, 3, 8, 8) + 1)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    return network.eval()


@pytest.mark.parametrize('weight', [0., 0.3, 1.])
@pytest.mark.parametrize(
    'norm', [
        CBN, MABN, nn.BatchNorm2d, GhostBN,
        lambda c: BGN(c, num_groups=2)
    ],
    ids=['CBN', 'MABN', 'BN', 'GhostBN', 'BGN'])
def test_examples_with_a_weight(norm, weight, tmp_path):
    network = _trained(norm(8))
    set_example_weight(network, weight)
    path = tmp_path / 'weighted.onnx'
    if weight == 0.3 or weight == 1 and norm is MABN:
        with pytest.raises(SetupError, match=f'example weight {weight:g}.*'
                           r'set_example_weight\(model, 0\)'):
            export_onnx(network, path, (1, 3, 16, 16))
        assert not path.exists()
        return
    export_onnx(network, path, (1, 3, 16, 16))
    image = torch.ones(2, 3, 9, 9).cumsum(3)
    with torch.no_grad():
        out = network(image)
    _assert_same(_run(path, image).values(), [out])
    assert ('InstanceNormalization' in _operators(path)) == (weight == 1)


def test_centring_is_done_before(tmp_path):
    network = _trained(MABN(8), CenConv2d)
    with torch.no_grad():  # so that centring matters
        network[0].weight.add_(1)
    path = tmp_path / 'centred.onnx'
    export_onnx(network, path, (1, 3, 16, 16))
    assert set(_operators(path)) == {'Conv', 'Relu'}
    image = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        _assert_same(_run(path, image).values(), [network(image)])


def test_a_norms_groups_are_constants(tmp_path):
    norm = BGN(8, num_groups=2, example_weight=0.)
    path = tmp_path / 'groups.onnx'
    export_onnx(_trained(norm), path, (1, 3, 16, 16))
    assert set(_operators(path)) == {'Conv', 'Relu'}
    assert norm.num_groups == 2


def test_the_exporter_is_quiet(tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        export_onnx(
            _trained(BGN(8, num_groups=2)), tmp_path / 'a.onnx',
            (1, 3, 16, 16))
    assert capfd.readouterr() == ('', '')


def test_levels_of_other_strides_are_counted(tmp_path):
    model = _retinanet(dict(type='CBN')).eval()
    model.bbox_head.prior_generator.strides[-1] = (100, 100)
    export = export_onnx(model, tmp_path / 'a.onnx', (1, 3, 64, 64))
    assert list(export.outputs) == [
        f'{name}_{i}' for name in ('cls_score', 'bbox_pred')
        for i in range(5)
    ]


def test_a_box_head_by_itself(tmp_path):
    from mmdet.models.roi_heads import Shared4Conv1FCBBoxHead
    head = Shared4Conv1FCBBoxHead(
        in_channels=8, conv_out_channels=8, fc_out_channels=8,
        norm_cfg=dict(type='CBN')).eval()
    path = tmp_path / 'box.onnx'
    with pytest.raises(SetupError, match='cannot run on .*14, 14.*fewer axes'):
        export_onnx(head, path, (2, 8, 7, 7))
    export_onnx(head, path, (2, 8, 7, 7), dynamic=('batch', ))
    regions = torch.randn(5, 8, 7, 7)
    with torch.no_grad():
        _assert_same(_run(path, regions).values(), head(regions))


class _OfOneSize(nn.Module):

    def forward(self, x):
        return x + torch.arange(int(x.size(3)))


def test_axes_that_the_network_does_not_let_differ(tmp_path):
    path = tmp_path / 'a.onnx'
    with pytest.raises(SetupError, match='onnxruntime cannot run.*fewer axes'):
        export_onnx(_OfOneSize(), path, (1, 3, 8, 8))
    assert not path.exists()
    export_onnx(_OfOneSize(), path, (1, 3, 8, 8), dynamic=('batch', 'height'))
    image = torch.randn(2, 3, 5, 8)
    _assert_same(_run(path, image).values(), [_OfOneSize()(image)])
    with pytest.raises(ValueError, match='dynamic takes batch, .*got depth'):
        export_onnx(_OfOneSize(), path, (1, 3, 8, 8), dynamic=('depth', ))


def test_a_file_that_differs_is_not_written(tmp_path, monkeypatch):
    network, path = _trained(CBN(8)), tmp_path / 'a.onnx'

    def damage(copied):
        assert copied is not network
        copied[0].weight.add_(1e-2)

    monkeypatch.setattr(onnx_export, '_make_constant', damage)
    with pytest.raises(SetupError, match='differs by .* onnxruntime and'):
        export_onnx(network, path, (1, 3, 16, 16))
    assert not path.exists()


def test_operators_of_other_domains_are_refused(tmp_path):
    from mmcv.ops import DeformConv2dPack
    with pytest.raises(SetupError, match='mmcv::MMCVDeformConv2d.*standard'):
        export_onnx(
            DeformConv2dPack(3, 4, 3), tmp_path / 'a.onnx', (1, 3, 16, 16))


def test_what_torch_cannot_export_is_named(tmp_path):

    class Inverse(nn.Module):

        def forward(self, x):
            return torch.linalg.inv(x + 9 * torch.eye(8))

    with pytest.raises(SetupError, match='cannot export .* 17: .*linalg_inv'):
        export_onnx(Inverse(), tmp_path / 'a.onnx', (1, 3, 8, 8), dynamic=())


def test_norms_without_averages_are_refused(tmp_path):
    network = nn.Sequential(GhostBN(3, track_running_stats=False))
    with pytest.raises(SetupError, match="GhostBN '0' keeps no moving"):
        export_onnx(network, tmp_path / 'a.onnx')


def test_other_detectors_are_refused(tmp_path):
    from mmdet.models.detectors import BaseDetector

    class Other(BaseDetector):
        extract_feat = loss = predict = _forward = None

    with pytest.raises(SetupError, match='Other is neither'):
        export_onnx(Other(), tmp_path / 'a.onnx')


def _hide(monkeypatch, *hidden):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, 'find_spec', lambda name, *args: None
        if name in hidden else real(name, *args))


def test_without_the_packages(tmp_path, monkeypatch):
    network, path = _trained(CBN(8)), tmp_path / 'a.onnx'
    _hide(monkeypatch, 'onnxruntime')
    assert export_onnx(network, path, (1, 3, 16, 16)).difference is None
    _hide(monkeypatch, 'onnx')
    with pytest.raises(SetupError, match='pip install onnx onnxruntime$'):
        export_onnx(network, path, (1, 3, 16, 16))


@pytest.fixture
def config(tmp_path):
    path = tmp_path / 'retinanet.py'
    Config(dict(model=_retinanet_cfg(dict(type='CBN')))).dump(path)
    return str(path)


def _main(tmp_path, config, state, *arguments):
    checkpoint = tmp_path / 'trained.pth'
    torch.save(dict(state_dict=state), checkpoint)
    out = tmp_path / 'out.onnx'
    cli.main([
        config, str(checkpoint), '-o', str(out), '--shape', '64', '96',
        *arguments
    ])
    return out


def test_the_tool(config, tmp_path, capsys):
    model = _retinanet(dict(type='CBN')).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    out = _main(tmp_path, config, model.state_dict(), '--dynamic', 'batch')
    printed = capsys.readouterr().out
    assert printed.startswith(f'written: {out}\nlargest difference between '
                              'onnxruntime and torch: ')
    assert printed.endswith(
        'inputs:\n'
        '  input (1, 3, 64, 96)\n'
        'outputs, of the head, not yet decoded to boxes:\n'
        '  cls_score_p3 (1, 7, 8, 12)\n'
        '  cls_score_p4 (1, 7, 4, 6)\n'
        '  cls_score_p5 (1, 7, 2, 3)\n'
        '  cls_score_p6 (1, 7, 1, 2)\n'
        '  cls_score_p7 (1, 7, 1, 1)\n'
        '  bbox_pred_p3 (1, 4, 8, 12)\n'
        '  bbox_pred_p4 (1, 4, 4, 6)\n'
        '  bbox_pred_p5 (1, 4, 2, 3)\n'
        '  bbox_pred_p6 (1, 4, 1, 2)\n'
        '  bbox_pred_p7 (1, 4, 1, 1)\n')
    image = torch.randn(2, 3, 64, 96)
    _assert_same(_run(out, image).values(), _head_outputs(model, image))


@pytest.mark.parametrize('change, message', [
    (lambda state: state.pop('neck.fpn_convs.0.conv.weight'),
     'does not fit this config: 1 missing (neck.fpn_convs.0.conv.weight)'),
    (lambda state: state.update({'backbone.conv1.weight': torch.zeros(1)}),
     'does not fit this config: 1 of another shape (backbone.conv1.weight '
     '(1,) for')
], ids=['missing', 'shape'])
def test_the_tool_wants_all_weights(change, message, config, tmp_path,
                                    capsys):
    state = dict(_retinanet(dict(type='CBN')).state_dict())
    change(state)
    with pytest.raises(SystemExit):
        _main(tmp_path, config, state)
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'out.onnx').exists()


def test_the_tool_tells_of_missing_packages(tmp_path, monkeypatch, capsys):
    _hide(monkeypatch, 'onnx')
    with pytest.raises(SystemExit):
        cli.main(['a.py', 'a.pth', '-o', str(tmp_path / 'a.onnx')])
    assert capsys.readouterr().err == (
        'error: the export needs the package onnx, and onnxruntime to check '
        'the file: pip install onnx onnxruntime\n')


def test_the_tool_weighs_examples_as_testing_does():
    model = nn.Sequential(CBN(4))
    cli.weigh_examples(
        model,
        Config(
            dict(custom_hooks=[
                dict(type='BurnInHook', iters=1),
                dict(type='ExampleWeightHook', weight=0.2)
            ])))
    assert model[0].example_weight == 0.2


def test_flags():
    args = cli.parse_args(['a.py', 'a.pth', '-o', 'a.onnx'])
    assert args.shape == (320, 320) and args.opset == 17 and not args.fold
    assert args.dynamic is None
    for wrong in (['-o', 'a.pth'], ['-o', 'a.onnx', '--shape', '0', '3'],
                  ['-o', 'a.onnx', '--dynamic', 'depth'], []):
        with pytest.raises(SystemExit):
            cli.parse_args(['a.py', 'a.pth', *wrong])


def test_help_says_what_a_file_holds(capsys):
    with pytest.raises(SystemExit):
        cli.parse_args(['--help'])
    told = ' '.join(capsys.readouterr().out.split())
    assert ('For Faster and Mask R-CNN the file holds the whole detector: from '
            'one normalised image of a fixed shape to boxes, scores, labels '
            'and masks.') in told
