_base_ = './mask-rcnn_r50_fpn_4conv1fc_gn-head_4xb4-1x_coco.py'
model = dict(
    backbone=dict(
        depth=101, init_cfg=dict(checkpoint='torchvision://resnet101')))
