"""Burn-in: from the runner's iteration to the layers' phase."""
from typing import Dict, Optional, Sequence, Union

from mmengine.dist import get_world_size
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop
from torch import nn

from ..errors import SetupError
from ..layers import (CBN, SmallBatchNorm, is_under, matches_none,
                      suggested_window_size)
from .model import asleep_note, check_unit, kept_asleep, one_unit
from .norm_hook import SmallBatchNormHook


@HOOKS.register_module()
class BurnInHook(SmallBatchNormHook):
    """Keep norms to the present batch while the weights still change fast.

    - CBN: window 1 (arXiv:2002.05712, Sec. 3.3: for 3 of 12 epochs on COCO);
      then the window opens and fills.
    - MABN: the batch's statistics in both passes, no renormalisation
      (arXiv:2001.06838, App. B.3: for 10,000 iterations, in the heads). The
      averages fill meanwhile.
    - BRN: r = 1 and d = 0, which is batch normalisation.

    A model may mix them, and norms without a burn-in. The hook does all that
    :class:`SmallBatchNormHook` does, for all of them.

    The phase is a function of the runner's epoch or iteration: a resumed run
    is where it was, and ``load_from`` starts burn-in afresh. Without this
    hook the layers do not burn in.

    Example:
        >>> custom_hooks = [dict(type='BurnInHook', epochs=3)]
        >>> custom_hooks = [
        ...     dict(type='BurnInHook', iters=10000, prefix='roi_head')]

    Args:
        epochs (int, optional): Length in epochs, for epoch-based training.
        iters (int, optional): Length in the runner's iterations (with
            gradient accumulation: of micro-batches). Exactly one of the two.
        prefix (str | Sequence[str], optional): Modules of the model whose
            norms burn in, such as ``'neck'``. None: the whole model. Several
            hooks with different prefixes may be used.
        save_states (bool): As of :class:`SmallBatchNormHook`.

    Raises:
        ValueError: If not exactly one of ``epochs`` and ``iters`` is given,
            or it is negative.
        SetupError: At the start of training, if no layer burns in, all of
            them stay in evaluation mode, or burn-in is as long as the
            training.
    """

    def __init__(self,
                 epochs: Optional[int] = None,
                 iters: Optional[int] = None,
                 prefix: Union[str, Sequence[str], None] = None,
                 save_states: bool = True) -> None:
        super().__init__(save_states)
        self.unit, self.length = one_unit('BurnInHook', epochs, iters)
        self.prefixes = (prefix, ) if isinstance(prefix, str) else prefix
        self._layers: Dict[str, SmallBatchNorm] = {}
        self._burning: Optional[bool] = None

    def find_layers(self, model: nn.Module) -> None:
        """Find the norms, and those of them that burn in.

        Raises:
            SetupError: If there is none in the model, or under a prefix.
        """
        super().find_layers(model)
        self._layers = {
            name: layer
            for name, layer in self._norms.items()
            if layer.burns_in and self.covers(name)
            and name not in self._teaching
        }
        for prefix in self.prefixes or (None, ):
            if not any(
                    self._under(name, prefix)
                    for name in (*self._layers, *self._teaching)):
                self._raise_no_layer(prefix, model)

    def before_train(self, runner) -> None:
        """Find the layers, and check that the burn-in makes sense."""
        super().before_train(runner)
        self.check_length(
            isinstance(runner.train_loop, EpochBasedTrainLoop),
            runner.max_epochs, runner.max_iters)
        self._burning = None

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Tell the layers the phase."""
        burning = self.is_burning_in(runner)
        if self._burning is None:
            self._check_modes(runner)
            self._log_examples(runner)
        if burning != self._burning:
            self._log_phase(runner, burning)
            self._burning = burning
            for layer in self._layers.values():
                layer.burning_in = burning
        super().before_train_iter(runner, batch_idx, data_batch)

    def after_train(self, runner) -> None:
        """Let the layers go."""
        super().after_train(runner)
        for layer in self._layers.values():
            layer.burning_in = False

    def is_burning_in(self, runner) -> bool:
        """Whether the runner's present iteration lies in the burn-in."""
        now = runner.epoch if self.unit == 'epochs' else runner.iter
        return now < self.length

    def covers(self, name: str) -> bool:
        """Whether a module of this name is in the hook's part of the model."""
        return any(
            self._under(name, prefix) for prefix in self.prefixes or (None, ))

    @staticmethod
    def _under(name: str, prefix: Optional[str]) -> bool:
        return prefix is None or is_under(name, prefix)

    def _raise_no_layer(self, prefix: Optional[str],
                        model: nn.Module) -> None:
        burning = [n for n, layer in self._norms.items() if layer.burns_in]
        if burning:
            said = matches_none('prefix', prefix, 'layer that burns in', burning)
            raise SetupError(f'BurnInHook: {said}')
        message = 'BurnInHook: the model holds no layer that burns in'
        # torch's, and mmcv's, which is no BatchNorm by its class.
        if any(type(m).__name__ == 'SyncBatchNorm' for m in model.modules()):
            message += (
                ', but SyncBatchNorm. If sync_bn (or use_syncbn) stands in '
                'the config, remove it: it converts every kind of BatchNorm')
        else:
            message += (". Give it one, such as norm_cfg=dict(type='CBN'), or "
                        'remove the hook')
        raise SetupError(message)

    def check_length(self, by_epoch: bool, max_epochs: int,
                     max_iters: int) -> None:
        """Compare the burn-in with the training.

        Args:
            by_epoch (bool): Whether the training loop counts epochs.
            max_epochs (int): Its length, if so.
            max_iters (int): Its length, if not, or if known.

        Raises:
            SetupError: If the units differ, or burn-in is as long as the
                training.
        """
        check_unit('BurnInHook', self.unit, self.length, by_epoch)
        total = max_epochs if self.unit == 'epochs' else max_iters
        if self.length and total and self.length >= total:
            raise SetupError(
                f'BurnInHook: {self.unit}={self.length} is no shorter than '
                f'the training ({total} {self.unit}), and the norms would '
                "never be used. For a trial run set the hook's "
                f'{self.unit}=0, as by --cfg-options custom_hooks.0.'
                f'{self.unit}=0')

    def _check_modes(self, runner) -> None:
        """Norms that should train but are kept in evaluation mode."""
        asleep = kept_asleep(self._layers)
        if not asleep:
            return
        message = f'BurnInHook: {asleep_note(asleep)}'
        if len(asleep) == len(self._layers):
            raise SetupError(message)
        runner.logger.warning(message)

    def _log_examples(self, runner) -> None:
        loader = runner.train_dataloader
        images = loader.batch_size or getattr(loader.batch_sampler,
                                              'batch_size', None)
        if not isinstance(images, int):
            return
        kinds: Dict[tuple, int] = {}
        for layer in self._layers.values():
            if layer.training and layer.averaged_iterations > 1:
                batch = images * (get_world_size() if layer.sync else 1)
                kind = (type(layer), layer.averaged_iterations, batch)
                kinds[kind] = kinds.get(kind, 0) + 1
        for (kind, iterations, batch), count in kinds.items():
            message = (
                f'{count} {kind.__name__} layers: {iterations} iterations x '
                f'{batch} images = {iterations * batch} examples behind the '
                'statistics')
            suggested = suggested_window_size(batch)
            if issubclass(kind, CBN) and iterations != suggested:
                message += (f'; the CBN paper suggests window_size={suggested}'
                            f' (min(ceil(16 / {batch}), 8))')
            runner.logger.info(message)

    def _log_phase(self, runner, burning: bool) -> None:
        where = f'iteration {runner.iter}, epoch {runner.epoch}'
        if burning:
            phase = (f'burn-in of {self.length} {self.unit}, the present '
                     'batch alone')
        else:
            phase = 'burn-in is over, past iterations count'
        runner.logger.info(
            f'{len(self._layers)} norms at {where}: {phase}')
