"""Other toolboxes than mmdet, and models without any."""
import subprocess
import sys
import textwrap
from pathlib import Path

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
for kind in ('CBN', 'NaiveCBN', 'MABN', 'BRN', 'BGN', 'GhostBN'):
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
            custom_hooks=[] if kind in ('BGN', 'GhostBN') else hooks,
            default_scope={scope!r}, experiment_name=kind,
            log_level='ERROR')
        runner.train()
        norm = runner.model.norm
        print(type(norm).__name__, int(norm.num_batches_tracked))
'''
TRAINED = [
    'CBN', '8', 'NaiveCBN', '8', 'MABN', '8', 'BRN', '8', 'BatchGroupNorm',
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
