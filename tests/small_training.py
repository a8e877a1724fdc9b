"""A detector that trains in seconds, under any feature of the toolbox."""
import math
from contextlib import contextmanager
from itertools import combinations, product

import torch
from mmengine.config import Config
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, OPTIM_WRAPPERS

from mmdet_smallbn.cli.runtime import build_runner
from mmdet_smallbn.layers import SmallBatchNorm
from tests.toy import LossScale

ITERATIONS = 30
HALF = 15
FEATURES = dict(
    norm=['CBN', 'NaiveCBN', 'MABN', 'BRN', 'BGN', 'GhostBN'],
    checkpointing=['none', 'with_cp', 'activation_checkpointing'],
    accumulate=[1, 3],
    amp=[False, True],
    ema=['none', 'weights', 'weights and buffers'],
    processes=[1, 2],
    norm_eval=[False, True],
    resume=[False, True])
# Those that change nothing in a training; the others make it another one.
NEUTRAL = dict(checkpointing='none', ema='none', resume=False)
SETTINGS = {
    'MABN': dict(buffer_size=4),
    'BGN': dict(num_groups=2, example_weight=0.),
}


def pairwise():
    """Combinations of features in which every pair of values occurs.

    Of all combinations, that with the most pairs that have not yet occurred
    is taken, until none is left.
    """
    names = list(FEATURES)
    every = [
        dict(zip(names, values)) for values in product(*FEATURES.values())
    ]
    pairs = [set(combinations(features.items(), 2)) for features in every]
    left = set().union(*pairs)
    while left:
        most = max(range(len(every)), key=lambda i: len(pairs[i] & left))
        left -= pairs[most]
        yield every[most]


def plain(features):
    """The same training without what must not change it."""
    return {**features, **NEUTRAL}


def name_of(features):
    """The features that are not as in the simplest training."""
    return ', '.join(
        key if value is True else f'{key} {value}'
        for key, value in features.items()
        if key == 'norm' or value != FEATURES[key][0])


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(LossScale):
    """mmengine's AmpOptimWrapper is for GPUs alone."""

    @contextmanager
    def optim_context(self, model):
        with super().optim_context(model), torch.autocast(
                'cpu', torch.bfloat16):
            yield


@HOOKS.register_module()
class Losses(Hook):
    """Keeps the losses, and each iteration's own seed."""

    def __init__(self):
        self.values = []

    def before_train_iter(self, runner, *args, **kwargs):
        torch.manual_seed(100 * runner.iter + get_rank())

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        self.values.append(outputs['loss'].item())


def model_cfg(norm, norm_eval=False, with_cp=False):
    """RetinaNet with the norm in backbone, neck and head."""
    norm_cfg = dict(type=norm, **SETTINGS.get(norm, {}))
    return dict(
        type='RetinaNet',
        data_preprocessor=dict(
            type='DetDataPreprocessor',
            mean=[123.675, 116.28, 103.53],
            std=[58.395, 57.12, 57.375],
            pad_size_divisor=32),
        backbone=dict(
            type='ResNet',
            depth=18,
            base_channels=8,
            norm_cfg=norm_cfg,
            norm_eval=norm_eval,
            with_cp=with_cp),
        neck=dict(
            type='FPN',
            in_channels=[8, 16, 32, 64],
            out_channels=16,
            start_level=1,
            add_extra_convs='on_input',
            num_outs=5,
            norm_cfg=norm_cfg),
        bbox_head=dict(
            type='RetinaSepBNHead',
            num_ins=5,
            num_classes=7,
            in_channels=16,
            feat_channels=16,
            stacked_convs=1,
            norm_cfg=norm_cfg,
            anchor_generator=dict(
                type='AnchorGenerator',
                octave_base_scale=4,
                scales_per_octave=1,
                ratios=[1.],
                strides=[8, 16, 32, 64, 128]),
            bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
            loss_cls=dict(type='FocalLoss', use_sigmoid=True),
            loss_bbox=dict(type='L1Loss')),
        train_cfg=dict(
            assigner=dict(
                type='MaxIoUAssigner',
                pos_iou_thr=0.5,
                neg_iou_thr=0.4,
                min_pos_iou=0,
                ignore_iof_thr=-1),
            sampler=dict(type='PseudoSampler'),
            allowed_border=-1,
            pos_weight=-1),
        test_cfg=dict(
            nms_pre=50,
            score_thr=0.05,
            nms=dict(type='nms', iou_threshold=0.5),
            max_per_img=20))


def training_cfg(data, work_dir, features, **changes):
    """The whole config of a training on a ShapesCOCO folder."""
    base = Config.fromfile('configs/_base_/shapes_coco.py')
    dataset = base.train_dataloader.dataset
    dataset.data_root = str(data)
    dataset.pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(type='PackDetInputs')
    ]
    hooks = [dict(type='Losses')]
    if features['norm'] not in ('BGN', 'GhostBN'):
        hooks.append(dict(type='BurnInHook', iters=6))
    if features['ema'] != 'none':
        hooks.append(
            dict(
                type='EMAHook',
                momentum=0.1,
                begin_iter=3,
                update_buffers=features['ema'] == 'weights and buffers'))
    wrapper = 'CPUAmpOptimWrapper' if features['amp'] else 'OptimWrapper'
    cfg = Config(
        dict(
            default_scope='mmdet',
            model=model_cfg(
                features['norm'],
                features['norm_eval'],
                with_cp=features['checkpointing'] == 'with_cp'),
            train_dataloader=dict(
                batch_size=2,
                num_workers=0,
                sampler=dict(type='InfiniteSampler', shuffle=True),
                dataset=dataset),
            train_cfg=dict(
                type='IterBasedTrainLoop',
                max_iters=ITERATIONS,
                val_interval=10**6),
            optim_wrapper=dict(
                type=wrapper,
                accumulative_counts=features['accumulate'],
                clip_grad=dict(max_norm=5),
                optimizer=dict(type='SGD', lr=0.001, momentum=0.9),
                # The levels' convolutions are one, as in mmdet's configs.
                paramwise_cfg=dict(bypass_duplicate=True)),
            default_hooks=dict(
                checkpoint=dict(
                    type='CheckpointHook', by_epoch=False, interval=HALF),
                logger=dict(type='LoggerHook', interval=10**6)),
            custom_hooks=hooks,
            randomness=dict(seed=0),
            log_level='ERROR',
            experiment_name=str(work_dir).replace('/', '_'),
            work_dir=str(work_dir)))
    if features['checkpointing'] == 'activation_checkpointing':
        cfg.activation_checkpointing = ['backbone.layer2', 'backbone.layer4']
    cfg.launcher = 'pytorch' if get_world_size() > 1 else 'none'
    cfg.merge_from_dict(changes)
    return cfg


class Stopped(Exception):
    """What ends a training half-way."""


class Stop(Hook):
    priority = 'LOWEST'

    def after_train_iter(self, runner, *args, **kwargs):
        if runner.iter + 1 == HALF:
            raise Stopped


def train(data, work_dir, features):
    """Train as the features say.

    Returns:
        dict: The losses, the weights and BatchNorm's buffers at the end, the
        norms' numbers of iterations, and whether all of it is finite.
    """
    losses = []
    if features['resume']:
        runner = build_runner(training_cfg(data, work_dir, features))
        runner.register_hook(Stop())
        try:
            runner.train()
        except Stopped:
            pass
        losses = _losses(runner)
    runner = build_runner(
        training_cfg(
            data,
            work_dir,
            features,
            resume=features['resume'],
            experiment_name=f'{str(work_dir).replace("/", "_")}_2'))
    runner.train()
    model = getattr(runner.model, 'module', runner.model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return dict(
        losses=losses + _losses(runner),
        iterations=runner.iter,
        state=state,
        asleep=sum(
            isinstance(m, SmallBatchNorm) and not m.training
            for m in model.modules()),
        ema=_average(runner))


def _losses(runner):
    hook, = (h for h in runner.hooks if isinstance(h, Losses))
    assert all(math.isfinite(value) for value in hook.values)
    return hook.values


def _average(runner):
    for hook in runner.hooks:
        if hasattr(hook, 'ema_model'):
            return {
                k: v.clone()
                for k, v in hook.ema_model.module.state_dict().items()
            }
    return None
