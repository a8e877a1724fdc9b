"""Drawing of ShapesCOCO's images.

An image has coloured shapes of seven classes and many sizes on an uneven
background. They may overlap. Lines and blots belong to no class. Light,
contrast, blur and noise vary. The data set is large enough to need training,
and small enough to learn in minutes on a CPU.
"""
from typing import Dict, List, Optional, Sequence, Tuple

import cv2
import numpy as np

CLASSES = ('circle', 'square', 'triangle', 'star', 'cross', 'heart',
           'crescent')
# Increase it when a seed draws another image than before.
VERSION = 1

# Smallest visible fraction of an object, and smallest number of its pixels.
_MIN_VISIBLE = 0.7
_MIN_PIXELS = 40
_SUPERSAMPLING = 4
# Smallest Euclidean distance between the colours of an object and of its
# background, for channels from 0 to 255.
_MIN_CONTRAST = 90


def _polar(angles: np.ndarray, radii) -> np.ndarray:
    return np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)


def _outline(name: str) -> np.ndarray:
    """Return a shape's outline in the unit disc, y downwards, (P, 2)."""
    turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    if name == 'circle':
        return 0.9 * _polar(turn, 1.)
    if name == 'square':
        return _polar(np.pi / 4 + np.pi / 2 * np.arange(4), 1.)
    if name == 'triangle':
        return _polar(2 * np.pi / 3 * np.arange(3), 1.)
    if name == 'star':
        return _polar(np.pi / 5 * np.arange(10), np.tile([1., 0.42], 5))
    if name == 'cross':
        a, b = 0.32, 0.95
        return np.array([(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a),
                         (a, b), (-a, b), (-a, a), (-b, a), (-b, -a),
                         (-a, -a)])
    if name == 'heart':
        x = np.sin(turn)**3
        y = (13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) -
             np.cos(4 * turn)) / 17
        return 0.95 * np.stack([x, -y], axis=1)
    if name == 'crescent':
        # A disc minus another disc: the two arcs meet where the circles
        # intersect.
        shift, inner = 0.5, 0.78
        x = (shift**2 + 1 - inner**2) / (2 * shift)
        y = np.sqrt(1 - x**2)
        far = np.linspace(np.arctan2(y, x), 2 * np.pi - np.arctan2(y, x), 48)
        near = np.linspace(
            np.arctan2(-y, x - shift) % (2 * np.pi), np.arctan2(y, x - shift),
            32)
        points = np.concatenate([
            np.stack([np.cos(far), np.sin(far)], axis=1),
            np.stack([shift + inner * np.cos(near), inner * np.sin(near)],
                     axis=1)
        ])
        return points + np.array([0.25, 0.])
    raise ValueError(f'unknown shape {name!r}. Use one of {CLASSES}')


_OUTLINES = {name: _outline(name) for name in CLASSES}


def _mask(outline: np.ndarray, size: int) -> np.ndarray:
    """Return each pixel's coverage, float32 in [0, 1], (size, size)."""
    big = np.zeros((size * _SUPERSAMPLING, ) * 2, np.uint8)
    points = np.round(outline * _SUPERSAMPLING).astype(np.int32)
    cv2.fillPoly(big, [points], 255)
    small = cv2.resize(big, (size, size), interpolation=cv2.INTER_AREA)
    return small.astype(np.float32) / 255


def shape_mask(rng: np.random.Generator, name: str, size: int) -> np.ndarray:
    """Draw one shape that fills most of an image, as coverage of each pixel.

    Args:
        rng (np.random.Generator): Random generator for size, place and angle.
        name (str): One of ``CLASSES``.
        size (int): Height and width in pixels.

    Returns:
        np.ndarray: float32 in [0, 1], shape (size, size).
    """
    radius = size * rng.uniform(0.28, 0.42)
    centre = rng.uniform(radius * 0.9, size - radius * 0.9, 2)
    return _mask(_OUTLINES[name] @ _turn(rng).T * radius + centre, size)


def _turn(rng: np.random.Generator) -> np.ndarray:
    angle = rng.uniform(-0.6, 0.6)
    return np.array([[np.cos(angle), -np.sin(angle)],
                     [np.sin(angle), np.cos(angle)]])


def _smooth_noise(rng: np.random.Generator, size: int,
                  cells: int) -> np.ndarray:
    """Return smooth noise in about [-1, 1], shape (size, size, 1)."""
    grid = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
    return cv2.resize(
        grid, (size, size), interpolation=cv2.INTER_CUBIC)[..., None]


def _colour(rng: np.random.Generator) -> np.ndarray:
    hsv = np.array([[[
        rng.integers(0, 180),
        rng.integers(90, 256),
        rng.integers(110, 256)
    ]]], np.uint8)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0].astype(np.float32)


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    first, second = _colour(rng) * 0.6, _colour(rng) * 0.6
    grey = np.float32(rng.uniform(60, 190))
    blend = 0.5 + 0.5 * _smooth_noise(rng, size, int(rng.integers(2, 5)))
    image = 0.5 * grey + 0.5 * (first * blend + second * (1 - blend))
    image = image + rng.uniform(4, 16) * _smooth_noise(rng, size, size // 8)
    return image


def _clutter(rng: np.random.Generator, image: np.ndarray) -> None:
    """Draw lines and soft blots, which resemble no class, in place."""
    size = len(image)
    for _ in range(rng.integers(2, 7)):
        points = rng.uniform(0, size, (3, 2))
        t = np.linspace(0, 1, 24)[:, None]
        curve = ((1 - t)**2 * points[0] + 2 * t * (1 - t) * points[1] +
                 t**2 * points[2])
        cv2.polylines(image, [np.round(curve * 8).astype(np.int32)], False,
                      _colour(rng).tolist(), int(rng.integers(1, 3)),
                      cv2.LINE_AA, 3)
    for _ in range(rng.integers(0, 4)):
        outline = (rng.uniform(0, size, 2) + _polar(
            np.linspace(0, 2 * np.pi, 12, endpoint=False),
            rng.uniform(0.05, 0.16) * size * rng.uniform(0.4, 1, 12)))
        blot = cv2.GaussianBlur(_mask(outline, size), (0, 0), size / 50)
        blot = (blot * rng.uniform(0.3, 0.7))[..., None]
        image += blot * (_colour(rng) - image)


def _texture(rng: np.random.Generator, size: int,
             behind: np.ndarray) -> np.ndarray:
    """Return an object's texture, (size, size, 3).

    Its colour differs from ``behind``, the mean colour of the background.
    """
    for _ in range(10):
        colour = _colour(rng)
        if np.linalg.norm(colour - behind) > _MIN_CONTRAST:
            break
    kind = rng.choice(['plain', 'shaded', 'striped'], p=[0.4, 0.35, 0.25])
    if kind == 'plain':
        return np.broadcast_to(colour, (size, size, 3))
    yy, xx = np.mgrid[:size, :size].astype(np.float32) / size
    angle = rng.uniform(0, 2 * np.pi)
    across = np.cos(angle) * xx + np.sin(angle) * yy
    if kind == 'shaded':
        return colour * (0.75 + 0.5 * across)[..., None].clip(0.4, 1.3)
    stripe = np.sin(across * rng.uniform(40, 90)) > 0
    return np.where(stripe[..., None], colour, colour * 0.72)


def _photometric(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Apply uneven light, contrast, blur and noise."""
    size = len(image)
    image = image * (1 + rng.uniform(0, 0.3) * _smooth_noise(rng, size, 2))
    image = (image - 128) * rng.uniform(0.7, 1.15) + 128
    image = image + rng.uniform(-25, 25)
    if rng.random() < 0.3:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 0.9))
    image = image + rng.normal(0, rng.uniform(1, 7), image.shape)
    return image.clip(0, 255).astype(np.uint8)


def _under_conditions(rng: np.random.Generator, image: np.ndarray,
                      strength: float) -> np.ndarray:
    """Apply one random exposure, white balance, gamma and haze."""
    image = (image / np.float32(255))**np.exp(strength * rng.uniform(-.5, .5))
    image = image * 2**(strength * rng.uniform(-1.5, 0.5))
    image = image * 2**(strength * rng.uniform(-0.4, 0.4, 3))
    haze = strength * rng.uniform(0, 0.6)
    image = image * (1 - haze) + haze * rng.uniform(0.4, 0.9)
    return (255 * image).clip(0, 255).astype(np.uint8)


def _place(rng: np.random.Generator, size: int) -> Tuple[int, np.ndarray]:
    category = int(rng.integers(len(CLASSES)))
    # Log-uniform radius, from a twelfth to a quarter of the image.
    radius = size * np.exp(rng.uniform(np.log(0.08), np.log(0.24)))
    centre = rng.uniform(radius * 0.7, size - radius * 0.7, 2)
    turn = _turn(rng)
    stretch = np.array([1., rng.uniform(0.75, 1.)])[rng.permutation(2)]
    outline = _OUTLINES[CLASSES[category]] * stretch @ turn.T * radius
    return category, outline + centre


def _annotation(category: int, visible: np.ndarray) -> Dict:
    """Return the COCO annotation of an object's visible part, without ids."""
    ys, xs = np.nonzero(visible)
    left, top = int(xs.min()), int(ys.min())
    right, bottom = int(xs.max()) + 1, int(ys.max()) + 1
    # OpenCV's contours run through pixel centres. In the enlarged mask they
    # follow the outline closely.
    crop = np.kron(visible[top:bottom, left:right],
                   np.ones((_SUPERSAMPLING, ) * 2)).astype(np.uint8)
    contours, _ = cv2.findContours(crop, cv2.RETR_EXTERNAL,
                                   cv2.CHAIN_APPROX_NONE)
    polygons = []
    for contour in contours:
        points = cv2.approxPolyDP(contour, 1., True)[:, 0]
        if len(points) >= 3:
            points = (points + 0.5) / _SUPERSAMPLING + (left, top)
            polygons.append(points.round(3).ravel().tolist())
    return dict(
        category_id=category + 1,
        bbox=[left, top, right - left, bottom - top],
        area=int(visible.sum()),
        segmentation=polygons,
        iscrowd=0)


def make_image(seed: Sequence[int],
               size: int = 192,
               conditions: float = 0.,
               scene: Optional[Sequence[int]] = None
               ) -> Tuple[np.ndarray, List[Dict]]:
    """Draw one image.

    Args:
        seed (Sequence[int]): Random seed. Equal arguments give equal images.
        size (int): Height and width in pixels.
        conditions (float): Strength of the differences in exposure, white
            balance, gamma and haze, from 0 (none) to 1. They resemble those
            of a car's camera by day, at dusk and in fog.
        scene (Sequence[int], optional): Random seed of the conditions alone.
            Images with the same scene have the same conditions. None: the
            image has its own conditions.

    Returns:
        tuple[np.ndarray, list[dict]]: The image in BGR, uint8, shape
        (size, size, 3), and the COCO annotations of the visible parts of all
        objects: boxes in pixels as x, y, width, height.
    """
    rng = np.random.default_rng(seed)
    image = _background(rng, size)
    _clutter(rng, image)
    owner = np.full((size, size), -1, np.int32)
    objects: List[Tuple[int, int]] = []
    for _ in range(rng.integers(4, 11)):
        category, outline = _place(rng, size)
        coverage = _mask(outline, size)
        solid = coverage > 0.5
        after = np.where(solid, len(objects), owner)
        full = [pixels for _, pixels in objects] + [int(solid.sum())]
        # Skip an object that would hide too much of another, or be too small.
        if any((after == i).sum() < max(_MIN_PIXELS, _MIN_VISIBLE * pixels)
               for i, pixels in enumerate(full)):
            continue
        alpha = coverage[..., None]
        texture = _texture(rng, size, image[solid].mean(0))
        image = image * (1 - alpha) + texture * alpha
        owner = after
        objects.append((category, full[-1]))
    annotations = [
        _annotation(category, owner == i)
        for i, (category, _) in enumerate(objects)
    ]
    image = _photometric(rng, image)
    if conditions:
        if scene is not None:
            rng = np.random.default_rng(scene)
        image = _under_conditions(rng, image, conditions)
    return image, annotations
