_base_ = 'mmpretrain::resnet/resnet50_8xb32_in1k.py'
custom_imports = dict(imports=['mmdet_smallbn'], allow_failed_imports=False)
model = dict(
    backbone=dict(
        conv_cfg=dict(type='CenConv'),
        norm_cfg=dict(type='MABN', buffer_size=16),
        zero_init_residual=False))
# 8 GPUs, 2 images for a norm and 32 for a step: 256 in all.
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(accumulative_counts=16)
auto_scale_lr = dict(base_batch_size=16)
# 600,000 steps, drops at 150,000, 300,000 and 450,000.
train_cfg = dict(max_epochs=120)
# Tells the norms the iteration and the part of the loss.
custom_hooks = [dict(type='BurnInHook', iters=0)]
