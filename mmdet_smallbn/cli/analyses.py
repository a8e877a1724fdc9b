"""Two analyses from the papers, repeated on a regime of the study."""
import argparse
import json
from pathlib import Path
from typing import (Any, Callable, Dict, List, NamedTuple, Optional, Sequence,
                    Tuple)

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import one_line_errors
from ..files import write_whole
from ..pictures import save_lines
from ..progress import progress_bar
from ..study.examples import Examples
from ..study.regimes import REGIMES
from ..study.settings import setting_of
from ..study.training import STEP, Regime, order, trained
from ..tables import as_sections, show, spread

# The head's convolutions form a chain without shortcuts.
_REGIME = 'head'
# Points of the training, in percent, at which gradients are measured. CBN's
# burn-in has ended before the first.
_PLACES = (10, 25, 50, 75, 99)
_BATCHES = (16, 4, 2, 1)


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Repeat two analyses from the papers on the study's "
        "head. 'gradients' compares a statistic's gradient with respect to "
        "earlier layers' weights with that of its own layer (CBN, Fig. 6). "
        "'ranges' measures the output range of BatchNorm in training and in "
        'evaluation (Four Things, Fig. 6)')
    parser.add_argument('--parts', nargs='+', choices=list(PARTS),
                        default=list(PARTS),
                        help='analyses to run (default: all)')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2],
                        help='random seeds (default: 0 1 2)')
    parser.add_argument('--out', default='docs/results/analyses.json',
                        help='JSON file to write; the pictures are saved in '
                        'the same folder (default: %(default)s)')
    return parser.parse_args(argv)


class _Calls:
    """Recorder of the calls of one type of module, in call order.

    Args:
        model (nn.Module): Model that holds the modules.
        kind (type): Type of the modules to record.
    """

    def __init__(self, model: nn.Module, kind: type) -> None:
        self.modules: List[nn.Module] = []
        self.inputs: List[Tensor] = []
        self.outputs: List[Tensor] = []
        self.handles = [module.register_forward_hook(self._keep)
                        for module in model.modules()
                        if isinstance(module, kind)]

    def _keep(self, module: nn.Module, inputs: Tuple[Tensor],
              output: Tensor) -> None:
        self.modules.append(module)
        self.inputs.append(inputs[0])
        self.outputs.append(output)

    def __enter__(self) -> '_Calls':
        return self

    def __exit__(self, *args: Any) -> None:
        for handle in self.handles:
            handle.remove()


def _square(statistic: Tensor, weights: Sequence[Tensor]) -> List[float]:
    """Return the squared Frobenius norm of the Jacobian by each weight."""
    squares = [0.] * len(weights)
    for value in statistic:
        gradients = torch.autograd.grad(value, weights, retain_graph=True)
        for i, gradient in enumerate(gradients):
            squares[i] += gradient.square().sum().item()
    return squares


def gradient_ratios(xs: Sequence[Tensor],
                    weights: Sequence[Tensor]) -> Dict[str, float]:
    """Compare gradients of statistics by earlier weights (CBN, Fig. 6).

    Args:
        xs (Sequence[Tensor]): Outputs of consecutive convolutions, each of
            shape (N, C, H, W), in one autograd graph.
        weights (Sequence[Tensor]): The convolutions' weights.

    Returns:
        dict: For mean and mean square, and for one and two layers before,
        the Frobenius norm of the Jacobian by that earlier layer's weights,
        divided by the norm for the layer's own weights. Averaged over layers.
    """
    found: Dict[str, List[float]] = {}
    for layer, x in enumerate(xs):
        back = min(layer, 2)
        if not back:
            continue
        own = list(weights[layer - back:layer + 1])[::-1]
        for name, statistic in (('mean', x.mean((0, 2, 3))),
                                ('mean square', x.square().mean((0, 2, 3)))):
            whole, *others = _square(statistic, own)
            for distance, other in enumerate(others, 1):
                found.setdefault(f'{name}, l - {distance}', []).append(
                    (other / whole)**0.5)
    return {name: sum(v) / len(v) for name, v in found.items()}


def watch_gradients(regime: Regime, seed: int,
                    images: int = 2) -> Dict[str, Dict[str, float]]:
    """Train with CBN and measure the gradients at several points.

    Returns:
        dict: :func:`gradient_ratios`, keyed by the percentage of training.
    """
    per_step = STEP // images
    # At the last batch of a step the window holds all batches of that step.
    watched = {int(place / 100 * regime.steps) * per_step + per_step - 1: place
               for place in _PLACES}
    found: Dict[str, Dict[str, float]] = {}
    seen = 0

    def loss_and_ratios(model: nn.Module, batch: Examples) -> Tensor:
        nonlocal seen
        place = watched.get(seen)
        seen += 1
        if place is None:
            return regime.loss(model, batch)
        with _Calls(model, nn.Conv2d) as calls:
            loss = regime.loss(model, batch)
        # A convolution with a bias has no norm after it.
        normed = [(x, conv.weight) for x, conv in zip(
            calls.outputs, calls.modules) if conv.bias is None]
        found[str(place)] = gradient_ratios(*zip(*normed))
        return loss

    trained(regime._replace(loss=loss_and_ratios), setting_of('CBN', images),
            images, seed)
    return found


def output_ranges(regime: Regime, images: int, seed: int,
                  steps: int = 50) -> Dict[str, float]:
    """Return the smallest and largest output of the last BatchNorm.

    The outputs are taken before scale and shift, in training mode and in
    evaluation, on the same images. With m values per channel in a batch, the
    absolute value in training is at most sqrt(m - 1) (Four Things,
    arXiv:1906.03548, Eq. 2, Appendix A).

    Args:
        regime (Regime): Task to train on.
        images (int): Images in a normalised batch.
        seed (int): Seed of the training.
        steps (int): Number of optimizer steps whose images are measured.
    """
    examples = regime.splits()[0]
    model = trained(regime, setting_of('BN', images), images, seed)
    indices = order(examples.groups, regime.together, seed)
    batches = [examples.pixels[batch] for _ in range(steps)
               for batch in next(indices).split(images)]

    def inputs() -> Tuple[nn.Module, List[Tensor]]:
        with torch.no_grad(), _Calls(model, _BatchNorm) as calls:
            for batch in batches:
                model(batch)
        last = calls.modules[-1]
        return last, [x for norm, x in zip(calls.modules, calls.inputs)
                      if norm is last]

    model.eval()
    norm, xs = inputs()
    evaluation = [F.batch_norm(x, norm.running_mean, norm.running_var,
                               eps=norm.eps) for x in xs]
    model.train()
    training = [F.batch_norm(x, None, None, training=True, eps=norm.eps)
                for x in inputs()[1]]
    values = xs[0].numel() // xs[0].size(1)
    found = {'bound': (values - 1)**0.5}
    for name, parts in (('training', training), ('evaluation', evaluation)):
        found[f'least in {name}'] = min(v.min().item() for v in parts)
        found[f'largest in {name}'] = max(v.max().item() for v in parts)
    return found


def _ranges(regime: Regime, seed: int) -> Dict[str, Dict[str, float]]:
    return {str(n): output_ranges(regime, n, seed) for n in _BATCHES}


class Part(NamedTuple):
    """One analysis.

    Attributes:
        measure (callable): Takes a regime and a seed, and returns values
            keyed by place (the x axis) and by name.
        title (str): Title of the table and the picture.
        x_label, y_label (str): Labels of the picture's axes.
    """
    measure: Callable[[Regime, int], Dict[str, Dict[str, float]]]
    title: str
    x_label: str
    y_label: str


PARTS: Dict[str, Part] = {
    'gradients': Part(
        watch_gradients, "Statistics' gradients by earlier layers",
        'part of the training, %', "norm, as a ratio to the own layer's"),
    'ranges': Part(
        _ranges, 'Range of the last BatchNorm',
        'images of a normalised batch', 'normalised value'),
}


def lines_of(by_seed: Dict[str, Dict[str, Dict[str, float]]]
             ) -> Dict[str, Dict[str, List[float]]]:
    """Regroup values keyed by seed, place and name by name and place."""
    lines: Dict[str, Dict[str, List[float]]] = {}
    for places in by_seed.values():
        for place, values in places.items():
            for name, value in values.items():
                lines.setdefault(name, {}).setdefault(place, []).append(value)
    return lines


def tables(results: Dict[str, Any]) -> Dict[str, List[List[str]]]:
    """Return a table per measured part, by title, header row first."""
    found = {}
    for name, part in PARTS.items():
        if name not in results:
            continue
        lines = lines_of(results[name])
        places = list(next(iter(lines.values())))
        found[part.title] = [[part.x_label, *places], *(
            [name, *(spread(line[place], 2) for place in places)]
            for name, line in lines.items())]
    return found


def page(results: Dict[str, Any]) -> str:
    """Return the tables as a Markdown page."""
    lines = ["# The papers' analyses, on made data", '',
             f'Mean and deviation over seeds, by `{results["command"]}`.', '']
    return '\n'.join([*lines, as_sections(tables(results))])


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the missing analyses, print the tables and draw the pictures."""
    args = parse_args(argv)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    results: Dict[str, Any] = dict(command='python tools/analyses.py')
    if out.exists():
        results = json.loads(out.read_text())
    todo = [(part, seed) for part in args.parts for seed in args.seeds
            if str(seed) not in results.setdefault(part, {})]
    with one_line_errors(), progress_bar('analyses', len(todo)) as tell:
        for part, seed in todo:
            results[part][str(seed)] = PARTS[part].measure(
                REGIMES[_REGIME], seed)
            write_whole(out, json.dumps(results, indent=1) + '\n')
            tell(advance=1)
    console = Console()
    for title, rows in tables(results).items():
        show(rows, console, title)
    for name, part in PARTS.items():
        if name in results:
            save_lines({part.title: lines_of(results[name])},
                       out.with_name(f'{name}.png'), part.x_label,
                       part.y_label)
    out.with_suffix('.md').write_text(page(results))


if __name__ == '__main__':
    main()
