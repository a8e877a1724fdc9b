_base_ = './faster-rcnn_r18_fpn_cbn-all_1xb4_shapes-coco.py'
norm_cfg = dict(type='GhostBN', ghost_size=2)
part = dict(norm_cfg=norm_cfg)
# In the head examples are regions: those of two images, 32 each.
head = dict(norm_cfg=dict(type='GhostBN', ghost_size=64))
model = dict(backbone=part, neck=part, roi_head=dict(bbox_head=head))
custom_hooks = []  # no burn-in
