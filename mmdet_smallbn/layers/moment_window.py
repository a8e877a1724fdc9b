"""The moments of a layer's last iterations."""
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from ..functional import (LinearCall, inner_products, moment_derivatives,
                          pool_moments, variance_about)
from .moving_average import alike
from .statistics import Batch


class MomentWindow:
    """Ring of the moments of the last ``size`` iterations of one layer.

    Of each iteration it holds the moments as affine functions of the
    convolution's weight (:class:`mmdet_smallbn.functional.AffineMoments`), in
    detached tensors of fixed shape, made when the first iteration comes in
    and emptied when the convolution's shape or the dtype changes. That is one
    weight-sized tensor, and C floats a few times; none at all beyond those
    where nothing is compensated.

    Args:
        size (int): Iterations, the present one included.
        positions (int, optional): Positions of a feature map that a
            derivative is estimated from, about. None: all.
    """

    def __init__(self, size: int, positions: Optional[int] = None) -> None:
        self.size = size
        self.positions = positions
        self.filled = 0
        self._turn = -1
        # Centres, and offsets of mean and mean square: (3, size, C).
        self._constants: Optional[Tensor] = None
        # Derivatives: (size, groups, F) and (size, C, F), or none.
        self._derivatives: List[Tensor] = []
        # This process's part of each entry's batch: (size, 1).
        self._parts: Optional[Tensor] = None

    @torch.no_grad()
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
        mean, var = self.enter(batch, call)
        total = mean + var
        valid = total - total == 0  # finite
        valid[self.place] = True
        weights = valid.to(mean.dtype)
        weights /= weights.sum(0)
        mean, var = pool_moments(mean, var, weights)
        return mean, var, weights[self.place]

    @property
    def place(self) -> int:
        """Where the present iteration is among the entries."""
        return self._turn % self.size

    @torch.no_grad()
    def enter(self, batch: Batch,
              call: Optional[LinearCall]) -> Tuple[Tensor, Tensor]:
        """Enter the present iteration, and bring all to today's weight.

        Args:
            batch (Batch): As for :meth:`pool`.
            call (LinearCall, optional): As for :meth:`pool`.

        Returns:
            tuple[Tensor, Tensor]: Means and biased variances of the
            iterations held, shape (k, C).
        """
        derivatives = self._differentiate(batch, call)
        self._make_room(batch.moments.mean, derivatives)
        self._turn += 1
        self.filled = min(self.filled + 1, self.size)
        if batch.processes is not None:
            self._parts[self.place] = batch.own.count / batch.moments.count
        mean, square = self._at_present(batch, call, derivatives)
        centre = self._constants[0, :self.filled]
        return mean, variance_about(centre, mean, square)

    def _differentiate(self, batch: Batch,
                       call: Optional[LinearCall]) -> Tuple[Tensor, ...]:
        if call is None:
            return ()
        x, own, moments, _ = batch
        if x.numel() == 0:  # this process's part of the batch
            length = call.filters.size(1)
            return (own.mean.new_zeros((call.groups, length)),
                    own.mean.new_zeros((own.mean.numel(), length)))
        # Other positions in each iteration, the same after a resume.
        return moment_derivatives(x, own, call, moments.mean, self.positions,
                                  self._turn + 1)

    def _at_present(self, batch: Batch, call: Optional[LinearCall],
                    derivatives: Tuple[Tensor, ...]) -> Tensor:
        """Enter, and give all batches' means and mean squares, (2, k, C)."""
        place = self.place
        own, centre, processes = batch.own, batch.moments.mean, batch.processes
        square = own.var
        if processes is not None:
            square = square + (own.mean - centre).square()
        constants = self._constants[:, :self.filled]
        constants[:, place] = torch.stack([centre, own.mean, square])
        if call is None:
            values = constants[1:].clone()
        else:
            for ring, value in zip(self._derivatives, derivatives):
                ring[place] = value
            products = inner_products(
                *(ring[:self.filled] for ring in self._derivatives),
                call.filters)
            # Exact at the present weight, however the derivatives are.
            constants[1:, place] -= products[:, place]
            values = products + constants[1:]
            if call.bias_trains:
                # The bias moves the mean one to one, and is what a mean's
                # offset is.
                bias = constants[1, place]
                if processes is not None:  # an empty part does not know it
                    bias = processes.sum(bias * self._parts[place])
                values[0] = products[0] + bias
        if processes is not None:
            values = processes.sum(values * self._parts[:self.filled])
        # As the batch has them, whatever its derivatives are.
        values[:, place] = torch.stack(batch.moments[:2])
        return values

    def _make_room(self, mean: Tensor, derivatives: Tuple[Tensor,
                                                          ...]) -> None:
        held = [] if self._constants is None else [
            self._constants[0, 0], *(ring[0] for ring in self._derivatives)
        ]
        if len(held) == 1 + len(derivatives) and all(
                map(alike, held, (mean, *derivatives))):
            return
        self._constants = mean.new_zeros((3, self.size, *mean.shape))
        self._derivatives = [
            value.new_zeros((self.size, *value.shape)) for value in derivatives
        ]
        self._parts = mean.new_ones((self.size, 1))
        self._turn = -1
        self.filled = 0

    def state_dict(self) -> Dict[str, Any]:
        """What is held, for a checkpoint."""
        return dict(
            filled=self.filled,
            turn=self._turn,
            parts=self._parts,
            constants=self._constants,
            derivatives=dict(enumerate(self._derivatives)))

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Hold what :meth:`state_dict` of one of the same size gave."""
        self.filled, self._turn = state['filled'], state['turn']
        self._parts, self._constants = state['parts'], state['constants']
        self._derivatives = list(state['derivatives'].values())

    def to(self, device: torch.device) -> None:
        """Move to a device. The dtype stays: statistics are not halved."""
        if self._constants is not None:
            self._constants = self._constants.to(device)
            self._derivatives = [v.to(device) for v in self._derivatives]
            self._parts = self._parts.to(device)
