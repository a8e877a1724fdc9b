"""Training regimes, and one training of them."""
import copy
import time
from functools import lru_cache
from typing import Any, Callable, Dict, Iterator, List, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..benchmark.classifier import (KINDS, Block, accuracy, build_classifier,
                                    loss_of)
from ..layers import TrainingLoop, norms_of, suggested_window_size
from .detector import average_precision, build_detector, detection_loss
from .examples import (Examples, Splits, classified, classified_by_class,
                       filmed, segmented, with_boxes)

STEP = 16  # images of an optimizer step


class Regime(NamedTuple):
    """What is trained, on what, and how.

    Attributes:
        splits (callable): Gives examples for training and validation.
        build (callable): Takes ``norm_cfg`` and ``conv_cfg`` as a dict, and
            gives the model.
        steps (int): Of the optimizer, 16 images each.
        lr (float): Highest learning rate.
        adam (bool): AdamW in place of SGD with momentum.
        together (int): Images of a group that follow each other.
        loss (callable): Takes the model and a batch of examples.
        score (callable): Takes the model and the validation's examples, and
            gives a part of 1.
    """
    splits: Callable[[], Splits]
    build: Callable[[dict], nn.Module]
    steps: int
    lr: float
    adam: bool = False
    together: int = 1
    loss: Callable[[nn.Module, Examples], Tensor] = loss_of
    score: Callable[[nn.Module, Examples], float] = accuracy


def order(groups: Tensor, together: int, seed: int) -> Iterator[Tensor]:
    """Indices of the images of each step, without end.

    A step takes ``16 / together`` groups by chance, and as many of their
    images as follow each other. In this order it is cut into the batches that
    are normalised, so every cut sees the same images.
    """
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(groups == group) for group in groups.unique()]
    deck: List[int] = []
    while True:
        indices = []
        for _ in range(STEP // together):
            deck = deck or list(rng.permutation(len(members)))
            indices.append(
                rng.choice(members[deck.pop()], together, replace=False))
        yield torch.from_numpy(np.concatenate(indices))


def _norm(type: str, centred: bool = False, **kwargs: Any) -> dict:
    norm = dict(norm_cfg=dict(type=type, **kwargs))
    if centred:
        norm['conv_cfg'] = dict(type='CenConv')
    return norm


SETTINGS: Dict[str, dict] = {
    'BN': _norm('BN'),
    'BN, CenConv': _norm('BN', centred=True),
    'GN': _norm('GN', num_groups=4),
    'BRN': _norm('BRN'),
    'BGN': _norm('BGN', num_groups=4),
    'NaiveCBN': _norm('NaiveCBN'),
    'CBN': _norm('CBN'),
    'CBN, released gradient': _norm('CBN', gradient='released'),
    'MABN': _norm('MABN', centred=True),
    'MABN, centred': _norm(
        'MABN', centered=True, forward_statistics='sma', buffer_size=8),
    'MABN, centred, ema': _norm('MABN', centered=True),
}


def norm_of(setting: str, images: int) -> dict:
    """A setting's norm for batches of so many images."""
    norm = copy.deepcopy(SETTINGS[setting])
    if norm['norm_cfg']['type'] in ('CBN', 'NaiveCBN'):
        norm['norm_cfg'].setdefault('window_size',
                                    suggested_window_size(images))
    return norm


def train(model: nn.Module, regime: Regime, examples: Examples, images: int,
          seed: int) -> None:
    """Train with warm-up and a cosine schedule.

    A tenth of the steps is burn-in, and warm-up.
    """
    if regime.adam:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            model.parameters(), regime.lr, weight_decay=0.05)
    else:
        optimizer = torch.optim.SGD(
            model.parameters(), regime.lr, momentum=0.9, weight_decay=5e-4)
    warm_up = max(1, regime.steps // 10)
    norms = norms_of(model)
    loop = TrainingLoop(norms)
    share = images / STEP
    indices = order(examples.groups, regime.together, seed)
    model.train()
    iteration = 0
    for step in range(regime.steps):
        for norm in norms.values():
            norm.burning_in = step < warm_up
        for group in optimizer.param_groups:
            group['lr'] = regime.lr * min(1., (step + 1) / warm_up) * 0.5 * (
                1 + np.cos(np.pi * step / regime.steps))
        optimizer.zero_grad()
        for batch in next(indices).split(images):
            loop.begin(iteration, share)
            regime.loss(model, examples.of(batch)).mul(share).backward()
            loop.end()
            iteration += 1
        optimizer.step()
    loop.release()


@torch.no_grad()
def make_precise(model: nn.Module, regime: Regime, examples: Examples,
                 images: int, batches: int = 100) -> None:
    """Take running statistics anew, as means over batches (PreciseBN)."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    indices = order(examples.groups, regime.together, 0)
    model.train()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    seen = 0
    while seen < batches:
        for batch in next(indices).split(images):
            regime.loss(model, examples.of(batch))
            seen += 1
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


def run(regime: str, setting: str, images: int, seed: int) -> dict:
    """Train one cell of the study.

    Args:
        regime (str): One of ``REGIMES``.
        setting (str): One of ``SETTINGS``.
        images (int): Of a batch that is normalised; divides 16.
        seed (int): Of the weights and the order of the images.

    Returns:
        dict: The score in percent, also with precise running statistics; the
        seconds of the training; and what was run.
    """
    rules = REGIMES[regime]
    examples, val = rules.splits()
    torch.manual_seed(seed)
    norm = norm_of(setting, images)
    model = rules.build(norm)
    start = time.perf_counter()
    train(model, rules, examples, images, seed)
    seconds = time.perf_counter() - start
    model.eval()
    found = dict(
        regime=regime,
        setting=setting,
        images=images,
        seed=seed,
        score=100 * rules.score(model, val),
        seconds=round(seconds, 1),
        steps=rules.steps,
        lr=rules.lr,
        norm=norm)
    make_precise(model, rules, examples, images)
    model.eval()
    return dict(found, precise=100 * rules.score(model, val))


def build_segmenter(norm: dict) -> nn.Sequential:
    """A small residual network that classifies pixels at half the size."""
    model = nn.Sequential(
        ConvModule(3, 16, 3, 2, 1, bias=False, **norm), Block(16, 16, 1, norm),
        Block(16, 32, 2, norm), Block(32, 32, 1, norm),
        nn.Conv2d(32, len(KINDS) + 1, 1),
        nn.Upsample(scale_factor=2, mode='bilinear'))
    for module in model.modules():
        if isinstance(module, ConvModule):
            module.init_weights()
    return model


@torch.no_grad()
def mean_iou(model: nn.Module, examples: Examples) -> float:
    """Mean over classes of intersection over union."""
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


@lru_cache(maxsize=None)
def _backbone() -> nn.Sequential:
    """A classifier's convolutions, trained with 16 plain images a batch."""
    rules = REGIMES['plain']
    torch.manual_seed(0)
    model = rules.build(_norm('BN'))
    train(model, rules, classified(0., seed=2)[0], STEP, 0)
    return model[:4].eval()


@lru_cache(maxsize=None)
def features(strength: float) -> Splits:
    """What a frozen backbone makes of scenes, each under its condition."""
    backbone = _backbone()
    with torch.no_grad():
        return tuple(
            split._replace(pixels=torch.cat(
                [backbone(part) for part in split.pixels.split(100)]))
            for split in filmed(strength))


def build_head(norm: dict) -> nn.Sequential:
    """Four convolutions and a linear layer over a backbone's features."""
    model = nn.Sequential(
        *(ConvModule(64, 64, 3, 1, 1, bias=False, **norm) for _ in range(4)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, len(KINDS)))
    for module in model.modules():
        if isinstance(module, ConvModule):
            module.init_weights()
    return model


REGIMES: Dict[str, Regime] = {
    'plain': Regime(lambda: classified(0.), build_classifier, 160, 0.05),
    'conditions': Regime(
        lambda: classified(1.), build_classifier, 240, 0.05),
    'one class a batch': Regime(
        lambda: classified_by_class(0.), build_classifier, 160, 0.05,
        together=4),
    'scenes': Regime(
        lambda: filmed(1.), build_classifier, 240, 0.05, together=4),
    'video': Regime(
        lambda: segmented(1., 4), build_segmenter, 200, 1e-2, adam=True,
        together=4, score=mean_iou),
    'detector': Regime(
        lambda: with_boxes(1.), build_detector, 250, 3e-3, adam=True,
        loss=detection_loss, score=average_precision),
    'head': Regime(
        lambda: features(1.5), build_head, 400, 0.02, together=4),
}
