"""What a CBN config adds to one of mmdet's: the norm, and its burn-in."""
custom_imports = dict(imports=['mmdet_smallbn'], allow_failed_imports=False)
norm_cfg = dict(type='CBN', window_size=4)
custom_hooks = [dict(type='BurnInHook', epochs=3)]
