_base_ = '../_base_/demo_mask-rcnn_r18_fpn.py'
norm_cfg = dict(type='CBN', window_size=8)
part = dict(norm_cfg=norm_cfg)
model = dict(
    backbone=part, neck=part, roi_head=dict(bbox_head=part, mask_head=part))
