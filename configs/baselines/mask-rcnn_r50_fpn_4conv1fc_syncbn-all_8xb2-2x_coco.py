_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_2x_coco.py'
part = dict(norm_cfg=dict(type='SyncBN'))
# From ImageNet weights, and nothing frozen, as in the authors' file.
model = dict(
    backbone=dict(frozen_stages=-1, norm_eval=False, **part),
    neck=part,
    roi_head=dict(
        bbox_head=dict(type='Shared4Conv1FCBBoxHead', **part), mask_head=part))
