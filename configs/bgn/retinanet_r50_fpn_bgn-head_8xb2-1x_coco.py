_base_ = ['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', '../_base_/bgn.py']
norm_cfg = _base_.norm_cfg
# The pyramid's levels share convolutions, and each has norms of its own.
model = dict(
    neck=dict(norm_cfg=norm_cfg),
    bbox_head=dict(type='RetinaSepBNHead', num_ins=5, norm_cfg=norm_cfg))
