_base_ = './faster-rcnn_r50_fpn_4conv1fc_ghostbn-head_4xb2-1x_coco.py'
# conv1 and the first stage stay frozen, as the base has them.
model = dict(backbone=dict(norm_cfg=_base_.norm_cfg, norm_eval=False))
