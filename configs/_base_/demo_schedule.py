"""Minutes on a CPU: iterations, so that the time does not hang on the data."""
_base_ = 'mmdet::_base_/default_runtime.py'
max_iters = 1200
custom_imports = dict(imports=['mmdet_smallbn'], allow_failed_imports=False)
custom_hooks = [dict(type='BurnInHook', iters=250)]
train_cfg = dict(
    type='IterBasedTrainLoop', max_iters=max_iters, val_interval=400)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=7e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=35, norm_type=2))
log_processor = dict(by_epoch=False)
default_hooks = dict(
    checkpoint=dict(by_epoch=False, interval=max_iters),
    logger=dict(interval=20, log_metric_by_epoch=False))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=100, end=max_iters)
]
