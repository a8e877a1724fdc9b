_base_ = './mask-rcnn_r50_fpn_4conv1fc_4xb4-1x_coco.py'
# The same 16 images, on 8 GPUs.
train_dataloader = dict(batch_size=2)
