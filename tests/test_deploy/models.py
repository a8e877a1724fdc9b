"""Small detectors whose statistics a few training steps have made."""
import torch
from mmengine.registry import MODELS, init_default_scope

NORMS = {
    'BN': dict(norm_cfg=dict(type='BN')),
    'CBN': dict(norm_cfg=dict(type='CBN')),
    'CmBN': dict(norm_cfg=dict(type='CmBN')),
    'NaiveCBN': dict(norm_cfg=dict(type='NaiveCBN')),
    'MABN': dict(
        norm_cfg=dict(type='MABN', momentum=0.3),
        conv_cfg=dict(type='CenConv')),
    'BRN': dict(norm_cfg=dict(type='BRN', momentum=0.3)),
    'BGN': dict(
        norm_cfg=dict(
            type='BGN', num_groups=4, example_weight=0., momentum=0.3)),
    'GhostBN': dict(norm_cfg=dict(type='GhostBN')),
}


def backbone(norm, **kwargs):
    return dict(
        type='ResNet',
        depth=18,
        base_channels=8,
        norm_eval=False,
        frozen_stages=-1,
        **norm,
        **kwargs)


def neck(norm):
    return dict(
        type='FPN',
        in_channels=[8, 16, 32, 64],
        out_channels=8,
        num_outs=5,
        # The lateral convolutions have one weight a filter and channel.
        **norm)


def retinanet(norm, head='RetinaHead', **kwargs):
    return dict(
        type='RetinaNet',
        data_preprocessor=dict(type='DetDataPreprocessor'),
        backbone=backbone(norm),
        neck=neck(norm),
        bbox_head=dict(
            type=head,
            num_classes=3,
            in_channels=8,
            feat_channels=8,
            stacked_convs=2,
            anchor_generator=dict(
                type='AnchorGenerator',
                octave_base_scale=4,
                scales_per_octave=1,
                ratios=[1.],
                strides=[4, 8, 16, 32, 64]),
            **norm,
            **kwargs))


def build(cfg, dtype=torch.float32):
    init_default_scope('mmdet')
    torch.manual_seed(0)
    return MODELS.build(cfg).to(dtype)


def train(module, *inputs, steps=4):
    """Some steps, after which statistics and weights are not trivial."""
    module.train()
    parameters = list(module.parameters())
    for parameter in parameters:
        if parameter.dim() == 1:  # of norms
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    for _ in range(steps):
        made = [[torch.randn_like(v) * 2 + 1 for v in x] if isinstance(
            x, (list, tuple)) else torch.randn_like(x) * 2 + 1 for x in inputs]
        outs = module(*made)
        loss = sum(out.square().mean() for out in tensors(outs))
        optimizer.zero_grad()
        (loss / (loss.detach() + 1)).backward()
        optimizer.step()
    return module.eval()


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for part in value for t in tensors(part)]
