"""What a training loop does for the norms, iteration by iteration."""
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .base import SmallBatchNorm, norms_of
from .checks import check_at_least
from .conv_call import remember_calls
from .ring import PastBank
from .statistics import TrainingStep


class TrainingLoop:
    """Tells the norms of a model the iteration, and prepares their past.

    For a training loop of your own: in mmengine's,
    :class:`mmdet_smallbn.SmallBatchNormHook` does that. The norms train
    without it, too. Then every training forward is an iteration, and each
    layer does its work by itself. With it

    - a layer that is called several times in an iteration tells these calls
      from iterations;
    - CBN finds its convolution inside activation checkpointing and
      torch.compile;
    - MABN's averages are of the loss itself, whatever it is multiplied with;
    - CmBN knows the optimizer's steps, those of a fused optimizer, too;
    - norms burn in;
    - what is not finite leaves the running statistics, and the past of all
      layers is prepared at once, which is faster.

    Args:
        model (nn.Module | dict[str, SmallBatchNorm]): The model that trains,
            or some of its norms by name, whose convolutions are left alone
            then.
        burn_in (int): Iterations that norms which burn in (CBN, MABN, BRN)
            keep to the present batch. 0: ``norm.burning_in`` is yours.

    Raises:
        ValueError: If there is to be a burn-in, and no norm that burns in.

    Example:
        >>> loop = TrainingLoop(model, burn_in=500)
        >>> for images, labels in loader:
        ...     with loop.iteration():
        ...         loss = criterion(model(images), labels)
        ...         optimizer.zero_grad()
        ...         loss.backward()
        ...         optimizer.step()
        >>> loop.release()
    """

    def __init__(self,
                 model: Union[nn.Module, Dict[str, SmallBatchNorm]],
                 burn_in: int = 0) -> None:
        check_at_least('burn_in', burn_in, 0)
        norms, handles = model, []
        if isinstance(model, nn.Module):
            norms, handles = norms_of(model), remember_calls(model)
            for name, norm in norms.items():
                norm.layer_name = name
        self._norms: Dict[str, SmallBatchNorm] = norms
        self._handles: List[RemovableHandle] = handles
        self._burn_in = burn_in
        self._step = TrainingStep()
        self._bank = PastBank()
        self._kept: List[Tuple[Tensor, List[Tensor]]] = []
        if burn_in and not any(n.burns_in for n in self._norms.values()):
            raise ValueError(f'burn_in={burn_in}, but the model has no norm '
                             'that burns in, as CBN, MABN and BRN do')
        for norm in self._norms.values():
            norm.training_step = self._step

    @contextmanager
    def iteration(self,
                  number: Optional[int] = None,
                  gradient_scale: Any = 1.,
                  after_step: Optional[bool] = None) -> Iterator[None]:
        """The context of one forward and backward pass.

        Args:
            number (int, optional): Which iteration it is, as a training that
                is resumed knows it. None: the next one, from 0.
            gradient_scale, after_step: As of :meth:`begin`.
        """
        if number is None:
            last = self._step.iteration
            number = 0 if last is None else last + 1
        self.begin(number, gradient_scale, after_step)
        try:
            yield
        finally:
            self.end()

    @torch.no_grad()
    def begin(self,
              iteration: int,
              gradient_scale: Any = 1.,
              after_step: Optional[bool] = None) -> None:
        """Before the forward pass.

        Args:
            iteration (int): Which one it is.
            gradient_scale (float | Tensor): What the loss is multiplied with:
                a loss scale in mixed precision, 1 / parts in gradient
                accumulation.
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
        if self._burn_in:
            self._set_burning_in(iteration < self._burn_in)
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
        for handle in self._handles:
            handle.remove()
        if self._burn_in:
            self._set_burning_in(False)

    def _set_burning_in(self, burning_in: bool) -> None:
        for norm in self._norms.values():
            if norm.burns_in:
                norm.burning_in = burning_in

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
