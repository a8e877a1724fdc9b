"""What a BGN config adds to one of mmdet's: groups of 2 images, 8 channels."""
custom_imports = dict(imports=['mmdet_smallbn'], allow_failed_imports=False)
norm_cfg = dict(type='BGN', num_groups=32, examples_per_group=2)
# In a RoI head examples are regions: those of both images, 512 each. One of a
# thousand has no weight in the statistics, and gets none at inference.
region_norm_cfg = dict(
    type='BGN', num_groups=32, examples_per_group=1024, example_weight=0.)
