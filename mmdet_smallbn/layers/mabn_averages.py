"""Moving averages for the forward and the backward pass of MABN."""
from typing import Any, Dict, Optional, Tuple

import torch
from torch import Tensor

from .moving_average import ExponentialMovingAverage, SimpleMovingAverage
from .ring import Ring


KINDS = ('batch', 'sma', 'ema')


def check_kinds(forward: str, backward: str, track_running_stats: bool,
                momentum: Optional[float]) -> None:
    """Check the kinds of statistics; 'ema' needs running statistics.

    Args:
        forward, backward (str): Kinds of the two passes.
        track_running_stats, momentum: Arguments of the layer.

    Raises:
        ValueError: If a kind is unknown or does not fit the other arguments.
            The message names the argument.
    """
    for name, kind in (('forward_statistics', forward),
                       ('backward_statistics', backward)):
        if kind not in KINDS:
            raise ValueError(f'{name} must be one of {", ".join(KINDS)}, '
                             f'but got {kind!r}')
        if kind == 'ema' and (not track_running_stats or momentum is None):
            raise ValueError(
                f"{name}='ema' needs track_running_stats=True and a momentum, "
                f'but got track_running_stats={track_running_stats} and '
                f'momentum={momentum}')


class MovingStatistics:
    """Averages for one of the layer's calls in an iteration.

    Args:
        buffer_size (int): Iterations in simple moving averages.
        backward (str): Kind of the gradient's statistics.
        momentum (float, optional): Weight of the present value in an
            exponential moving average.
    """

    def __init__(self, buffer_size: int, backward: str,
                 momentum: Optional[float]) -> None:
        self.forward = SimpleMovingAverage(buffer_size)
        self.backward: Any = None
        if backward == 'sma':
            self.backward = SimpleMovingAverage(buffer_size)
        elif backward == 'ema':
            self.backward = ExponentialMovingAverage(momentum)

    @property
    def filled(self) -> int:
        """Number of iterations in the average of the forward passes."""
        return self.forward.filled

    @property
    def rings(self) -> Dict[str, Ring]:
        """The rings that :class:`PastBank` prepares, by name."""
        both = dict(forward=self.forward, backward=self.backward)
        return {k: v for k, v in both.items() if isinstance(v, Ring)}

    def state_dict(self) -> Dict[str, Any]:
        backward = self.backward
        return dict(
            forward=self.forward.state_dict(),
            backward=backward if backward is None else backward.state_dict())

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.forward.load_state_dict(state['forward'])
        if self.backward is not None:
            self.backward.load_state_dict(state['backward'])

    def to(self, device: torch.device) -> None:
        self.forward.to(device)
        if self.backward is not None:
            self.backward.to(device)


class MovingGradient:
    """Gradient statistics for the backward passes of one forward pass.

    Args:
        average (optional): Moving average of the gradient's statistics.
        in_use (bool): If False, the average is updated but not used.
        centered (bool): If True, the gradient's mean is subtracted.
        scale (float | Tensor): Factor of the loss. The averages are of
            gradients divided by it, because it may change from step to step.
    """

    def __init__(self, average, in_use: bool, centered: bool, scale) -> None:
        self._average = average
        self._in_use = in_use
        self._centered = centered
        self._scale = scale
        self._turn: Optional[int] = None

    def __call__(self, mean_g: Optional[Tensor],
                 mean_gx: Tensor) -> Tuple[Optional[Tensor], Tensor]:
        values = torch.stack([mean_g, mean_gx
                              ]) if self._centered else mean_gx[None]
        if self._average is not None:
            # A second backward pass of the same forward replaces the first.
            plain = isinstance(self._scale, float) and self._scale == 1
            self._turn = self._average.push(
                values if plain else values / self._scale, self._turn)
            if self._in_use:
                values = self._average.mean()
                values = values if plain else values * self._scale
        return (values[0] if self._centered else None), values[-1]
