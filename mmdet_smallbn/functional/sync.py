"""Statistics of a batch that is split over several processes."""
from itertools import accumulate
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.distributed as dist
from torch import Tensor

from .moments import (GradientStatistics, Moments, average_groups,
                      pool_moments)


class Processes:
    """The processes of the default group, each with a part of the batch.

    All processes must call each method with a collective, in the same order,
    also a process whose part of the batch is empty.
    """

    @classmethod
    def current(cls) -> Optional['Processes']:
        """Return the processes of this training; None if there is only one."""
        if (dist.is_available() and dist.is_initialized()
                and dist.get_world_size() > 1):
            return cls()
        return None

    def check_alike(self, values: Dict[str, Any], what: str) -> None:
        """Check that all processes have the same values. One collective.

        Args:
            values (dict): Values of this process, by name.
            what (str): Name of these values in the message.

        Raises:
            RuntimeError: In all processes, if one of them differs.
        """
        theirs: List[Dict[str, Any]] = [{}] * dist.get_world_size()
        dist.all_gather_object(theirs, values)
        for rank, other in enumerate(theirs):
            for name in (*values, *other):
                if values.get(name) != other.get(name):
                    raise RuntimeError(
                        f'processes differ in the {what}: {name!r} has '
                        f'{values.get(name)} in process {dist.get_rank()} '
                        f'and {other.get(name)} in process {rank}')

    @staticmethod
    def _gather(part: Tensor) -> Tensor:
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part.contiguous())
        return torch.stack(parts)

    @torch.no_grad()
    def join(self, part: Moments) -> Moments:
        """Return the moments of the joint batch from those of each part.

        It runs one collective of 2 C + 1 values.

        Args:
            part (Moments): Moments of this process's part, shape (C,). If the
                count is 0, the moments may be any finite values.

        Returns:
            Moments: Moments of the joint batch, the same in every process.
            NaN if all parts are empty.
        """
        c = part.mean.numel()
        count = part.mean.new_full((1, ), part.count)
        gathered = self._gather(torch.cat([part.mean, part.var, count]))
        mean, var = pool_moments(gathered[:, :c], gathered[:, c:2 * c],
                                 gathered[:, -1:])
        return Moments(mean, var, gathered[:, -1].sum())

    @torch.no_grad()
    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over the processes, same shape. One collective."""
        values = values.contiguous().clone()
        dist.all_reduce(values)
        return values

    def gradient_statistics(self,
                            part: Tensor,
                            then: Union[Tensor, GradientStatistics,
                                        None] = None) -> GradientStatistics:
        """Return the joint batch's gradient statistics, for :func:`normalize`.

        Args:
            part (Tensor): This process's part of the joint batch's values, a
                scalar from 0 to 1.
            then (Tensor | callable, optional): The ``gradient`` of
                :func:`normalize`, applied to the joint means.

        Returns:
            callable: Function that runs one collective of 2 C values in each
            backward pass.
        """

        def joint(mean_g: Optional[Tensor], mean_gx: Tensor):
            # An empty part has the means 0 and the part 0.
            if mean_g is None:
                return then(None, self.sum(mean_gx * part))
            both = self.sum(torch.stack([mean_g, mean_gx]) * part)
            if callable(then):
                return then(*both)
            return tuple(both if then is None else both * then)

        return joint

    def group_examples(self, examples: int, values: int,
                       examples_per_group: int,
                       device: torch.device) -> 'ExampleGroups':
        """Group the examples of the joint batch in the order of the ranks.

        It runs one collective, and the host waits for the result.

        Args:
            examples (int): Number of examples of this process, N.
            values (int): Values of each example in a channel, H * W.
            examples_per_group (int): Examples in a group.
            device (torch.device): Device of the statistics.

        Returns:
            ExampleGroups: The groups, as this process needs them.
        """
        parts = self._gather(torch.tensor([examples, values], device=device))
        return ExampleGroups(self, parts.tolist(), dist.get_rank(),
                             examples_per_group)


class ExampleGroups:
    """Groups of examples, some of them shared by several processes.

    Args:
        processes (Processes): The processes that share the batch.
        parts (list): For each process, the number of examples and the number
            of values of each example in a channel.
        rank (int): Rank of this process.
        size (int): Examples in a group.
    """

    def __init__(self, processes: Processes, parts: List[Sequence[int]],
                 rank: int, size: int) -> None:
        self._processes = processes
        self._size = size
        ends = list(accumulate(examples for examples, _ in parts))
        spans = list(zip([0, *ends], ends))
        total = ends[-1]

        def inside(group: int, span: Tuple[int, int]) -> Tuple[int, int]:
            """Return the start and end of a group's examples in a span."""
            first = max(group * size, span[0])
            return first, max(min(group * size + size, span[1]), first)

        def count(group: int) -> int:
            """Return the number of values of a group in a channel."""
            ranges = [inside(group, span) for span in spans]
            return sum((to - first) * values
                       for (first, to), (_, values) in zip(ranges, parts))

        # A group is shared if one process ends and another begins in it.
        shared = sorted({end // size for end in ends
                         if end % size and end < total})
        begin, end = spans[rank]
        self._own_values = parts[rank][1]
        self._shared = [(slice(*(p - begin for p in inside(group,
                                                           (begin, end)))),
                         count(group)) for group in shared]
        own = [piece for piece, _ in self._shared if piece.stop > piece.start]
        # The examples of this process that are in no shared group.
        self._first = own[0].stop if own and own[0].start == 0 else 0
        self._last = end - begin
        if own and own[-1].stop == self._last and own[-1].stop > self._first:
            self._last = own[-1].start
        # Only the last group may be smaller than the others.
        self.smallest = count((total - 1) // size) if total else 0

    @torch.no_grad()
    def average(self, values: Tensor, num_groups: int) -> Tensor:
        """Average as :func:`average_groups`, over the joint batch.

        It runs one collective, or none if no group is shared.

        Args:
            values (Tensor): Values, shape (N, C).
            num_groups (int): Groups of neighbouring channels; must divide C.

        Returns:
            Tensor: Averages, shape (N, C), constant in each group.
        """
        average = torch.empty_like(values)
        between = slice(self._first, self._last)
        average[between] = average_groups(values[between], num_groups,
                                          self._size)
        if self._shared:
            totals = torch.stack([
                values[piece].sum(0) * (self._own_values / count)
                for piece, count in self._shared
            ])
            totals = average_groups(self._processes.sum(totals), num_groups, 1)
            for (piece, _), total in zip(self._shared, totals):
                average[piece] = total
        return average
