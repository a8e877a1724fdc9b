"""The moments of a layer's last iterations."""
from typing import Any, Dict, Optional, Tuple

import torch
from torch import Tensor

from ..functional import (AffineMoments, LinearCall, Moments, Processes,
                          affine_moments, moments_at_weight, pool_moments,
                          variance_about)
from .moving_average import alike
from .statistics import Batch


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
        self.filled = 0
        self._entries: Optional[AffineMoments] = None
        # This process's part of each entry's batch.
        self._parts: Optional[Tensor] = None
        self._cursor = -1

    def pool(self, batch: Batch,
             call: Optional[LinearCall]) -> Tuple[Tensor, Tensor, Tensor]:
        """Enter the present iteration, and pool it with the past ones.

        Every iteration has the same weight, whatever its batch size, as in
        the paper. A channel whose moments or derivatives are not finite makes
        this iteration's statistics what batch normalisation's would be (the
        loss shows it) and is left out in the following ones.

        Args:
            batch (Batch): The layer's input and its moments.
            call (LinearCall, optional): The convolution that made it. None:
                past entries are used as they are.

        Returns:
            tuple[Tensor, Tensor, Tensor]: Pooled mean, pooled biased variance
            and the weight of the present iteration, each of shape (C,).
        """
        x, own, moments, processes = batch
        present = self._describe(x, own, moments.mean, call)
        if not self._fits(present):
            self._allocate(present)
        self._cursor = (self._cursor + 1) % self.size
        self.filled = min(self.filled + 1, self.size)
        for ring, value in zip(self._entries, present):
            ring[self._cursor].copy_(value)

        entries = AffineMoments(*(ring[:self.filled]
                                  for ring in self._entries))
        if processes is not None:
            self._parts[self._cursor] = own.count / moments.count
        mean, square = self._at_present(entries, call, processes)
        var = variance_about(entries.centre, mean, square)
        valid = torch.isfinite(mean + var)
        mean[self._cursor] = moments.mean
        var[self._cursor] = moments.var
        valid[self._cursor] = True
        weights = valid.to(mean.dtype)
        return (*pool_moments(mean, var, weights), weights.sum(0).reciprocal())

    @staticmethod
    def _describe(x: Tensor, own: Moments, centre: Tensor,
                  call: Optional[LinearCall]) -> AffineMoments:
        channels = own.mean.numel()
        if call is None or x.numel() == 0:
            # No weight to follow: constants, with derivatives of length 0.
            # Of an empty part of a batch: zeros.
            groups, length = 1, 0
            if call is not None:
                groups, length = call.groups, call.filters.size(1)
            square = own.var + (own.mean - centre).square()
            return AffineMoments(centre, own.mean, square,
                                 centre.new_zeros((groups, length)),
                                 centre.new_zeros((channels, length)))
        return affine_moments(x, own, call, centre)

    def _at_present(
            self, entries: AffineMoments, call: Optional[LinearCall],
            processes: Optional[Processes]) -> Tuple[Tensor, Tensor]:
        """The whole batches' means and mean squares at today's weight."""
        parts = self._parts[:self.filled]
        if call is None:
            mean, square = entries.mean_offset.clone(), entries.square_offset
        else:
            bias = None
            if call.bias_trains:
                bias = entries.mean_offset[self._cursor]
                if processes is not None:  # an empty part does not know it
                    bias = processes.sum(bias * parts[self._cursor])
            mean, square = moments_at_weight(entries, call.filters, bias)
        if processes is None:
            return mean, square
        return processes.sum(torch.cat([mean, square], 1) * parts).chunk(2, 1)

    def _fits(self, present: AffineMoments) -> bool:
        return self._entries is not None and all(
            alike(ring[0], value)
            for ring, value in zip(self._entries, present))

    def _allocate(self, present: AffineMoments) -> None:
        self._entries = AffineMoments(*(v.new_zeros((self.size, *v.shape))
                                        for v in present))
        self._parts = present.centre.new_ones((self.size, 1))
        self._cursor = -1
        self.filled = 0

    def state_dict(self) -> Dict[str, Any]:
        """What is held, for a checkpoint."""
        return dict(
            filled=self.filled,
            cursor=self._cursor,
            parts=self._parts,
            entries=None
            if self._entries is None else self._entries._asdict())

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Hold what :meth:`state_dict` of one of the same size gave."""
        self.filled, self._cursor = state['filled'], state['cursor']
        self._parts = state['parts']
        entries = state['entries']
        self._entries = (
            entries if entries is None else AffineMoments(**entries))

    def to(self, device: torch.device) -> None:
        """Move to a device. The dtype stays: statistics are not halved."""
        if self._entries is not None:
            self._entries = AffineMoments(*(v.to(device)
                                            for v in self._entries))
            self._parts = self._parts.to(device)
