"""Every config is what its file's name says, builds, and takes a step."""
import copy
import math
import re
import warnings
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Optional

import pytest
import torch
import yaml
from mmcv.cnn import ConvModule
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.utils.dl_utils.parrots_wrapper import SyncBatchNorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdet_smallbn.layers import (BGN, BRN, CBN, MABN, CenConv2d, CmBN,
                                  GhostBN, NaiveCBN, SmallBatchNorm)

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = sorted(
    p for p in (ROOT / 'configs').iterdir()
    if p.is_dir() and p.name not in ('_base_', 'other_toolboxes'))
CONFIGS = sorted(p for folder in FOLDERS for p in folder.glob('*.py'))
COCO = [p for p in CONFIGS if p.stem.endswith('_coco')]

NAME = re.compile(
    r'(?P<detector>faster-rcnn|mask-rcnn|cascade-mask-rcnn|retinanet|'
    r'rtmdet_tiny|rtmdet_s|yolox_s)'
    r'(?:_r(?P<depth>18|50|101)(?P<scratch>-scratch)?_fpn'
    r'(?P<head>_4conv1fc)?)?'
    r'(?:_(?P<norm>[a-z]+)-(?P<place>backbone|head|all)'
    r'(?:-(?P<variant>[a-z]+)(?P<number>\d*))?)?'
    r'_(?P<gpus>\d+)xb(?P<images>\d+)(?:-accumulate(?P<parts>\d+))?'
    r'(?:-(?P<schedule>1x|2x|40e))?'
    r'_(?P<data>coco|shapes-coco)')
NORMS = {
    'bn': nn.BatchNorm2d,
    'syncbn': SyncBatchNorm,
    'gn': nn.GroupNorm,
    'cbn': CBN,
    'cmbn': CmBN,
    'naivecbn': NaiveCBN,
    'mabn': MABN,
    'brn': BRN,
    'bgn': BGN,
    'ghostbn': GhostBN,
}
FOLDER_OF = {
    'cbn': 'cbn',
    'cmbn': 'cbn',
    'naivecbn': 'cbn',
    'mabn': 'mabn',
    'brn': 'brn',
    'bgn': 'bgn',
    'ghostbn': 'bgn'
}
# Parts of the model that carry the norm.
PLACES = {
    None: (),
    'backbone': ('backbone', ),
    'head': ('neck', 'roi_head', 'bbox_head'),
    'all': ('backbone', 'neck', 'roi_head', 'bbox_head'),
}
TYPES = {
    'faster-rcnn': 'FasterRCNN',
    'mask-rcnn': 'MaskRCNN',
    'cascade-mask-rcnn': 'CascadeRCNN',
    'retinanet': 'RetinaNet',
    'rtmdet_tiny': 'RTMDet',
    'rtmdet_s': 'RTMDet',
    'yolox_s': 'YOLOX'
}
# mmdet's learning rate, and the images that it is for.
LR = {
    'RetinaNet': (0.01, 16),
    'RTMDet': (0.004, 256),
    'YOLOX': (0.01, 64),
}


class Intent(NamedTuple):
    """What a config's file name says."""
    detector: str
    depth: int
    scratch: bool
    four_convs: bool
    norm: Optional[str]
    place: Optional[str]
    variant: Optional[str]
    number: Optional[int]
    gpus: int
    images: int
    parts: int
    schedule: Optional[str]
    demo: bool

    @property
    def masks(self):
        return 'mask' in self.detector

    @property
    def fine_tunes(self):
        """Whether it starts from a whole detector's weights."""
        return self.schedule == '40e'

    def carries_norm(self, module_name):
        return module_name.split('.')[0] in PLACES[self.place]

    def is_frozen(self, module_name):
        """Of the backbone: conv1 and the first stage, if anything."""
        if (self.schedule in ('2x', '40e') or self.demo
                or (self.norm, self.place) == ('bgn', 'all')):
            return False  # 2x: the MABN paper's
        return module_name.startswith(('backbone.conv1', 'backbone.bn1',
                                       'backbone.gn1', 'backbone.layer1'))

    def settings(self, module_name):
        """Attributes that a norm of this config must have there."""
        window = min(math.ceil(16 / self.images), 8)
        if self.variant == 'window':
            window = self.number
        per_image = 32 if self.demo else 512
        in_roi_head = module_name.startswith('roi_head')
        groups = 8 if self.demo else 32
        # In the demo's backbone and neck each image is by itself.
        ghost = (2 if in_roi_head else 1) if self.demo else 4
        if in_roi_head:
            ghost *= per_image
        return {
            None: {},
            'bn':
            dict(momentum=0.1),
            'syncbn':
            dict(momentum=0.1),
            'gn':
            dict(num_groups=groups),
            'cbn':
            dict(
                window_size=window,
                compensate=True,
                # As the weights that it starts from.
                momentum=0.03 if self.detector == 'yolox_s' else 0.1),
            'cmbn': {},
            'naivecbn':
            dict(window_size=window, compensate=False),
            # Table 5 and 6 of the MABN paper have 32.
            'mabn':
            dict(
                buffer_size=32 if self.four_convs else 16,
                momentum=0.02,
                clip=5.),
            'brn':
            dict(momentum=0.02, r_max=3., d_max=5.),
            'bgn':
            dict(
                num_groups=groups,
                examples_per_group=2 * (per_image if in_roi_head else 1),
                example_weight=0. if in_roi_head else 1.),
            'ghostbn':
            dict(
                ghost_size=ghost,
                sync=not self.demo,
                example_weight=float(self.demo and not in_roi_head)),
        }[self.norm]

    def pretrained(self):
        """What the backbone starts from."""
        if self.scratch or self.demo or self.fine_tunes:
            return None
        if self.place == 'all' and self.norm == 'gn':
            return dict(
                type='Pretrained',
                checkpoint='open-mmlab://contrib/resnet50_gn')
        if self.place == 'all' and self.norm == 'mabn':
            return dict(
                type='Pretrained',
                checkpoint='data/pretrained/resnet50_mabn.pth',
                prefix='backbone.')
        return dict(
            type='Pretrained', checkpoint=f'torchvision://resnet{self.depth}')

    def burn_in(self):
        """Arguments of BurnInHook; None if there is none."""
        if (self.norm, self.images) == ('mabn', 2) and self.gpus == 1 and (
                not self.demo):
            return dict(epochs=1)
        if self.norm not in ('cbn', 'naivecbn', 'mabn', 'brn'):
            return None
        if self.demo:
            return dict(iters=250)
        if self.norm == 'brn':
            return dict(iters=5000)
        if self.norm == 'mabn':
            head = ('bbox_head'
                    if self.detector == 'retinanet' else 'roi_head')
            return dict(iters=0) if self.place == 'backbone' else dict(
                iters=10000, prefix=['neck', head])
        return dict(epochs=self.number if self.variant == 'burnin' else 3)


@lru_cache(None)
def _intent(path):
    match = NAME.fullmatch(path.stem)
    assert match, f'{path.name} is not a name of this zoo'
    part = match.groupdict()
    return Intent(part['detector'], int(part['depth'] or 0),
                  bool(part['scratch']), bool(part['head']), part['norm'],
                  part['place'], part['variant'],
                  int(part['number']) if part['number'] else None,
                  int(part['gpus']), int(part['images']),
                  int(part['parts'] or 1), part['schedule'],
                  part['data'] != 'coco')


@lru_cache(None)
def _config(path):
    return Config.fromfile(path)


def _build(cfg):
    """The model at depth 18, with few regions and nothing to download."""
    init_default_scope('mmdet')
    model = cfg.model.copy()
    if model.backbone.get('depth', 18) != 18:
        model.backbone = dict(model.backbone, depth=18)
        model.neck = dict(model.neck, in_channels=[64, 128, 256, 512])
    model.backbone = dict(model.backbone, init_cfg=None)
    # YOLOX would bring the images to other sizes.
    model.data_preprocessor = dict(model.data_preprocessor)
    model.data_preprocessor.pop('batch_augments', None)
    if 'roi_head' in model:
        train_cfg = model.train_cfg.copy()
        train_cfg.rpn_proposal = dict(
            train_cfg.rpn_proposal, nms_pre=100, max_per_img=50)
        train_cfg.rcnn = copy.deepcopy(train_cfg.rcnn)
        stages = train_cfg.rcnn
        for rcnn in stages if isinstance(stages, list) else [stages]:
            rcnn.sampler.num = 16
        model.train_cfg = train_cfg
    return MODELS.build(model).train()


def _hook(cfg, kind):
    """The hook of this type in a config; None if there is none."""
    hooks = [h for h in cfg.get('custom_hooks', []) if h.type == kind]
    assert len(hooks) <= 1
    return hooks[0] if hooks else None


def _is_norm(module):
    return isinstance(module, (_BatchNorm, nn.GroupNorm))


def _same(paths, ids=lambda p: p.stem):
    return pytest.mark.parametrize('path', paths, ids=ids)


def test_the_folders_are_those_of_the_methods():
    assert [f.name for f in FOLDERS
            ] == ['baselines', 'bgn', 'brn', 'cbn', 'demo', 'mabn']


def _depth(path):
    """Files from a leaf to the first of mmdet's, both included."""
    bases = re.search(r"^_base_ = (\[[^]]*\]|'[^']*')", path.read_text(), re.M)
    files = re.findall(r"'([^']+)'", bases[1]) if bases else []
    return 1 + max(
        (1 if f.startswith('mmdet::') else _depth((path.parent / f).resolve())
         for f in files), default=0)


@_same(CONFIGS)
def test_leaf_shows_its_whole_delta_in_the_folder_of_its_method(path):
    intent = _intent(path)
    assert path.parent.name == ('demo' if intent.demo else FOLDER_OF.get(
        intent.norm, 'baselines'))
    # At most one file of ours lies between it and mmdet's. The demo's detector
    # has one part more, which is its own.
    assert _depth(path) <= (5 if intent.demo else 3)


@_same(CONFIGS)
def test_no_two_leaves_are_the_same(path):
    others = [p for p in CONFIGS if p.parent == path.parent and p != path]
    assert path.read_text() not in [p.read_text() for p in others]


@pytest.mark.parametrize('folder', FOLDERS, ids=lambda p: p.name)
def test_readme_and_metafile_list_the_folder(folder):
    names = [p.stem for p in sorted(folder.glob('*.py'))]
    readme = (folder / 'README.md').read_text()
    rows = [line for line in readme.splitlines() if line.startswith('|')]
    for name in names:
        assert sum(f']({name}.py)' in row for row in rows) == 1, name

    metafile = yaml.safe_load((folder / 'metafile.yml').read_text())
    collections = {c['Name'] for c in metafile['Collections']}
    assert [m['Name'] for m in metafile['Models']] == names
    for model in metafile['Models']:
        path = ROOT / model['Config']
        assert path == folder / f'{model["Name"]}.py'
        assert model['In Collection'] in collections
        # Nothing was run on COCO; the demo's results are in its README.
        assert not {'Weights', 'Results'} & set(model)
        cfg, intent = _config(path), _intent(path)
        assert model['Metadata']['Batch Size'] == (
            intent.gpus * intent.images * intent.parts)
        if not intent.demo:
            assert model['Metadata']['Epochs'] == cfg.train_cfg.max_epochs
    for collection in metafile['Collections']:
        assert (ROOT / collection['README']).exists()
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    assert f'configs/{folder.name}/metafile.yml' in index['Import']


@_same(CONFIGS)
def test_norms_are_where_the_name_says_and_take_a_step(path):
    cfg, intent = _config(path), _intent(path)
    assert cfg.model.type == TYPES[intent.detector]
    assert cfg.model.backbone.get('depth', 0) == intent.depth
    assert cfg.model.backbone.get('init_cfg') == intent.pretrained()
    assert bool(cfg.get('load_from')) == intent.fine_tunes
    if intent.scratch:
        assert cfg.model.backbone.zero_init_residual is False
    if 'roi_head' in cfg.model:
        heads = cfg.model.roi_head.bbox_head
        for head in heads if isinstance(heads, list) else [heads]:
            assert head.type == ('Shared4Conv1FCBBoxHead'
                                 if intent.four_convs or intent.demo else
                                 'Shared2FCBBoxHead')
    model = _build(cfg)
    norms = {n: m for n, m in model.named_modules() if _is_norm(m)}
    for name, norm in norms.items():
        trains = any(p.requires_grad for p in norm.parameters())
        assert trains != intent.is_frozen(name), name
        if not intent.carries_norm(name):
            # A backbone's own BatchNorm: the statistics are fixed.
            assert type(norm) is nn.BatchNorm2d and not norm.training, name
            continue
        assert type(norm) is NORMS[intent.norm], name
        assert norm.training == trains, name
        for key, value in intent.settings(name).items():
            assert getattr(norm, key) == value, (name, key)
    parts = {name.split('.')[0] for name in norms}
    assert set(PLACES[intent.place]) & {n
                                        for n, _ in model.named_children()
                                        } <= parts
    _check_convolutions(model, intent)
    if cfg.model.type in ('RetinaNet', 'RTMDet'):
        # Convolutions shared by levels, norms of each.
        shared = model.bbox_head.cls_convs
        assert shared[0][0].conv is shared[-1][0].conv
        assert shared[0][0].bn is not shared[-1][0].bn

    steps = cfg.optim_wrapper.get('accumulative_counts', 1)
    if intent.variant != 'statistics':  # which says it in the file
        assert steps == intent.parts
    model = revert_sync_batchnorm(model)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    inputs = demo_mm_inputs(
        2, [[3, 64, 64]] * 2,
        num_classes=7 if intent.demo else 80,
        with_mask=intent.masks)
    with warnings.catch_warnings():
        # No norm may follow something that it cannot compensate for.
        warnings.filterwarnings('error', message='.*follows no convolution.*')
        # Nor be called for several levels.
        warnings.filterwarnings('error', message='.*called several times.*')
        for iteration in range(steps):
            for norm in model.modules():
                if isinstance(norm, SmallBatchNorm):
                    norm.iteration = iteration
                    norm.training_step.optimizer_steps = 0
            losses = model.train_step(inputs, wrapper)
    assert torch.isfinite(losses['loss'])
    moved = {n for n, p in model.named_parameters() if (p != before[n]).any()}
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(n.startswith(('backbone.layer4', 'backbone.stage4'))
               for n in moved)
    assert not [n for n in moved if intent.is_frozen(n)]
    for module in model.modules():
        if isinstance(module, SmallBatchNorm) and module.training:
            _check_state(module, steps)


def _check_convolutions(model, intent):
    """Centred weights where MABN needs them, and only there; frozen ones."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        assert module.weight.requires_grad != intent.is_frozen(name), name
        parent = model.get_submodule(name.rpartition('.')[0])
        normed = name.startswith('backbone') or (
            isinstance(parent, ConvModule) and 'rpn_head' not in name)
        centred = normed and intent.norm == 'mabn' and (
            intent.carries_norm(name))
        assert isinstance(module, CenConv2d) == centred, name


def _check_state(norm, steps):
    """The steps are in the window or buffer, if the layer saw something."""
    if isinstance(norm, CmBN):
        assert norm.held_iterations == [steps]
    assert norm.num_batches_tracked == steps or (
        norm.num_batches_tracked == 0 and not norm.held_iterations)
    for count, held in zip(norm.held_iterations, norm.export_states()):
        assert count == steps
        if isinstance(norm, CBN):
            assert ('patches' in held['state']['latest']) == norm.compensate
        if isinstance(norm, MABN):  # and as many backward passes
            assert held['state']['backward']['turn'] == steps - 1


@_same(COCO)
def test_batch_and_learning_rate_fit_the_name(path):
    cfg, intent = _config(path), _intent(path)
    assert cfg.train_dataloader.batch_size == intent.images
    batch = intent.gpus * intent.images
    lr, images = LR.get(cfg.model.type, (0.02, 16))
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(
        lr * batch * intent.parts / images)
    assert cfg.auto_scale_lr.base_batch_size == batch
    data = cfg.train_dataloader.dataset
    data = data.get('dataset', data)
    assert data.data_root == 'data/coco/'
    assert data.ann_file.endswith('annotations/instances_train2017.json')
    assert cfg.val_evaluator.ann_file.endswith('instances_val2017.json')


@_same([p for p in COCO if not _intent(p).fine_tunes])
def test_schedule_is_mmdets(path):
    cfg, intent = _config(path), _intent(path)
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.momentum,
            optimizer.weight_decay) == ('SGD', 0.9, 1e-4)
    epochs, drops = {
        '1x': (12, [8, 11]),
        '2x': (24, [16, 22])
    }[intent.schedule]
    assert cfg.train_cfg.max_epochs == epochs
    warmup, decay = cfg.param_scheduler
    assert (warmup.type, warmup.start_factor,
            warmup.end) == ('LinearLR', 0.001, 500 * intent.parts)
    assert (decay.end, decay.milestones, decay.gamma) == (epochs, drops, 0.1)
    # The CBN paper's recipe clips.
    clips = intent.detector != 'retinanet' and intent.schedule == '1x'
    assert cfg.optim_wrapper.get('clip_grad') == (
        dict(max_norm=35, norm_type=2) if clips else None)
    # On gamma and beta, too, but where the name says otherwise.
    assert cfg.optim_wrapper.get('paramwise_cfg', {}).get(
        'norm_decay_mult', 1) == (intent.variant != 'nodecay')


@_same([p for p in COCO if _intent(p).fine_tunes])
def test_fine_tuning_ends_without_mosaic(path):
    cfg = _config(path)
    assert cfg.train_cfg.max_epochs == 40
    _, decay, *rest = cfg.param_scheduler
    assert (rest or [decay])[-1].end == 40
    assert decay.eta_min == cfg.optim_wrapper.optimizer.lr * 0.05
    assert decay.begin + decay.T_max == decay.end
    switch = _hook(cfg, 'PipelineSwitchHook')
    if switch is None:
        assert _hook(cfg, 'YOLOXModeSwitchHook').num_last_epochs == 10
    else:
        assert switch.switch_epoch == 30
        assert cfg.train_cfg.dynamic_intervals == [(30, 1)]
        assert 'Mosaic' not in str(switch.switch_pipeline)
        # It would turn CBN into SyncBN on several GPUs.
        assert cfg.model.use_syncbn is False
    assert 'Mosaic' in str(cfg.train_dataloader.dataset.pipeline)
    assert _hook(cfg, 'EMAHook').update_buffers


@_same(CONFIGS)
def test_burn_in_is_the_papers(path):
    hook = _hook(_config(path), 'BurnInHook')
    expected = _intent(path).burn_in()
    assert (hook is None) == (expected is None)
    if hook is not None:
        assert {k: v for k, v in hook.items() if k != 'type'} == expected


@_same([p for p in COCO if p.parent.name == 'bgn'])
def test_weight_decay_on_scale_and_shift_is_the_optimizers(path):
    cfg, intent = _config(path), _intent(path)
    model = _build(cfg)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    decays = {
        id(p): group['weight_decay']
        for group in wrapper.optimizer.param_groups
        for p in group['params']
    }
    on_norms = 0 if intent.variant == 'nodecay' else 1e-4
    checked = 0
    for norm in filter(_is_norm, model.modules()):
        for p in norm.parameters():
            assert decays.get(id(p), on_norms) == on_norms
            checked += p.requires_grad
    assert checked > 24
    assert decays[id(model.neck.fpn_convs[0].conv.weight)] == 1e-4


@_same(CONFIGS)
def test_this_package_is_imported_where_it_is_needed(path):
    """Stock mmdet runs the others."""
    imported = _config(path).get('custom_imports')
    if path.parent.name == 'baselines':
        assert imported is None
    else:
        assert imported == dict(
            imports=['mmdet_smallbn'], allow_failed_imports=False)


# Box AP (and mask AP) of the papers: CBN's Tables 4 and 5, MABN's 3, 5, 6, 7.
PAPER = {
    'faster-rcnn_r50_fpn_4conv1fc_{}_4xb4-1x_coco': {
        '': '36.9',
        'bn-head': '36.3',
        'syncbn-head': '37.7',
        'gn-head': '37.8',
        'cbn-head': '37.7',
        'bn-all': '35.5',
        'syncbn-all': '37.9',
        'gn-all': '37.8',
        'cbn-all': '37.3'
    },
    'faster-rcnn_r101_fpn_4conv1fc_{}_4xb4-1x_coco': {
        'gn-head': '39.3',
        'syncbn-head': '39.2',
        'cbn-head': '39.2'
    },
    'mask-rcnn_r50_fpn_4conv1fc_{}_4xb4-1x_coco': {
        'gn-head': '38.6 35.0',
        'syncbn-head': '38.5 34.7',
        'cbn-head': '38.5 34.6'
    },
    'mask-rcnn_r50-scratch_fpn_{}_8xb2-2x_coco': {
        'bn-backbone': '30.41 27.91',
        'brn-backbone': '31.93 29.16',
        'syncbn-backbone': '34.81 31.69',
        'mabn-backbone': '34.85 31.61',
        '4conv1fc_bn-all': '32.38 29.07',
        '4conv1fc_brn-all': '34.07 30.98',
        '4conv1fc_syncbn-all': '36.81 33.11',
        '4conv1fc_mabn-all': '36.50 32.69'
    },
    'mask-rcnn_r50_fpn_4conv1fc_{}_8xb2-2x_coco': {
        'syncbn-all': '38.25 34.22',
        'mabn-all': '38.42 34.12'
    },
    'retinanet_r50-scratch_fpn_{}_8xb2-2x_coco': {
        'syncbn-all': '29.80',
        'mabn-all': '29.52'
    },
}
PAPER = {
    name.format(norm).replace('__', '_'): aps.split()
    for name, rows in PAPER.items() for norm, aps in rows.items()
}


# Rows and points of figures that the papers' text has no AP of.
WITHOUT_NUMBERS = [
    # CBN, Table 5
    *(f'mask-rcnn_r101_fpn_4conv1fc_{norm}-head_4xb4-1x_coco'
      for norm in ('gn', 'syncbn', 'cbn')),
    # CBN, Table 6; MABN, Table 9
    'mask-rcnn_r50_fpn_4conv1fc_bn-head_4xb4-1x_coco',
    'mask-rcnn_r50-scratch_fpn_gn-backbone_8xb2-2x_coco',
    # CBN, Fig. 3
    *(f'faster-rcnn_r50_fpn_4conv1fc_{norm}-head{window}_4xb4-1x_coco'
      for norm, window in (('cbn', '-window1'), ('cbn', '-window2'),
                           ('cbn', '-window8'), ('naivecbn', '-window2'),
                           ('naivecbn', ''), ('naivecbn', '-window8'))),
    *(f'faster-rcnn_r50_fpn_4conv1fc_bn-head_{batch}-1x_coco'
      for batch in ('2xb8', '1xb16', '1xb32')),
    # CBN, Fig. 5: the lengths that the authors' files name, beside 3
    *(f'faster-rcnn_r50_fpn_4conv1fc_cbn-head-burnin{epochs}_4xb4-1x_coco'
      for epochs in (1, 2, 4, 6, 8)),
]
TABLE = (ROOT / 'configs' / 'README.md').read_text()


@pytest.mark.parametrize('name', [*PAPER, *WITHOUT_NUMBERS])
def test_every_row_of_the_papers_has_its_config(name):
    """And configs/README.md says which, and what differs."""
    assert name in {p.stem for p in COCO}
    table = TABLE[TABLE.index("## The papers' rows"):]
    row, = [line for line in table.splitlines() if f'/{name}.py)' in line]
    assert re.match(r'\| (CBN|MABN), (Table|Fig\.) \d \|', row)


@pytest.mark.parametrize('name', PAPER)
def test_readmes_quote_the_papers_numbers(name):
    """In the README of the paper's method, once."""
    quoted = []
    for folder in FOLDERS:
        for row in (folder / 'README.md').read_text().splitlines():
            if f'/{name}.py)' in row or f'({name}.py)' in row:
                numbers = re.findall(r'(?<![\d.])\d\d\.\d\d?(?![\d.])', row)
                if not numbers:  # a row of an ablation, to compare with
                    continue
                assert set(PAPER[name]) <= set(numbers), row
                assert numbers[0] == PAPER[name][0]
                quoted.append(folder.name)
    assert quoted == ['mabn' if '8xb2' in name else 'cbn']


def test_the_other_rows_have_no_numbers():
    for folder in FOLDERS:
        if folder.name == 'demo':
            continue
        for row in (folder / 'README.md').read_text().splitlines():
            names = re.findall(r'([\w-]+_coco)\.py\)', row)
            if row.startswith('|') and re.search(r'\| \d\d\.\d', row):
                assert set(names) & set(PAPER), row


def _readme(folder):
    return (ROOT / 'configs' / folder / 'README.md').read_text()


@pytest.mark.parametrize('folder', ['baselines', 'brn', 'cbn', 'mabn'])
def test_readme_says_what_differs_from_the_released_code(folder):
    assert re.search('^## .*hat differs from the released code$',
                     _readme(folder), re.M)


@_same([
    p for p in COCO if _intent(p).depth and _intent(p).gpus > 1
    and _intent(p).detector != 'retinanet' and p.parent.name != 'bgn'
])
def test_what_differs_is_what_the_configs_have(path):
    """The column "here" of CBN's and MABN's tables."""
    model = _config(path).model
    assert model.rpn_head.loss_bbox.type == 'L1Loss'
    assert model.roi_head.bbox_head.loss_bbox.type == 'L1Loss'
    assert model.train_cfg.rpn_proposal.max_per_img == 1000
    assert model.train_cfg.rpn.allowed_border == -1
    assert model.roi_head.bbox_roi_extractor.roi_layer.sampling_ratio == 0
    assert model.backbone.style == 'pytorch'


def test_facts_of_the_sources_are_in_the_readmes():
    cbn, mabn = _readme('cbn'), _readme('mabn')
    for fact in ('β = 1/9', '2,000', 'sample_num=2', '37.4', '36.9', '37.3'):
        assert fact in cbn, fact
    for fact in ('R50-wc.pth', '19.6 AP', 'FREEZE_CONV_BODY_AT: -1',
                 'STRIDE_IN_1X1: True', 'drops at 120,000 and 160,000',
                 '1,000 with r = 1'):
        assert fact in mabn, fact


def test_accumulation_fits_the_window():
    """The last part's window is the step."""
    for path in COCO:
        intent = _intent(path)
        if intent.parts > 1 and intent.norm == 'cbn':
            assert _config(path).model.neck.norm_cfg.window_size == (
                intent.parts)


def test_where_to_start_names_files_for_one_gpu():
    rows = TABLE[TABLE.index('## Where to start'):].split('\n\n')[1]
    named = set(re.findall(r'\(\w+/([\w-]+)\.py\)', rows))
    recipes = {p.stem for p in COCO if _intent(p).gpus == 1
               and _intent(p).images <= 4}
    assert recipes - named == {
        'faster-rcnn_r50_fpn_4conv1fc_cbn-all_1xb2-1x_coco'}
