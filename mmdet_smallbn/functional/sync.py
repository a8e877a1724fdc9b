"""Statistics of a batch that several processes share."""
from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor

from .moments import Moments, pool_moments
from .normalize import GradientStatistics


class Processes:
    """The processes of the default group, as parts of one batch.

    Every method with a collective has to be called by all of them, in the
    same order, also by one whose part of the batch is empty.
    """

    @classmethod
    def current(cls) -> Optional['Processes']:
        """The processes of this training; None if there is only this one."""
        if (dist.is_available() and dist.is_initialized()
                and dist.get_world_size() > 1):
            return cls()
        return None

    @staticmethod
    def _gather(part: Tensor) -> Tensor:
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part.contiguous())
        return torch.stack(parts)

    @torch.no_grad()
    def join(self, part: Moments) -> Moments:
        """Moments of the joint batch, from those of each part.

        One collective of 2 C + 1 values.

        Args:
            part (Moments): Moments of shape (C,) of this process's part. The
                count may be 0, the moments then any finite values.

        Returns:
            Moments: Of the whole, the same in every process. NaN if all parts
            are empty.
        """
        c = part.mean.numel()
        count = part.mean.new_full((1, ), part.count)
        gathered = self._gather(torch.cat([part.mean, part.var, count]))
        mean, var = pool_moments(gathered[:, :c], gathered[:, c:2 * c],
                                 gathered[:, -1:])
        return Moments(mean, var, gathered[:, -1].sum())

    @torch.no_grad()
    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes, same shape. One collective."""
        values = values.contiguous().clone()
        dist.all_reduce(values)
        return values

    def gradient_statistics(self,
                            part: Tensor,
                            share: Optional[Tensor] = None,
                            then: Optional[GradientStatistics] = None
                            ) -> GradientStatistics:
        """Gradient statistics of the joint batch, for :func:`normalize`.

        Args:
            part (Tensor): This process's part of the joint batch's values, a
                scalar from 0 to 1.
            share (Tensor, optional): The joint batch's part in the forward
                statistics, shape (C,). None: all.
            then (callable, optional): What to make of them further.

        Returns:
            callable: One collective of 2 C values a backward pass.
        """

        def joint(mean_g: Tensor, mean_gx: Tensor):
            # Of an empty part the means are 0, and the part is 0.
            both = self.sum(torch.stack([mean_g, mean_gx]) * part)
            if share is not None:
                both = both * share
            return tuple(both) if then is None else then(*both)

        return joint

    def group_examples(self, examples: int, examples_per_group: int,
                       values: int, like: Tensor) -> 'ExampleGroups':
        """Groups of examples over the joint batch, in the processes' order.

        One collective, whose result the host has to wait for.

        Args:
            examples (int): Examples of this process, N.
            examples_per_group (int): Examples in a group.
            values (int): Values a channel of each of them, H * W.
            like (Tensor): Of the dtype and device of the statistics.

        Returns:
            ExampleGroups: This process's place in them.
        """
        counts = self._gather(
            torch.tensor([examples], device=like.device)).flatten().tolist()
        before = sum(counts[:dist.get_rank()])
        groups = -(-sum(counts) // examples_per_group)
        own = torch.arange(
            before, before + examples, device=like.device)
        own = own.div(examples_per_group, rounding_mode='floor')
        member = torch.arange(groups, device=like.device)[:, None] == own
        return ExampleGroups(self, member.to(like.dtype), values)


class ExampleGroups:
    """Groups of examples that may lie across processes.

    Args:
        processes (Processes): Who shares the batch.
        member (Tensor): 1 where an example is in a group, shape (groups, N).
        values (int): Values a channel of each example here, H * W.
    """

    def __init__(self, processes: Processes, member: Tensor,
                 values: int) -> None:
        self._processes = processes
        self._member = member
        own = member.sum(1) * values
        self.counts = processes.sum(own)
        self._weights = member * values / self.counts[:, None]

    @torch.no_grad()
    def average(self, values: Tensor, num_groups: int) -> Tensor:
        """As :func:`average_groups`, over the joint batch. One collective.

        Args:
            values (Tensor): Shape (N, C).
            num_groups (int): Groups of neighbouring channels; divides C.

        Returns:
            Tensor: Shape (N, C), constant in each group.
        """
        n, c = values.shape
        by_group = values.view(n, num_groups, c // num_groups).mean(2)
        totals = self._processes.sum(self._weights @ by_group)
        return (self._member.t() @ totals).repeat_interleave(
            c // num_groups, 1)
