"""Functions that make, check and run ONNX files."""
import importlib
import inspect
import io
import warnings
from contextlib import contextmanager
from typing import Any, Dict, Iterator

import torch
from torch import Tensor, nn

from ..errors import SetupError, describe

# Warnings of torch's TorchScript exporter that do not concern the user: that
# it is old, that it leaves some steps to the runtime, and that negative
# indices fail, which no model here has. The new exporter needs more packages,
# and older versions of torch do not have it.
_OF_THE_EXPORTER = (
    'You are using the legacy TorchScript-based ONNX export',
    'The feature will be removed. Please remove usage of this function',
    'Constant folding - Only steps=1 can be constant folded',
    'Exporting aten::index operator of advanced indexing',
    r'`?torch\.jit\.\w+`? is deprecated')


def make_onnx(network: nn.Module, inputs: Dict[str, Tensor],
              outputs: Dict[str, Tensor], axes: Dict[str, Dict[int, str]],
              opset: int) -> bytes:
    """Return the content of an ONNX file, traced on an example.

    Args:
        network (nn.Module): Network that takes the inputs in this order.
        inputs, outputs (dict[str, Tensor]): The example's tensors by name.
        axes (dict[str, dict[int, str]]): Names of the dynamic axes, by tensor
            name and axis.
        opset (int): Version of ONNX's operator set.

    Raises:
        SetupError: If torch cannot export the network.
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
    """Silence the exporter's warnings about itself and about branches."""
    with warnings.catch_warnings():
        for message in _OF_THE_EXPORTER:
            warnings.filterwarnings('ignore', message)
        # The later comparison finds branches that depend on the size.
        warnings.simplefilter('ignore', torch.jit.TracerWarning)
        yield


def check_onnx(content: bytes) -> None:
    """Refuse a file that other runtimes cannot load.

    Raises:
        SetupError: If the file has operators of other domains, or is not valid
            ONNX.
    """
    import onnx
    model = onnx.load_from_string(content)
    foreign = sorted({
        f'{node.domain}::{node.op_type}'
        for node in _nodes(model.graph) if node.domain not in ('', 'ai.onnx')
    })
    if foreign:
        raise SetupError(f'the model needs {", ".join(foreign)}, but ONNX has '
                         'no such standard operators: export the parts of the '
                         'model without them')
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError,
            onnx.shape_inference.InferenceError) as error:
        raise SetupError(f'the file that torch exported is not valid ONNX: '
                         f'{describe(error)}') from error


def _nodes(graph: Any) -> Iterator[Any]:
    """Yield a graph's nodes, including those in branches and loops."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                yield from _nodes(inner)


def run_onnx(content: bytes, inputs: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Run a file in onnxruntime on a CPU, and return the outputs by name.

    Raises:
        SetupError: If onnxruntime cannot run the file.
    """
    runtime = importlib.import_module('onnxruntime')
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # only errors, which are also raised
    try:
        session = runtime.InferenceSession(
            content, options, providers=['CPUExecutionProvider'])
        outputs = session.run(
            None, {name: tensor.numpy()
                   for name, tensor in inputs.items()})
    except Exception as error:  # onnxruntime has its own error types
        raise SetupError(f'onnxruntime cannot run the exported file: '
                         f'{describe(error)}') from error
    return {
        node.name: torch.from_numpy(output)
        for node, output in zip(session.get_outputs(), outputs)
    }
