"""Synthetic data of the study's regimes."""
from functools import lru_cache
from typing import NamedTuple, Tuple

import numpy as np
import torch
from torch import Tensor

from ..benchmark.classifier import KINDS, SIZE, make_images
from ..data.shapes import shape_mask


class Examples(NamedTuple):
    """Images with their labels and groups.

    Attributes:
        pixels (Tensor): Images or features, shape (N, C, H, W).
        labels (Tensor): Classes of images, shape (N,), or classes of pixels,
            shape (N, H, W), or boxes as x1, y1, x2, y2, class, shape
            (N, 4, 5). Class -1 fills the rows of missing boxes.
        groups (Tensor): Group of each image, shape (N,). The images of a
            group are similar: they have the same class or the same scene.
    """
    pixels: Tensor
    labels: Tensor
    groups: Tensor

    def of(self, indices: Tensor) -> 'Examples':
        return Examples(*(values[indices] for values in self))


Splits = Tuple[Examples, Examples]


def under_conditions(pixels: Tensor, groups: Tensor, strength: float,
                     seed: int) -> Tensor:
    """Apply one gain, tint and haze to all images of a group.

    Like day, night and fog for a camera, they depend only on the group. An
    image looks the same each time it is used.

    Args:
        pixels (Tensor): Images with values around zero, shape (N, 3, H, W).
        groups (Tensor): Group of each image, shape (N,).
        strength (float): Strength of the conditions. With 1 the gain is from
            0.5 to 2, the tint of each channel from 0.7 to 1.4, and the offset
            (haze) from -0.5 to 0.5. With 0 the images do not change.
        seed (int): Random seed of the conditions.
    """
    rng = np.random.default_rng(seed)
    shape = (int(groups.max()) + 1, 1, 1, 1)
    gain = 2**(strength * rng.uniform(-1, 1, shape))
    tint = 2**(strength * rng.uniform(-0.5, 0.5, (shape[0], 3, 1, 1)))
    haze = strength * rng.uniform(-0.5, 0.5, shape)
    return (pixels * torch.from_numpy(gain * tint).float()[groups] +
            torch.from_numpy(haze).float()[groups])


def _classified(count: int, seed: int, strength: float) -> Examples:
    pixels, labels = make_images(count, seed, light=0)
    alone = torch.arange(count)
    if strength:
        pixels = under_conditions(pixels, alone, strength, seed)
    return Examples(pixels, labels, alone)


@lru_cache(maxsize=None)
def classified(strength: float, seed: int = 0) -> Splits:
    """Return images of one shape; each image has its own conditions."""
    return (_classified(3000, seed, strength),
            _classified(1000, seed + 1, strength))


@lru_cache(maxsize=None)
def classified_by_class(strength: float) -> Splits:
    """Return the same images; the images of a class are a group."""
    train, val = classified(strength)
    return train._replace(groups=train.labels), val


def _filmed(scenes: int, seed: int, strength: float) -> Examples:
    pixels, labels = make_images(4 * scenes, seed, light=0)
    groups = torch.arange(scenes).repeat_interleave(4)
    return Examples(
        under_conditions(pixels, groups, strength, seed), labels, groups)


@lru_cache(maxsize=None)
def filmed(strength: float) -> Splits:
    """Return images of one shape; four per scene share the conditions."""
    return _filmed(750, 0, strength), _filmed(250, 1, strength)


def _tiled(count: int, seed: int,
           strength: float) -> Tuple[Examples, Tensor]:
    """Return images of up to four shapes, with classes of pixels and boxes.

    The four images of a scene follow each other and share the conditions.
    """
    rng = np.random.default_rng(seed)
    size = 2 * SIZE
    pixels = np.empty((count, size, size, 3), np.float32)
    classes = np.zeros((count, size, size), np.int64)
    boxes = torch.full((count, 4, 5), -1.)
    for i, image in enumerate(pixels):
        image[:] = rng.uniform(-0.2, 0.2, 3) + rng.normal(0, 0.1, image.shape)
        for j, (y, x) in enumerate(np.ndindex(2, 2)):
            kind = int(rng.integers(len(KINDS) + 1))
            if kind == len(KINDS):
                continue
            shape = shape_mask(rng, KINDS[kind], SIZE)
            tile = tuple(slice(SIZE * k, SIZE * (k + 1)) for k in (y, x))
            image[tile] += shape[..., None] * rng.uniform(0.7, 1.3, 3)
            classes[i][tile][shape > 0.5] = 1 + kind
            ys, xs = np.nonzero(shape > 0.5)
            boxes[i, j] = torch.tensor([
                SIZE * x + xs.min(), SIZE * y + ys.min(),
                SIZE * x + xs.max() + 1, SIZE * y + ys.max() + 1, kind
            ])
    scenes = torch.arange(count) // 4
    pixels = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    return Examples(
        under_conditions(pixels, scenes, strength, seed),
        torch.from_numpy(classes)[:, ::2, ::2].contiguous(), scenes), boxes


@lru_cache(maxsize=None)
def segmented(strength: float) -> Splits:
    """Return images of up to four shapes, with segmentation at half size."""
    return tuple(
        _tiled(count, seed, strength)[0]
        for count, seed in ((2000, 0), (400, 1)))


@lru_cache(maxsize=None)
def with_boxes(strength: float) -> Splits:
    """Return the same images, with boxes."""
    found = []
    for count, seed in ((2000, 0), (400, 1)):
        examples, boxes = _tiled(count, seed, strength)
        found.append(examples._replace(labels=boxes))
    return tuple(found)
