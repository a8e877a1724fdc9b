_base_ = 'mmpretrain::resnet/resnet18_8xb32_in1k.py'
custom_imports = dict(imports=['mmdet_smallbn'], allow_failed_imports=False)
model = dict(backbone=dict(norm_cfg=dict(type='CBN', window_size=4)))
# 4 GPUs with 4 images each. The paper: 0.1 * N / 32 for N images per GPU.
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(optimizer=dict(lr=0.0125))
auto_scale_lr = dict(base_batch_size=16)
param_scheduler = dict(
    _delete_=True, type='CosineAnnealingLR', by_epoch=True, T_max=100)
custom_hooks = [dict(type='BurnInHook', epochs=25)]
