_base_ = [
    '../baselines/mask-rcnn_r50-scratch_fpn_bn-backbone_8xb2-2x_coco.py',
    '../_base_/mabn.py'
]
norm_cfg = dict(type='MABN', buffer_size=32)
part = dict(conv_cfg=_base_.conv_cfg, norm_cfg=norm_cfg)
model = dict(
    backbone=part,
    neck=part,
    roi_head=dict(
        bbox_head=dict(type='Shared4Conv1FCBBoxHead', **part), mask_head=part))
custom_hooks = [
    dict(type='BurnInHook', iters=10000, prefix=['neck', 'roi_head'])
]
