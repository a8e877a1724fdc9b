_base_ = './faster-rcnn_r50_fpn_4conv1fc_bn-head_4xb4-1x_coco.py'
# The examples that CBN has in a window of 4, for the same 16 images a step.
train_dataloader = dict(batch_size=16)
