_base_ = './mask-rcnn_r50-scratch_fpn_4conv1fc_bn-all_8xb2-2x_coco.py'
part = dict(norm_cfg=dict(type='SyncBN'))
model = dict(
    backbone=part, neck=part, roi_head=dict(bbox_head=part, mask_head=part))
