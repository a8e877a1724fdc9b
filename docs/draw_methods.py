"""Draw the pictures of the method cards: python docs/draw_methods.py [FOLDER]

One SVG file for each card, the same bytes in each run.
"""
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

INK = '#333333'
GREY = '#e6e6e6'
PRESENT = '#8fb8de'  # the present batch, or an example
PAST = '#d6e4f2'  # past iterations, or other examples
RUNNING = '#f2c48d'  # running statistics
CHANGE = '#c0392b'  # what is corrected, and where something ends
GROUPS = ('#8fb8de', '#f2c48d', '#a8d5a2', '#d9a7c7', '#c9c9c9', '#f0e08c',
          '#9fd8d3', '#e3a79c')
WIDTH = 10.  # of a picture, in units; 700 pixels


def _canvas(height: float) -> tuple:
    figure = Figure(figsize=(7.3, 0.73 * height), facecolor='white')
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, height))
    ax.axis('off')
    return figure, ax


def _text(ax: Axes, x: float, y: float, text: str, **style) -> None:
    ax.text(x, y, text, **dict(dict(
        ha='center', va='center', fontsize=11, color=INK), **style))


def _box(ax: Axes, x: float, y: float, width: float, height: float,
         text: str = '', color: str = PRESENT, **style) -> None:
    """A box by its centre."""
    ax.add_patch(Rectangle((x - width / 2, y - height / 2), width, height,
                           facecolor=color, edgecolor=INK, lw=1))
    _text(ax, x, y, text, **style)


def _arrow(ax: Axes, start: tuple, end: tuple, color: str = INK,
           style: str = '-|>') -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle=style, color=color,
                                 mutation_scale=13, lw=1.4, shrinkA=1,
                                 shrinkB=1))


def _window(compensate: bool) -> Figure:
    """Statistics of four iterations, carried to today's weights or not."""
    height = 5.3 if compensate else 3.7
    figure, ax = _canvas(height)
    top, corrected, end = height - 1.15, 2.25, 0.65
    for x, time in zip((3.3, 5., 6.7, 8.4), ('t-3', 't-2', 't-1', 't')):
        past = time != 't'
        _text(ax, x, height - 0.35,
              f'iteration ${time}$' if past else 'present')
        _box(ax, x, top, 1.4, 0.8, rf'$\mu, \nu$ at $\theta_{{{time}}}$',
             PAST if past else PRESENT)
        last = top
        if past and compensate:
            last = corrected
            _arrow(ax, (x, top - 0.4), (x, corrected + 0.4), CHANGE)
            _box(ax, x, corrected, 1.4, 0.8, r'$\mu, \nu$ at $\theta_t$', PAST)
        _arrow(ax, (x, last - 0.4), (x, end + 0.35))
    _text(ax, 1.3, top, 'statistics of\neach batch')
    if compensate:
        _text(ax, 1.3, (top + corrected) / 2,
              'Taylor step\nto the present\nweights', color=CHANGE)
        _text(ax, 1.3, corrected, 'corrected')
    else:
        _text(ax, 1.3, 1.6, 'no correction', color=CHANGE)
    _box(ax, 5.85, end, 6.5, 0.7, r'average $\bar\mu$, $\bar\sigma$: '
         'normalise the present batch')
    return figure


def cbn() -> Figure:
    return _window(compensate=True)


def naive_cbn() -> Figure:
    return _window(compensate=False)


def cmbn() -> Figure:
    """Statistics that grow part by part, and end with the step."""
    figure, ax = _canvas(4.3)
    for left, name, parts in ((1.7, 'step $s$', 4), (7.4, 'step $s+1$', 2)):
        width = 1.25 * parts
        ax.add_patch(Rectangle((left - 0.1, 0.5), width + 0.05, 3.3,
                               facecolor='none', edgecolor=INK, ls='--'))
        _text(ax, left + width / 2, 4.05, name)
        for part in range(parts):
            x = left + 0.52 + 1.25 * part
            _box(ax, x, 3.3, 1.05, 0.6, f'part {part + 1}')
            for seen in range(part + 1):
                _box(ax, x, 1.05 + 0.37 * seen, 1.05, 0.37, '',
                     PRESENT if seen == part else PAST)
            _arrow(ax, (x, 2.98), (x, 1.27 + 0.37 * part))
    _text(ax, 0.8, 3.3, 'batches')
    _text(ax, 0.8, 1.6, r'in $\mu$, $\sigma$')
    _arrow(ax, (7.0, 0.45), (7.0, 4.1), CHANGE, '-')
    _text(ax, 5, 0.22, 'optimizer step: the weights move, and the statistics '
          'start again', color=CHANGE)
    return figure


def mabn() -> Figure:
    """Averages in both passes."""
    figure, ax = _canvas(4.9)
    rows = ((3.6, 'forward', r'\chi^2', r'x\,/\,\bar\chi'),
            (1.1, 'backward', r'\Psi', r'(g - z\,\bar\Psi)\,/\,\bar\chi'))
    for y, name, statistic, use in rows:
        _text(ax, 0.85, y, name, weight='bold')
        for turn in range(5):
            _box(ax, 2.1 + 0.5 * turn, y, 0.42, 0.6, '',
                 PRESENT if turn == 4 else PAST)
        _text(ax, 3.1, y - 0.65, rf'${statistic}$ of the last $m$ batches')
        _arrow(ax, (4.4, y), (5.9, y))
        _text(ax, 5.1, y + 0.3, 'average')
        _box(ax, 6.8, y, 1.8, 0.75, rf'${use}$', GREY)
    _arrow(ax, (7.7, 3.6), (8.75, 3.6))
    _box(ax, 9.2, 3.6, 0.9, 0.75, r'$\times\, r$', GREY)
    _box(ax, 9.0, 2.15, 1.6, 0.65, r'running $\hat\chi^2$', RUNNING)
    _arrow(ax, (9.2, 2.48), (9.2, 3.22))
    _text(ax, 7.6, 2.75, r'$r = \bar\chi\,/\,\hat\chi$, clipped', color=CHANGE)
    _text(ax, 5, 4.6, 'No mean is subtracted: CenConv takes the mean out of '
          'each filter.')
    return figure


def brn() -> Figure:
    """Two distributions, and the bounds of r and d."""
    figure = Figure(figsize=(7.3, 3.1), facecolor='white')
    left = figure.add_axes((0.02, 0.2, 0.46, 0.72))
    x = np.linspace(-4, 6, 201)
    for mean, width, color, name, place in (
            (-0.6, 0.8, PRESENT, 'batch', (-2.6, 0.36)),
            (1.6, 1.35, RUNNING, 'running', (4.1, 0.22))):
        y = np.exp(-((x - mean) / width)**2 / 2) / width / 2.5066
        left.fill_between(x, y, color=color, alpha=0.7, lw=0)
        left.plot(x, y, color=INK, lw=1)
        _text(left, *place, name)
        left.plot([mean, mean], [0, y.max()], color=INK, lw=1, ls=':')
    _arrow(left, (-0.6, 0.53), (1.6, 0.53), CHANGE)
    _text(left, 0.5, 0.58, '$d$: shift', color=CHANGE)
    _text(left, 3.6, 0.45, '$r$: ratio of widths', color=CHANGE)
    left.set(xlim=(-4, 6), ylim=(0, 0.63), yticks=[], xticks=[-0.6, 1.6])
    left.set_xticklabels([r'$\mu_B$', r'$\hat\mu$'], fontsize=12)
    right = figure.add_axes((0.58, 0.2, 0.38, 0.72))
    ratio = np.geomspace(1 / 9, 9, 101)
    right.plot(ratio, ratio, color=INK, lw=1, ls=':')
    right.plot(ratio, ratio.clip(1 / 3, 3), color=CHANGE, lw=2)
    right.set(xscale='log', yscale='log', xlim=(1 / 9, 9), ylim=(1 / 6, 6))
    for axis, ticks in ((right.xaxis, (1 / 3, 1, 3)),
                        (right.yaxis, (1 / 3, 1, 3))):
        axis.set_ticks(ticks, ('1/3', '1', '3'), fontsize=11)
        axis.set_ticks([], minor=True)
    right.set_xlabel(r'$\sigma_B\,/\,\hat\sigma$', fontsize=12)
    _text(right, 2.2, 0.3, '$r$, within bounds', color=CHANGE)
    for ax in (left, right):
        ax.spines[['top', 'right']].set_visible(False)
    left.spines['left'].set_visible(False)
    return figure


def _grid(ax: Axes, x: float, title: str, note: str, group) -> None:
    """Examples by channels; a cell has the colour of its group."""
    cell = 0.34
    _text(ax, x + 4 * cell, 3.5, title, weight='bold')
    for example in range(4):
        for channel in range(8):
            ax.add_patch(Rectangle(
                (x + cell * channel, 2.8 - cell * example), cell, cell,
                facecolor=GROUPS[group(example, channel) % len(GROUPS)],
                edgecolor='white', lw=1))
    _text(ax, x + 4 * cell, 1.5, '8 channels')
    _text(ax, x + 4 * cell, 0.95, note)


def bgn() -> Figure:
    """Which values share a mean and a variance, in three norms."""
    figure, ax = _canvas(3.8)
    _text(ax, 0.28, 2.46, '4 examples', rotation=90)
    _grid(ax, 0.6, 'BatchNorm', '1 channel, all examples',
          lambda n, c: c)
    _grid(ax, 3.8, 'GroupNorm', '4 channels, 1 example',
          lambda n, c: 2 * n + c // 4)
    _grid(ax, 7.0, 'BGN', '4 channels, 2 examples',
          lambda n, c: 2 * (n // 2) + c // 4)
    _text(ax, 5, 0.1, 'one colour: one mean, one variance', va='bottom')
    return figure


def ghost_bn() -> Figure:
    """A batch in one part, and in four."""
    figure, ax = _canvas(4.1)
    for y, name, size in ((2.9, 'BatchNorm', 8), (1.0, 'GhostBN,\nsize 2', 2)):
        _text(ax, 1.0, y, name, weight='bold')
        for first in range(0, 8, size):
            left = 2.2 + 0.95 * first
            middle = left + 0.95 * size / 2 - 0.05
            for example in range(size):
                _box(ax, left + 0.95 * example + 0.425, y, 0.8, 0.8, '',
                     GROUPS[first // size], fontsize=11)
            _text(ax, middle, y + 0.85, r'$\mu, \sigma$')
            ax.plot([left + 0.05, left + 0.95 * size - 0.15], [y + 0.55] * 2,
                    color=INK, lw=1.4)
    _text(ax, 6, 0.1, 'one colour: images that are normalised together',
          va='bottom')
    return figure


def example_weighting() -> Figure:
    """From running statistics to an example's own."""
    figure, ax = _canvas(3.2)
    first, last = (np.array(to_rgb(color)) for color in (RUNNING, PRESENT))
    for step in range(40):
        shade = step / 39
        ax.add_patch(Rectangle((1.2 + 0.19 * step, 1.), 0.19, 0.6, lw=0,
                               facecolor=(1 - shade) * first + shade * last))
    ax.add_patch(Rectangle((1.2, 1.), 7.6, 0.6, facecolor='none', lw=1,
                           edgecolor=INK))
    for weight in (0, 0.5, 1):
        _text(ax, 1.2 + 7.6 * weight, 0.75, f'{weight:g}')
    _text(ax, 5, 0.3, r'weight of the example $\alpha$')
    _text(ax, 1.3, 2.1, 'running statistics:\nfolds')
    _text(ax, 8.7, 2.1, "example's own:\ndoes not fold")
    _text(ax, 5, 2.75, r'$\mu = (1-\alpha)\, m_x + \alpha\, E[x]$')
    _text(ax, 5, 2.1, r'$\sigma^2 = (1-\alpha)\, m_{x^2} + '
          r'\alpha\, E[x^2] - \mu^2$')
    return figure


PICTURES = (cbn, naive_cbn, cmbn, mabn, brn, bgn, ghost_bn, example_weighting)


def main(folder: Path) -> None:
    """Write the pictures."""
    for draw in PICTURES:
        # The salt names clip paths: the names are the same in each run.
        with matplotlib.rc_context({'svg.hashsalt': draw.__name__}):
            draw().savefig(folder / f'{draw.__name__}.svg',
                           metadata={'Date': None})


if __name__ == '__main__':
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else
         Path(__file__).parent / 'methods')
