"""Calls that are linear in filters of their own: one filter a channel."""
from typing import Any, Dict, NamedTuple, Optional, Tuple, Type, Union

import torch
from torch import Tensor

# What a part of a call keeps at least, of examples and of rows and columns.
_EXAMPLES = 16
_LINES = 6


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
        """Both :meth:`patch_sum` and :meth:`products`."""
        return (self.patch_sum(grad.shape[2:], dtype), self.products(grad))

    def patch_sum(self, size: Tuple[int, int], dtype: torch.dtype) -> Tensor:
        r"""Sum of the input's patches over all positions, :math:`\sum_i p_i`.

        Args:
            size (tuple[int, int]): Height and width of the output.
            dtype (torch.dtype): To sum in.

        Returns:
            Tensor: Shape (groups, F).
        """
        total = self.input.sum(0, dtype=dtype)
        kernel = self.weight.shape[2:]
        if kernel.numel() == 1 and not any(self.padding) and (
                total.shape[1:] == size):
            return total.sum((1, 2)).view(self.groups, -1)
        rows, columns = (
            _reach(*of_axis, self.transposed, dtype, total.device)
            for of_axis in zip(total.shape[1:], size, kernel, self.stride,
                               self.padding, self.dilation))
        # (C_in, H, W) x (kw, W) x (kh, H) -> (C_in, kh, kw)
        sums = torch.tensordot(total @ columns.t(), rows, ([1], [1]))
        return sums.transpose(1, 2).reshape(self.groups, -1)

    def products(self, grad: Tensor) -> Tensor:
        r"""Sums of patches with weights, :math:`\sum_i g_{ij} p_i`.

        Args:
            grad (Tensor): Shape (N, C, H, W), as the call's output.

        Returns:
            Tensor: Shape (C, F).
        """
        weight, input = self.weight.to(grad.dtype), self.input.to(grad.dtype)
        if self.transposed:
            # The convolution whose input's gradient the call is. What
            # output_padding adds may be out of all patches' reach.
            height, width = (
                (size - 1) * step - 2 * pad + dilation * (kernel - 1) + 1
                for size, step, pad, dilation, kernel in zip(
                    input.shape[2:], self.stride, self.padding, self.dilation,
                    weight.shape[2:]))
            grad, input = input, grad[:, :, :height, :width]
        _, result, _ = torch.ops.aten.convolution_backward(
            grad, input, weight, None, self.stride, self.padding,
            self.dilation, False, (0, 0), self.groups, (False, True, False))
        return self._as_filters(result)

    def part(self, x: Tensor, positions: int,
             turn: int) -> Optional[Tuple[Tensor, 'ConvCall']]:
        """The call at some positions, spread evenly over its output.

        Of maps these are rows and columns whose patches lie within the input,
        of many examples with small maps some of the examples.

        Args:
            x (Tensor): Output of the call, shape (N, C, H, W).
            positions (int): About how many.
            turn (int): Other positions in each turn.

        Returns:
            tuple[Tensor, ConvCall], optional: Output and call of that part.
            None where all is not much more.
        """
        many = x.numel() // x.size(1) // positions
        if many < 2:
            return None
        step = min(many, x.size(0) // _EXAMPLES)
        call = self
        if step >= 2:
            examples = slice(turn % step, None, step)
            x = x[examples]
            call = self._replace(input=self.input[examples])
            many //= step
        if many >= 2 and not self.transposed:
            found = call._part_of_maps(x, many, turn)
            if found is not None:
                return found
        return None if call is self else (x, call)

    def _part_of_maps(self, x: Tensor, many: int,
                      turn: int) -> Optional[Tuple[Tensor, 'ConvCall']]:
        reach = [d * (k - 1) + 1
                 for d, k in zip(self.dilation, self.weight.shape[2:])]
        # Outputs whose patches lie within the input.
        first = [-(-p // s) for p, s in zip(self.padding, self.stride)]
        inside = [
            (size - r + p) // s + 1 - f
            for size, r, p, s, f in zip(self.input.shape[2:], reach,
                                        self.padding, self.stride, first)
        ]
        # Of each axis at least some are left. Rows that are left out need not
        # be read.
        steps = [min(many, inside[0] // _LINES)]
        if steps[0] < 2 or 2 * inside[1] < x.size(3):  # narrow maps
            return None
        steps.append(max(1, min(many // steps[0], inside[1] // _LINES)))
        first = [f + turn % step for f, step in zip(first, steps)]
        counts = [(i - turn % step - 1) // step + 1
                  for i, step in zip(inside, steps)]
        corner = [f * s - p
                  for f, s, p in zip(first, self.stride, self.padding)]
        rows, columns = (
            slice(f, f + (n - 1) * step + 1, step)
            for f, n, step in zip(first, counts, steps))
        # Each row of the output with the rows of the input that it sees is an
        # example by itself.
        stride = [step * s for step, s in zip(steps, self.stride)]
        width = (counts[1] - 1) * stride[1] + reach[1]
        slabs = self.input[:, :, corner[0]:, corner[1]:corner[1] + width]
        slabs = slabs.unfold(2, reach[0], stride[0])[:, :, :counts[0]]
        slabs = slabs.permute(0, 2, 1, 4, 3).flatten(0, 1)
        x = x[:, :, rows, columns].transpose(1, 2).flatten(0, 1).unsqueeze(2)
        return x, self._replace(
            input=slabs, stride=(1, stride[1]), padding=(0, 0))

    def _as_filters(self, weight: Tensor) -> Tensor:
        if not self.transposed:
            return weight.flatten(1)
        by_group = weight.unflatten(0, (self.groups, -1))
        return by_group.transpose(1, 2).flatten(0, 1).flatten(1)


# Of the geometries that were met; multi-scale training meets many.
_REACHES: Dict[tuple, Tensor] = {}
_MOST_REACHES = 512


def _reach(*geometry) -> Tensor:
    """:func:`_make_reach`, once for each geometry."""
    table = _REACHES.get(geometry)
    if table is None:
        table = _make_reach(*geometry)
        if type(table) is Tensor:  # no stand-in of one that traces
            if len(_REACHES) == _MOST_REACHES:
                _REACHES.clear()
            _REACHES[geometry] = table
    return table


def _make_reach(size: int, out: int, kernel: int, stride: int, padding: int,
                dilation: int, transposed: bool, dtype: torch.dtype,
                device: torch.device) -> Tensor:
    """Which lines of the input meet each of the kernel's.

    Returns:
        Tensor: Of ones and zeros, shape (kernel, size).
    """
    lines = torch.arange(size, device=device)
    taps = torch.arange(kernel, device=device)[:, None] * dilation - padding
    if transposed:
        met = lines * stride + taps
        return ((met >= 0) & (met < out)).to(dtype)
    met = lines - taps
    return ((met % stride == 0) & (met >= 0) & (met < out * stride)).to(dtype)


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

    def part(self, x: Tensor, positions: int, turn: int) -> None:
        """None: always all. Its sampling places are no lines."""


LinearCall = Union[ConvCall, DeformCall]
