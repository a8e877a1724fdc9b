"""Other toolboxes than mmdet, and models without any."""
import importlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from mmengine.config import Config

ROOT = Path(__file__).resolve().parents[1]

# As if they were not installed.
BLOCK = '''
import sys
import warnings
warnings.simplefilter('ignore')
for name in {blocked}:
    sys.modules[name] = None
'''


def _run(code, blocked):
    result = subprocess.run(
        [sys.executable, '-c',
         BLOCK.format(blocked=blocked) + textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


TRAIN = '''
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import nn
import mmdet_smallbn
from mmdet_smallbn import functional, layers


@MODELS.register_module()
class Classifier(BaseModel):

    def __init__(self, norm_cfg):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = {build}
        self.fc = nn.Linear(8, 2)

    def forward(self, inputs, labels, mode='tensor'):
        x = self.norm(self.conv(torch.stack(inputs))).relu().mean((2, 3))
        loss = nn.functional.cross_entropy(self.fc(x), torch.tensor(labels))
        return dict(loss=loss)


torch.manual_seed(0)
data = [dict(inputs=torch.randn(3, 8, 8), labels=i % 2) for i in range(8)]
import tempfile
for kind in ('CBN', 'NaiveCBN', 'CmBN', 'MABN', 'BRN', 'BGN', 'GhostBN'):
    norm = dict(type=kind)
    if kind == 'BGN':
        norm['num_groups'] = 4
    hooks = [dict(type='BurnInHook', iters=2)]
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(
            dict(type='Classifier', norm_cfg=norm),
            folder,
            train_dataloader=dict(
                dataset=data, batch_size=2,
                sampler=dict(type='DefaultSampler', shuffle=True)),
            train_cfg=dict(by_epoch=True, max_epochs=2),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
            custom_hooks=[] if kind in ('BGN', 'CmBN', 'GhostBN') else hooks,
            default_scope={scope!r}, experiment_name=kind,
            log_level='ERROR')
        runner.train()
        norm = runner.model.norm
        print(type(norm).__name__, int(norm.num_batches_tracked))
'''
TRAINED = [
    'CBN', '8', 'NaiveCBN', '8', 'CmBN', '8', 'MABN', '8', 'BRN', '8', 'BGN',
    '8', 'GhostBN', '8'
]


def test_an_mmengine_model_needs_neither_mmcv_nor_mmdet():
    code = TRAIN.replace(
        '{build}', 'MODELS.build(dict(norm_cfg, num_features=8))').replace(
            '{scope!r}', "'mmengine'")
    found = _run(code, ['mmcv', 'mmdet', 'pycocotools'])
    assert found == TRAINED


def test_a_toolbox_on_mmcv_does_not_need_mmdet():
    """mmpretrain's registry is a child of mmengine's, as mmdet's is."""
    code = '''
        from mmengine.registry import MODELS as ROOT
        from mmengine.registry import Registry
        TOOLBOX = Registry('model', parent=ROOT, scope='mmpretrain')
        from mmcv.cnn import build_norm_layer
    '''
    train = TRAIN.replace('{build}', 'build_norm_layer(norm_cfg, 8)[1]')
    train = train.replace('{scope!r}', "'mmpretrain'")
    assert _run(textwrap.dedent(code) + train, ['mmdet']) == TRAINED


def test_the_mathematics_needs_torch_alone():
    """Beyond what the package itself checks at import."""
    code = '''
        import torch
        from mmdet_smallbn.functional import batch_moments, normalize
        x = torch.randn(2, 3, 4, 4)
        moments = batch_moments(x)
        out = normalize(x, moments.mean, moments.var, None, None, 1e-5)
        torch.testing.assert_close(
            out, torch.nn.functional.batch_norm(x, None, None, training=True))
    '''
    _run(code, ['mmcv', 'mmdet', 'pycocotools'])
    code = '''
        import pathlib, re
        import mmdet_smallbn.functional as f
        for path in pathlib.Path(f.__file__).parent.glob('*.py'):
            for name in re.findall(r'^(?:from|import) ([a-z]\\w*)',
                                   path.read_text(), re.M):
                print(name)
    '''
    assert set(_run(code, [])) <= {'torch', *sys.stdlib_module_names}


CONFIGS = sorted((ROOT / 'configs' / 'other_toolboxes').glob('*.py'))
SETTINGS = {
    'resnet18_cbn_4xb4_in1k': dict(
        norm='CBN', lr=0.0125, images=4, parts=1, epochs=100, window_size=4,
        says=['batch_size=4', 'lr=0.0125', 'T_max=100', 'epochs=25']),
    'resnet50_mabn_8xb2-accumulate16_in1k': dict(
        norm='MABN', lr=0.1, images=2, parts=16, epochs=120, buffer_size=16,
        says=['batch_size=2', 'accumulative_counts=16', 'max_epochs=120',
              'zero_init_residual=False']),
    'pspnet_r101-d8_mabn_8xb2-80k_cityscapes-512x1024': dict(
        norm='MABN', lr=0.01, images=2, parts=1, iters=80000, buffer_size=16,
        says=['end=558', 'end=80000', 'pretrained=None']),
}
TRAIN_CONFIG = '''
import sys
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import import_modules_from_strings

cfg = Config.fromfile(sys.argv[1])
init_default_scope(cfg.default_scope)
model_cfg = cfg.model
model_cfg.backbone.init_cfg = None
model_cfg.backbone.depth = 18 if cfg.default_scope == 'mmpretrain' else 50
if cfg.default_scope == 'mmpretrain' and model_cfg.head.in_channels > 512:
    model_cfg.head.in_channels = 512
if 'data_preprocessor' in cfg:
    model_cfg.setdefault('data_preprocessor', cfg.data_preprocessor)
import_modules_from_strings(**cfg.custom_imports)
from mmdet_smallbn.layers import CenConv2d, TrainingLoop, norms_of
model = MODELS.build(model_cfg).train()
wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
norms = norms_of(model)
loop = TrainingLoop(norms)
torch.manual_seed(0)
if cfg.default_scope == 'mmpretrain':
    from mmpretrain.structures import DataSample
    kind = dict(inputs=torch.randint(0, 255, (2, 3, 64, 64)), data_samples=[
        DataSample().set_gt_label(label) for label in (1, 7)])
else:
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample
    kind = dict(
        inputs=list(torch.randint(0, 255, (2, 3, 512, 1024))[..., :64, :64]),
        data_samples=[
            SegDataSample(gt_sem_seg=PixelData(
                data=torch.randint(0, 19, (1, 64, 64)))) for _ in range(2)])
before = {n: p.detach().clone() for n, p in model.named_parameters()}
steps = cfg.optim_wrapper.get('accumulative_counts', 1) + 1
for iteration in range(steps):
    loop.begin(iteration, after_step=wrapper.should_update())
    losses = model.train_step(kind, wrapper)
    loop.end()
assert torch.isfinite(losses['loss'])
for name, parameter in model.named_parameters():
    assert (parameter != before[name]).any(), name
assert {type(norm).__name__ for norm in norms.values()} == {sys.argv[2]}
for norm in norms.values():
    assert norm.held_iterations == [min(steps, norm.averaged_iterations)]
if sys.argv[2] == 'MABN':
    convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(isinstance(m, CenConv2d) for m in convs if m.bias is None)
'''


def _toolbox(path):
    return 'mmpretrain' if 'in1k' in path.stem else 'mmseg'


def _why_not(toolbox):
    """Why a toolbox cannot be imported; None if it can be."""
    try:
        importlib.import_module(f'{toolbox}.models')
    except Exception as error:  # whatever an import may run into
        return f'{toolbox} cannot be imported here: {error}'
    return None


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_a_recipe_is_the_papers(path):
    """As far as the file says it, without the toolbox."""
    wanted = SETTINGS[path.stem]
    text = path.read_text()
    assert f"_base_ = '{_toolbox(path)}::" in text
    assert f"type='{wanted['norm']}'" in text
    for key in ('window_size', 'buffer_size'):
        if key in wanted:
            assert f'{key}={wanted[key]}' in text
    # What the base does not have.
    for line in wanted['says']:
        assert line in text
    if wanted['norm'] == 'MABN':
        assert "conv_cfg=dict(type='CenConv')" in text


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_a_recipe_is_built_and_takes_a_step(path):
    reason = _why_not(_toolbox(path))
    if reason:
        pytest.skip(reason)
    cfg, wanted = Config.fromfile(path), SETTINGS[path.stem]
    assert cfg.optim_wrapper.optimizer.lr == wanted['lr']
    assert cfg.optim_wrapper.get('accumulative_counts', 1) == wanted['parts']
    assert cfg.train_dataloader.batch_size == wanted['images']
    assert (cfg.train_cfg.get('max_epochs'),
            cfg.train_cfg.get('max_iters')) == (wanted.get('epochs'),
                                                wanted.get('iters'))
    result = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', TRAIN_CONFIG, str(path),
         wanted['norm']],
        cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
