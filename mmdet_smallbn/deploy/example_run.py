"""Forward pass of a model on example inputs."""
from typing import Any, Callable, Optional, Sequence, Union

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import SetupError, describe

# Large enough for all levels of a pyramid, small enough for a CPU.
_SIDE = 128

Inputs = Union[Tensor, Sequence[Any]]


def example_run(model: nn.Module,
                inputs: Optional[Inputs] = None) -> Callable[[], Any]:
    """Return a forward pass that can be repeated on copies of the inputs.

    Args:
        model (nn.Module): A detector, or a part of one.
        inputs (Tensor | Sequence, optional): Inputs of the model. None: one
            random image of 128 x 128 pixels, or random feature maps for a
            module whose ``in_channels`` is a list, such as a neck. A detector
            runs its whole network, also the second stage.

    Returns:
        callable: Function that runs the model in evaluation mode, without
        gradients. It raises SetupError if the model cannot run on the inputs.
    """
    call = _call(model, inputs)

    @torch.no_grad()
    def run() -> Any:
        model.eval()
        try:
            return call()
        except SetupError:  # raised by module hooks of the caller
            raise
        except Exception as error:
            given = 'the inputs given' if inputs is not None else (
                'a random image, the default input')
            raise SetupError(f'{type(model).__name__} cannot run on {given}: '
                             f'{describe(error)}. Give it inputs that it '
                             'accepts') from error

    return run


def _call(model: nn.Module, inputs: Optional[Inputs]) -> Callable[[], Any]:
    if inputs is not None:
        if isinstance(inputs, Tensor):
            inputs = (inputs, )
        return lambda: model(*copies(inputs))
    if hasattr(model, 'extract_feat') and hasattr(model, 'data_preprocessor'):
        image = _random(model, 3, _SIDE)
        return lambda: model(
            image.clone(), [_sample()], mode='tensor')
    channels = getattr(model, 'in_channels', None)
    if isinstance(channels, (list, tuple)):
        maps = tuple(
            _random(model, c, max(1, _SIDE // 2**(level + 2)))
            for level, c in enumerate(channels))
        return lambda: model(copies(maps))
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)),
                 None)
    image = _random(model, 3 if first is None else first.in_channels, _SIDE)
    return lambda: model(image.clone())


def copies(values: Any) -> Any:
    """Clone the tensors in nested values: a model may change them in place."""
    return tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v,
                    values)


def _random(model: nn.Module, channels: int, side: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn((1, channels, side, side), generator=generator)
    anchor = next(model.parameters(), image)
    return image.to(anchor.device, anchor.dtype)


def _sample() -> Any:
    """Return the data sample of a detector for an image."""
    from mmdet.structures import DetDataSample
    size = (_SIDE, _SIDE)
    return DetDataSample(
        metainfo=dict(
            img_shape=size,
            ori_shape=size,
            pad_shape=size,
            batch_input_shape=size,
            scale_factor=(1., 1.)))
