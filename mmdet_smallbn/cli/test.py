"""Evaluation of a detector, with mmdet's flags and one-line errors."""
import argparse
from copy import deepcopy
from typing import Optional, Sequence

from mmengine.config import Config, ConfigDict

from ..errors import SetupError, one_line_errors
from .own_data import innermost_dataset
from .runtime import (add_config_arguments, add_run_arguments, build_runner,
                      load_config)


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the flags of mmdet's ``tools/test.py``."""
    parser = argparse.ArgumentParser(
        description='Evaluate a detector on the test data of its config')
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    add_run_arguments(parser)
    parser.add_argument(
        '--out', metavar='FILE.pkl', help='file to write the predictions to')
    parser.add_argument(
        '--show', action='store_true', help='show the detections in a window')
    parser.add_argument(
        '--show-dir', metavar='DIR', help='folder for images of the '
        'detections, inside the work folder')
    parser.add_argument(
        '--wait-time',
        type=float,
        default=2,
        help='seconds for which --show shows an image (default: 2)')
    parser.add_argument(
        '--tta', action='store_true',
        help='use test-time augmentation: that of the config, or a '
        'horizontal flip')
    args = parser.parse_args(argv)
    if args.out is not None and not args.out.endswith(('.pkl', '.pickle')):
        parser.error(f'--out must end in .pkl or .pickle, but got {args.out}')
    return args


def apply_test_flags(cfg: Config, args: argparse.Namespace) -> None:
    """Set the checkpoint, the drawing flags and ``--tta`` in the config."""
    cfg.load_from = args.checkpoint
    if args.show or args.show_dir:
        hooks = cfg.get('default_hooks', {})
        if 'visualization' not in hooks:
            raise SetupError('--show and --show-dir need the hook '
                             'default_hooks.visualization in the config')
        hooks.visualization.update(draw=True)
        if args.show:
            hooks.visualization.update(show=True, wait_time=args.wait_time)
        if args.show_dir:
            hooks.visualization.update(test_out_dir=args.show_dir)
    if args.tta:
        _add_tta(cfg)


def _add_tta(cfg: Config) -> None:
    """Add the config's test-time augmentation, or a horizontal flip."""
    model = cfg.get(
        'tta_model',
        dict(
            type='DetTTAModel',
            tta_cfg=dict(
                nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)))
    data = innermost_dataset(cfg.test_dataloader)
    pipeline = cfg.get('tta_pipeline')
    if pipeline is None:
        keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor',
                'flip', 'flip_direction')
        pipeline = deepcopy(list(data.pipeline))
        pipeline[-1] = dict(
            type='TestTimeAug',
            transforms=[[
                dict(type='RandomFlip', prob=1.),
                dict(type='RandomFlip', prob=0.)
            ], [dict(type='PackDetInputs', meta_keys=keys)]])
    cfg.model = ConfigDict(**model, module=cfg.model)
    data.pipeline = pipeline


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the evaluation."""
    args = parse_args(argv)
    with one_line_errors():
        cfg = load_config(args, training=False)
        apply_test_flags(cfg, args)
        runner = build_runner(cfg)
        if args.out is not None:
            from mmdet.evaluation import DumpDetResults
            runner.test_evaluator.metrics.append(
                DumpDetResults(out_file_path=args.out))
        runner.test()


if __name__ == '__main__':
    main()
