_base_ = 'mmseg::pspnet/pspnet_r101-d8_4xb2-80k_cityscapes-512x1024.py'
custom_imports = dict(imports=['mmdet_smallbn'], allow_failed_imports=False)
norm_cfg = dict(type='MABN', buffer_size=16)
part = dict(conv_cfg=dict(type='CenConv'), norm_cfg=norm_cfg)
model = dict(
    pretrained=None,
    # An ImageNet model with MABN and CenConv, yours to supply: see README.md.
    backbone=dict(
        init_cfg=dict(
            type='Pretrained',
            checkpoint='data/pretrained/resnetv1c101_mabn.pth',
            prefix='backbone.'),
        **part),
    decode_head=part,
    auxiliary_head=part)
# The paper's warm-up of 3 epochs, then mmsegmentation's polynomial.
param_scheduler = [
    dict(
        type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=558),
    dict(
        type='PolyLR',
        eta_min=1e-4,
        power=0.9,
        begin=558,
        end=80000,
        by_epoch=False)
]
# Tells the norms the iteration.
custom_hooks = [dict(type='BurnInHook', iters=0)]
