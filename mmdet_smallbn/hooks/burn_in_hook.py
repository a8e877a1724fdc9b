"""Hook that sets the burn-in phase of the layers."""
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
    """Hook for burn-in: norms use the current batch alone at first.

    Past statistics are of little use while the weights change fast. During
    burn-in:

    - CBN has window 1 (arXiv:2002.05712, Sec. 3.3: 3 of 12 epochs on COCO).
      After burn-in the window fills.
    - MABN uses the statistics of the batch in both passes, without
      renormalisation (arXiv:2001.06838, App. B.3: 10,000 iterations, in the
      heads). Its averages fill during burn-in.
    - BRN has r = 1 and d = 0, which is batch normalisation.

    A model may contain several of these norms, and norms without a burn-in.
    The hook also does everything that :class:`SmallBatchNormHook` does, for
    all norms.

    The phase depends only on the runner's epoch or iteration. A resumed run
    therefore continues in the same phase, and a run with ``load_from`` starts
    with burn-in. Without this hook the layers do not burn in.

    Example:
        >>> custom_hooks = [dict(type='BurnInHook', epochs=3)]
        >>> custom_hooks = [
        ...     dict(type='BurnInHook', iters=10000, prefix='roi_head')]

    Args:
        epochs (int, optional): Length in epochs, for epoch-based training.
        iters (int, optional): Length in iterations of the runner (micro-
            batches, with gradient accumulation). Give either ``epochs`` or
            ``iters``.
        prefix (str | Sequence[str], optional): Modules of the model whose
            norms burn in, such as ``'neck'``. None: the whole model. Several
            hooks with different prefixes may be used.
        save_states (bool): See :class:`SmallBatchNormHook`.

    Raises:
        ValueError: If both or neither of ``epochs`` and ``iters`` are given,
            or if the length is negative.
        SetupError: At the start of training, if no layer burns in, if all
            layers that burn in stay in evaluation mode, or if burn-in is as
            long as the training.
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
        """Find the norms of the model, and the norms that burn in.

        Raises:
            SetupError: If no norm of the model, or under one of the prefixes,
                burns in.
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
        """Find the layers, and check the length of the burn-in."""
        super().before_train(runner)
        self.check_length(
            isinstance(runner.train_loop, EpochBasedTrainLoop),
            runner.max_epochs, runner.max_iters)
        self._burning = None

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Set the phase of the layers."""
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
        """End the burn-in of the layers."""
        super().after_train(runner)
        for layer in self._layers.values():
            layer.burning_in = False

    def is_burning_in(self, runner) -> bool:
        """Return True if the runner's current iteration is in burn-in."""
        now = runner.epoch if self.unit == 'epochs' else runner.iter
        return now < self.length

    def covers(self, name: str) -> bool:
        """Return True if the hook's prefixes include a module's name."""
        return any(
            self._under(name, prefix) for prefix in self.prefixes or (None, ))

    @staticmethod
    def _under(name: str, prefix: Optional[str]) -> bool:
        return prefix is None or is_under(name, prefix)

    def _raise_no_layer(self, prefix: Optional[str],
                        model: nn.Module) -> None:
        burning = [n for n, layer in self._norms.items() if layer.burns_in]
        if burning:
            text = matches_none('prefix', prefix, 'layer that burns in',
                                burning)
            raise SetupError(f'BurnInHook: {text}')
        message = 'BurnInHook: the model has no layer that burns in'
        # By name, because mmcv's SyncBatchNorm is not a subclass of torch's.
        if any(type(m).__name__ == 'SyncBatchNorm' for m in model.modules()):
            message += (
                ', but SyncBatchNorm. If the config has sync_bn (or '
                'use_syncbn), remove it: it converts every kind of BatchNorm')
        else:
            message += (". Add one, such as norm_cfg=dict(type='CBN'), or "
                        'remove the hook')
        raise SetupError(message)

    def check_length(self, by_epoch: bool, max_epochs: int,
                     max_iters: int) -> None:
        """Check that the burn-in fits the training.

        Args:
            by_epoch (bool): True if the training loop counts epochs.
            max_epochs (int): Length of the training in epochs.
            max_iters (int): Length of the training in iterations; 0 if it is
                unknown.

        Raises:
            SetupError: If the units differ, or if burn-in is as long as the
                training.
        """
        check_unit('BurnInHook', self.unit, self.length, by_epoch)
        total = max_epochs if self.unit == 'epochs' else max_iters
        if self.length and total and self.length >= total:
            raise SetupError(
                f'BurnInHook: {self.unit}={self.length} is not shorter than '
                f'the training ({total} {self.unit}), so the norms would '
                "never use past iterations. For a trial run set the hook's "
                f'{self.unit}=0, for example with --cfg-options '
                f'custom_hooks.0.{self.unit}=0')

    def _check_modes(self, runner) -> None:
        """Report norms that should train but stay in evaluation mode."""
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
                f'{batch} images = {iterations * batch} examples in the '
                'statistics')
            suggested = suggested_window_size(batch)
            if issubclass(kind, CBN) and iterations != suggested:
                message += ('. The CBN paper suggests window_size='
                            f'{suggested} (min(ceil(16 / {batch}), 8))')
            runner.logger.info(message)

    def _log_phase(self, runner, burning: bool) -> None:
        where = f'iteration {runner.iter}, epoch {runner.epoch}'
        if burning:
            phase = (f'burn-in of {self.length} {self.unit} with the '
                     'statistics of the current batch')
        else:
            phase = 'burn-in is over, statistics use past iterations'
        runner.logger.info(
            f'{len(self._layers)} norms at {where}: {phase}')
