_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'
part = dict(norm_cfg=dict(type='SyncBN'))
# From scratch: nothing pretrained, nothing frozen, every scale starts at 1.
# The pyramid's levels share convolutions, and each has norms of its own.
model = dict(
    backbone=dict(
        frozen_stages=-1,
        norm_eval=False,
        zero_init_residual=False,
        init_cfg=None,
        **part),
    neck=part,
    bbox_head=dict(type='RetinaSepBNHead', num_ins=5, **part))
