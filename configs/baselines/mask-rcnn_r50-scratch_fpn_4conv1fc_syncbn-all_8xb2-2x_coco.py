_base_ = './mask-rcnn_r50-scratch_fpn_bn-backbone_8xb2-2x_coco.py'
part = dict(norm_cfg=dict(type='SyncBN'))
model = dict(
    backbone=part,
    neck=part,
    roi_head=dict(
        bbox_head=dict(type='Shared4Conv1FCBBoxHead', **part), mask_head=part))
