"""Checkpoints are loaded safely, from wherever they are named."""
import ast
import importlib
import pickle
import re
from pathlib import Path

import mmdet
import pytest
import torch
from mmdet.models.backbones import ResNet
from mmengine.config import Config
from mmengine.fileio import (LocalBackend, PetrelBackend,
                              register_backend)
from mmengine.runner import CheckpointLoader

from mmdet_smallbn.cli import checkpoints, print_norms, train
from mmdet_smallbn.cli.checkpoints import (load_from_address, load_from_local,
                                           register_checkpoint_loader,
                                           trust_checkpoints)
from mmdet_smallbn.errors import SetupError

ROOT = Path(__file__).resolve().parents[2]
DEMO = 'configs/demo/faster-rcnn_r18_fpn_bn-all_1xb2_shapes-coco.py'
CBN_DEMO = 'configs/demo/faster-rcnn_r18_fpn_cbn-all_1xb2_shapes-coco.py'


class Malicious:
    """Leaves a file where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, 'w')


@pytest.fixture(autouse=True)
def _no_trust():
    trust_checkpoints(False)
    yield
    trust_checkpoints(False)


@pytest.fixture
def trap(tmp_path):
    """A checkpoint that runs code, and what it would leave."""
    left, path = tmp_path / 'left', tmp_path / 'trap.pth'
    torch.save(
        dict(state_dict=dict(w=torch.ones(2)), more=Malicious(left)), path)
    return path, left


def test_plain_checkpoints_need_no_trust(tmp_path):
    path = tmp_path / 'weights.pth'
    torch.save(dict(state_dict=dict(w=torch.ones(2))), path)
    register_checkpoint_loader()
    loaded = CheckpointLoader.load_checkpoint(str(path), 'cpu')
    torch.testing.assert_close(loaded['state_dict']['w'], torch.ones(2))


def test_code_in_a_checkpoint_runs_only_if_it_is_trusted(trap):
    path, left = trap
    register_checkpoint_loader()
    with pytest.raises(SetupError, match='add --trust-checkpoint'):
        CheckpointLoader.load_checkpoint(str(path), 'cpu')
    assert not left.exists()
    trust_checkpoints(True)
    CheckpointLoader.load_checkpoint(str(path), 'cpu')
    assert left.exists()


_RUN = ['--data', '{data}', '--work-dir', '{out}']
_WEIGHTS = ['--cfg-options', 'load_from={path}']
# Every tool that can load a checkpoint, and how it comes to do so.
LOADING = {
    'convert_from_stock': ['{path}', '-o', '{out}.pth'],
    'convert_to_stock': [DEMO, '{path}', '-o', '{out}.pth'],
    'demo': [DEMO, *_RUN, *_WEIGHTS],
    'diagnose_norm': [DEMO, '{path}', *_RUN],
    'export_onnx': [DEMO, '{path}', '-o', '{out}.onnx'],
    'statistics_error': [CBN_DEMO, *_RUN, *_WEIGHTS],
    'sweep_example_weight': [DEMO, '{path}', *_RUN],
    'test': [DEMO, '{path}', *_RUN],
    'train': [DEMO, *_RUN, *_WEIGHTS],
}


@pytest.mark.parametrize('name', LOADING)
def test_the_tools_refuse_it(name, trap, shapes, tmp_path, capsys):
    path, left = trap
    words = [word.format(path=path, data=shapes, out=tmp_path / 'out')
             for word in LOADING[name]]
    with pytest.raises(SystemExit):
        importlib.import_module(f'mmdet_smallbn.cli.{name}').main(words)
    assert 'add --trust-checkpoint' in capsys.readouterr().err
    assert not left.exists()


@pytest.mark.parametrize(
    'name', sorted(path.stem for path in (ROOT / 'tools').glob('*.py')
                   if path.stem not in ('setup_env', 'check_gpu')))
def test_the_flag_is_where_a_checkpoint_can_be_loaded(name, capsys):
    tool = importlib.import_module(f'mmdet_smallbn.cli.{name}')
    with pytest.raises(SystemExit):
        tool.parse_args(['--help'])
    has_flag = '--trust-checkpoint' in capsys.readouterr().out
    assert has_flag == (name in LOADING)


def test_the_table_of_norms_loads_nothing(trap, tmp_path, capsys):
    """Not even the teacher, which mmdet loads where it builds a detector."""
    path, left = trap
    teacher = Path(mmdet.__file__).parent / '.mim/configs/gfl'
    config = tmp_path / 'distilled.py'
    config.write_text(
        "_base_ = 'mmdet::ld/ld_r18-gflv1-r101_fpn_1x_coco.py'\n"
        f'load_from = {str(path)!r}\n'
        f'model = dict(teacher_ckpt={str(path)!r}, teacher_config='
        f"{str(teacher / 'gfl_r50_fpn_1x_coco.py')!r}, backbone=dict("
        f'init_cfg=dict(checkpoint={str(path)!r})))\n')
    print_norms.main([str(config)])
    assert 'bbox_head' in capsys.readouterr().out
    assert not left.exists()


def _is_unsafe(call):
    """Whether a call unpickles, or may, without ``weights_only=True``."""
    safe = [getattr(k.value, 'value', None) is True for k in call.keywords
            if k.arg == 'weights_only']
    name = (getattr(getattr(call.func, 'value', None), 'id', None),
            getattr(call.func, 'attr', None))
    return safe == [False] or not safe and name in (
        ('torch', 'load'), ('pickle', 'load'), ('pickle', 'loads'),
        ('pickle', 'Unpickler'))


def test_one_place_alone_loads_what_is_not_safe():
    """docs/deployment.md names it."""
    unsafe = [
        path.name for folder in ('mmdet_smallbn', 'tools')
        for path in (ROOT / folder).rglob('*.py')
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and _is_unsafe(node)
    ]
    assert unsafe == ['checkpoints.py']
    page = (ROOT / 'docs' / 'deployment.md').read_text()
    assert '`load_from_local`' in page and 'add --trust-checkpoint' in page


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='no checkpoint at .*none.pth'):
        load_from_local(str(tmp_path / 'none.pth'))
    path = tmp_path / 'text.pth'
    path.write_text('hello')
    torch.save(dict(w=torch.ones(99)), tmp_path / 'whole.pth')
    whole = (tmp_path / 'whole.pth').read_bytes()
    for content in (b'hello', b'', b'<html>', pickle.dumps([1])[:-1],
                    whole[:len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(SetupError, match='text.pth is not a checkpoint'):
            load_from_local(str(path))


def test_addresses_are_loaded_safely_or_not_at_all(tmp_path):
    source, cache = tmp_path / 'source', tmp_path / 'cache'
    source.mkdir()
    torch.save(dict(w=torch.ones(2)), source / 'plain.pth')
    loaded = load_from_address((source / 'plain.pth').as_uri(), 'cpu', cache)
    torch.testing.assert_close(loaded['w'], torch.ones(2))
    torch.save(dict(more=Config(dict(a=1))), source / 'more.pth')
    with pytest.raises(SetupError, match='not loaded from a URL'):
        load_from_address((source / 'more.pth').as_uri(), 'cpu', cache)


@pytest.fixture
def bucket(tmp_path):
    """A folder that stands for a storage of addresses s3://..."""
    folder = tmp_path / 'bucket'
    folder.mkdir()

    class Bucket(LocalBackend):

        def get(self, filepath):
            return super().get(folder / Path(filepath).name)

    register_backend('bucket', Bucket, prefixes='s3', force=True)
    yield folder
    register_backend('petrel', PetrelBackend, prefixes=['petrel', 's3'],
                     force=True)


def test_a_storage_is_read_safely_or_not_at_all(bucket, trap):
    path, left = trap
    register_checkpoint_loader()
    trust_checkpoints(True)
    torch.save(dict(w=torch.ones(2)), bucket / 'plain.pth')
    loaded = CheckpointLoader.load_checkpoint('s3://b/plain.pth', 'cpu')
    torch.testing.assert_close(loaded['w'], torch.ones(2))
    path.rename(bucket / 'trap.pth')
    with pytest.raises(SetupError, match='not loaded from a URL'):
        CheckpointLoader.load_checkpoint('s3://b/trap.pth', 'cpu')
    assert not left.exists()
    whole = (bucket / 'plain.pth').read_bytes()
    for content in (b'', b'<html>', whole[:100]):
        (bucket / 'damaged.pth').write_bytes(content)
        with pytest.raises(SetupError, match='not a checkpoint, or .*damaged'):
            CheckpointLoader.load_checkpoint('s3://b/damaged.pth', 'cpu')


def test_names_of_torchvision_need_no_torchvision(tmp_path, monkeypatch):
    """mmdet's backbone starts from a file where torch keeps downloads."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    folder = tmp_path / 'hub' / 'checkpoints'
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    wanted = ResNet(18).state_dict()
    torch.save(wanted, folder / 'resnet18-f37072fd.pth')
    register_checkpoint_loader()
    model = ResNet(
        18, init_cfg=dict(
            type='Pretrained', checkpoint='torchvision://resnet18'))
    model.init_weights()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, wanted[key], rtol=0, atol=0)


@pytest.mark.parametrize('name, message', [
    ('torchvision://resnet49', 'resnet50'),
    ('open-mmlab://resnet50_caffee', 'resnet50_caffe'),
])
def test_a_name_that_is_not_known(name, message, monkeypatch):
    monkeypatch.setattr(checkpoints, 'get_torchvision_models', dict)
    register_checkpoint_loader()
    with pytest.raises(SetupError, match=f'Did you mean .*{message}'):
        CheckpointLoader.load_checkpoint(name, 'cpu')


def test_what_cannot_be_downloaded_has_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))

    def fail(*args, **kwargs):
        raise OSError('no way out')

    monkeypatch.setattr(torch.hub, 'download_url_to_file', fail)
    register_checkpoint_loader()
    with pytest.raises(SetupError) as error:
        CheckpointLoader.load_checkpoint('torchvision://resnet50', 'cpu')
    text = str(error.value)
    assert 'no way out' in text
    assert f"put it at {tmp_path / 'hub/checkpoints/resnet50-0676ba61.pth'}" in (
        text)
    assert 'model.backbone.init_cfg=None' in text


@pytest.mark.slow
def test_the_documented_command_trains_without_torchvision(
        shapes, tmp_path, monkeypatch):
    """One GPU, 2 images, a folder of one's own, ImageNet weights."""
    page = (ROOT / 'docs' / 'get_started.md').read_text()
    config, = re.findall(
        r'^python tools/train\.py (\S+) --data path/to/folder$', page, re.M)
    folder = tmp_path / 'torch' / 'hub' / 'checkpoints'
    folder.mkdir(parents=True)
    state = ResNet(50).state_dict()
    state['conv1.weight'].fill_(0.25)  # frozen: it stays
    torch.save(state, folder / 'resnet50-0676ba61.pth')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    train.main([
        config, '--data', str(shapes), '--work-dir', str(tmp_path / 'work'),
        '--cfg-options', 'train_dataloader.dataset.pipeline.2.scale=(64,64)',
        'train_dataloader.dataset.indices=2', 'train_dataloader.num_workers=0',
        'train_dataloader.persistent_workers=False', 'train_cfg.max_epochs=1',
        'train_cfg.val_interval=2', 'custom_hooks.0.epochs=0',
        'default_hooks.logger.interval=1'
    ])
    saved = torch.load(tmp_path / 'work' / 'epoch_1.pth', weights_only=True)
    found = saved['state_dict']['backbone.conv1.weight']
    torch.testing.assert_close(found, state['conv1.weight'])
