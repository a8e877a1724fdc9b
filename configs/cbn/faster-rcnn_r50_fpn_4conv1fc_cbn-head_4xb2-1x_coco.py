_base_ = [
    '../baselines/faster-rcnn_r50_fpn_4conv1fc_4xb4-1x_coco.py',
    '../_base_/cbn.py'
]
norm_cfg = dict(type='CBN', window_size=8)
model = dict(
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg)))
# 4 GPUs with 2 images each: 0.02 for 16 images, scaled linearly.
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(optimizer=dict(lr=0.01))
auto_scale_lr = dict(base_batch_size=8)
