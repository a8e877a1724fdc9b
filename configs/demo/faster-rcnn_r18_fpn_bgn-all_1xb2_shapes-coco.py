_base_ = '../_base_/demo_faster-rcnn_r18_fpn.py'
norm_cfg = dict(type='BGN', num_groups=8, examples_per_group=2)
part = dict(norm_cfg=norm_cfg)
# In the head examples are regions: those of two images, 32 each. One of them
# has little weight in the statistics, and gets none at inference.
head = dict(
    norm_cfg=dict(
        type='BGN', num_groups=8, examples_per_group=64, example_weight=0.))
model = dict(backbone=part, neck=part, roi_head=dict(bbox_head=head))
custom_hooks = []  # no burn-in
