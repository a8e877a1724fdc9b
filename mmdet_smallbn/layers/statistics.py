"""Training step, batch and statistics: data that a norm's forward uses."""
from typing import Any, NamedTuple, Optional, Union

from torch import Tensor

from ..functional import GradientStatistics, Moments, Past, Processes
from .forward_pass import ForwardPass


class TrainingStep:
    """State of the training loop, one object for all its layers.

    Attributes:
        iteration (int, optional): Index of the iteration. None: unknown, and
            every training forward pass counts as an iteration.
        gradient_scale (float | Tensor): Factor of the loss in the backward
            pass: the loss scale in mixed precision, 1 / parts in gradient
            accumulation.
        mends_running (bool): True if the loop removes non-finite values from
            the running statistics after each iteration.
        optimizer_steps (int, optional): Number of optimizer steps so far.
            None: unknown.
    """

    def __init__(self) -> None:
        self.iteration: Optional[int] = None
        self.gradient_scale: Any = 1.
        self.mends_running = False
        self.optimizer_steps: Optional[int] = None


class Batch(NamedTuple):
    """A layer's input in the present iteration, and its moments.

    Attributes:
        x (Tensor): The input, shape (N, C, H, W).
        own (Moments): Moments of the input, as the layer measures them: shape
            (C,), or (N, C) for each example.
        moments (Moments): Moments of the batch, shape (C,). With ``sync`` the
            batch is that of all processes.
        processes (Processes, optional): The processes that share the batch.
        step (ForwardPass): Kind of the forward pass.
        updated (bool): True if the running statistics already hold it.
    """
    x: Tensor
    own: Moments
    moments: Moments
    processes: Optional[Processes] = None
    step: ForwardPass = ForwardPass.PLAIN
    updated: bool = False

    @property
    def part(self) -> Tensor:
        """This process's part of a shared batch, a scalar from 0 to 1."""
        return self.own.count / self.moments.count.clamp(min=1)

    @property
    def is_empty(self) -> bool:
        """True if the input is empty and no other process shares the batch."""
        return self.processes is None and self.x.numel() == 0


class Statistics(NamedTuple):
    """Statistics of a training forward pass and its backward pass.

    Attributes:
        mean, var (Tensor): Mean and biased variance, shape (C,), or (N, C)
            for each example.
        gradient (Tensor | callable, optional): Statistics of the backward
            pass; see :func:`mmdet_smallbn.functional.normalize`.
        r, d (Tensor, optional): Factor and shift of the normalised values
            before the affine parameters, shape (C,), constants to autograd.
        past (Past, optional): Past moments that ``mean`` and ``var`` contain.
    """
    mean: Tensor
    var: Tensor
    gradient: Union[Tensor, GradientStatistics, None] = None
    r: Optional[Tensor] = None
    d: Optional[Tensor] = None
    past: Optional[Past] = None
