"""Export of models with these norms to ONNX, in standard operators."""
import copy
import importlib.util
import inspect
import math
import re
from pathlib import Path
from typing import (Any, Dict, Iterator, List, NamedTuple, Optional, Sequence,
                    Tuple, Union)

import torch
from torch import Tensor, nn

from ..errors import SetupError, describe
from ..functional import fold_groups
from ..layers import CenConv2d, SmallBatchNorm
from ..layers.cen_conv import effective_weight
from .difference import difference
from .onnx_file import check_onnx, make_onnx, run_onnx

# Axes of an image tensor that may differ from call to call.
AXES = dict(batch=0, height=2, width=3)
# Largest allowed difference to torch. It is relative to the output's largest
# absolute value if that is above 1.
TOLERANCE = 1e-4
_REMEDY = ('If this depends on the size, make fewer axes dynamic '
           f'({", ".join(AXES)}), or use another shape')


class Export(NamedTuple):
    """Description of an exported ONNX file.

    Attributes:
        inputs, outputs (dict[str, tuple[int, ...]]): Shapes by name, for the
            random image that the model was exported with.
        difference (float, optional): Largest difference between onnxruntime
            and torch, relative to the output's largest absolute value if that
            is above 1. For a whole detector, the 5% of detections with the
            largest difference are left out. None: onnxruntime is not
            installed.
    """
    inputs: Dict[str, Tuple[int, ...]]
    outputs: Dict[str, Tuple[int, ...]]
    difference: Optional[float]


def require_onnx() -> None:
    """Raise an error if the package onnx is not installed.

    Raises:
        SetupError: If onnx is missing. It names the packages to install.
    """
    if importlib.util.find_spec('onnx') is None:
        raise SetupError('the export needs the package onnx, and onnxruntime '
                         'to check the file: pip install onnx onnxruntime')


def export_onnx(model: nn.Module,
                file: Union[str, Path],
                shape: Sequence[int] = (1, 3, 320, 320),
                fold: bool = False,
                opset: int = 17,
                dynamic: Optional[Sequence[str]] = None) -> Export:
    """Export a model in evaluation mode to an ONNX file.

    - Faster and Mask R-CNN: the file holds the whole detector. The inputs are
      ``input``, one normalised image of a fixed shape, and ``size``, its
      height and width without padding. The outputs are ``boxes``,
      ``scores``, ``labels`` and ``masks``. They equal the detections of
      mmdet's ``predict`` before it rescales them to the original image.
    - Single-stage detectors: the file holds the network, from normalised
      images to the head's outputs. Their names are those of the head's loss
      with the level: ``cls_score_p3``, ``bbox_pred_p3``, ... have stride 8.
      If a stride is not a power of 2, the levels are counted from 0. The
      decoding of these outputs to boxes is not in the file.
    - Any module that takes one tensor, such as a backbone, or backbone and
      neck as ``nn.Sequential``: its outputs are ``output``, or ``output_0``,
      ``output_1``, ... if there are several.

    The data preprocessor is not in the file. The file uses only operators of
    ONNX's own domain. If onnxruntime is installed, the export is compared on
    random inputs with torch before the file is written; whole detectors are
    compared with mmdet's ``predict``. The model does not change.

    Args:
        model (nn.Module): Model with trained norms. It is exported in float32.
        file (str | Path): File to write.
        shape (Sequence[int]): Shape (N, C, H, W) of the example images.
        fold (bool): True to fold norms into convolutions first, with
            :func:`mmdet_smallbn.fuse_norm`, which refuses a norm
            that it cannot fold. If False, torch's exporter folds the norms
            that it can.
        opset (int): Version of ONNX's operator set. A whole detector needs 16
            or above.
        dynamic (Sequence[str], optional): Axes among batch, height and width
            that may differ from ``shape``. None: all of them, but for a whole
            detector none.

    Returns:
        Export: Description of the file.

    Raises:
        SetupError: If onnx is missing, if the model cannot be exported, or if
            the exported outputs differ from torch.
        ValueError: If ``dynamic`` names an unknown axis.

    Example:
        >>> model = init_detector(config, checkpoint, device='cpu')
        >>> export_onnx(model, 'detector.onnx', shape=(1, 3, 800, 1344))
        >>> export_onnx(nn.Sequential(model.backbone, model.neck), 'fpn.onnx')
    """
    require_onnx()
    network, whole = _network(_copy(model))
    # The exporter restores each module to the mode that it has here.
    network.eval()
    if dynamic is None:
        dynamic = () if whole else tuple(AXES)
    unknown = set(dynamic) - set(AXES)
    if unknown:
        raise ValueError(f'dynamic takes {", ".join(AXES)}, but got '
                         f'{", ".join(sorted(unknown))}')
    if whole:
        examples = network.examples(shape, dynamic, opset)
    else:
        examples = [
            dict(input=_random_image(size))
            for size in _sizes(tuple(shape), dynamic)
        ]
    expected = [_run(network, example) for example in examples]
    if fold:
        from .fuse import fuse_norm
        if whole:  # the wrapper's example inputs are not those of fuse_norm
            fuse_norm(network.detector)
        else:
            fuse_norm(network, tuple(examples[0].values()))
    _make_constant(network)
    if whole:
        axes = {name: {0: 'detections'} for name in expected[0]}
    else:
        axes = _axes({**examples[0], **expected[0]}, dynamic)
    content = make_onnx(network, examples[0], expected[0], axes, opset)
    check_onnx(content)
    worst = None
    if importlib.util.find_spec('onnxruntime') is not None:
        worst = max(
            _compare(network, content, example, wanted)
            for example, wanted in zip(examples, expected))
    Path(file).write_bytes(content)
    return Export(_shapes(examples[0]), _shapes(expected[0]), worst)


def _shapes(tensors: Dict[str, Tensor]) -> Dict[str, Tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _axes(tensors: Dict[str, Tensor],
          dynamic: Sequence[str]) -> Dict[str, Dict[int, str]]:
    """Return the names of the dynamic axes."""
    return {
        name: {
            AXES[key]: key if key == 'batch' else f'{name}_{key}'
            for key in dynamic if AXES[key] < tensor.dim()
        }
        for name, tensor in tensors.items()
    }


def _sizes(shape: Tuple[int, ...],
           dynamic: Sequence[str]) -> List[Tuple[int, ...]]:
    """Return the shapes to compare at: the example's, and a larger one."""
    other = list(shape)
    for name in dynamic:
        if AXES[name] < len(shape):
            # Doubling keeps multiples, which some networks require.
            other[AXES[name]] *= 2
    return [shape] if tuple(other) == shape else [shape, tuple(other)]


def _copy(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).cpu().float().eval()
    for name, module in model.named_modules():
        if isinstance(module, SmallBatchNorm) and module.running_mean is None:
            raise SetupError(
                f'{type(module).__name__} {name!r} keeps no moving averages '
                '(track_running_stats=False): it normalises each batch with '
                'its own statistics, and ONNX has no operator for that. Train '
                'with track_running_stats=True')
        weight = getattr(module, 'example_weight', 0.)
        if weight and (weight < 1 or not getattr(module, 'centered', True)):
            raise SetupError(
                f'{type(module).__name__} {name!r} has the example weight '
                f'{weight:g}, and ONNX has no operator for that. Call '
                'set_example_weight(model, 0), or remove ExampleWeightHook '
                'from the config, and evaluate the model again')
    return model.requires_grad_(False)


class _Dense(nn.Module):
    """Single-stage detector from images to the outputs of its head."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor) -> Tuple[Any, ...]:
        return self.detector.bbox_head(self.detector.extract_feat(image))

    def onnx_names(self, outputs: Tuple[Any, ...]) -> Iterator[str]:
        """Yield a name per output and level, as the head's loss names them."""
        head = self.detector.bbox_head
        losses = getattr(head, 'loss_by_feat', None)
        names = [] if losses is None else inspect.signature(losses).parameters
        names = [re.sub(r'(ss)es$|s$', r'\1', name) for name in names]
        if len(names) < len(outputs):
            names.extend(f'output{i}' for i in range(len(outputs)))
        strides = getattr(
            getattr(head, 'prior_generator', None), 'strides', ())
        pyramid = [f'p{math.log2(stride):g}' for stride, _ in strides]
        for name, output in zip(names, outputs):
            levels = range(len(list(_tensors(output))))
            if len(set(pyramid)) == len(levels) and '.' not in str(pyramid):
                levels = pyramid
            yield from (f'{name}_{level}' for level in levels)


def _network(model: nn.Module) -> Tuple[nn.Module, bool]:
    """Return the network to export, and True for a whole detector."""
    try:
        from mmdet.models.detectors import (BaseDetector, SingleStageDetector,
                                            TwoStageDetector)
    except ImportError:  # without mmdet the model is no detector
        return model, False
    if isinstance(model, SingleStageDetector):
        return _Dense(model), False
    if isinstance(model, TwoStageDetector):
        from .onnx_two_stage import TwoStage
        return TwoStage(model), True
    if isinstance(model, BaseDetector):
        raise SetupError(
            f'{type(model).__name__} is neither a single-stage nor a '
            'two-stage detector. Export a part of it that takes an image: '
            'backbone and neck as nn.Sequential, or an inner detector')
    return model, False


def _tensors(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, (dict, list, tuple)):
        values = outputs.values() if isinstance(outputs, dict) else outputs
        for value in values:
            yield from _tensors(value)
    else:
        raise SetupError('a network to export must return tensors, but this '
                         f'one returns a {type(outputs).__name__}')


def _random_image(shape: Sequence[int]) -> Tensor:
    return torch.randn(
        tuple(shape), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _run(network: nn.Module, example: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Run the network and return its outputs by name."""
    try:
        outputs = network(*example.values())
    except Exception as error:
        raise SetupError(
            f'{type(network).__name__} cannot run on a random tensor of shape '
            f'{tuple(example["input"].shape)}: {describe(error)}. {_REMEDY}'
        ) from error
    found = list(_tensors(outputs))
    if hasattr(network, 'onnx_names'):
        names = network.onnx_names(outputs)
    elif len(found) == 1:
        names = ['output']
    else:
        names = [f'output_{i}' for i in range(len(found))]
    return dict(zip(names, found))


def _make_constant(network: nn.Module) -> None:
    """Precompute values that depend only on weights and averages."""
    for module in network.modules():
        if isinstance(module, CenConv2d) and 'weight' in module._parameters:
            module.weight.copy_(effective_weight(module))
            module.__class__ = nn.Conv2d
        elif getattr(module, 'example_weight', None) == 0:
            module.running_mean, module.running_var = fold_groups(
                module.running_mean, module.running_var,
                getattr(module, 'num_groups', None))
            module.num_groups = None


def _compare(network: nn.Module, content: bytes, example: Dict[str, Tensor],
             expected: Dict[str, Tensor]) -> float:
    """Return the largest difference between onnxruntime and torch.

    Raises:
        SetupError: If the difference is above :data:`TOLERANCE`.
    """
    size = tuple(example['input'].shape)
    try:
        found = run_onnx(content, example)
    except SetupError as error:
        raise SetupError(f'{error}. The input had the shape {size}. '
                         f'{_REMEDY}') from error
    if hasattr(network, 'onnx_difference'):
        errors = {'detections': network.onnx_difference(found, expected)}
    else:
        errors = {
            name: difference(found[name], wanted, at_least=1)
            for name, wanted in expected.items()
        }
    name = max(errors, key=errors.get)
    if not errors[name] <= TOLERANCE:
        raise SetupError(
            f'the output {name} differs by {errors[name]:.1e} between '
            f'onnxruntime and torch for an input of shape {size}. {_REMEDY}')
    return errors[name]
