"""Command line tool that exports a trained detector to ONNX."""
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

# Inputs and outputs of a whole detector.
_MEANINGS = dict(
    input='a normalised image, padded with zeros at the right and bottom',
    size="the image's height and width without the padding",
    boxes="x1, y1, x2, y2 in the input's pixels",
    scores='in descending order',
    labels='class indices',
    masks='probabilities, on a grid over the box')


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description='Export a trained detector to an ONNX file with standard '
        'operators. For Faster and Mask R-CNN the file holds the whole '
        'detector: from one normalised image of a fixed shape to boxes, '
        'scores, labels and masks. For single-stage detectors it holds the '
        "network: from normalised images to the head's outputs of each level. "
        'Decoding these outputs to boxes is not in the file, and neither is '
        'the data preprocessor. If onnxruntime is installed, the outputs are '
        'compared with mmdet before the file is written')
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
        help='height and width of the images; one number sets both (default: '
        '320)')
    parser.add_argument(
        '--dynamic',
        nargs='*',
        choices=tuple(AXES),
        metavar='AXIS',
        help='axes that may differ from --shape, for single-stage detectors '
        'only (default: batch height width)')
    parser.add_argument(
        '--fold',
        action='store_true',
        help='fold the norms into the convolutions before them')
    parser.add_argument(
        '--opset',
        type=int,
        default=17,
        metavar='N',
        help="version of ONNX's operator set (default: 17)")
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

    A missing weight would be exported with its initial value.

    Raises:
        SetupError: If a weight is missing or has another shape.
    """
    state = find_state_dict(
        CheckpointLoader.load_checkpoint(checkpoint, 'cpu'), checkpoint)
    load_strictly(
        model, state, f'{checkpoint} does not fit this config',
        allow_more=True)


def weigh_examples(model: nn.Module, cfg: Config) -> None:
    """Set the example weight that the config uses for testing."""
    for hook in norm_hooks(cfg):
        if isinstance(hook, ExampleWeightHook):
            set_example_weight(model, hook.weight, hook.excluded)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the export."""
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
    """Print the check's result, and the file's inputs and outputs."""
    whole = 'size' in export.inputs
    print(f'written: {file}')
    if export.difference is None:
        print('not compared with torch, because onnxruntime is missing: pip '
              'install onnxruntime')
    else:
        print('largest difference between onnxruntime and torch'
              f'{", over 95% of the detections" if whole else ""}: '
              f'{export.difference:.1e}')
    print('inputs:')
    _list(export.inputs, whole)
    print('outputs, ' +
          ('the detections, here of a random image:'
           if whole else 'of the head, not yet decoded to boxes:'))
    _list(export.outputs, whole)


def _list(shapes: Dict[str, Tuple[int, ...]], whole: bool) -> None:
    for name, shape in shapes.items():
        meaning = f': {_MEANINGS[name]}' if whole else ''
        print(f'  {name} {shape}{meaning}')


if __name__ == '__main__':
    main()
