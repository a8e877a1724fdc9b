"""Demo that trains and evaluates a small detector and draws pictures."""
import argparse
import datetime
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from mmengine.runner import Runner
from rich.console import Console

from ..benchmark.contests import processor
from ..data.coco_folder import CocoSplit, find_coco_split
from ..data.shapes_coco import make_shapes_coco
from ..errors import SetupError, one_line_errors
from ..layers import check_positive_int
from ..pictures import (Objects, coco_objects, quiet_coco, save_curves,
                        save_detections)
from ..tables import show
from .demo_config import (put_on_shapes, stretch, use_images, use_norm,
                          use_size)
from .demo_results import (batch_norm_note, norms_in, read_results, record,
                           results_table, trained_as)
from .runtime import (add_config_arguments, add_run_arguments, build_runner,
                      load_config, open_config)

_PICTURED = 6
_MIN_SCORE = 0.5
_ROWS = (('AP', 'bbox_mAP'), ('AP50', 'bbox_mAP_50'), ('AP75', 'bbox_mAP_75'),
         ('AP small', 'bbox_mAP_s'), ('AP medium', 'bbox_mAP_m'),
         ('AP large', 'bbox_mAP_l'))


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description='Train and evaluate the demo detector. Another config is '
        "trained from scratch on the demo's images with the demo's schedule. "
        'With --data it is trained on your data and with its own schedule')
    add_config_arguments(parser)
    add_run_arguments(parser)
    parser.add_argument(
        '--size',
        type=int,
        metavar='PIXELS',
        help='size that images are resized to; the time grows with its '
        'square')
    parser.add_argument(
        '--images',
        type=int,
        metavar='N',
        help='batch size; the schedule is stretched so that the total number '
        'of images stays the same')
    parser.add_argument(
        '--iters',
        type=int,
        metavar='N',
        help='number of iterations; the schedule is stretched to it')
    parser.add_argument(
        '--norm',
        metavar='TYPE',
        help="replace the config's CBN, MABN, ... with this norm, for example "
        'BN for a comparison')
    parser.add_argument('--seed', type=int, default=0,
                        help='random seed (default: 0)')
    parser.add_argument(
        '--results',
        default='docs/results/demo.json',
        metavar='FILE',
        help="stored trainings on the demo's data; the result of BatchNorm is "
        'printed for comparison (default: %(default)s)')
    parser.add_argument(
        '--record', action='store_true',
        help='add this training to the --results file')
    return parser.parse_args(argv)


def read_scalars(runner: Runner) -> List[Dict[str, Any]]:
    """Read the records that mmengine's local backend wrote in this run."""
    path = Path(runner.log_dir) / 'vis_data' / 'scalars.json'
    return [json.loads(line) for line in path.read_text().splitlines()]


@torch.no_grad()
def detect(runner: Runner, val: CocoSplit,
           count: int) -> List[Tuple[str, Objects, Objects]]:
    """Return file, ground truth and detections of the first images."""
    dataset = runner.val_loop.dataloader.dataset
    coco = quiet_coco(val.ann_file)
    runner.model.eval()
    rows = []
    for index in range(min(count, len(dataset))):
        sample, = runner.model.test_step(pseudo_collate([dataset[index]]))
        found = sample.pred_instances.cpu()
        found = found[found.scores > _MIN_SCORE]
        boxes = found.bboxes.numpy()
        boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
        rows.append((sample.img_path, coco_objects(coco, sample.img_id),
                     Objects(boxes, found.labels.numpy(),
                             found.scores.numpy())))
    return rows


def report(metrics: Dict[str, float], beside: str, work_dir: Path,
           console: Console) -> None:
    """Print the AP table, BatchNorm's AP and the written files."""
    # COCO's -1 means that there are no objects of this size.
    values = {label: metrics.get(f'coco/{key}', -1) for label, key in _ROWS}
    if 'coco/segm_mAP' in metrics:
        values['mask AP'] = metrics['coco/segm_mAP']
    show([('metric', 'value'),
          *((label, f'{value:.3f}' if value >= 0 else '-')
            for label, value in values.items())],
         console, 'COCO metrics')
    if beside:
        console.print(beside, soft_wrap=True, highlight=False)
    console.print(
        f'written to {work_dir}: the checkpoint, metrics.json, curves.png, '
        'detections.png',
        soft_wrap=True)


def say_what_next(console: Console) -> None:
    """Print what to run after the demo."""
    activate = ''
    if sys.prefix != sys.base_prefix and 'VIRTUAL_ENV' not in os.environ:
        activate = f'  source {os.path.relpath(sys.prefix)}/bin/activate\n'
    console.print(
        'Train the same small detector on your own COCO-format folder (add '
        'NORM=... for another norm):\n'
        '  make demo DATA=path/to/folder\n'
        'Train Faster R-CNN R50 with CBN on COCO in data/coco:\n'
        f'{activate}  tools/dist_train.sh configs/cbn/'
        'faster-rcnn_r50_fpn_4conv1fc_cbn-head_4xb4-1x_coco.py 4',
        soft_wrap=True,
        highlight=False)


def _command(args: argparse.Namespace) -> str:
    words = ['python', 'tools/demo.py', args.config]
    for flag in ('size', 'images', 'iters', 'norm'):
        if getattr(args, flag) is not None:
            words += [f'--{flag}', str(getattr(args, flag))]
    if args.cfg_options:
        words += ['--cfg-options', *(f'{key}={value}' for key, value in
                                     args.cfg_options.items())]
    return shlex.join(words)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the demo."""
    args = parse_args(argv)
    results = Path(args.results)
    with one_line_errors():
        given = args.data is not None
        if given and args.record:
            raise SetupError("--record stores only trainings on the demo's "
                             'data: remove --record or --data')
        cfg = open_config(args.config)
        is_demo = 'shapes_coco' in cfg
        if not given:
            if not is_demo:
                put_on_shapes(
                    cfg, Path(args.config).resolve().parents[1] / '_base_')
            args.data = str(make_shapes_coco(**cfg.shapes_coco))
            read_results(results)  # a bad file fails before the training
        if args.norm:
            use_norm(cfg, args.norm)
        cfg = load_config(args, cfg=cfg)
        cfg.randomness = dict(seed=args.seed)
        splits = [find_coco_split(args.data, s) for s in ('train', 'val')]
        for name, split in zip(('train', 'val'), splits):
            print(f'{name}: {split.num_images} images of '
                  f'{len(split.classes)} classes, {split.ann_file}')
        if args.size:
            use_size(cfg, args.size)
        if args.images is not None:
            use_images(cfg, args.images)
        if args.iters is not None:
            check_positive_int('--iters', args.iters)
            stretch(cfg, args.iters / cfg.train_cfg.max_iters)
        runner = build_runner(cfg)
        begun = time.perf_counter()
        runner.train()
    seconds = time.perf_counter() - begun
    work_dir = Path(cfg.work_dir)
    scalars = read_scalars(runner)
    # mmdet reports no metrics if a model detects nothing.
    scored = [r for r in scalars if 'coco/bbox_mAP' in r]
    metrics = scored[-1] if scored else {}
    (work_dir / 'metrics.json').write_text(json.dumps(metrics, indent=2))
    burn_in = [
        hook.get('iters') for hook in cfg.get('custom_hooks') or []
        if hook['type'] == 'BurnInHook'
    ]
    save_curves(scalars, work_dir / 'curves.png', *burn_in[:1])
    val = splits[1]
    save_detections(
        detect(runner, val, _PICTURED), val.classes,
        work_dir / 'detections.png')
    beside = ''
    if not given:
        trained = trained_as(cfg, args.cfg_options)
        if args.record:
            record(results, dict(
                norm=norms_in(cfg),
                seed=args.seed,
                ap=metrics.get('coco/bbox_mAP', 0.),
                **({'mask_ap': metrics['coco/segm_mAP']}
                   if 'coco/segm_mAP' in metrics else {}),
                trained_as=trained,
                seconds=round(seconds),
                command=_command(args),
                machine=f'{processor()}, torch {torch.__version__}, '
                f'{torch.get_num_threads()} of its threads',
                date=datetime.date.today().isoformat()))
            show(results_table(read_results(results)), Console())
        beside = batch_norm_note(read_results(results), trained)
    report(metrics, beside, work_dir, Console())
    if is_demo:
        say_what_next(Console())


if __name__ == '__main__':
    main()
