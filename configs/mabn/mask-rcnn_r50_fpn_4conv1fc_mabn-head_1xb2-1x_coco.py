_base_ = [
    '../baselines/mask-rcnn_r50_fpn_4conv1fc_4xb4-1x_coco.py',
    '../_base_/mabn.py'
]
norm_cfg = dict(type='MABN', buffer_size=32)
part = dict(conv_cfg=_base_.conv_cfg, norm_cfg=norm_cfg)
model = dict(
    neck=part, roi_head=dict(bbox_head=part, mask_head=part))
# 117,000 images; the paper's 10,000 iterations are 160,000.
custom_hooks = [dict(type='BurnInHook', epochs=1)]
# 1 GPU with 2 images: 0.02 for 16 images, scaled linearly.
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(optimizer=dict(lr=0.0025))
auto_scale_lr = dict(base_batch_size=2)
