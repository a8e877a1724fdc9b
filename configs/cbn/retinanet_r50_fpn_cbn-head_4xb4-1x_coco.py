_base_ = ['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', '../_base_/cbn.py']
norm_cfg = dict(type='CBN', window_size=4)
# The pyramid's levels share convolutions, and each has norms of its own.
model = dict(
    neck=dict(norm_cfg=norm_cfg),
    bbox_head=dict(type='RetinaSepBNHead', num_ins=5, norm_cfg=norm_cfg))
# 4 GPUs with 4 images each: mmdet's learning rate of 0.01 is for 16 images.
train_dataloader = dict(batch_size=4)
