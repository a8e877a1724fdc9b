"""Export a trained detector to ONNX."""
import argparse
from typing import Dict, Optional, Sequence, Tuple

from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.runner import CheckpointLoader
from torch import nn

from ..deploy.onnx_export import AXES, Export, export_onnx, require_onnx
from ..deploy.state_dict import find_state_dict, load_strictly
from ..errors import one_line_errors
from ..hooks import ExampleWeightHook
from ..layers import set_example_weight
from .print_norms import norm_hooks
from .checkpoints import add_trust_argument
from .runtime import add_config_arguments, build_model, read_config

# What goes into and comes out of a whole detector.
_MEANINGS = dict(
    input='a normalised image, padded with zeros at the right and bottom',
    size="the image's height and width without the padding",
    boxes="x1, y1, x2, y2 in the input's pixels",
    scores='the highest first',
    labels='indices of the classes',
    masks='probabilities, on a grid over the box')


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Flags of the export."""
    parser = argparse.ArgumentParser(
        description='Write a trained detector to an ONNX file, in standard '
        'operators. Faster and Mask R-CNN: the whole detector, from one '
        'normalised image of a fixed shape to boxes, scores, labels and '
        'masks. Single-stage detectors: the network, from normalised images '
        "to the head's outputs of each level, from which boxes are yet to be "
        'made. The data preprocessor is not in the file. Before it is '
        'written, it is compared with mmdet if onnxruntime is installed')
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '-o',
        '--out',
        required=True,
        metavar='FILE.onnx',
        help='file to write')
    parser.add_argument(
        '--shape',
        type=int,
        nargs='+',
        default=(320, ),
        metavar='PIXELS',
        help='height and width, or both at once, of the images (320)')
    parser.add_argument(
        '--dynamic',
        nargs='*',
        choices=tuple(AXES),
        metavar='AXIS',
        help='which axes may differ from --shape in a single-stage '
        "detector's file: of batch, height, width (all)")
    parser.add_argument(
        '--fold',
        action='store_true',
        help='fold the norms into the convolutions before them')
    parser.add_argument(
        '--opset',
        type=int,
        default=17,
        metavar='N',
        help="version of ONNX's operators (17)")
    add_trust_argument(parser)
    args = parser.parse_args(argv)
    if len(args.shape) > 2 or min(args.shape) < 1:
        parser.error('--shape takes one or two numbers of at least 1, but got '
                     f'{args.shape}')
    args.shape = tuple(args.shape) * (3 - len(args.shape))
    if not args.out.endswith('.onnx'):
        parser.error(f'--out must end in .onnx, but got {args.out}')
    return args


def load_weights(model: nn.Module, checkpoint: str) -> None:
    """Load a checkpoint that has all of a model's weights.

    What is missing would be exported as it was initialised.

    Raises:
        SetupError: If something is missing, or of another shape.
    """
    state = find_state_dict(
        CheckpointLoader.load_checkpoint(checkpoint, 'cpu'), checkpoint)
    load_strictly(
        model, state, f'{checkpoint} is not of this config', allow_more=True)


def weigh_examples(model: nn.Module, cfg: Config) -> None:
    """Give examples the weight that the config's testing gives them."""
    for hook in norm_hooks(cfg):
        if isinstance(hook, ExampleWeightHook):
            set_example_weight(model, hook.weight, hook.excluded)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Export as the command line says."""
    args = parse_args(argv)
    with one_line_errors():
        require_onnx()
        cfg = read_config(args, training=False)
        model = revert_sync_batchnorm(build_model(cfg))
        load_weights(model, args.checkpoint)
        weigh_examples(model, cfg)
        export = export_onnx(model, args.out, (1, 3, *args.shape), args.fold,
                             args.opset, args.dynamic)
        _tell(args.out, export)


def _tell(file: str, export: Export) -> None:
    """Print what was written, the file's outputs last."""
    whole = 'size' in export.inputs
    print(f'written: {file}')
    if export.difference is None:
        print('not compared with torch: pip install onnxruntime')
    else:
        print('largest difference between onnxruntime and torch'
              f'{", of 19 in 20 detections" if whole else ""}: '
              f'{export.difference:.1e}')
    print('inputs:')
    _list(export.inputs, whole)
    print('outputs, ' +
          ('the detections, here of a random image:'
           if whole else 'of the head, from which boxes are yet to be made:'))
    _list(export.outputs, whole)


def _list(shapes: Dict[str, Tuple[int, ...]], whole: bool) -> None:
    for name, shape in shapes.items():
        meaning = f': {_MEANINGS[name]}' if whole else ''
        print(f'  {name} {shape}{meaning}')


if __name__ == '__main__':
    main()
