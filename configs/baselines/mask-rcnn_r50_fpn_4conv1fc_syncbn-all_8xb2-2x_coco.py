_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_2x_coco.py'
part = dict(norm_cfg=dict(type='SyncBN'))
# conv1 and the first stage stay frozen, as the base has them.
model = dict(
    backbone=dict(norm_eval=False, **part),
    neck=part,
    roi_head=dict(
        bbox_head=dict(type='Shared4Conv1FCBBoxHead', **part), mask_head=part))
