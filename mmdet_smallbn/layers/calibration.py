"""Moments for GroupNorm, which keeps no moving averages in training."""
from contextlib import contextmanager
from typing import Dict, Iterator

import torch
from torch import nn

from ..functional import Moments, Processes, example_moments, mix_moments


@contextmanager
def calibrate_group_norms(model: nn.Module) -> Iterator[None]:
    """Gather the moments that GroupNorm does not keep in training.

    Within the context each GroupNorm averages the mean and variance over all
    examples of all processes, with equal weights. On exit it holds them as
    ``running_mean`` and ``running_var``, outside its state dict, for
    :func:`set_example_weight`. A later calibration replaces them.

    Example:
        >>> with calibrate_group_norms(model), torch.no_grad():
        ...     for batch in train_dataloader:
        ...         model.val_step(batch)

    Args:
        model (nn.Module): The model, with example weights as trained.
    """
    norms = [
        module for module in model.modules()
        if isinstance(module, nn.GroupNorm)
    ]
    gathered: Dict[nn.Module, Moments] = {}  # ``count`` counts examples

    @torch.no_grad()
    def gather(module: nn.Module, args, kwargs, _) -> None:
        x = args[0] if args else kwargs['input']
        if x.dim() != 4 or x.numel() == 0:
            return
        new = example_moments(x).over_examples()
        if module not in gathered:
            gathered[module] = Moments(new.mean, new.var, len(x))
            return
        *held, count = gathered[module]
        total = count + len(x)
        gathered[module] = Moments(
            *mix_moments(
                torch.stack(held), torch.stack(new[:2]),
                len(x) / total), total)

    handles = [
        module.register_forward_hook(gather, with_kwargs=True)
        for module in norms
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    processes = Processes.current()
    for module in norms:
        moments = gathered.get(module)
        if processes is not None:
            if moments is None:
                nothing = torch.zeros_like(module.weight, dtype=torch.float32)
                moments = Moments(nothing, nothing, 0)
            moments = processes.join(moments)
        if moments is not None:
            module.register_buffer(
                'running_mean', moments.mean, persistent=False)
            module.register_buffer(
                'running_var', moments.var, persistent=False)
