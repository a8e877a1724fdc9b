_base_ = './mask-rcnn_r50_fpn_4conv1fc_bgn-head_4xb2-1x_coco.py'
# Nothing stays frozen: the weights were trained with other statistics.
model = dict(
    backbone=dict(norm_cfg=_base_.norm_cfg, norm_eval=False, frozen_stages=-1))
