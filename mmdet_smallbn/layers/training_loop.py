"""What a training loop does for the norms, iteration by iteration."""
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from .base import SmallBatchNorm
from .ring import PastBank
from .statistics import TrainingStep


class TrainingLoop:
    """Tells the norms of a model the iteration, and prepares their past.

    :class:`mmdet_smallbn.SmallBatchNormHook` does that in mmengine's loops;
    this is for others. The norms work without it, too: then every training
    forward is an iteration, and each layer does its work by itself.

    Args:
        norms (dict[str, SmallBatchNorm]): By their names in the model.

    Example:
        >>> loop = TrainingLoop(norms_of(model))
        >>> for iteration, batch in enumerate(loader):
        ...     loop.begin(iteration)
        ...     model(batch).backward()
        ...     optimizer.step()
        ...     loop.end()
    """

    def __init__(self, norms: Dict[str, SmallBatchNorm]) -> None:
        self._norms = norms
        self._step = TrainingStep()
        self._bank = PastBank()
        self._kept: List[Tuple[Tensor, List[Tensor]]] = []
        for norm in norms.values():
            norm.training_step = self._step

    @torch.no_grad()
    def begin(self,
              iteration: int,
              gradient_scale: Any = 1.,
              after_step: Optional[bool] = None) -> None:
        """Before the forward pass.

        Args:
            iteration (int): Which one it is.
            gradient_scale (float | Tensor): What the loss is multiplied with.
            after_step (bool, optional): Whether the optimizer took a step
                since the last iteration. False in gradient accumulation, but
                for the first part. None: unknown.
        """
        if self._kept:  # an error ended the last iteration
            self.end()
        self._step.iteration = iteration
        self._step.gradient_scale = gradient_scale
        if after_step is not None:
            self._step.optimizer_steps = after_step + (
                self._step.optimizer_steps or 0)
        self._keep_running()
        self._bank.prepare({
            f'{name}[{call}]': ring
            for name, norm in self._norms.items()
            if norm.keeps_states and norm.training and norm.uses_past()
            for call, ring in norm.rings.items()
        })

    @torch.no_grad()
    def end(self) -> None:
        """After the iteration: mend running statistics.

        What is not finite in them becomes what it was before.
        """
        self._step.mends_running = False
        for kept, buffers in self._kept:
            now = torch.cat(buffers)
            mended = torch.where(now - now == 0, now, kept)
            torch._foreach_copy_(
                buffers, list(mended.split([len(b) for b in buffers])))
        self._kept = []

    def release(self) -> None:
        """Let the norms go: who calls them next has iterations of his own."""
        for norm in self._norms.values():
            norm.training_step = TrainingStep()

    def _keep_running(self) -> None:
        groups: Dict[tuple, List[Tensor]] = {}
        for norm in self._norms.values():
            if norm.running_mean is not None and norm.training:
                for buffer in (norm.running_mean, norm.running_var):
                    groups.setdefault((buffer.dtype, buffer.device),
                                      []).append(buffer)
        self._kept = [(torch.cat(buffers), buffers)
                      for buffers in groups.values()]
        self._step.mends_running = True
