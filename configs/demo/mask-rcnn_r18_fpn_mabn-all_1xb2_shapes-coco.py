_base_ = '../_base_/demo_mask-rcnn_r18_fpn.py'
norm_cfg = dict(type='MABN')
part = dict(conv_cfg=dict(type='CenConv'), norm_cfg=norm_cfg)
model = dict(
    backbone=part, neck=part, roi_head=dict(bbox_head=part, mask_head=part))
