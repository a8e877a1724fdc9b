_base_ = [
    '../baselines/faster-rcnn_r50_fpn_4conv1fc_4xb4-1x_coco.py',
    '../_base_/bgn.py'
]
model = dict(
    neck=dict(norm_cfg=_base_.norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=_base_.region_norm_cfg)))
# 16 images on 8 GPUs.
train_dataloader = dict(batch_size=2)
