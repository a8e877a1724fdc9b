_base_ = './faster-rcnn_r50_fpn_4conv1fc_bn-head_4xb4-1x_coco.py'
# The examples that CBN has in a window of 8. 32 images a step: the learning
# rate is scaled linearly.
train_dataloader = dict(batch_size=32)
optim_wrapper = dict(optimizer=dict(lr=0.04))
auto_scale_lr = dict(base_batch_size=32)
