_base_ = [
    '../baselines/mask-rcnn_r50-scratch_fpn_bn-backbone_8xb2-2x_coco.py',
    '../_base_/mabn.py'
]
model = dict(backbone=dict(conv_cfg=_base_.conv_cfg, norm_cfg=_base_.norm_cfg))
