"""What every small-batch norm shares."""
import warnings
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import Moments, batch_moments, normalize
from .conv_call import in_backward

# No model calls a layer so often: the iteration is not told any more.
_MAX_CALLS = 64


class SmallBatchNorm(nn.BatchNorm2d):
    """Base of the norms: batch normalisation with a hole for the statistics.

    To the toolboxes it is a BatchNorm: the same parameters, buffers and state
    dict (pretrained weights load, ``norm_decay_mult``, ``norm_eval`` and
    freezing apply), the same evaluation, a per-channel affine map that folds
    into the convolution before it. In training a subclass says in
    :meth:`statistics` what to normalise with.

    Whatever the statistics are, ``running_mean`` and ``running_var`` follow
    the present batch as in ``nn.BatchNorm2d``, with three differences: a
    recomputation in a backward pass (activation checkpointing) does not count
    twice, a non-finite batch and an empty one leave them untouched.

    State beyond BatchNorm's lives in plain attributes: ``buffers()`` and
    ``state_dict()`` hold BatchNorm's three buffers and nothing else, because
    the toolboxes average, cast and copy buffers as they please.

    Attributes:
        burns_in (bool): Whether the kind of layer has a burn-in.
        window_size (int): Iterations behind the statistics.
        iteration (int, optional): The training loop's iteration, told by
            :class:`mmdet_smallbn.BurnInHook`. None: unknown, and every
            training forward is an iteration of its own.
        burning_in (bool): Whether the layer is in its burn-in.
        layer_name (str, optional): The layer's place in the model, told by
            the hook, for messages.
    """

    burns_in = False
    window_size = 1

    def __init__(self,
                 num_features: int,
                 eps: float = 1e-5,
                 momentum: Optional[float] = 0.1,
                 affine: bool = True,
                 track_running_stats: bool = True,
                 device=None,
                 dtype=None) -> None:
        super().__init__(num_features, eps, momentum, affine,
                         track_running_stats, device, dtype)
        self.iteration: Optional[int] = None
        self.burning_in = False
        self.layer_name: Optional[str] = None
        self._last_iteration: Optional[int] = None
        self._call = 0
        self._warned_of_calls = False

    def statistics(
            self, x: Tensor, moments: Moments
    ) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
        """What a training forward normalises with; the hole to fill.

        Args:
            x (Tensor): The input, shape (N, C, H, W), not empty.
            moments (Moments): Its moments.

        Returns:
            tuple[Tensor, Tensor, Tensor | None]: Mean, biased variance and
            the share of this batch in them, as
            :func:`mmdet_smallbn.functional.normalize` takes them.
        """
        raise NotImplementedError

    def reset_state(self) -> None:
        """Forget what was gathered over past iterations."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` of shape (N, C, H, W); same shape and dtype."""
        self._check_input_dim(x)
        if x.size(1) != self.num_features:
            raise ValueError(
                f'{self._who()} was built for {self.num_features} channels, '
                f'but got an input of shape {tuple(x.shape)}')
        if not self.training and self.running_mean is not None:
            return F.batch_norm(x, self.running_mean, self.running_var,
                                self.weight, self.bias, False, 0., self.eps)
        recomputed = in_backward()
        if self.training and torch.is_grad_enabled() and not recomputed:
            self._count_call()
        if x.numel() == 0:
            # Zero RoIs: no state changes, the graph stays connected. Torch
            # answers with x * weight + bias, promoted in half precision.
            return F.batch_norm(x, None, None, self.weight, self.bias, True,
                                0., self.eps).to(x.dtype)
        moments = batch_moments(x)
        if not self.training:
            mean, var, share = self.batch_statistics(moments)
        else:
            mean, var, share = self.statistics(x, moments)
            if not recomputed:
                self._update_running(moments)
        return normalize(x, mean, var, self.weight, self.bias, self.eps, share)

    def batch_statistics(self,
                         moments: Moments) -> Tuple[Tensor, Tensor, None]:
        """The present batch alone: batch normalisation.

        Raises:
            ValueError: If there is one value a channel, as in torch.
        """
        if moments.count == 1:
            raise ValueError(
                f'{self._who()} got one value per channel, which has no '
                'variance. Give it more images, a larger feature map, or put '
                'no norm there')
        return moments.mean, moments.var, None

    @torch.no_grad()
    def _update_running(self, moments: Moments) -> None:
        if self.running_mean is None:
            return
        self.num_batches_tracked.add_(1)
        factor = self.momentum
        if factor is None:  # cumulative average, as in nn.BatchNorm2d
            factor = self.num_batches_tracked.to(
                moments.mean.dtype).reciprocal()
        for running, new in ((self.running_mean, moments.mean),
                             (self.running_var, moments.unbiased_var())):
            if new is None:
                continue
            updated = torch.lerp(running.to(new.dtype), new, factor)
            running.copy_(torch.where(new.isfinite(), updated, running))

    def _count_call(self) -> None:
        """Set the index of this forward among those of the iteration.

        Raises:
            RuntimeError: If there are too many to be of one iteration.
        """
        if self.iteration is None or self.iteration != self._last_iteration:
            self._last_iteration = self.iteration
            self._call = 0
            return
        self._call += 1
        if self._call == 1 and not self._warned_of_calls:
            self._warned_of_calls = True
            warnings.warn(
                f'{self._who()} is called several times in an iteration, as a '
                'head that pyramid levels share. Each call has past '
                'statistics of its own, but the running statistics mix them: '
                'take a head with a norm for each level (RetinaSepBNHead)')
        if self._call == _MAX_CALLS:
            raise RuntimeError(
                f'{self._who()} was called {_MAX_CALLS} times in iteration '
                f'{self.iteration}. If training was interrupted and the model '
                'is now used otherwise, set .iteration = None on its norms')

    def _who(self) -> str:
        kind = type(self).__name__
        if self.layer_name:
            return f'{kind} {self.layer_name!r}'
        return f'{kind}({self.num_features})'

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # The weights jumped: the past has nothing to say about them.
        self.reset_state()
