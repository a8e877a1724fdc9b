"""Running statistics in the last part of a training."""
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
    """Train with running statistics from some point of the training on.

    What ``norm_eval=True`` does to a backbone's norms, but late, and in any
    part of the model. The norms go into evaluation mode: they normalise as at
    inference, and change their running statistics no more. Scale, shift and
    all other weights train on, and get used to these statistics.
    ``docs/study.md`` shows where it helps. Several processes take the mean of
    theirs first.

    Example:
        >>> custom_hooks = [dict(type='FreezeStatisticsHook', epochs=9)]

    Args:
        epochs (int, optional): From this epoch on, counted from 0.
        iters (int, optional): From this iteration on. Exactly one of the two.
        prefix (str | Sequence[str], optional): Modules of the model whose
            norms are meant, such as ``'roi_head'``. None: the whole model.

    Raises:
        ValueError: If not exactly one of ``epochs`` and ``iters`` is given,
            or it is negative.
        SetupError: At the start of training, if there is no norm with running
            statistics in the model, or under a prefix, or if the training
            ends before.
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
                said = matches_none('prefix', prefix, 'norm with running '
                                 'statistics', norms)
                raise SetupError(f'FreezeStatisticsHook: {said}')
        self._norms = [
            module for name, module in norms.items() if self.covers(name)
        ]
        if not self._norms:
            raise SetupError('FreezeStatisticsHook: the model holds no norm '
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
                f'training is over after {total}. Take fewer, or remove the '
                'hook')

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Into evaluation mode, each time anew: the loop puts them out of it.
        """
        now = runner.epoch if self.unit == 'epochs' else runner.iter
        if now < self.begin:
            return
        if not self._frozen:
            self._frozen = True
            # Not those that norm_eval or a teacher keeps in evaluation mode.
            self._norms = [norm for norm in self._norms if norm.training]
            all_reduce_params(
                [buffer for norm in self._norms for buffer in norm.buffers()
                 if buffer.is_floating_point()], op='mean')
            runner.logger.info(
                f'{len(self._norms)} norms keep their running statistics at '
                f'iteration {runner.iter}, epoch {runner.epoch}')
        for norm in self._norms:
            norm.eval()
