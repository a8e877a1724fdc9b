"""Calls that are linear in filters of their own: one filter a channel."""
from typing import Any, NamedTuple, Tuple, Type, Union

import torch
from torch import Tensor


class ConvCall(NamedTuple):
    """One call x = conv(input; weight) + bias, all tensors detached.

    Attributes:
        input (Tensor): Shape (N, C_in, H_in, W_in).
        weight (Tensor): The weight as used (after centralisation, in the
            autocast dtype), shape (C, C_in / groups, kh, kw); transposed
            (C_in, C / groups, kh, kw).
        bias_trains (bool): Whether a bias is added that may move.
        stride, padding, dilation (tuple[int, int]): As in ``nn.Conv2d``.
        groups (int): As in ``nn.Conv2d``.
        transposed (bool): Whether it is ``nn.ConvTranspose2d``'s.
    """
    input: Tensor
    weight: Tensor
    bias_trains: bool
    stride: Tuple[int, int]
    padding: Tuple[int, int]
    dilation: Tuple[int, int]
    groups: int
    transposed: bool = False

    @property
    def filters(self) -> Tensor:
        """One row for each output channel, shape (C, F)."""
        return self._as_filters(self.weight)

    def patch_sums(self, grad: Tensor,
                   dtype: torch.dtype) -> Tuple[Tensor, Tensor]:
        r"""Sums over all positions of the input's patches :math:`p_i`.

        Args:
            grad (Tensor): Shape (N, C, H, W), as the call's output.
            dtype (torch.dtype): Of the first result.

        Returns:
            tuple[Tensor, Tensor]: :math:`\sum_i p_i` of each group, shape
            (groups, F), and :math:`\sum_i g_{ij} p_i`, shape (C, F).
        """
        # The sum is linear in the input: examples are summed before the
        # convolution, which then sees a batch of one.
        ones = torch.ones((), dtype=dtype, device=grad.device)
        return (self._weight_gradient(
            ones.expand(1, self.groups, *grad.shape[2:]),
            self.input.sum(0, keepdim=True, dtype=dtype)),
                self._weight_gradient(grad, self.input))

    def _weight_gradient(self, grad: Tensor, input: Tensor) -> Tensor:
        """Gradient by a weight of as many filters as grad has channels."""
        channels = grad.size(1)
        if self.transposed:
            # The convolution whose input's gradient the call is.
            shape = (-1, channels // self.groups, *self.weight.shape[2:])
            weight = self.weight[:, :1].to(input.dtype).expand(shape)
            # What output_padding adds may be out of all patches' reach.
            reach = [(size - 1) * step - 2 * pad + dilation * (kernel - 1) + 1
                     for size, step, pad, dilation, kernel in zip(
                         input.shape[2:], self.stride, self.padding,
                         self.dilation, self.weight.shape[2:])]
            grad, input = input, grad[:, :, :reach[0], :reach[1]]
        else:
            shape = (channels, *self.weight.shape[1:])
            weight = self.weight[:1].to(input.dtype).expand(shape)
        _, result, _ = torch.ops.aten.convolution_backward(
            grad, input, weight, None, self.stride, self.padding,
            self.dilation, False, (0, 0), self.groups, (False, True, False))
        return self._as_filters(result)

    def _as_filters(self, weight: Tensor) -> Tensor:
        if not self.transposed:
            return weight.flatten(1)
        by_group = weight.unflatten(0, (self.groups, -1))
        return by_group.transpose(1, 2).flatten(0, 1).flatten(1)


class DeformCall(NamedTuple):
    """One call of a deformable convolution, all tensors detached.

    Where it looks (and how much it weighs, in version 2) is taken as it was:
    in its own filters the call is linear.

    Attributes:
        function (type): mmcv's ``DeformConv2dFunction`` or
            ``ModulatedDeformConv2dFunction``.
        before (tuple): Its arguments before the weight.
        weight (Tensor): The weight, shape (C, C_in / groups, kh, kw).
        after (tuple): Its arguments after weight and bias.
        bias_trains (bool): Whether a bias is added that may move.
        groups (int): As in ``nn.Conv2d``.
    """
    function: Type[torch.autograd.Function]
    before: Tuple[Tensor, ...]
    weight: Tensor
    after: Tuple[Any, ...]
    bias_trains: bool
    groups: int

    @property
    def filters(self) -> Tensor:
        """One row for each output channel, shape (C, F)."""
        return self.weight.flatten(1)

    def patch_sums(self, grad: Tensor,
                   dtype: torch.dtype) -> Tuple[Tensor, Tensor]:
        """As :meth:`ConvCall.patch_sums`.

        The operator gives a gradient by its weight only with all others, so
        that both come from one call, with another filter in each group.
        """
        by_group = self.weight.unflatten(0, (self.groups, -1))
        weight = torch.cat([by_group[:, :1], by_group], 1)
        grad = grad.unflatten(1, (self.groups, -1))
        # Half precision would overflow with ones.
        one = grad[:, 0, :1].numel()**-0.5
        grad = torch.cat([torch.full_like(grad[:, :, :1], one), grad], 2)
        with torch.enable_grad():
            weight = weight.flatten(0, 1).requires_grad_()
            x = self.function.apply(*self.before, weight, *self.after)
            result, = torch.autograd.grad(x, weight, grad.flatten(1, 2))
        result = result.flatten(1).unflatten(0, (self.groups, -1))
        return result[:, 0].to(dtype) / one, result[:, 1:].flatten(0, 1)


LinearCall = Union[ConvCall, DeformCall]
