"""Training loop of the study."""
from collections import defaultdict
from typing import Callable, Dict, Iterator, List, NamedTuple, Tuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..benchmark.classifier import accuracy, loss_of
from ..layers import TrainingLoop, norms_of
from .examples import Examples, Splits
from .settings import Setting

STEP = 16  # images in an optimizer step


class Regime(NamedTuple):
    """Data, model and schedule of a training.

    Attributes:
        examples (callable): Function that takes the strength of the
            conditions and returns training and validation data.
        strength (float): Strength of the conditions.
        build (callable): Function that takes a dict with ``norm_cfg`` and
            ``conv_cfg`` and returns the model.
        steps (int): Number of optimizer steps of 16 images.
        lr (float): Highest learning rate.
        adam (bool): Use AdamW instead of SGD with momentum.
        together (int): Number of images of a group that follow each other.
        loss (callable): Function that takes the model and a batch and returns
            the loss.
        score (callable): Function that takes the model and the validation
            data and returns a score from 0 to 1.
    """
    examples: Callable[[float], Splits]
    strength: float
    build: Callable[[dict], nn.Module]
    steps: int
    lr: float
    adam: bool = False
    together: int = 1
    loss: Callable[[nn.Module, Examples], Tensor] = loss_of
    score: Callable[[nn.Module, Examples], float] = accuracy

    def splits(self) -> Splits:
        """Return training and validation data."""
        return self.examples(self.strength)


def order(groups: Tensor, together: int, seed: int) -> Iterator[Tensor]:
    """Yield the indices of the images of each step, without end.

    A step has ``16 / together`` random groups, and ``together`` random images
    of each group in a row. The caller splits a step into batches in this
    order, so the images of a step do not depend on the batch size.
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


def _batch_norms(model: nn.Module) -> List[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


def train(model: nn.Module, regime: Regime, setting: Setting,
          examples: Examples, images: int, seed: int) -> None:
    """Train with warm-up, a tenth of the steps, and a cosine schedule."""
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
            norm.burning_in = step < setting.burn_in * regime.steps
        if step >= setting.frozen_from * regime.steps:
            for norm in _batch_norms(model):
                norm.eval()
        for group in optimizer.param_groups:
            group['lr'] = regime.lr * min(1., (step + 1) / warm_up) * 0.5 * (
                1 + np.cos(np.pi * step / regime.steps))
        optimizer.zero_grad()
        batches = next(indices).split(images)
        for turn in range(setting.rehearsals + 1):
            for batch in batches:
                loop.begin(iteration, share)
                loss = regime.loss(model, examples.of(batch)).mul(share)
                if turn == setting.rehearsals:
                    loss.backward()
                loop.end()
                iteration += 1
        optimizer.step()
    loop.release()


def trained(regime: Regime, setting: Setting, images: int,
            seed: int) -> nn.Module:
    """Build a model of the regime, train it, and return it."""
    examples = regime.splits()[0]
    torch.manual_seed(seed)
    model = regime.build(setting.norm)
    train(model, regime, setting, examples, images, seed)
    return model


@torch.no_grad()
def make_precise(model: nn.Module, regime: Regime, examples: Examples,
                 images: int, batches: int = 100) -> None:
    """Recompute the running statistics from several batches (PreciseBN).

    The variance is that of all values, within and between batches
    (arXiv:2105.07576, Sec. 3).
    """
    moments: Dict[nn.Module, List[Tensor]] = defaultdict(list)

    def gather(norm: nn.Module, inputs: Tuple[Tensor]) -> None:
        dims = [0, *range(2, inputs[0].dim())]
        moments[norm].append(torch.stack(
            [inputs[0].mean(dims), inputs[0].square().mean(dims)]))

    handles = [norm.register_forward_pre_hook(gather)
               for norm in _batch_norms(model)]
    indices = order(examples.groups, regime.together, 0)
    model.train()
    seen = 0
    while seen < batches:
        for batch in next(indices).split(images):
            regime.loss(model, examples.of(batch))
            seen += 1
    for handle in handles:
        handle.remove()
    for norm, found in moments.items():
        mean, square = torch.stack(found).mean(0)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_((square - mean.square()).clamp(min=0))
