_base_ = './faster-rcnn_r50_fpn_4conv1fc_4xb4-1x_coco.py'
norm_cfg = dict(type='GN', num_groups=32)
# conv1 and the first stage stay frozen, as the base has them.
model = dict(
    # Weights that were trained with GN.
    backbone=dict(
        norm_cfg=norm_cfg,
        init_cfg=dict(checkpoint='open-mmlab://contrib/resnet50_gn')),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg)))
