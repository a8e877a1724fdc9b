"""Small image classifier on synthetic images, for quick experiments.

It trains in minutes, where a detector takes hours.
"""
from typing import Callable, Iterator, NamedTuple, Optional, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from torch import Tensor, nn

from ..data.shapes import shape_mask
from ..layers import norms_of

SIZE = 24
KINDS = ('circle', 'triangle', 'cross', 'star')


class Images(NamedTuple):
    """Images and their classes.

    Attributes:
        pixels (Tensor): Images, shape (N, 3, 24, 24), from about -1.5 to 4.
        labels (Tensor): Classes, shape (N,).
    """
    pixels: Tensor
    labels: Tensor

    def of(self, indices: Tensor) -> 'Images':
        return Images(self.pixels[indices], self.labels[indices])


def make_images(count: int, seed: int = 0, light: float = 1.) -> Images:
    """Draw images of one ShapesCOCO shape each, on noise.

    Each image has its own gain from 0.5 to 2 and its own offset from -0.5 to
    0.5, like photographs in different light. The statistics of one image,
    despite its many pixels, therefore differ from those of all images.

    Args:
        count (int): Number of images.
        seed (int): Random seed. Equal arguments give equal images.
        light (float): Strength of the differences in light. 0: none.
    """
    rng = np.random.default_rng(seed)
    pixels = np.empty((count, SIZE, SIZE, 3), np.float32)
    labels = rng.integers(0, len(KINDS), count)
    for image, label in zip(pixels, labels):
        shape = shape_mask(rng, KINDS[label], SIZE)[..., None]
        image[:] = rng.uniform(-0.2, 0.2, 3) + shape * rng.uniform(0.7, 1.3, 3)
        image += rng.normal(0, 0.1, image.shape)
        image *= 2**(light * rng.uniform(-1, 1))
        image += light * rng.uniform(-0.5, 0.5)
    return Images(
        torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(labels))


class Block(nn.Module):
    """Residual block of two convolutions, as in ResNet-18."""

    def __init__(self, inputs: int, channels: int, stride: int,
                 norm: dict) -> None:
        super().__init__()
        self.first = ConvModule(
            inputs, channels, 3, stride, 1, bias=False, **norm)
        self.second = ConvModule(
            channels, channels, 3, 1, 1, bias=False, act_cfg=None, **norm)
        self.shortcut = None
        if stride > 1 or inputs != channels:
            self.shortcut = ConvModule(
                inputs, channels, 1, stride, bias=False, act_cfg=None,
                norm_cfg=norm['norm_cfg'])

    def forward(self, x: Tensor) -> Tensor:
        past = x if self.shortcut is None else self.shortcut(x)
        return F.relu(self.second(self.first(x)) + past)


def build_classifier(norm: dict, width: int = 16) -> nn.Sequential:
    """Build a residual network of 11 convolutions and a linear layer.

    Args:
        norm (dict): ``norm_cfg``, and ``conv_cfg`` if the norm needs one.
        width (int): Number of channels in the first stage.
    """
    model = nn.Sequential(
        ConvModule(3, width, 3, 1, 1, bias=False, **norm),
        Block(width, width, 1, norm), Block(width, 2 * width, 2, norm),
        Block(2 * width, 4 * width, 2, norm),
        Block(4 * width, 4 * width, 1, norm), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(4 * width, len(KINDS)))
    for module in model.modules():
        if isinstance(module, ConvModule):
            module.init_weights()
    return model


def tell_iteration(model: nn.Module,
                   iteration: Optional[int],
                   scale: float = 1.,
                   burning_in: bool = False) -> None:
    """Set the norms' training state, as the hook does in mmengine's loop."""
    for layer in norms_of(model).values():
        layer.iteration = iteration
        layer.gradient_scale = scale
        layer.burning_in = burning_in


class Schedule(NamedTuple):
    """Training schedule of a classifier.

    Attributes:
        images (int): Number of images that are normalised together.
        batches (int): Number of such batches in an optimizer step.
        steps (int): Number of optimizer steps.
        lr (float): Highest learning rate of SGD.
        burn_in (int): Number of steps with the norms in burn-in.
    """
    images: int
    batches: int
    steps: int
    lr: float
    burn_in: int


def batches_of(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Yield the indices of shuffled batches without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[:count // size * size].view(-1, size)


def train_classifier(model: nn.Module,
                     train: Images,
                     schedule: Schedule,
                     seed: int,
                     tell: Callable[[], None] = lambda: None) -> None:
    """Train with SGD with momentum, warm-up and a cosine schedule.

    For a given seed, the images of a step do not depend on how the step is
    split into batches.
    """
    optimizer = torch.optim.SGD(
        model.parameters(), schedule.lr, momentum=0.9, weight_decay=5e-4)
    warm_up = max(1, schedule.steps // 10)
    steps = batches_of(
        len(train.labels), schedule.images * schedule.batches, seed)
    model.train()
    for step in range(schedule.steps):
        rate = min(1., (step + 1) / warm_up) * 0.5 * (
            1 + np.cos(np.pi * step / schedule.steps))
        for group in optimizer.param_groups:
            group['lr'] = schedule.lr * rate
        optimizer.zero_grad()
        for part, indices in enumerate(
                next(steps).view(schedule.batches, schedule.images)):
            tell_iteration(model, step * schedule.batches + part,
                           1 / schedule.batches, step < schedule.burn_in)
            loss_of(model, train.of(indices)).div(schedule.batches).backward()
        optimizer.step()
        tell()
    tell_iteration(model, None)


def loss_of(model: nn.Module, images: Images) -> Tensor:
    """Return the cross entropy of a batch."""
    return F.cross_entropy(model(images.pixels), images.labels)


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Return the fraction of correctly classified images, in evaluation."""
    model.eval()
    found: Tuple[Tensor, ...] = tuple(
        model(pixels).argmax(1) for pixels in images.pixels.split(256))
    return (torch.cat(found) == images.labels).float().mean().item()
