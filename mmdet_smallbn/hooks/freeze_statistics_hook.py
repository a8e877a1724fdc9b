"""Hook that freezes running statistics in the last part of a training."""
from typing import List, Optional, Sequence, Union

from mmengine.dist import all_reduce_params
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import SetupError
from ..layers import SmallBatchNorm, is_under, matches_none
from .model import bare_model, check_unit, one_unit


@HOOKS.register_module()
class FreezeStatisticsHook(Hook):
    """Hook that freezes the running statistics late in the training.

    From the given point on it sets the norms to evaluation mode. They then
    normalise with their running statistics, as at inference, and the running
    statistics do not change. Scale, shift and all other weights continue to
    train and adapt to these statistics. ``norm_eval=True`` does the same, but
    for the backbone alone and from the start. ``docs/study.md`` shows where
    the hook helps. In distributed training the processes average their
    running statistics first.

    Example:
        >>> custom_hooks = [dict(type='FreezeStatisticsHook', epochs=9)]

    Args:
        epochs (int, optional): First epoch with frozen statistics, counted
            from 0.
        iters (int, optional): First iteration with frozen statistics, counted
            from 0. Give either ``epochs`` or ``iters``.
        prefix (str | Sequence[str], optional): Modules of the model whose
            norms are frozen, such as ``'roi_head'``. None: the whole model.

    Raises:
        ValueError: If both or neither of ``epochs`` and ``iters`` are given,
            or if the number is negative.
        SetupError: At the start of training, if no norm of the model, or
            under one of the prefixes, has running statistics, or if the
            training ends before this point.
    """

    def __init__(self,
                 epochs: Optional[int] = None,
                 iters: Optional[int] = None,
                 prefix: Union[str, Sequence[str], None] = None) -> None:
        self.unit, self.begin = one_unit(type(self).__name__, epochs, iters)
        self.prefixes = (prefix, ) if isinstance(prefix, str) else prefix
        self._norms: List[nn.Module] = []

    def before_train(self, runner) -> None:
        """Find the norms, and check that they have a time to stay."""
        self.find_layers(bare_model(runner))
        self.check_length(
            isinstance(runner.train_loop, EpochBasedTrainLoop),
            runner.max_epochs, runner.max_iters)
        self._frozen = False

    def covers(self, name: str) -> bool:
        """Whether a module of this name is in the hook's part of the model."""
        return self.prefixes is None or any(
            is_under(name, prefix) for prefix in self.prefixes)

    def find_layers(self, model: nn.Module) -> None:
        """Find the norms.

        Raises:
            SetupError: If there is none in the model, or under a prefix.
        """
        norms = {
            name: module for name, module in model.named_modules()
            if isinstance(module, (_BatchNorm, SmallBatchNorm))
            and getattr(module, 'running_mean', None) is not None
        }
        for prefix in self.prefixes or ():
            if not any(is_under(name, prefix) for name in norms):
                text = matches_none('prefix', prefix, 'norm with running '
                                    'statistics', norms)
                raise SetupError(f'FreezeStatisticsHook: {text}')
        self._norms = [
            module for name, module in norms.items() if self.covers(name)
        ]
        if not self._norms:
            raise SetupError('FreezeStatisticsHook: the model has no norm '
                             'with running statistics. Remove the hook')

    def check_length(self, by_epoch: bool, max_epochs: Optional[int],
                     max_iters: Optional[int]) -> None:
        """Compare the point with the training.

        Args:
            by_epoch (bool): Whether the training loop counts epochs.
            max_epochs (int, optional): Its length, if so.
            max_iters (int, optional): Its length, if not, or if known.

        Raises:
            SetupError: If the units differ, or the training ends before.
        """
        check_unit('FreezeStatisticsHook', self.unit, self.begin, by_epoch)
        total = max_epochs if self.unit == 'epochs' else max_iters
        if total and self.begin >= total:
            raise SetupError(
                f'FreezeStatisticsHook: {self.unit}={self.begin}, but the '
                f'training ends after {total} {self.unit}. Use a smaller '
                'number, or remove the hook')

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Set the norms to evaluation mode.

        This happens in each iteration, because the training loop sets the
        whole model to training mode again.
        """
        now = runner.epoch if self.unit == 'epochs' else runner.iter
        if now < self.begin:
            return
        if not self._frozen:
            self._frozen = True
            # norm_eval or a teacher keeps the others in evaluation mode.
            self._norms = [norm for norm in self._norms if norm.training]
            all_reduce_params(
                [buffer for norm in self._norms for buffer in norm.buffers()
                 if buffer.is_floating_point()], op='mean')
            runner.logger.info(
                f'running statistics of {len(self._norms)} norms are frozen '
                f'from iteration {runner.iter}, epoch {runner.epoch}')
        for norm in self._norms:
            norm.eval()
