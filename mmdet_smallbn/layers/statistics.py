"""What a norm sees of an iteration, and what it normalises with."""
from typing import Callable, NamedTuple, Optional, Tuple

from torch import Tensor

from ..functional import GradientStatistics, Moments, Processes


class Batch(NamedTuple):
    """What a layer sees of the present iteration.

    Attributes:
        x (Tensor): The input, shape (N, C, H, W).
        own (Moments): Its moments as the layer measures them: of shape (C,),
            or (N, C) of each example.
        moments (Moments): Moments of shape (C,) of the batch, all processes'
            parts of it under ``sync``.
        processes (Processes, optional): Who has the other parts.
    """
    x: Tensor
    own: Moments
    moments: Moments
    processes: Optional[Processes] = None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to normalise, and nobody to wait for."""
        return self.processes is None and self.x.numel() == 0


class Statistics(NamedTuple):
    """What a training forward normalises with.

    Attributes:
        mean, var (Tensor): Shape (C,), or (N, C) for each example.
        share (Tensor, optional): This batch's part in them, shape (C,).
        gradient (callable, optional): What the backward pass makes of the
            batch's own gradient statistics; see
            :func:`mmdet_smallbn.functional.normalize`.
        r, d (Tensor, optional): Factor and shift of the normalised values
            before the affine parameters, shape (C,), constants to autograd.
        follow (callable, optional): Gives ``mean`` and ``var`` as functions
            of today's weight, live to autograd in the pass that it is called
            in.
    """
    mean: Tensor
    var: Tensor
    share: Optional[Tensor] = None
    gradient: Optional[GradientStatistics] = None
    r: Optional[Tensor] = None
    d: Optional[Tensor] = None
    follow: Optional[Callable[[], Tuple[Tensor, Tensor]]] = None
