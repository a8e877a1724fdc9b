_base_ = './faster-rcnn_r50_fpn_4conv1fc_cbn-head_4xb1-1x_coco.py'
# conv1 and the first stage stay frozen, as the base has them.
model = dict(backbone=dict(norm_cfg=_base_.norm_cfg, norm_eval=False))
