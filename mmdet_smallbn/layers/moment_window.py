"""The moments of a layer's last iterations."""
from typing import Optional, Tuple

import torch
from torch import Tensor

from ..functional import (AffineMoments, ConvCall, Moments, affine_moments,
                          moments_at_weight, pool_moments)


class MomentWindow:
    """Ring of the moments of the last ``size`` iterations of one layer.

    Holds detached tensors of fixed shape, made when the first iteration comes
    in and emptied when the convolution's shape or the dtype changes. An entry
    takes one weight-sized tensor, and C floats a few times; none at all
    beyond those where nothing is compensated.

    Args:
        size (int): Iterations, the present one included.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._entries: Optional[AffineMoments] = None
        self._valid: Optional[Tensor] = None
        self._cursor = 0
        self.filled = 0

    def pool(self, x: Tensor, moments: Moments,
             call: Optional[ConvCall]) -> Tuple[Tensor, Tensor, Tensor]:
        """Enter the present iteration, and pool it with the past ones.

        A channel whose moments or derivatives are not finite makes this
        iteration's statistics what batch normalisation's would be (the loss
        shows it) and is left out in the following ones.

        Args:
            x (Tensor): The layer's input, shape (N, C, H, W).
            moments (Moments): Its moments.
            call (ConvCall, optional): The convolution that made it. None:
                past entries are used as they are.

        Returns:
            tuple[Tensor, Tensor, Tensor]: Pooled mean, pooled biased variance
            and the weight of the present iteration, each of shape (C,).
        """
        present = self._describe(x, moments, call)
        finite = torch.isfinite(present.mean_offset + present.square_offset)
        if not self._fits(present):
            self._allocate(present)
        self._cursor = (self._cursor + 1) % self.size
        for ring, value in zip(self._entries, present):
            ring[self._cursor].copy_(value)
        self._valid[self._cursor].fill_(True)
        self.filled = min(self.filled + 1, self.size)

        means, variances = self._at_present(call)
        means[self._cursor] = moments.mean
        variances[self._cursor] = moments.var
        pooled = pool_moments(means, variances, self._valid)
        self._valid[self._cursor].copy_(finite)
        return pooled

    @staticmethod
    def _describe(x: Tensor, moments: Moments,
                  call: Optional[ConvCall]) -> AffineMoments:
        if call is not None:
            return affine_moments(x, moments, call)
        # Without a weight to follow: constants, with derivatives of length 0.
        none = moments.mean.new_zeros((1, 0))
        return AffineMoments(moments.mean, moments.mean, moments.var, none,
                             none.expand(moments.mean.numel(), 0))

    def _at_present(self,
                    call: Optional[ConvCall]) -> Tuple[Tensor, Tensor]:
        if call is None:
            return (self._entries.mean_offset.clone(),
                    self._entries.square_offset.clone())
        shift = None
        if call.bias_trains:
            # The offset of the mean is the bias.
            offset = self._entries.mean_offset
            shift = offset[self._cursor] - offset
        return moments_at_weight(self._entries, call.weight, shift)

    def _fits(self, present: AffineMoments) -> bool:
        if self._entries is None:
            return False
        return all(
            ring.shape[1:] == value.shape and ring.dtype == value.dtype
            and ring.device == value.device
            for ring, value in zip(self._entries, present))

    def _allocate(self, present: AffineMoments) -> None:
        self._entries = AffineMoments(*(v.new_zeros((self.size, *v.shape))
                                        for v in present))
        self._valid = present.centre.new_zeros(
            (self.size, present.centre.numel()), dtype=torch.bool)
        self.filled = 0

    def to(self, device: torch.device) -> None:
        """Move to a device. The dtype stays: statistics are not halved."""
        if self._entries is not None:
            self._entries = AffineMoments(*(v.to(device)
                                            for v in self._entries))
            self._valid = self._valid.to(device)
