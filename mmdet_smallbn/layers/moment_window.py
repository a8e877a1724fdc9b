"""The moments of a layer's last iterations."""
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from ..functional import (ConvCall, LinearCall, factors_are_smaller,
                          inner_products, is_sampled, moment_derivatives,
                          patch_values, sample_products, sample_weights,
                          variance_about)
from .moving_average import alike
from .statistics import Batch


class MomentWindow:
    r"""Ring of the moments of the last ``size`` iterations of one layer.

    Of each iteration it holds the moments as first-order functions of the
    convolution's weight :math:`\theta`. With the mean of the batch (of all of
    it, where several processes share it) held fixed as the centre c,

    .. math::
        \mu(\theta) = \text{offset}_\mu + \langle\partial\mu, \theta\rangle,
        \qquad
        s(\theta) = \text{offset}_s + \langle\partial s, \theta\rangle,

    where :math:`s = \text{mean}((x - c)^2)`. The offsets make both exact at
    the weight they were taken at, however the derivatives are estimated or
    rounded, and no past weight is needed. The rings are detached tensors of
    fixed shape, made when the first iteration comes in and emptied when the
    convolution's shape or the dtype changes; C floats a few times and nothing
    else where nothing is compensated.

    Args:
        size (int): Iterations, the present one included.
        positions (int, optional): Positions of a feature map that a
            derivative is estimated from. None: all.
    """

    def __init__(self, size: int, positions: Optional[int] = None) -> None:
        self.size = size
        self.positions = positions
        self.filled = 0
        self._turn = -1
        # Whether derivatives are held as a sample's factors, which is decided
        # when the first of a weight of this shape come in.
        self._as_sample = False
        self._weight_shape: Tuple[int, ...] = ()
        # Centres, offsets of mean and mean square, biases that train: (4,
        # size, C).
        self._constants: Optional[Tensor] = None
        # Derivatives of mean and mean square, (size, groups, F) and (size, C,
        # F), or the factors of their estimates, patches and weights, (size,
        # P, groups, C_in / groups, kh, kw) and (size, P, C); or none.
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
        means, variances = self.enter(batch, call)
        # About the present mean, which is not far: nothing cancels.
        present = batch.moments.mean
        values = means.new_empty((2, *means.shape))
        away = torch.sub(means, present, out=values[0])
        square = torch.addcmul(variances, away, away, out=values[1])
        unused = square - square != 0  # not finite
        unused[self.place] = False
        share = (self.filled - unused.sum(0, dtype=means.dtype)).reciprocal_()
        away, square = values.masked_fill_(unused, 0).sum(1).mul_(share)
        return (present + away, torch.addcmul(square, away, away, value=-1),
                share)

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
        _, own, moments, processes = batch
        # Other positions in each iteration, the same after a resume.
        turn = self._turn + 1
        derivatives = self._differentiate(batch, call, turn)
        self._make_room(moments.mean, derivatives)
        self._turn += 1
        self.filled = min(self.filled + 1, self.size)
        place, constants = self.place, self._constants[:, :self.filled]
        constants[0, place] = moments.mean
        square = own.var
        if processes is not None:
            self._parts[place] = own.count / moments.count
            square = square + (own.mean - moments.mean).square()
        if call is None:
            constants[1, place] = own.mean
            constants[2, place] = square
            values = constants[1:3].clone()
        else:
            products = self._products(batch, call, derivatives)
            # Exact at the present weight, however the derivatives are.
            torch.sub(own.mean, products[0, place], out=constants[1, place])
            torch.sub(square, products[1, place], out=constants[2, place])
            values = products + constants[1:3]
            if call.bias_trains:
                values[0] += self._bias_step(batch, call, products[0, place],
                                             turn)
        if processes is not None:
            values = processes.sum(values * self._parts[:self.filled])
        mean, square = values
        var = variance_about(constants[0], mean, square)
        # As the batch has them, whatever its derivatives are.
        mean[place], var[place] = moments.mean, moments.var
        return mean, var

    def _differentiate(self, batch: Batch, call: Optional[LinearCall],
                       turn: int) -> Tuple[Tensor, ...]:
        """What the rings hold of an iteration, or begins with it."""
        if call is None:
            return ()
        x, own, moments, processes = batch
        shape = (*call.weight.shape, isinstance(call, ConvCall))
        if self._weight_shape != shape:
            self._weight_shape = shape
            self._as_sample = is_sampled(
                x, call, self.positions) and factors_are_smaller(
                    call, self.positions)
        if self._as_sample:
            patches = call.sample(x, self.positions, turn)
            # To be filled in, once the values are known.
            weights = own.mean.new_empty((self.positions, x.size(1)))
            return patches, weights
        centre = None if processes is None else moments.mean
        return moment_derivatives(x, own, call, centre, self.positions, turn)

    def _products(self, batch: Batch, call: LinearCall,
                  derivatives: Tuple[Tensor, ...]) -> Tensor:
        """Enter the derivatives, and multiply all with the weight."""
        place = self.place
        first, second = (ring[:self.filled] for ring in self._derivatives)
        first[place] = derivatives[0]
        if not self._as_sample:
            second[place] = derivatives[1]
            return inner_products(first, second, call.filters)
        _, own, moments, processes = batch
        values = patch_values(first, call.filters, second.dtype)
        means = values.mean(1)
        shift = None if processes is None else own.mean - moments.mean
        sample_weights(values[place], means[place], shift, out=second[place])
        return sample_products(values, means, second)

    def _bias_step(self, batch: Batch, call: LinearCall, product: Tensor,
                   turn: int) -> Tensor:
        """How far the bias has moved since each iteration, shape (k, C).

        It moves the mean one to one, and the mean square about the batch's
        own mean not at all, to first order.
        """
        x, own, _, processes = batch
        mean = own.mean
        if is_sampled(x, call, self.positions) or self._as_sample:
            mean = call.sample_mean(x, self.positions, turn, mean.dtype)
        bias = mean - product
        if processes is not None:  # an empty part does not know it
            bias = processes.sum(bias * self._parts[self.place])
        self._constants[3, self.place] = bias
        return bias - self._constants[3, :self.filled]

    def _make_room(self, mean: Tensor, derivatives: Tuple[Tensor,
                                                          ...]) -> None:
        held = [] if self._constants is None else [
            self._constants[0, 0], *(ring[0] for ring in self._derivatives)
        ]
        if len(held) == 1 + len(derivatives) and all(
                map(alike, held, (mean, *derivatives))):
            return
        self._constants = mean.new_zeros((4, self.size, *mean.shape))
        self._derivatives = [
            torch.zeros(
                (self.size, *value.shape),
                dtype=value.dtype,
                device=value.device) for value in derivatives
        ]
        self._parts = mean.new_ones((self.size, 1))
        self._turn = -1
        self.filled = 0

    def state_dict(self) -> Dict[str, Any]:
        """What is held, for a checkpoint."""
        return dict(
            filled=self.filled,
            turn=self._turn,
            as_sample=self._as_sample,
            weight_shape=self._weight_shape,
            parts=self._parts,
            constants=self._constants,
            derivatives=dict(enumerate(self._derivatives)))

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Hold what :meth:`state_dict` of one of the same size gave."""
        self.filled, self._turn = state['filled'], state['turn']
        self._as_sample = state['as_sample']
        self._weight_shape = tuple(state['weight_shape'])
        self._parts, self._constants = state['parts'], state['constants']
        self._derivatives = list(state['derivatives'].values())

    def to(self, device: torch.device) -> None:
        """Move to a device. The dtype stays: statistics are not halved."""
        if self._constants is not None:
            self._constants = self._constants.to(device)
            self._derivatives = [v.to(device) for v in self._derivatives]
            self._parts = self._parts.to(device)
