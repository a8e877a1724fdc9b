_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
model = dict(roi_head=dict(bbox_head=dict(type='Shared4Conv1FCBBoxHead')))
# 4 GPUs with 4 images each: mmdet's learning rate of 0.02 is for 16 images.
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
