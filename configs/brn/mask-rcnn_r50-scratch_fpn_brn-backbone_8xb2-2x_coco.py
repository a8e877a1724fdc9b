_base_ = [
    '../baselines/mask-rcnn_r50-scratch_fpn_bn-backbone_8xb2-2x_coco.py',
    '../_base_/brn.py'
]
model = dict(backbone=dict(norm_cfg=_base_.norm_cfg))
