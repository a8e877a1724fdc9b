"""Norms of a student and of the frozen teacher beside it."""
import copy
import math

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.hub import get_config
from mmengine.model import BaseModel
from mmengine.registry import init_default_scope
from torch.utils.data import Dataset

from mmdet_smallbn import BGN, CBN
from mmdet_smallbn.errors import SetupError
from mmdet_smallbn.layers import SmallBatchNorm
from tests.toy import Toy, read_log, toy_runner

MeanTeacherHook = pytest.importorskip('mmdet.engine.hooks').MeanTeacherHook
MODELS = pytest.importorskip('mmdet.registry').MODELS
demo_mm_inputs = pytest.importorskip('mmdet.testing').demo_mm_inputs

BRANCHES = ('sup', 'unsup_teacher', 'unsup_student')


class Branches(Dataset):
    """One image as a semi-supervised pipeline gives it, three times over."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        data = demo_mm_inputs(
            1, [[3, 96, 96]], num_classes=3, use_box_type=False)
        sample, = data['data_samples']
        sample.set_metainfo(dict(homography_matrix=np.eye(3, dtype='f4')))
        return dict(
            inputs={b: data['inputs'][0] for b in BRANCHES},
            data_samples={b: copy.deepcopy(sample) for b in BRANCHES})


def _soft_teacher(norm):
    init_default_scope('mmdet')
    cfg = get_config(
        'mmdet::soft_teacher/'
        'soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py').model
    cfg.semi_train_cfg.pseudo_label_initial_score_thr = 0.
    detector = cfg.detector
    detector.backbone.update(
        depth=18,
        base_channels=8,
        norm_cfg=norm,
        norm_eval=False,
        init_cfg=None)
    detector.neck.update(
        in_channels=[8, 16, 32, 64], out_channels=16, norm_cfg=norm)
    detector.rpn_head.update(in_channels=16, feat_channels=16)
    detector.roi_head.bbox_roi_extractor.out_channels = 16
    detector.roi_head.bbox_head.update(
        type='Shared4Conv1FCBBoxHead',
        in_channels=16,
        conv_out_channels=16,
        fc_out_channels=16,
        num_classes=3,
        norm_cfg=norm)
    detector.train_cfg.rcnn.sampler.num = 16
    detector.train_cfg.rpn_proposal.update(nms_pre=64, max_per_img=16)
    detector.test_cfg.rpn.update(nms_pre=64, max_per_img=16)
    return MODELS.build(cfg)


def _norms(model):
    return [m for m in model.modules() if isinstance(m, SmallBatchNorm)]


class Watch(Hook):
    """The teacher's norms before and after the model's own pass."""
    priority = 'NORMAL'

    def __init__(self):
        self.iterations = 0

    def before_train_iter(self, runner, *args, **kwargs):
        teacher = runner.model.teacher
        self.before = copy.deepcopy(teacher.state_dict())
        self.modes = [m.training for m in _norms(teacher)]

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        self.iterations += 1
        assert math.isfinite(outputs['loss'].item())
        teacher = runner.model.teacher
        live = [m for m in _norms(teacher) if m.weight.requires_grad]
        assert not live and not any(self.modes)
        for key, value in teacher.state_dict().items():
            torch.testing.assert_close(
                value, self.before[key], rtol=0, atol=0)


@pytest.mark.parametrize('kind', ['CBN', 'MABN', 'BRN'])
@pytest.mark.filterwarnings('ignore:.*called several times')
def test_soft_teacher_trains_with_a_teacher_that_evaluates(tmp_path, kind):
    """mmdet leaves the teacher's norms in training mode."""
    model = _soft_teacher(dict(type=kind))
    watch = Watch()
    runner = toy_runner(
        tmp_path, [
            dict(type='BurnInHook', iters=1), watch,
            MeanTeacherHook(momentum=0.5, skip_buffer=False)
        ],
        model,
        train_dataloader=dict(
            dataset=Branches(),
            batch_size=2,
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='pseudo_collate')),
        train_cfg=dict(by_epoch=False, max_iters=4))
    runner.train()
    assert watch.iterations == 4
    assert 'stay in evaluation mode' in read_log(tmp_path)
    student, teacher = (_norms(m) for m in (model.student, model.teacher))
    for theirs in teacher:
        assert not theirs.held_iterations
    # Learned from the student's, which moved away from where both began.
    moved = [
        not torch.equal(t.running_var, torch.ones_like(t.running_var))
        for t in teacher if t.num_batches_tracked == 0
    ]
    assert moved and sum(moved) > len(moved) / 2
    if kind == 'BRN':
        return
    # Labelled and unlabelled images each have a past of their own.
    backbone = [m for m in _norms(model.student.backbone) if m.training]
    assert {len(m.held_iterations) for m in backbone} == {2}
    assert len(student) == len(teacher)


class Pair(BaseModel):
    """A student, and a teacher that looks on."""

    def __init__(self, norm=CBN):
        super().__init__()
        self.student = Toy(norm)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, inputs, mode='tensor'):
        with torch.no_grad():
            wanted = self.teacher(inputs)
        out = self.student(inputs)
        return dict(loss=(out - wanted).square().mean())


def test_a_teacher_without_statistics_is_refused(tmp_path):
    hooks = [dict(type='BurnInHook', iters=1), MeanTeacherHook()]
    runner = toy_runner(tmp_path, hooks, Pair())
    with pytest.raises(SetupError, match=r"2 norms.*'teacher.backbone.1'.*"
                       'skip_buffer=False'):
        runner.train()


@pytest.mark.parametrize('prefix', [None, 'student', ['student', 'teacher']])
def test_a_teacher_may_be_named_among_what_burns_in(tmp_path, prefix):
    hooks = [
        dict(type='BurnInHook', iters=1, prefix=prefix),
        MeanTeacherHook(skip_buffer=False)
    ]
    toy_runner(tmp_path, hooks, Pair()).train()


def test_a_frozen_detector_of_another_name_is_no_mean_teacher(tmp_path):
    """As one for distillation, with statistics that it was trained with."""
    model = Pair()
    model.wise = copy.deepcopy(model.teacher)
    model.teacher = copy.deepcopy(model.student).eval()
    for norm in _norms(model.teacher):
        norm.track_running_stats = False
    model.teacher.requires_grad_(False)
    hooks = [dict(type='BurnInHook', iters=1), MeanTeacherHook()]
    toy_runner(tmp_path, hooks, model).train()
    assert not any(norm.training for norm in _norms(model.wise))


def test_a_teacher_that_needs_none_is_not(tmp_path):
    """Groups of an example's own need no running statistics."""
    model = Pair(lambda c: BGN(c, num_groups=2))
    model.student.head[1] = CBN(4)
    model.teacher.head[1] = BGN(4, num_groups=2)
    model.teacher.requires_grad_(False)
    hooks = [dict(type='BurnInHook', iters=1), MeanTeacherHook()]
    toy_runner(tmp_path, hooks, model).train()
    assert not any(norm.training for norm in _norms(model.teacher))


def test_a_frozen_part_is_no_teacher(tmp_path):
    """Its norms are the training's, as of a frozen backbone."""
    model = Toy()
    model.backbone.requires_grad_(False)
    toy_runner(tmp_path, [dict(type='BurnInHook', iters=1)], model).train()
    assert model.backbone[1].training
    assert model.backbone[1].num_batches_tracked == 6
