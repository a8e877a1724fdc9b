_base_ = './faster-rcnn_r18_fpn_mabn-all_1xb2_shapes-coco.py'
# One image a batch and a step for every 8: small batch and large one are of
# the same weights.
train_dataloader = dict(batch_size=1)
optim_wrapper = dict(accumulative_counts=8)
custom_hooks = [
    dict(type='BurnInHook', iters=250),
    dict(
        type='StatisticsHook',
        layers=[
            'backbone.layer1.0.bn1', 'roi_head.bbox_head.shared_convs.0.bn'
        ],
        regular=8)
]
