_base_ = [
    '../baselines/mask-rcnn_r50-scratch_fpn_bn-backbone_8xb2-2x_coco.py',
    '../_base_/brn.py'
]
part = dict(norm_cfg=_base_.norm_cfg)
model = dict(
    backbone=part,
    neck=part,
    roi_head=dict(
        bbox_head=dict(type='Shared4Conv1FCBBoxHead', **part), mask_head=part))
