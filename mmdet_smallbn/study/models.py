"""Segmenter and head of the study."""
import torch
from mmcv.cnn import ConvModule
from torch import nn

from ..benchmark.classifier import KINDS, Block
from .examples import Examples


def _initialised(model: nn.Sequential) -> nn.Sequential:
    for module in model.modules():
        if isinstance(module, ConvModule):
            module.init_weights()
    return model


def build_segmenter(norm: dict) -> nn.Sequential:
    """Build a small residual network for segmentation at half size."""
    model = nn.Sequential(
        ConvModule(3, 16, 3, 2, 1, bias=False, **norm), Block(16, 16, 1, norm),
        Block(16, 32, 2, norm), Block(32, 32, 1, norm),
        nn.Conv2d(32, len(KINDS) + 1, 1),
        nn.Upsample(scale_factor=2, mode='bilinear'))
    return _initialised(model)


def build_head(norm: dict) -> nn.Sequential:
    """Build a head of four convolutions and a linear layer."""
    model = nn.Sequential(
        *(ConvModule(64, 64, 3, 1, 1, bias=False, **norm) for _ in range(4)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, len(KINDS)))
    return _initialised(model)


@torch.no_grad()
def mean_iou(model: nn.Module, examples: Examples) -> float:
    """Return the intersection over union, mean over the classes."""
    model.eval()
    classes = len(KINDS) + 1
    pairs = torch.zeros(classes * classes)
    for pixels, labels in zip(
            examples.pixels.split(64), examples.labels.split(64)):
        found = model(pixels).argmax(1)
        pairs += torch.bincount((labels * classes + found).flatten(),
                                minlength=classes * classes)
    pairs = pairs.view(classes, classes)
    both = pairs.diagonal()
    return (both / (pairs.sum(0) + pairs.sum(1) - both)).mean().item()
