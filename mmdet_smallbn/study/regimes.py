"""Regimes of the study, and the function that runs one training."""
import time
from functools import lru_cache
from typing import Dict

import torch
from torch import nn

from ..benchmark.classifier import build_classifier
from ..layers import set_example_weight
from .detector import average_precision, build_detector, detection_loss
from .examples import (Splits, classified, classified_by_class, filmed,
                       segmented, with_boxes)
from .models import build_head, build_segmenter, mean_iou
from .settings import SETTINGS, setting_of
from .training import STEP, Regime, make_precise, train, trained


@lru_cache(maxsize=None)
def _backbone() -> nn.Sequential:
    """Return the convolutions of a classifier trained on regime 'plain'.

    The training has 16 images per batch.
    """
    rules = REGIMES['plain']
    torch.manual_seed(0)
    setting = SETTINGS['BN']
    model = rules.build(setting.norm)
    train(model, rules, setting, classified(0., seed=2)[0], STEP, 0)
    return model[:4].eval()


@lru_cache(maxsize=None)
def features(strength: float) -> Splits:
    """Return a frozen backbone's features of scenes under conditions."""
    backbone = _backbone()
    with torch.no_grad():
        return tuple(
            split._replace(pixels=torch.cat(
                [backbone(part) for part in split.pixels.split(100)]))
            for split in filmed(strength))


EXAMPLE_WEIGHTS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.)

# Except in the plain detector, BatchNorm with 1 image is worse than with 16.
REGIMES: Dict[str, Regime] = {
    # Similar images: the statistics of a few are close to those of all.
    'plain': Regime(classified, 0., build_classifier, 160, 0.05),
    # Each image has its own conditions.
    'conditions': Regime(
        classified, 1., build_classifier, 240, 0.05),
    # In each step, four images of each of the four classes in a row.
    'one class a batch': Regime(
        classified_by_class, 0., build_classifier, 160, 0.05,
        together=4),
    # In each step, four images of each of four scenes in a row.
    'video': Regime(
        segmented, 1., build_segmenter, 200, 1e-2, adam=True,
        together=4, score=mean_iou),
    # As 'video', but a classifier whose norms are in the head alone.
    'head': Regime(
        features, 1.5, build_head, 400, 0.02, together=4),
    # A detector with norms everywhere, on similar images.
    'plain detector': Regime(
        with_boxes, 0., build_detector, 200, 3e-3, adam=True,
        together=4, loss=detection_loss, score=average_precision),
    # The same detector, on scenes under conditions.
    'hasty detector': Regime(
        with_boxes, 1.5, build_detector, 200, 3e-3, adam=True,
        together=4, loss=detection_loss, score=average_precision),
    # The same with more and smaller steps: the weights change less in a
    # window.
    'detector': Regime(
        with_boxes, 1.5, build_detector, 600, 1e-3, adam=True,
        together=4, loss=detection_loss, score=average_precision),
}


def asked(regime: str, setting: str, images: int, seed: int) -> dict:
    """Return the full description of a training.

    Args:
        regime (str): One of ``REGIMES``.
        setting (str): One of ``SETTINGS``.
        images (int): Number of images that are normalised together; it
            divides 16.
        seed (int): Random seed of the weights and the order of the images.
    """
    rules = REGIMES[regime]
    return dict(
        regime=regime,
        setting=setting,
        images=images,
        seed=seed,
        strength=rules.strength,
        steps=rules.steps,
        lr=rules.lr,
        **setting_of(setting, images)._asdict())


def run(regime: str, setting: str, images: int, seed: int) -> dict:
    """Run the training that :func:`asked` describes.

    Returns:
        dict: The description, the score in percent, and the time of the
        training in seconds. For BatchNorm also the scores with precise
        running statistics, and with example weights.
    """
    rules = REGIMES[regime]
    examples, val = rules.splits()
    start = time.perf_counter()
    model = trained(rules, setting_of(setting, images), images, seed)
    seconds = time.perf_counter() - start

    def score() -> float:
        model.eval()
        return 100 * rules.score(model, val)

    found = dict(
        asked(regime, setting, images, seed),
        score=score(),
        seconds=round(seconds, 1))
    if setting == 'BN':
        weighted = {}
        for weight in EXAMPLE_WEIGHTS:
            set_example_weight(model, weight)
            weighted[f'{weight:g}'] = score()
        set_example_weight(model, None)
        make_precise(model, rules, examples, images)
        found.update(weighted=weighted, precise=score())
    return found
