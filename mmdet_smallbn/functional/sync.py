"""Statistics of a batch that several processes share."""
from itertools import accumulate
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.distributed as dist
from torch import Tensor

from .moments import (GradientStatistics, Moments, average_groups,
                      pool_moments)


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

    def check_alike(self, values: Dict[str, Any], what: str) -> None:
        """Make sure that all processes have the same. One collective.

        Args:
            values (dict): What this one has, by name.
            what (str): What that is, for the message.

        Raises:
            RuntimeError: In all of them, if one differs.
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
                            then: Union[Tensor, GradientStatistics,
                                        None] = None) -> GradientStatistics:
        """Gradient statistics of the joint batch, for :func:`normalize`.

        Args:
            part (Tensor): This process's part of the joint batch's values, a
                scalar from 0 to 1.
            then (Tensor | callable, optional): What to make of them further;
                the ``gradient`` of :func:`normalize`.

        Returns:
            callable: One collective of 2 C values a backward pass.
        """

        def joint(mean_g: Optional[Tensor], mean_gx: Tensor):
            # Of an empty part the means are 0, and the part is 0.
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
        """Groups of examples over the joint batch, in the processes' order.

        One collective, whose result the host has to wait for.

        Args:
            examples (int): Examples of this process, N.
            values (int): Values a channel of each of them, H * W.
            examples_per_group (int): Examples in a group.
            device (torch.device): Where the statistics are.

        Returns:
            ExampleGroups: This process's place in them.
        """
        parts = self._gather(torch.tensor([examples, values], device=device))
        return ExampleGroups(self, parts.tolist(), dist.get_rank(),
                             examples_per_group)


class ExampleGroups:
    """Groups of examples, some of which lie across processes.

    Args:
        processes (Processes): Who shares the batch.
        parts (list): Examples, and values a channel of each, by process.
        rank (int): This process's place among them.
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
            """Where a group's examples are in a span; from, to."""
            first = max(group * size, span[0])
            return first, max(min(group * size + size, span[1]), first)

        def count(group: int) -> int:
            """Values a channel of a group."""
            ranges = [inside(group, span) for span in spans]
            return sum((to - first) * values
                       for (first, to), (_, values) in zip(ranges, parts))

        # A group is shared if processes meet in the middle of it.
        shared = sorted({end // size for end in ends
                         if end % size and end < total})
        begin, end = spans[rank]
        self._own_values = parts[rank][1]
        self._shared = [(slice(*(p - begin for p in inside(group,
                                                           (begin, end)))),
                         count(group)) for group in shared]
        own = [piece for piece, _ in self._shared if piece.stop > piece.start]
        # The examples between this process's part of shared groups.
        self._first = own[0].stop if own and own[0].start == 0 else 0
        self._last = end - begin
        if own and own[-1].stop == self._last and own[-1].stop > self._first:
            self._last = own[-1].start
        # Only the last group may be smaller than the others.
        self.smallest = count((total - 1) // size) if total else 0

    @torch.no_grad()
    def average(self, values: Tensor, num_groups: int) -> Tensor:
        """As :func:`average_groups`, over the joint batch.

        One collective, and none if no group is shared.

        Args:
            values (Tensor): Shape (N, C).
            num_groups (int): Groups of neighbouring channels; divides C.

        Returns:
            Tensor: Shape (N, C), constant in each group.
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
