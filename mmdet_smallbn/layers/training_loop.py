"""Support of the norms in a training loop, iteration by iteration."""
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
    """Helper that numbers the iterations of a model's norms in your own loop.

    In mmengine's loop :class:`mmdet_smallbn.SmallBatchNormHook` does this
    work. The norms also train without it. Then every training forward pass
    counts as an iteration, and each layer prepares its own past. With the
    helper:

    - a layer that is called several times in an iteration has statistics for
      each of these calls;
    - CBN finds its convolution inside activation checkpointing and
      torch.compile;
    - MABN's averages do not depend on the factor of the loss;
    - CmBN knows the optimizer's steps, also those of a fused optimizer;
    - norms burn in;
    - non-finite values are removed from the running statistics;
    - the past of all layers is prepared together, which is faster.

    Args:
        model (nn.Module | dict[str, SmallBatchNorm]): The model that trains,
            or some of its norms by name. In the second case its convolutions
            get no hooks.
        burn_in (int): Number of iterations in which norms with a burn-in
            (CBN, MABN, BRN) use the present batch alone. 0: the loop does not
            change ``norm.burning_in``.

    Raises:
        ValueError: If ``burn_in`` is above 0 and no norm has a burn-in.

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
                             'with a burn-in. Set burn_in=0, or use CBN, MABN '
                             'or BRN')
        for norm in self._norms.values():
            norm.training_step = self._step

    @contextmanager
    def iteration(self,
                  number: Optional[int] = None,
                  gradient_scale: Any = 1.,
                  after_step: Optional[bool] = None) -> Iterator[None]:
        """Return the context of one iteration: :meth:`begin`, :meth:`end`.

        Args:
            number (int, optional): Index of the iteration; a resumed training
                gives its own. None: the next index, from 0.
            gradient_scale, after_step: As in :meth:`begin`.
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
        """Begin an iteration; call it before the forward pass.

        Args:
            iteration (int): Index of the iteration.
            gradient_scale (float | Tensor): Factor of the loss: the loss
                scale in mixed precision, 1 / parts in gradient accumulation.
            after_step (bool, optional): True if the optimizer took a step
                since the last iteration. In gradient accumulation it is True
                for the first part of each step. None: unknown.
        """
        if self._kept:  # an error interrupted the last iteration
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
        """End an iteration, and repair the running statistics.

        Non-finite values get back the values from before the iteration.
        """
        self._step.mends_running = False
        for kept, buffers in self._kept:
            now = torch.cat(buffers)
            mended = torch.where(now - now == 0, now, kept)
            torch._foreach_copy_(
                buffers, list(mended.split([len(b) for b in buffers])))
        self._kept = []

    def release(self) -> None:
        """Detach the norms from this loop, and remove its hooks.

        Afterwards every training forward pass counts as an iteration.
        """
        for norm in self._norms.values():
            if norm.training_step is self._step:  # and of no later loop
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
