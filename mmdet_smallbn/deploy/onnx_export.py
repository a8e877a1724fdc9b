"""ONNX files of models with these norms, in standard operators."""
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
# Largest difference to torch, relative to an output's largest value if that
# is above 1.
TOLERANCE = 1e-4
_REMEDY = ('If the size is what it depends on, let fewer axes be '
           f'dynamic ({", ".join(AXES)}), or take another shape')


class Export(NamedTuple):
    """What an ONNX file holds.

    Attributes:
        inputs, outputs (dict[str, tuple[int, ...]]): Their shapes by name, for
            the random image that it was exported with.
        difference (float, optional): Largest difference between onnxruntime
            and torch, as a part of the output's largest value if that is
            above 1; of 19 in 20 detections, if detections are the output.
            None: onnxruntime is not installed.
    """
    inputs: Dict[str, Tuple[int, ...]]
    outputs: Dict[str, Tuple[int, ...]]
    difference: Optional[float]


def require_onnx() -> None:
    """Refuse to go on without the package onnx.

    Raises:
        SetupError: Saying what to install.
    """
    if importlib.util.find_spec('onnx') is None:
        raise SetupError('exporting needs the package onnx, and onnxruntime '
                         'to check what was exported: pip install onnx '
                         'onnxruntime')


def export_onnx(model: nn.Module,
                file: Union[str, Path],
                shape: Sequence[int] = (1, 3, 320, 320),
                fold: bool = False,
                opset: int = 17,
                dynamic: Optional[Sequence[str]] = None) -> Export:
    """Write a model in evaluation to an ONNX file.

    - Faster and Mask R-CNN: the whole detector. From ``input``, one
      normalised image of a fixed shape, and ``size``, its height and width
      without padding, to ``boxes``, ``scores``, ``labels`` and ``masks``.
      These are the detections of mmdet's ``predict``, before it brings them
      to the original image's size.
    - A single-stage detector: the network. From normalised images to what
      the head puts out, named as in the head's losses and by the level:
      ``cls_score_p3``, ``bbox_pred_p3``, ... are of stride 8. Levels whose
      strides are no powers of 2 are counted from 0. What makes boxes of
      these outputs is not in the file.
    - Any module that takes one tensor, such as a backbone, or backbone and
      neck as ``nn.Sequential``: its outputs are ``output``, or ``output_0``,
      ``output_1``, ... if there are several.

    The data preprocessor is not in the file. Domains other than ONNX's own
    are refused. Before the file is written, it is checked, and compared on
    random inputs with torch, whole detectors with mmdet's ``predict``, if
    onnxruntime is installed. The model is left as it is.

    Args:
        model (nn.Module): With trained norms. Is exported in float32.
        file (str | Path): To write.
        shape (Sequence[int]): Of the images that the model is run with.
        fold (bool): Whether to fold norms into convolutions first, with
            :func:`mmdet_smallbn.fuse_norm`, which refuses a norm
            that it cannot fold. Without, torch folds those that it can.
        opset (int): Version of ONNX's operators; 16 or above for a whole
            detector.
        dynamic (Sequence[str], optional): Which of batch, height and width
            may differ from those of ``shape``. None: all, but none of a whole
            detector.

    Returns:
        Export: What it holds.

    Raises:
        SetupError: If onnx is missing, the model cannot be exported, or if
            what was exported is not the same.

    Example:
        >>> model = init_detector(config, checkpoint, device='cpu')
        >>> export_onnx(model, 'detector.onnx', shape=(1, 3, 800, 1344))
        >>> export_onnx(nn.Sequential(model.backbone, model.neck), 'fpn.onnx')
    """
    require_onnx()
    network, whole = _network(_copy(model))
    # Its own mode is what the exporter leaves it in.
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
        if whole:  # whose own example has regions
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
    """What the axes are called that may differ."""
    return {
        name: {
            AXES[key]: key if key == 'batch' else f'{name}_{key}'
            for key in dynamic if AXES[key] < tensor.dim()
        }
        for name, tensor in tensors.items()
    }


def _sizes(shape: Tuple[int, ...],
           dynamic: Sequence[str]) -> List[Tuple[int, ...]]:
    """The shapes to compare at: the example's, and one that differs."""
    other = list(shape)
    for name in dynamic:
        if AXES[name] < len(shape):
            # Twice, for networks that want multiples of something.
            other[AXES[name]] *= 2
    return [shape] if tuple(other) == shape else [shape, tuple(other)]


def _copy(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).cpu().float().eval()
    for name, module in model.named_modules():
        if isinstance(module, SmallBatchNorm) and module.running_mean is None:
            raise SetupError(
                f'{type(module).__name__} {name!r} keeps no moving averages '
                '(track_running_stats=False): it normalises each batch with '
                'its own statistics, in operators that ONNX does not have')
        weight = getattr(module, 'example_weight', 0.)
        if weight and (weight < 1 or not getattr(module, 'centered', True)):
            raise SetupError(
                f'{type(module).__name__} {name!r} has the example weight '
                f'{weight:g}, and ONNX has no operator for that. '
                'set_example_weight(model, 0), or no ExampleWeightHook in the '
                'config, makes it an affine map: evaluate that before')
    return model.requires_grad_(False)


class _Dense(nn.Module):
    """A single-stage detector from images to what its head puts out."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor) -> Tuple[Any, ...]:
        return self.detector.bbox_head(self.detector.extract_feat(image))

    def onnx_names(self, outputs: Tuple[Any, ...]) -> Iterator[str]:
        """One a level, as the head's losses call the outputs they take."""
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
    """What is exported of a model, and whether it is a whole detector."""
    try:
        from mmdet.models.detectors import (BaseDetector, SingleStageDetector,
                                            TwoStageDetector)
    except ImportError:  # no detector, then
        return model, False
    if isinstance(model, SingleStageDetector):
        return _Dense(model), False
    if isinstance(model, TwoStageDetector):
        from .onnx_two_stage import TwoStage
        return TwoStage(model), True
    if isinstance(model, BaseDetector):
        raise SetupError(
            f'{type(model).__name__} is neither a single-stage nor a '
            'two-stage detector. Export its parts that take an image: '
            'backbone and neck as nn.Sequential, or the detector within it')
    return model, False


def _tensors(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, (dict, list, tuple)):
        values = outputs.values() if isinstance(outputs, dict) else outputs
        for value in values:
            yield from _tensors(value)
    else:
        raise SetupError('a network to export puts out tensors, but this one '
                         f'a {type(outputs).__name__}')


def _random_image(shape: Sequence[int]) -> Tensor:
    return torch.randn(
        tuple(shape), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _run(network: nn.Module, example: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """The outputs by name."""
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
    """Write down what evaluation computes of weights and averages alone."""
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
    """Largest difference between onnxruntime and torch.

    Raises:
        SetupError: If it is more than rounding.
    """
    size = tuple(example['input'].shape)
    try:
        found = run_onnx(content, example)
    except SetupError as error:
        raise SetupError(f'{error}. Its input had the shape {size}. '
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
            f'{name} of an input of shape {size} differs by '
            f'{errors[name]:.1e} between onnxruntime and torch. {_REMEDY}')
    return errors[name]
