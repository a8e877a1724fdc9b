"""The examples of the study's regimes."""
from functools import lru_cache
from typing import NamedTuple, Tuple

import cv2
import numpy as np
import torch
from torch import Tensor

from ..benchmark.classifier import KINDS, SIZE, make_images
from ..data.shapes import make_image, shape_mask

# More objects than an image has; boxes of one are padded to it.
_MAX_OBJECTS = 12


class Examples(NamedTuple):
    """Images, and what is to be found in them.

    Attributes:
        pixels (Tensor): Shape (N, C, H, W).
        labels (Tensor): Classes, shape (N,); classes of pixels, (N, H, W); or
            boxes as x1, y1, x2, y2, class, (N, 12, 5), class -1 where there
            are fewer.
        groups (Tensor): Shape (N,). Images of a group are alike: of one
            class, or of one scene.
    """
    pixels: Tensor
    labels: Tensor
    groups: Tensor

    def of(self, indices: Tensor) -> 'Examples':
        return Examples(*(values[indices] for values in self))


Splits = Tuple[Examples, Examples]


def under_conditions(pixels: Tensor, groups: Tensor, strength: float,
                     seed: int) -> Tensor:
    """Give each group a gain, a tint and a haze of its own.

    They are fixed by the group's number, as day, night and fog are for a
    camera: an image has the same ones whenever it is seen.

    Args:
        pixels (Tensor): Shape (N, 3, H, W), about zero.
        groups (Tensor): Shape (N,).
        strength (float): 1: a gain from 0.5 to 2, a tint of each channel from
            0.7 to 1.4, and an offset from -0.5 to 0.5.
        seed (int): Of the conditions.
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
def classified(strength: float) -> Splits:
    """Images of one shape, under conditions of their own."""
    return _classified(3000, 0, strength), _classified(1000, 1, strength)


@lru_cache(maxsize=None)
def classified_by_class(strength: float) -> Splits:
    """The same, where the images of a class are a group."""
    train, val = classified(strength)
    return train._replace(groups=train.labels), val


def _filmed(scenes: int, seed: int, strength: float) -> Examples:
    pixels, labels = make_images(4 * scenes, seed, light=0)
    groups = torch.arange(scenes).repeat_interleave(4)
    return Examples(
        under_conditions(pixels, groups, strength, seed), labels, groups)


@lru_cache(maxsize=None)
def filmed(strength: float) -> Splits:
    """Images of one shape; four of each scene, under one condition."""
    return _filmed(750, 0, strength), _filmed(250, 1, strength)


def _drawn(index: int, seed: int, size: int) -> Tuple[np.ndarray, list]:
    image, annotations = make_image((seed, index), size)
    return (image.astype(np.float32) - 128) / 64, annotations


def _tiled(count: int, seed: int, strength: float) -> Examples:
    rng = np.random.default_rng(seed)
    size = 2 * SIZE
    pixels = np.empty((count, size, size, 3), np.float32)
    labels = np.zeros((count, size, size), np.int64)
    for image, classes in zip(pixels, labels):
        image[:] = rng.uniform(-0.2, 0.2, 3) + rng.normal(0, 0.1, image.shape)
        for y in (0, SIZE):
            for x in (0, SIZE):
                kind = rng.integers(len(KINDS) + 1)
                if kind == len(KINDS):
                    continue
                shape = shape_mask(rng, KINDS[kind], SIZE)
                tile = slice(y, y + SIZE), slice(x, x + SIZE)
                image[tile] += shape[..., None] * rng.uniform(0.7, 1.3, 3)
                classes[tile][shape > 0.5] = 1 + kind
    alone = torch.arange(count)
    pixels = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    return Examples(
        under_conditions(pixels, alone, strength, seed),
        torch.from_numpy(labels)[:, ::2, ::2].contiguous(), alone)


@lru_cache(maxsize=None)
def segmented(strength: float) -> Splits:
    """Images of up to four shapes, to be segmented at half their size."""
    return _tiled(2000, 0, strength), _tiled(400, 1, strength)


def _with_boxes(count: int, seed: int, strength: float,
                size: int) -> Examples:
    pixels, labels = [], torch.full((count, _MAX_OBJECTS, 5), -1.)
    for index in range(count):
        image, annotations = _drawn(index, seed, size)
        pixels.append(image.transpose(2, 0, 1))
        for place, found in enumerate(annotations):
            x, y, w, h = found['bbox']
            labels[index, place] = torch.tensor(
                [x, y, x + w, y + h, found['category_id'] - 1])
    alone = torch.arange(count)
    pixels = torch.from_numpy(np.stack(pixels))
    return Examples(
        under_conditions(pixels, alone, strength, seed), labels, alone)


@lru_cache(maxsize=None)
def with_boxes(strength: float, size: int = 80) -> Splits:
    """Pictures of several objects, under conditions of their own."""
    return (_with_boxes(1200, 0, strength, size),
            _with_boxes(200, 1, strength, size))
