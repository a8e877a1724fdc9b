"""What a norm is told and sees of an iteration, and what it makes of it."""
from typing import Any, NamedTuple, Optional, Union

from torch import Tensor

from ..functional import GradientStatistics, Moments, Past, Processes
from .forward_pass import ForwardPass


class TrainingStep:
    """What a training loop tells its layers, in one object for all of them.

    Attributes:
        iteration (int, optional): None: unknown, and every training forward
            is an iteration of its own.
        gradient_scale (float | Tensor): What the loss is multiplied with
            before the backward pass: a loss scale in mixed precision, one
            part in gradient accumulation.
        mends_running (bool): Whether the loop takes out of the running
            statistics what is not finite, after each iteration.
        optimizer_steps (int, optional): Steps that the optimizer has taken.
            None: unknown.
    """

    def __init__(self) -> None:
        self.iteration: Optional[int] = None
        self.gradient_scale: Any = 1.
        self.mends_running = False
        self.optimizer_steps: Optional[int] = None


class Batch(NamedTuple):
    """What a layer sees of the present iteration.

    Attributes:
        x (Tensor): The input, shape (N, C, H, W).
        own (Moments): Its moments as the layer measures them: of shape (C,),
            or (N, C) of each example.
        moments (Moments): Moments of shape (C,) of the batch, all processes'
            parts of it under ``sync``.
        processes (Processes, optional): Who has the other parts.
        step (ForwardPass): What the forward pass belongs to.
        updated (bool): Whether the running statistics have seen it.
    """
    x: Tensor
    own: Moments
    moments: Moments
    processes: Optional[Processes] = None
    step: ForwardPass = ForwardPass.PLAIN
    updated: bool = False

    @property
    def part(self) -> Tensor:
        """This process's part of a batch that several share, a scalar."""
        return self.own.count / self.moments.count.clamp(min=1)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to normalise, and nobody to wait for."""
        return self.processes is None and self.x.numel() == 0


class Statistics(NamedTuple):
    """What a training forward normalises with.

    Attributes:
        mean, var (Tensor): Shape (C,), or (N, C) for each example.
        gradient (Tensor | callable, optional): What the backward pass
            normalises with; see :func:`mmdet_smallbn.functional.normalize`.
        r, d (Tensor, optional): Factor and shift of the normalised values
            before the affine parameters, shape (C,), constants to autograd.
        past (Past, optional): Past moments in ``mean`` and ``var``.
    """
    mean: Tensor
    var: Tensor
    gradient: Union[Tensor, GradientStatistics, None] = None
    r: Optional[Tensor] = None
    d: Optional[Tensor] = None
    past: Optional[Past] = None
