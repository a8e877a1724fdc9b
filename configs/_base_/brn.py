"""What a BRN config adds to one of mmdet's: the norm, and its burn-in."""
custom_imports = dict(imports=['mmdet_smallbn'], allow_failed_imports=False)
norm_cfg = dict(type='BRN', r_max=3., d_max=5.)
custom_hooks = [dict(type='BurnInHook', iters=5000)]
