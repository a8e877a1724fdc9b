_base_ = [
    '../baselines/faster-rcnn_r50_fpn_4conv1fc_4xb4-1x_coco.py',
    '../_base_/cbn.py'
]
norm_cfg = dict(type='CBN', window_size=4)
model = dict(
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg)))
custom_hooks = [dict(type='BurnInHook', epochs=4)]
