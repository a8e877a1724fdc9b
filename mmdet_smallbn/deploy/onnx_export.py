"""ONNX files of networks with these norms, in standard operators."""
import copy
import importlib
import importlib.util
import inspect
import io
import re
import warnings
from contextlib import contextmanager
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

# Axes of an image tensor that may differ from call to call.
AXES = dict(batch=0, height=2, width=3)
# Largest difference to torch, relative to an output's largest value if that
# is above 1.
TOLERANCE = 1e-4
_REMEDY = ('If the size is what it depends on, let fewer axes be '
           f'dynamic ({", ".join(AXES)})')
# What torch says of its TorchScript exporter, whoever uses it. The one that
# is to follow needs more packages, and exists in none of the older versions.
_OF_THE_EXPORTER = (
    'You are using the legacy TorchScript-based ONNX export',
    'The feature will be removed. Please remove usage of this function',
    r'`?torch\.jit\.\w+`? is deprecated')


class Export(NamedTuple):
    """What an ONNX file holds.

    Attributes:
        outputs (dict[str, tuple[int, ...]]): Shapes of the outputs by name,
            for the shape that it was exported with.
        difference (float, optional): Largest difference between onnxruntime
            and torch, as a part of the output's largest value if that is
            above 1. None: onnxruntime is not installed.
    """
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
                dynamic: Sequence[str] = tuple(AXES)) -> Export:
    """Write a model's network in evaluation to an ONNX file.

    - A module that takes one tensor, such as a backbone, or backbone and neck
      as ``nn.Sequential``: its outputs are ``output``, or ``output_0``,
      ``output_1``, ... if there are several.
    - A single-stage detector: from normalised images to what its head puts
      out, named as in the head's losses: ``cls_score_0``, ``bbox_pred_0``,
      ... of each level.
    - A two-stage detector: from normalised images to the features,
      ``feature_0``, ..., and what the RPN head puts out, named in the same
      way. The RoI head is not part of it, for its regions are a result of
      what comes between: ``model.roi_head.bbox_head`` is a module that takes
      a tensor, to be exported by itself with ``dynamic=('batch', )``.

    Neither the data preprocessor nor what makes boxes of a head's outputs is
    in the file. Domains other than ONNX's own are refused. The file is
    checked, and compared with torch on random inputs if onnxruntime is
    installed, before it is written. The model is left as it is.

    Args:
        model (nn.Module): With trained norms. Is exported in float32.
        file (str | Path): To write.
        shape (Sequence[int]): Of the example that the model is run with.
        fold (bool): Whether to fold norms into convolutions first, with
            :func:`mmdet_smallbn.deploy.fuse.fuse_norm`, which refuses a norm
            that it cannot fold. Without, torch folds those that it can.
        opset (int): Version of ONNX's operators.
        dynamic (Sequence[str]): Which of batch, height and width may differ
            from those of ``shape``.

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
    unknown = set(dynamic) - set(AXES)
    if unknown:
        raise ValueError(f'dynamic takes {", ".join(AXES)}, but got '
                         f'{", ".join(sorted(unknown))}')
    network, names = _network(_copy(model))
    # Its own mode is what the exporter leaves it in.
    network.eval()
    images = [
        _random_image(size) for size in _sizes(tuple(shape), dynamic)
    ]
    runs = [_run(network, image, names) for image in images]
    expected, names = runs[0]
    if fold:
        from .fuse import fuse_norm
        network = fuse_norm(network, (images[0], ))
    _make_constant(network)
    content = _export(network, images[0], names, expected, opset, dynamic)
    _check(content)
    worst = None
    if importlib.util.find_spec('onnxruntime') is not None:
        worst = max(
            _compare(content, names, image, wanted)
            for image, (wanted, _) in zip(images, runs))
    Path(file).write_bytes(content)
    return Export(
        {name: tuple(out.shape)
         for name, out in zip(names, expected)}, worst)


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
    """A detector from images to what its dense head puts out."""

    def __init__(self, detector: nn.Module, head: str,
                 with_features: bool) -> None:
        super().__init__()
        self.detector = detector
        self.head = head
        self.with_features = with_features

    def forward(self, image: Tensor) -> Tuple[Any, ...]:
        features = self.detector.extract_feat(image)
        outputs = getattr(self.detector, self.head)(features)
        return (features, *outputs) if self.with_features else outputs


def _network(model: nn.Module) -> Tuple[nn.Module, Optional[List[str]]]:
    """The part of a model that is exported, and what its outputs are.

    Names are of the items that it returns, each of one tensor a level. None:
    there are no names.
    """
    try:
        from mmdet.models.detectors import (BaseDetector, SingleStageDetector,
                                            TwoStageDetector)
    except ImportError:  # no detector, then
        return model, None
    kind = type(model).__name__
    if isinstance(model, SingleStageDetector):
        return (_Dense(model, 'bbox_head', False),
                _names_of_outputs(model.bbox_head))
    if isinstance(model, TwoStageDetector):
        if not model.with_rpn:
            raise SetupError(f'{kind} has no RPN head, and its RoI head is no '
                             'function of an image. Export its parts: '
                             'backbone and neck as nn.Sequential')
        names = ['feature', *_names_of_outputs(model.rpn_head)]
        if model.with_roi_head:  # folding asks for all that is there
            del model.roi_head
        return _Dense(model, 'rpn_head', True), names
    if isinstance(model, BaseDetector):
        raise SetupError(
            f'{kind} is neither a single-stage nor a two-stage detector. '
            'Export its parts that take an image: backbone and neck as '
            'nn.Sequential, or the detector within it')
    return model, None


def _names_of_outputs(head: nn.Module) -> List[str]:
    """What a head calls the outputs that its losses take, one of each."""
    losses = getattr(head, 'loss_by_feat', None)
    names = [] if losses is None else inspect.signature(losses).parameters
    return [re.sub(r'(ss)es$|s$', r'\1', name) for name in names]


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
def _run(network: nn.Module, image: Tensor,
         names: Optional[List[str]]) -> Tuple[List[Tensor], List[str]]:
    """The outputs, flat, and a name for each."""
    try:
        outputs = network(image)
    except Exception as error:
        raise SetupError(
            f'{type(network).__name__} cannot run on a random tensor of shape '
            f'{tuple(image.shape)}: {describe(error)}. {_REMEDY}') from error
    found = list(_tensors(outputs))
    if names is None:
        alone = len(found) == 1
        return found, ['output'] if alone else [
            f'output_{i}' for i in range(len(found))
        ]
    if len(names) < len(outputs):
        names = [*names, *(f'output{i}' for i in range(len(outputs)))]
    return found, [
        f'{name}_{i}' for name, item in zip(names, outputs)
        for i, _ in enumerate(_tensors(item))
    ]


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


def _export(network: nn.Module, image: Tensor, names: List[str],
            outputs: List[Tensor], opset: int,
            dynamic: Sequence[str]) -> bytes:
    """The file's content."""
    axes = {}
    for name, tensor in [('input', image), *zip(names, outputs)]:
        axes[name] = {
            AXES[key]: key if key == 'batch' else f'{name}_{key}'
            for key in dynamic if AXES[key] < tensor.dim()
        }
    settings = {}
    if 'dynamo' in inspect.signature(torch.onnx.export).parameters:
        settings['dynamo'] = False
    buffer = io.BytesIO()
    with _quietly():
        try:
            torch.onnx.export(
                network, (image, ),
                buffer,
                input_names=['input'],
                output_names=names,
                dynamic_axes=axes,
                opset_version=opset,
                **settings)
        except (RuntimeError, ValueError) as error:
            raise SetupError('torch cannot export the model at opset '
                             f'{opset}: {describe(error)}') from error
    return buffer.getvalue()


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporter's notes on itself and on branches."""
    with warnings.catch_warnings():
        for message in _OF_THE_EXPORTER:
            warnings.filterwarnings('ignore', message)
        # Whether a branch is another one at other sizes is seen afterwards.
        warnings.simplefilter('ignore', torch.jit.TracerWarning)
        yield


def _check(content: bytes) -> None:
    """Refuse a file that other runtimes would not take.

    Raises:
        SetupError: If it has operators of other domains, or is no valid ONNX.
    """
    import onnx
    model = onnx.load_from_string(content)
    foreign = sorted({
        f'{node.domain}::{node.op_type}'
        for node in _nodes(model.graph) if node.domain not in ('', 'ai.onnx')
    })
    if foreign:
        raise SetupError(f'the model needs {", ".join(foreign)}, which are '
                         'no standard operators of ONNX: export the parts '
                         'without them')
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError,
            onnx.shape_inference.InferenceError) as error:
        raise SetupError(f'what torch exported is no valid ONNX: '
                         f'{describe(error)}') from error


def _nodes(graph: Any) -> Iterator[Any]:
    """A graph's nodes, those of branches and loops, too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                yield from _nodes(inner)


def _compare(content: bytes, names: List[str], image: Tensor,
             expected: List[Tensor]) -> float:
    """Largest difference between onnxruntime and torch.

    Raises:
        SetupError: If it is more than rounding.
    """
    runtime = importlib.import_module('onnxruntime')
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors; they are raised, too
    size = tuple(image.shape)
    try:
        session = runtime.InferenceSession(
            content, options, providers=['CPUExecutionProvider'])
        outputs = session.run(names, {'input': image.numpy()})
    except Exception as error:  # of its own kinds, by what went wrong
        raise SetupError(f'onnxruntime cannot run what was exported on an '
                         f'input of shape {size}: {describe(error)}. '
                         f'{_REMEDY}') from error
    worst = 0.
    for name, found, wanted in zip(names, outputs, expected):
        found = torch.from_numpy(found)
        if found.shape != wanted.shape:
            raise SetupError(
                f'{name} of an input of shape {size} has the shape '
                f'{tuple(found.shape)} in onnxruntime, and '
                f'{tuple(wanted.shape)} in torch. {_REMEDY}')
        error = difference(found, wanted, at_least=1)
        if error > TOLERANCE:
            raise SetupError(
                f'{name} of an input of shape {size} differs by '
                f'{error:.1e} between onnxruntime and torch. {_REMEDY}')
        worst = max(worst, error)
    return worst
