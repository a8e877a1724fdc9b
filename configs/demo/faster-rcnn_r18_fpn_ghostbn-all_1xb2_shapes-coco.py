_base_ = '../_base_/demo_faster-rcnn_r18_fpn.py'
# Each image by itself, in training and at inference.
norm_cfg = dict(type='GhostBN', ghost_size=1, example_weight=1.)
part = dict(norm_cfg=norm_cfg)
# In the head examples are regions: those of two images, 32 each.
head = dict(norm_cfg=dict(type='GhostBN', ghost_size=64))
model = dict(backbone=part, neck=part, roi_head=dict(bbox_head=head))
custom_hooks = []  # no burn-in
