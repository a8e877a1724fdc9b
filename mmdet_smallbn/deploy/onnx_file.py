"""Make, check and run ONNX files."""
import importlib
import inspect
import io
import warnings
from contextlib import contextmanager
from typing import Any, Dict, Iterator

import torch
from torch import Tensor, nn

from ..errors import SetupError, describe

# What torch says of its TorchScript exporter, whoever uses it; of steps that
# it leaves to the runtime; and of negative indices, which nothing here has.
# The exporter that is to follow needs more packages, and exists in none of the
# older versions.
_OF_THE_EXPORTER = (
    'You are using the legacy TorchScript-based ONNX export',
    'The feature will be removed. Please remove usage of this function',
    'Constant folding - Only steps=1 can be constant folded',
    'Exporting aten::index operator of advanced indexing',
    r'`?torch\.jit\.\w+`? is deprecated')


def make_onnx(network: nn.Module, inputs: Dict[str, Tensor],
              outputs: Dict[str, Tensor], axes: Dict[str, Dict[int, str]],
              opset: int) -> bytes:
    """The content of a file with a network that was run on an example.

    Args:
        network (nn.Module): Takes the inputs in this order.
        inputs, outputs (dict[str, Tensor]): The example's, by name.
        axes (dict[str, dict[int, str]]): Names of those that may differ.
        opset (int): Version of ONNX's operators.

    Raises:
        SetupError: If torch cannot.
    """
    settings = {}
    if 'dynamo' in inspect.signature(torch.onnx.export).parameters:
        settings['dynamo'] = False
    buffer = io.BytesIO()
    with _quietly():
        try:
            torch.onnx.export(
                network,
                tuple(inputs.values()),
                buffer,
                input_names=list(inputs),
                output_names=list(outputs),
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


def check_onnx(content: bytes) -> None:
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


def run_onnx(content: bytes, inputs: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """The outputs by name, in onnxruntime on a CPU.

    Raises:
        SetupError: If it cannot run.
    """
    runtime = importlib.import_module('onnxruntime')
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors; they are raised, too
    try:
        session = runtime.InferenceSession(
            content, options, providers=['CPUExecutionProvider'])
        outputs = session.run(
            None, {name: tensor.numpy()
                   for name, tensor in inputs.items()})
    except Exception as error:  # of its own kinds, by what went wrong
        raise SetupError(f'onnxruntime cannot run what was exported: '
                         f'{describe(error)}') from error
    return {
        node.name: torch.from_numpy(output)
        for node, output in zip(session.get_outputs(), outputs)
    }
