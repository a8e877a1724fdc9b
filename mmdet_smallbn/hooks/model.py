"""What hooks ask a runner for."""
from typing import Union

import torch
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import Tensor, nn


def bare_model(runner: Runner) -> nn.Module:
    """The runner's model, out of what distributes it."""
    model = runner.model
    return model.module if is_model_wrapper(model) else model


def gradient_scale(runner: Runner) -> Union[float, Tensor]:
    """What the present iteration's loss is multiplied with for its backward.

    One part in gradient accumulation, times the loss scale in mixed
    precision. To be asked before the iteration: its step may change both.

    Returns:
        float | Tensor: The factor; on the device, without waiting for it,
        where there is a loss scale. 1 where several optimizers share a model.
    """
    wrapper = runner.optim_wrapper
    if not isinstance(wrapper, OptimWrapper):
        return 1.
    scale = wrapper.scale_loss(torch.ones(())).item()
    scaler = getattr(wrapper, 'loss_scaler', None)
    if scaler is None:
        return scale
    # get_scale() would wait for the device, but not before the first step.
    on_device = getattr(scaler, '_scale', None)
    if on_device is None:
        return scale * scaler.get_scale()
    return scale * on_device
