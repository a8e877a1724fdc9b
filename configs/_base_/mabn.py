"""What a MABN config adds to one of mmdet's: the norm, and centred weights."""
custom_imports = dict(imports=['mmdet_smallbn'], allow_failed_imports=False)
norm_cfg = dict(type='MABN', buffer_size=16)
conv_cfg = dict(type='CenConv')
# No burn-in; the hook tells the norms the iteration and the loss scale.
custom_hooks = [dict(type='BurnInHook', iters=0)]
