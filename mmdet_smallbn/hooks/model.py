"""Functions of hooks and tools that read the runner and its model."""
from typing import (Callable, Dict, List, Optional, Sequence, Tuple,
                    Union)

import torch
from mmengine.dist import get_world_size
from mmengine.model import BaseModel, BaseTTAModel, is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from ..errors import SetupError
from ..layers import calibrate_group_norms, is_under, norms_of
from ..words import counted


def bare_model(runner: Runner) -> nn.Module:
    """Return the runner's model without wrappers for DDP or augmentation."""
    model = runner.model
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def one_unit(hook: str, epochs: Optional[int],
             iters: Optional[int]) -> Tuple[str, int]:
    """Return unit and number of a hook that takes ``epochs`` or ``iters``.

    Raises:
        ValueError: If both or neither are given, or if the number is not an
            integer of at least 0.
    """
    if (epochs is None) == (iters is None):
        raise ValueError(f'{hook} needs exactly one of epochs and iters, but '
                         f'got epochs={epochs}, iters={iters}')
    unit, number = ('iters', iters) if epochs is None else ('epochs', epochs)
    if not isinstance(number, int) or number < 0:
        raise ValueError(f'{hook}: {unit} must be an integer of at least 0, '
                         f'but got {number!r}')
    return unit, number


def check_unit(hook: str, unit: str, number: int, by_epoch: bool) -> None:
    """Check that a hook with epochs runs in an epoch-based training loop.

    Raises:
        SetupError: If the training loop counts iterations.
    """
    if unit == 'epochs' and not by_epoch:
        raise SetupError(f'{hook}: epochs={number}, but the training loop '
                         'counts iterations. Use iters')


def norms_of_teachers(model: nn.Module) -> Dict[str, nn.Module]:
    """Find the norms of frozen detectors inside the model, such as a teacher.

    Args:
        model (nn.Module): The whole model.

    Returns:
        dict[str, SmallBatchNorm]: Norms by their names in the model.
    """
    teachers = [
        name for name, part in model.named_modules() if part is not model
        and isinstance(part, BaseModel) and _is_frozen(part)
    ]
    return {
        name: layer
        for name, layer in norms_of(model).items()
        if any(is_under(name, teacher) for teacher in teachers)
    }


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def kept_asleep(norms: Dict[str, nn.Module]) -> List[str]:
    """Return the names of norms in evaluation mode with trainable parameters.
    """
    return [
        name for name, norm in norms.items() if not norm.training
        and any(p.requires_grad for p in norm.parameters())
    ]


def asleep_note(names: Sequence[str]) -> str:
    """Return the message about norms from :func:`kept_asleep`."""
    return (f'{counted(len(names), "norm")} (first: {names[0]}) should train, '
            'but the model keeps them in evaluation mode. Set '
            'norm_eval=False in the backbone')


def gradient_scale(runner: Runner) -> Union[float, Tensor]:
    """Return the factor of the loss in the current iteration's backward pass.

    The factor is 1 / (number of accumulated batches), times the loss scale in
    mixed precision. Call this before the iteration, because the optimizer
    step may change both.

    Returns:
        float | Tensor: The factor. With a loss scale it is a tensor on the
        device, so that the host does not wait. 1 if the model has several
        optimizers.
    """
    wrapper = runner.optim_wrapper
    if not isinstance(wrapper, OptimWrapper):
        return 1.
    scale = wrapper.scale_loss(torch.ones(())).item()
    scaler = getattr(wrapper, 'loss_scaler', None)
    if scaler is None:
        return scale
    # get_scale() waits for the device, except before the first step, when
    # there is no tensor yet.
    on_device = getattr(scaler, '_scale', None)
    if on_device is None:
        return scale * scaler.get_scale()
    return scale * on_device


def is_after_step(runner: Runner) -> Optional[bool]:
    """Return True if the optimizer took a step since the last iteration.

    Call this before the iteration. It is also True before the first
    iteration, and None if the model has several optimizers.
    """
    wrapper = runner.optim_wrapper
    return wrapper.should_update() if isinstance(wrapper,
                                                 OptimWrapper) else None


def calibrate(runner: Runner, images: int,
              tell: Callable[[int], None] = lambda seen: None) -> None:
    """Compute moving averages for the model's GroupNorms from training images.

    The forward pass computes the losses, so RoIs are those of training. Every
    call uses the same images and RoIs.

    Args:
        runner (Runner): Runner whose model has its weights loaded.
        images (int): Number of images, over all processes.
        tell (callable): Progress callback. It takes the number of images
            processed so far.

    Raises:
        SetupError: If the config has no training images.
    """
    if runner.cfg.get('train_dataloader') is None:
        raise SetupError('GroupNorm has no moving averages, and the config '
                         'has no train_dataloader to compute them from. Add '
                         'one')
    loader = runner.build_dataloader(runner.cfg.train_dataloader, seed=0)
    model, seen = bare_model(runner), 0
    training = model.training
    model.eval()
    with calibrate_group_norms(model), torch.no_grad(), (
            torch.random.fork_rng()):
        torch.manual_seed(0)
        for batch in loader:
            model(**model.data_preprocessor(batch, True), mode='loss')
            seen += len(batch['inputs']) * get_world_size()
            tell(min(seen, images))
            if seen >= images:
                break
    model.train(training)
