_base_ = '../baselines/faster-rcnn_r50_fpn_4conv1fc_4xb4-1x_coco.py'
custom_imports = dict(imports=['mmdet_smallbn'], allow_failed_imports=False)
norm_cfg = dict(type='CmBN')
model = dict(
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg)))
# 1 GPU: 8 times 2 images before each step, with the learning rate of 16. The
# warm-up is 500 steps, as mmdet's.
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(accumulative_counts=8)
auto_scale_lr = dict(base_batch_size=2)
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=0.001,
        by_epoch=False,
        begin=0,
        end=4000),
    dict(
        type='MultiStepLR',
        begin=0,
        end=12,
        by_epoch=True,
        milestones=[8, 11],
        gamma=0.1)
]
# Tells the norms when a step was taken.
custom_hooks = [dict(type='SmallBatchNormHook')]
