_base_ = './retinanet_r50_fpn_bgn-head_8xb2-1x_coco.py'
# No weight decay on the scale and shift of any norm, frozen BatchNorm's too.
# The head's shared convolutions are met five times, and optimised once.
optim_wrapper = dict(
    paramwise_cfg=dict(norm_decay_mult=0., bypass_duplicate=True))
