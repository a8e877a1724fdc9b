"""Functions that draw the pictures of the tools."""
import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import (TYPE_CHECKING, Any, Dict, List, NamedTuple, Optional,
                    Sequence, Tuple, Union)

import cv2
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle

if TYPE_CHECKING:
    from pycocotools.coco import COCO

_INK = '#333333'


class Objects(NamedTuple):
    """Objects to draw on an image.

    Attributes:
        boxes (Sequence): Boxes in pixels as x, y, width, height.
        labels (Sequence[int]): Class index of each object.
        scores (Sequence[float], optional): Confidences in [0, 1].
        polygons (Sequence[Sequence], optional): Outlines of each object, as
            flat lists x1, y1, x2, y2, …
    """
    boxes: Sequence
    labels: Sequence[int]
    scores: Optional[Sequence[float]] = None
    polygons: Optional[Sequence[Sequence]] = None


def _finish(ax: Axes) -> None:
    """Add a light grid, and remove the frame's top and right lines."""
    ax.grid(alpha=0.25)
    ax.spines[['top', 'right']].set_visible(False)


def quiet_coco(ann_file: Union[str, Path]) -> 'COCO':
    """Load an annotation file with pycocotools, without its messages."""
    from pycocotools.coco import COCO
    with redirect_stdout(io.StringIO()):
        return COCO(str(ann_file))


def coco_objects(coco: 'COCO', image_id: int) -> Objects:
    """Return the ground truth of one image."""
    anns = coco.loadAnns(coco.getAnnIds(image_id, iscrowd=False))
    order = {cat: i for i, cat in enumerate(coco.getCatIds())}
    polygons = [
        a['segmentation'] if isinstance(a.get('segmentation'), list) else []
        for a in anns
    ]
    return Objects([a['bbox'] for a in anns],
                   [order[a['category_id']] for a in anns], None, polygons)


def draw_objects(ax: Axes, image: np.ndarray, objects: Objects,
                 classes: Sequence[str]) -> None:
    """Draw an RGB image, shape (H, W, 3), with boxes, names and outlines.

    A name is above its box, or inside the box at the top of the image.
    """
    height, width = image.shape[:2]
    ax.imshow(image, interpolation='bilinear')
    ax.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    palette = colormaps['tab10' if len(classes) <= 10 else 'hsv']
    for index, (box, label) in enumerate(zip(objects.boxes, objects.labels)):
        colour = palette(label if len(classes) <= 10 else label / len(classes))
        x, y, w, h = box
        ax.add_patch(
            Rectangle((x, y), w, h, fill=False, edgecolor=colour, lw=1.6))
        for points in (objects.polygons[index] if objects.polygons else ()):
            ax.add_patch(
                Polygon(
                    np.reshape(points, (-1, 2)),
                    fill=False,
                    edgecolor='white',
                    lw=1))
        text = classes[label]
        if objects.scores is not None:
            text += f' {objects.scores[index]:.2f}'
        above = y > 0.06 * height
        ax.text(
            max(x, 1),
            y - 1 if above else y + 1,
            text,
            color='white',
            fontsize=7,
            clip_on=True,
            va='bottom' if above else 'top',
            bbox=dict(facecolor=colour, edgecolor='none', pad=1))


def _read_rgb(path: Union[str, Path]) -> np.ndarray:
    image = cv2.imread(str(path))
    if image is None:
        raise FileNotFoundError(f'no image at {path}')
    return image[..., ::-1]


def save_sheet(ann_file: Union[str, Path],
               image_dir: Union[str, Path],
               path: Union[str, Path],
               rows: int = 4,
               columns: int = 6) -> None:
    """Save the first images of a COCO-format data set with annotations."""
    coco = quiet_coco(ann_file)
    classes = [c['name'] for c in coco.loadCats(coco.getCatIds())]
    figure = Figure(figsize=(2.4 * columns, 2.4 * rows), layout='tight')
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.axis('off')
    for ax, image in zip(axes, coco.loadImgs(coco.getImgIds())):
        ax.axis('on')
        draw_objects(ax, _read_rgb(Path(image_dir) / image['file_name']),
                     coco_objects(coco, image['id']), classes)
    figure.savefig(path, dpi=110)


def save_detections(rows: Sequence[Tuple[Union[str, Path], Objects, Objects]],
                    classes: Sequence[str], path: Union[str, Path]) -> None:
    """Save ground truth beside detections, two images per row.

    Args:
        rows (Sequence[tuple]): Image file, ground truth and detections of
            each image.
        classes (Sequence[str]): Names of the classes.
        path (str | Path): Image file to write.
    """
    lines = -(-len(rows) // 2)
    figure = Figure(figsize=(13, 3.4 * lines), layout='tight')
    axes = figure.subplots(lines, 4, squeeze=False).reshape(-1, 2)
    for pair in axes[len(rows):]:
        for ax in pair:
            ax.axis('off')
    for (left, right), (file, truth, found) in zip(axes, rows):
        image = _read_rgb(file)
        draw_objects(left, image, truth, classes)
        draw_objects(right, image, found, classes)
        left.set_title('ground truth', fontsize=9, color=_INK)
        right.set_title('detections', fontsize=9, color=_INK)
    figure.savefig(path, dpi=110)


def save_curves(scalars: List[Dict[str, Any]],
                path: Union[str, Path],
                burn_in: Optional[int] = None) -> None:
    """Save loss and box AP over the iterations of a run.

    Args:
        scalars (list[dict]): Records of mmengine's local backend, from an
            iteration-based run.
        path (str | Path): Image file to write.
        burn_in (int, optional): Iteration at which burn-in ends.
    """
    figure = Figure(figsize=(10, 3.8), layout='tight')
    loss_ax, ap_ax = figure.subplots(1, 2, sharex=True)
    _plot(loss_ax, scalars, 'loss', 'loss', '#1f5fa8')
    loss_ax.set(title='Training loss', ylim=(0, None))
    _plot(ap_ax, scalars, 'coco/bbox_mAP', 'AP', '#c0392b', 'o')
    _plot(ap_ax, scalars, 'coco/bbox_mAP_50', 'AP50', '#e59866', 'o')
    ap_ax.set(title='Box AP on validation images', ylim=(0, 1))
    ap_ax.legend(frameon=False, loc='upper left')
    for ax in (loss_ax, ap_ax):
        ax.set(xlabel='iteration', xlim=(0, None))
        _finish(ax)
        if burn_in:
            ax.axvline(burn_in, color='grey', ls=':', lw=1)
            ax.annotate(
                'burn-in ends', (burn_in, 0.02),
                xycoords=('data', 'axes fraction'),
                xytext=(4, 0),
                textcoords='offset points',
                color='grey',
                fontsize=8)
    figure.savefig(path, dpi=110)


def save_sweep(metrics: Dict[float, float],
               name: str,
               path: Union[str, Path],
               best: float,
               trained: Optional[float] = None) -> None:
    """Save a metric over the example weight, with the best weight marked.

    Args:
        metrics (dict[float, float]): Metric by example weight.
        name (str): Name of the metric.
        path (str | Path): Image file to write.
        best (float): Best weight.
        trained (float, optional): Weight of the model as trained.
    """
    weights = sorted(metrics)
    values = [metrics[weight] for weight in weights]
    figure = Figure(figsize=(6, 3.8), layout='tight')
    ax = figure.subplots()
    ax.plot(weights, values, marker='o', ms=4, color='#c0392b', lw=1.6)
    ax.annotate(
        f'{metrics[best]:.3f} at {best:g}', (best, metrics[best]),
        xytext=(0, 7),
        textcoords='offset points',
        ha='left' if best < 0.5 * max(weights) else 'right',
        color='#c0392b')
    if trained is not None:
        ax.axhline(
            metrics[trained], color='grey', ls=':', lw=1, label='as trained')
        ax.legend(frameon=False)
    ax.set(
        title='Inference example weighting',
        xlabel='weight of the example',
        ylabel=name)
    ax.margins(y=0.15)
    _finish(ax)
    figure.savefig(path, dpi=110)


_STATISTICS = dict(
    mean='mean $\\mu$',
    var='variance $\\sigma^2$',
    mean_square='mean square $\\chi^2$',
    gradient='gradient $g$',
    psi='$\\Psi$')


def draw_statistics(rows: Sequence[Dict[str, Any]],
                    layers: Sequence[str]) -> Figure:
    """Draw the recorded statistics of norms, one row of panels per norm.

    Args:
        rows (Sequence[dict]): Records of
            :class:`mmdet_smallbn.StatisticsHook`.
        layers (Sequence[str]): Names of the layers to draw.

    Returns:
        Figure: Panels of mean, variance, mean square, g and Psi.
    """
    figure = Figure(
        figsize=(3.3 * len(_STATISTICS), 2.6 * len(layers)), layout='tight')
    axes = figure.subplots(len(layers), len(_STATISTICS), squeeze=False)
    for line, layer in zip(axes, layers):
        own = [row for row in rows if row['layer'] == layer]
        for ax, (key, title) in zip(line, _STATISTICS.items()):
            lines = (('batch', key, 'batch', '#8fb8de'),
                     ('regular', key, 'large batch', '#e07b2e'),
                     ('moving', f'ema_{key}', 'EMA', '#2a9d5c'),
                     ('moving', f'sma_{key}', 'SMA', '#1d3557'))
            for kind, name, label, colour in lines:
                points = [(row['iter'], row[kind][name]) for row in own
                          if name in row.get(kind, {})]
                if points:
                    ax.plot(*zip(*points), color=colour, lw=1.1, label=label)
            ax.set_title(title, fontsize=10)
            ax.set(xlabel='iteration')
            ax.set_ylim(bottom=0)
            _finish(ax)
            if ax.lines:
                ax.legend(frameon=False, fontsize=8, loc='upper right')
        line[0].set_ylabel(f'{layer}\nL2 norm', fontsize=8)
    return figure


def _plot(ax: Axes,
          scalars: List[Dict[str, Any]],
          key: str,
          label: str,
          colour: str,
          marker: str = '') -> None:
    """Plot a scalar over the iterations, and label its last value."""
    points = [(r['step'], r[key]) for r in scalars if key in r]
    if not points:
        return
    ax.plot(*zip(*points), marker=marker, color=colour, lw=1.6, label=label)
    ax.annotate(
        f'{points[-1][1]:.3f}',
        points[-1],
        xytext=(0, 6),
        textcoords='offset points',
        ha='right',
        color=colour)


def save_errors(means: Dict[tuple, Dict[str, float]],
                path: Union[str, Path]) -> None:
    """Draw errors of statistics over windows, one column per learning rate.

    Args:
        means (dict): Errors of mean and variance. The key has the factor of
            the learning rate, the kind of statistics, and the window (None
            for statistics without a window).
        path (str | Path): Image file to write.
    """
    factors = sorted({factor for factor, _, _ in means})
    kinds = list(dict.fromkeys(kind for _, kind, _ in means))
    colours = dict(zip(kinds, colormaps['tab10'].colors))
    figure = Figure(figsize=(3.6 * len(factors), 6.4), layout='constrained')
    axes = figure.subplots(2, len(factors), squeeze=False, sharey='row')
    titles = dict(mean='error of the mean / deviation',
                  var='relative error of the variance')
    for row, (metric, title) in zip(axes, titles.items()):
        for ax, factor in zip(row, factors):
            for kind in kinds:
                points = sorted((window or 0, errors[metric]) for (
                    f, k, window), errors in means.items()
                                if (f, k) == (factor, kind))
                windows, values = zip(*points)
                if len(points) == 1:
                    style = '--' if windows[0] else ':'
                    ax.axhline(
                        values[0], color=colours[kind], ls=style, label=kind)
                else:
                    ax.plot(
                        windows,
                        values,
                        'o-',
                        ms=4,
                        color=colours[kind],
                        label=kind)
            ax.set_xscale('log', base=2)
            windows = sorted({w for _, _, w in means if w and w > 1})
            ax.set_xticks(windows, windows)
            ax.set(title=f'learning rate x {factor:g}', xlabel='window')
            _finish(ax)
        row[0].set_ylabel(title)
        row[0].set_ylim(0, 1.1 * max(e[metric] for e in means.values()))
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc='outside lower center',
        ncols=len(kinds),
        frameon=False,
        fontsize=8)
    figure.savefig(path, dpi=110)


def save_cosines(found: Dict[str, Dict[str, Sequence[float]]],
                 path: Union[str, Path]) -> None:
    """Draw cosines of gradients by layer, one line per variant.

    Args:
        found (dict): One value per layer, by variant and seed.
        path (str | Path): Image file to write.
    """
    figure = Figure(figsize=(7.2, 3.6), layout='constrained')
    ax = figure.subplots()
    for name, by_seed in found.items():
        values = np.mean(list(by_seed.values()), 0)
        ax.plot(range(1, len(values) + 1), values, 'o-', ms=4, label=name)
    ax.set(
        xlabel='convolution, from the input on',
        ylabel="cosine to BatchNorm's at 16",
        ylim=(None, 1.05))
    _finish(ax)
    figure.legend(loc='outside right upper', frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def save_costs(panels: Dict[str, Dict[str, Dict[str, float]]],
               path: Union[str, Path]) -> None:
    """Draw the time of norms relative to BatchNorm as bars, one panel a title.

    Args:
        panels (dict): By title and norm, the median, low and high quartile of
            the ratio of times.
        path (str | Path): Image file to write.
    """
    heights = [len(bars) for bars in panels.values()]
    figure = Figure(
        figsize=(7, 0.32 * sum(heights) + 0.7 * len(heights)), layout='tight')
    axes = figure.subplots(
        len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)
    for ax, (title, bars) in zip(axes.ravel(), panels.items()):
        medians = np.array([ratio['median'] for ratio in bars.values()])
        spread = np.abs([[ratio[q] for ratio in bars.values()] - medians
                         for q in ('low', 'high')])
        ax.barh(list(bars), medians, xerr=spread, color='#8fb8de',
                ecolor=_INK, height=0.65)
        for place, median in enumerate(medians):
            ax.text(0.03, place, f'{median:.2f}', va='center', fontsize=9)
        ax.axvline(1, color='#c0392b', lw=1)
        ax.set_title(title, fontsize=10, loc='left')
        ax.invert_yaxis()
        ax.spines[['top', 'right']].set_visible(False)
    axes[-1, 0].set_xlabel('time of a training step / BatchNorm\'s')
    figure.savefig(path, dpi=110)


def save_lines(panels: Dict[str, Dict[str, Dict[str, Sequence[float]]]],
               path: Union[str, Path],
               x_label: str,
               y_label: str,
               steady: Optional[str] = None,
               joined: bool = True) -> None:
    """Draw means and standard deviations, one panel per title.

    Args:
        panels (dict): Values of the seeds by title, line and place on the x
            axis. The places are evenly spaced. A place without values is left
            out.
        path (str | Path): Image file to write.
        x_label, y_label (str): Labels of the axes.
        steady (str, optional): Name of a line with a single place. It is
            drawn as a horizontal line.
        joined (bool): Connect the points of a line.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(
        figsize=(4.2 * columns, 3.4 * rows), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    names = dict.fromkeys(n for lines in panels.values() for n in lines)
    colours = dict(zip(names, colormaps['tab10'].colors))
    for ax in axes[len(panels):]:
        ax.axis('off')
    for ax, (title, lines) in zip(axes, panels.items()):
        places = list(dict.fromkeys(p for line in lines.values()
                                    for p in line))
        for name, line in lines.items():
            known = {places.index(p): v for p, v in line.items() if len(v)}
            style = dict(label=name, color=colours[name])
            if name == steady and known:
                value, = known.values()
                ax.axhline(np.mean(value), ls='--', lw=1.2, **style)
            elif known:
                ax.errorbar(
                    list(known), [np.mean(v) for v in known.values()],
                    [np.std(v, ddof=1) if len(v) > 1 else 0
                     for v in known.values()],
                    marker='o', ms=4, capsize=2,
                    ls='-' if joined else 'none', **style)
        ax.set(title=title, xlabel=x_label, ylabel=y_label)
        ax.set_xticks(range(len(places)), places)
        _finish(ax)
    if len(names) > 1:
        labelled = {label: handle for ax in axes for handle, label in zip(
            *ax.get_legend_handles_labels())}
        figure.legend(labelled.values(), labelled, loc='outside lower center',
                      ncols=min(len(labelled), 2 * columns), frameon=False)
    figure.savefig(path, dpi=110)


def save_check(parts: Dict[str, Sequence[Tuple[str, float, float]]],
               path: Union[str, Path]) -> None:
    """Draw BatchNorm's loss of accuracy over the agreement of its gradients.

    Args:
        parts (dict): Name, agreement and loss of accuracy of each cell, by
            title.
        path (str | Path): Image file to write.
    """
    figure = Figure(figsize=(8, 4.6), layout='constrained')
    ax = figure.subplots()
    for (title, cells), colour in zip(parts.items(), ('#8a8a8a', '#c0392b')):
        if not cells:
            continue
        names, agreements, falls = zip(*cells)
        ax.scatter(agreements, falls, s=22, color=colour, label=title)
        for name, x, y in cells:
            ax.annotate(name, (x, y), xytext=(4, 2), fontsize=6.5,
                        textcoords='offset points', color=_INK)
    ax.set(xlabel='agreement with the gradient of 16 images',
           ylabel='fall of BatchNorm from 16 images, points')
    _finish(ax)
    ax.legend(frameon=False)
    figure.savefig(path, dpi=110)


def save_diagnosis(agreement: Dict[int, Tuple[float, float]], reference: int,
                   windows: Dict[int, Tuple[float, Optional[float]]],
                   threshold: float, title: str,
                   path: Union[str, Path]) -> None:
    """Draw the results of the norm doctor.

    Args:
        agreement (dict): Agreement with the gradient of the large batch, and
            its standard error, by number of images that are normalised
            together. The first number is that of the batch.
        reference (int): Number of images in the large batch.
        windows (dict): Errors of the statistics by window: with the past
            moments as they were, and recomputed with the current weights.
        threshold (float): Threshold of the agreement.
        title (str): Title of the picture.
        path (str | Path): Image file to write.
    """
    panels = 2 if windows else 1
    figure = Figure(figsize=(5.2 * panels, 4), layout='constrained')
    figure.suptitle(title)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    ax = axes[0]
    sizes = [*agreement, reference]
    means, errors = zip(*agreement.values(), (1., 0.))
    ax.axhspan(-0.1, threshold, color='#c0392b', alpha=0.1)
    ax.text(len(sizes) - 1, threshold / 2, 'BatchNorm lost accuracy\nin our '
            'study', ha='right', va='center', color='#c0392b', fontsize=9)
    ax.errorbar(range(len(sizes)), means, errors, marker='o', capsize=3,
                color='#1f5fa8')
    ax.annotate(f'your batch: {means[0]:.2f}', (0, means[0]), xytext=(8, -4),
                textcoords='offset points', color='#1f5fa8')
    ax.set_xticks(range(len(sizes)), sizes)
    ax.set(ylim=(min(0, *means) - 0.02, 1.05),
           xlabel='images that are normalised together',
           ylabel=f'agreement with the gradient of {reference} images')
    if windows:
        ax = axes[1]
        for index, label in ((0, 'as they were'),
                             (1, 'recomputed with the current weights (CBN)')):
            points = [(w, e[index]) for w, e in windows.items()
                      if e[index] is not None]
            if points:
                ax.plot(*zip(*points), 'o-', label=label)
        ax.set_xscale('log', base=2)
        ax.set_xticks(list(windows), list(windows))
        ax.set(ylim=(0, None), xlabel='iterations in the statistics '
               '(1: BatchNorm)', ylabel='error of the layer\'s output, '
               'standard deviations')
        ax.legend(frameon=False)
    for ax in axes:
        _finish(ax)
    figure.savefig(path, dpi=110)
