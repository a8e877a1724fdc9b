_base_ = './faster-rcnn_r50_fpn_4conv1fc_naivecbn-head_4xb4-1x_coco.py'
norm_cfg = dict(window_size=2)
model = dict(
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg)))
