_base_ = [
    '../baselines/retinanet_r50-scratch_fpn_syncbn-all_8xb2-2x_coco.py',
    '../_base_/mabn.py'
]
part = dict(conv_cfg=_base_.conv_cfg, norm_cfg=_base_.norm_cfg)
model = dict(backbone=part, neck=part, bbox_head=part)
custom_hooks = [
    dict(type='BurnInHook', iters=10000, prefix=['neck', 'bbox_head'])
]
