"""Calls that are linear in filters of their own: one filter a channel."""
from typing import (Any, Callable, Dict, List, NamedTuple, Optional, Tuple,
                    Type, Union)

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
            _table(_reach, *of_axis, self.transposed, dtype, total.device)
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

    def sample(self, x: Tensor, size: int, turn: int) -> Tensor:
        """Patches of the input behind some positions of the output.

        They are spread evenly over examples, rows and columns. There may be
        fewer than are asked for; some come several times then.

        Args:
            x (Tensor): Output of the call, shape (N, C, H, W). Of an empty
                one they are 0.
            size (int): How many positions P.
            turn (int): Others in each turn, of eight.

        Returns:
            Tensor: Shape (P, groups, C_in / groups, kh, kw), a view of what
            is laid out otherwise.
        """
        channels, kernel = self.input.size(1), self.weight.shape[2:]
        if x.numel() == 0:
            patches = x.new_zeros((size, channels, *kernel))
            return patches.unflatten(1, (self.groups, -1))
        examples, rows, columns = self._positions(x, size, turn)
        patches = torch.ops.aten.index(
            self.input, [examples.input, None, rows.input, columns.input])
        for lines in (rows, columns):
            if lines.met is not None:
                patches.mul_(lines.met)
        # (P, kh, kw, C_in)
        patches = patches.permute(0, 3, 1, 2)
        return patches.unflatten(1, (self.groups, -1))

    def sample_mean(self, x: Tensor, size: int, turn: int,
                    dtype: torch.dtype) -> Tensor:
        """Mean of the outputs at the positions of :meth:`sample`.

        Returns:
            Tensor: Shape (C,).
        """
        if x.numel() == 0:
            return x.new_zeros(x.size(1), dtype=dtype)
        examples, rows, columns = self._positions(x, size, turn)
        outputs = torch.ops.aten.index(
            x, [examples.output, None, rows.output, columns.output])
        return outputs.mean(0, dtype=dtype)

    def _positions(self, x: Tensor, size: int, turn: int) -> List['_Lines']:
        """Those of a turn, on the axes of examples, rows and columns."""
        device = x.device
        tables = [_table(_make_examples, x.size(0), size, device)]
        tables += [
            _table(_make_lines, axis, self.input.size(axis + 2),
                   x.size(axis + 2), self.weight.size(axis + 2),
                   self.stride[axis], self.padding[axis], self.dilation[axis],
                   self.transposed, size, device) for axis in (0, 1)
        ]
        return [table[turn % _TURNS] for table in tables]

    def _as_filters(self, weight: Tensor) -> Tensor:
        if not self.transposed:
            return weight.flatten(1)
        by_group = weight.unflatten(0, (self.groups, -1))
        return by_group.transpose(1, 2).flatten(0, 1).flatten(1)


# Of the sizes of axes that were met.
_TABLES: Dict[tuple, Any] = {}
_MOST_TABLES = 4096


def _table(make: Callable, *sizes) -> Any:
    """What ``make`` gives, once for each of the sizes."""
    key = (make, *sizes)
    table = _TABLES.get(key)
    if table is None:
        table = make(*sizes)
        first = table[0].output if isinstance(table, list) else table
        if type(first) is Tensor:  # no stand-in of one that traces
            if len(_TABLES) == _MOST_TABLES:
                _TABLES.clear()
            _TABLES[key] = table
    return table


def _reach(size: int, out: int, kernel: int, stride: int, padding: int,
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


class _Lines(NamedTuple):
    """Where on one axis a sample's positions are.

    Attributes:
        output (Tensor): Lines of the output, shape (P,).
        input (Tensor): Lines of the input behind them, (P, kernel), in a
            shape that broadcasts with those of the other axes.
        met (Tensor, optional): Whether there is such a line, and no padding.
    """
    output: Tensor
    input: Tensor
    met: Optional[Tensor] = None


_TURNS = 8
# Powers of the inverse of the root of x^4 = x + 1: points at multiples of
# them, modulo 1, fill the cube evenly. Of rows, columns and examples.
_STEPS = tuple(round(1.2207440846057596**-i * 2**24) for i in (1, 2, 3))


def _spread(axis: int, size: int, count: int, device: torch.device) -> Tensor:
    """Lines of an axis for each turn's positions, shape (turns, count)."""
    point = torch.arange(_TURNS * count, device=device) * _STEPS[axis]
    lines = (point + 2**23) % 2**24 * size // 2**24
    return lines.view(_TURNS, count)


def _make_examples(size: int, count: int,
                   device: torch.device) -> List[_Lines]:
    return [
        _Lines(lines, lines.view(-1, 1, 1))
        for lines in _spread(2, size, count, device)
    ]


def _make_lines(axis: int, size: int, out: int, kernel: int, stride: int,
                padding: int, dilation: int, transposed: bool, count: int,
                device: torch.device) -> List[_Lines]:
    output = _spread(axis, out, count, device)
    taps = torch.arange(kernel, device=device) * dilation - padding
    lines = output.unsqueeze(2)
    lines = lines - taps if transposed else lines * stride + taps
    met = (lines >= 0) & (lines < (size * stride if transposed else size))
    if transposed:
        met &= lines % stride == 0
        lines = lines // stride
    shape = (_TURNS, count, *((-1, 1) if axis == 0 else (1, -1)))
    lines = lines.clamp(0, size - 1).view(shape)
    met = met.view(*shape, 1) if padding or transposed else [None] * _TURNS
    return [_Lines(*of_turn) for of_turn in zip(output, lines, met)]


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
