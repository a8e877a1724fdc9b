"""What a BGN config adds to one of mmdet's."""
custom_imports = dict(imports=['mmdet_smallbn'], allow_failed_imports=False)
norm_cfg = dict(type='BGN', num_groups=32, examples_per_group=2)
