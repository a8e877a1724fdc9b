_base_ = './mask-rcnn_r50_fpn_4conv1fc_4xb4-1x_coco.py'
# 4 GPUs with 2 images each: the learning rate is scaled linearly.
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(optimizer=dict(lr=0.01))
auto_scale_lr = dict(base_batch_size=8)
