_base_ = [
    '../baselines/mask-rcnn_r50_fpn_4conv1fc_syncbn-all_8xb2-2x_coco.py',
    '../_base_/mabn.py'
]
norm_cfg = dict(type='MABN', buffer_size=32)
part = dict(conv_cfg=_base_.conv_cfg, norm_cfg=norm_cfg)
model = dict(
    # An ImageNet model with MABN and CenConv: see README.md. It trains whole,
    # as in the authors' file.
    backbone=dict(
        **part,
        init_cfg=dict(
            checkpoint='data/pretrained/resnet50_mabn.pth',
            prefix='backbone.')),
    neck=part,
    roi_head=dict(bbox_head=part, mask_head=part))
custom_hooks = [
    dict(type='BurnInHook', iters=10000, prefix=['neck', 'roi_head'])
]
