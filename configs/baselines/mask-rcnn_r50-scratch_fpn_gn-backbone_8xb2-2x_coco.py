_base_ = './mask-rcnn_r50-scratch_fpn_bn-backbone_8xb2-2x_coco.py'
model = dict(backbone=dict(norm_cfg=dict(type='GN', num_groups=32)))
