_base_ = './faster-rcnn_r50_fpn_4conv1fc_cbn-head_4xb4-1x_coco.py'
custom_hooks = [dict(type='BurnInHook', epochs=8)]
