_base_ = './faster-rcnn_r50_fpn_4conv1fc_bgn-all_4xb2-1x_coco.py'
# No weight decay on the scale and shift of any norm, frozen BatchNorm's too.
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.))
