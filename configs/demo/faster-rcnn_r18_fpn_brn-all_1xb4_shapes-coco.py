_base_ = './faster-rcnn_r18_fpn_cbn-all_1xb4_shapes-coco.py'
norm_cfg = dict(type='BRN')
part = dict(norm_cfg=norm_cfg)
model = dict(backbone=part, neck=part, roi_head=dict(bbox_head=part))
