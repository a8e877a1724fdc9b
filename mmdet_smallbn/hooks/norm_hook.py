"""Hook that connects the norms with the training loop and checkpoints."""
from typing import Dict, Optional

from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS
from torch import nn

from ..errors import SetupError
from ..layers import SmallBatchNorm, TrainingLoop, is_under, norms_of
from .model import (bare_model, gradient_scale, is_after_step,
                    norms_of_teachers)
from .plain_checkpoint_hook import make_plain, restore_history

# Checkpoint key of the norms' states.
_STATES = 'smallbn_states'


@HOOKS.register_module()
class SmallBatchNormHook(Hook):
    """Hook that gives the norms of this package the state of the training.

    Before each iteration it provides

    - the number of the iteration, so that two calls of a layer in one
      iteration do not count as two iterations,
    - the factor of the loss (loss scale, gradient accumulation), so that
      MABN averages the gradients of the unscaled loss,
    - for CmBN, whether the optimizer took a step since the last iteration,
    - the past moments, recomputed with the current weights for all layers at
      once.

    After each iteration it removes values that are not finite from the
    running statistics. It also finds the convolution before each layer inside
    activation checkpointing and torch.compile.

    Checkpoints store the past statistics of CBN and MABN, and a resumed
    training continues with them. Only the main process stores and restores
    its statistics. The norms of the other processes, and norms with
    ``sync=True`` in distributed training, fill again within ``window_size``
    or ``buffer_size`` iterations. CBN stores 32 patches of its input per
    layer and iteration. Checkpoints load safely, as with
    :class:`PlainCheckpointHook`.

    The model may contain a frozen detector, such as the teacher in
    semi-supervised learning or distillation. mmdet leaves it in training
    mode. The hook sets its norms to evaluation mode.

    Args:
        save_states (bool): Store the past statistics of the norms in
            checkpoints. False: they fill again after a resume.

    Raises:
        SetupError: At the start of training, if a teacher evaluates with
            running statistics that it never receives.

    Example:
        >>> custom_hooks = [dict(type='SmallBatchNormHook')]
    """
    priority = 'ABOVE_NORMAL'

    def __init__(self, save_states: bool = True) -> None:
        self.save_states = save_states
        self._norms: Dict[str, SmallBatchNorm] = {}
        self._teaching: Dict[str, SmallBatchNorm] = {}
        self._loop: Optional[TrainingLoop] = None
        self._loaded: Dict[str, list] = {}
        self._kept: Dict[SmallBatchNorm, list] = {}
        self._leads = False

    def find_layers(self, model: nn.Module) -> None:
        """Find the norms, and the norms of frozen detectors in the model."""
        self._norms = norms_of(model)
        self._teaching = norms_of_teachers(model)

    def before_train(self, runner) -> None:
        """Find and reset the layers, and restore their states."""
        model = bare_model(runner)
        self.find_layers(model)
        # If there are several such hooks, only the first one acts.
        self._leads = next(hook for hook in runner.hooks if isinstance(
            hook, SmallBatchNormHook)) is self
        if not self._leads:
            return
        if not self._norms:
            runner.logger.warning(
                f'{type(self).__name__}: the model has no norm of this '
                'package. If the config has sync_bn (or use_syncbn), remove '
                'it: it converts every kind of BatchNorm')
        for layer in self._norms.values():
            # The same model object may have trained before.
            layer.reset_state()
        if self._loop is not None:  # an earlier training ended in an error
            self._loop.release()
        self._loop = TrainingLoop(model)
        self._check_teachers(runner)
        self._check_wrapper(runner)
        self._restore(runner)

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Give the layers the iteration, and recompute the past moments."""
        if not self._leads:
            return
        # The training loop sets the whole model to training mode.
        for layer in self._teaching.values():
            layer.eval()
        self._loop.begin(runner.iter, gradient_scale(runner),
                         is_after_step(runner))

    def after_train_iter(self, runner, *args, **kwargs) -> None:
        """Remove values that are not finite from the running statistics."""
        if self._leads:
            self._loop.end()

    def after_train(self, runner) -> None:
        """Disconnect the layers: another training loop may use them next."""
        if self._leads:
            self._loop.release()

    def before_val_epoch(self, runner) -> None:
        """Keep the layers' states, which mmdet's SyncNormHook would reset.

        That hook loads a state dict, which normally brings new weights.
        """
        self._kept = {
            layer: layer.states
            for layer in self._norms.values() if layer.keeps_states
        }

    def after_val_epoch(self, runner, metrics=None) -> None:
        """Restore the layers' states: the weights have not changed."""
        for layer, states in self._kept.items():
            layer.states = states
        self._kept = {}

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Put the norms' states into a checkpoint."""
        make_plain(checkpoint)
        if not self.save_states or _STATES in checkpoint:
            return  # another hook of this kind has stored them
        alone = get_world_size() == 1
        names = {p: n for n, p in bare_model(runner).named_parameters()}
        checkpoint[_STATES] = {
            name: layer.export_states(names)
            for name, layer in self._norms.items()
            if layer.keeps_states and (alone or not layer.sync)
        }

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Keep the norms' states of a checkpoint that is resumed."""
        restore_history(checkpoint)
        states = checkpoint.get(_STATES)
        if not states or not runner._resume or not is_main_process():
            return
        if 'ema_state_dict' in checkpoint and not any(
                isinstance(hook, EMAHook) for hook in runner.hooks):
            runner.logger.warning(
                'the checkpoint has the averaged weights of an EMAHook, but '
                'the config has no EMAHook, so training continues from the '
                'averaged weights. The past statistics of the norms belong to '
                'other weights and are discarded. They fill again. To '
                'continue as before, keep the EMAHook')
            return
        # Not restored now: loading the weights, which follows, resets norms.
        self._loaded = states

    def _restore(self, runner) -> None:
        alone = get_world_size() == 1
        parameters = dict(bare_model(runner).named_parameters())
        refused = []
        for name, states in self._loaded.items():
            layer = self._norms.get(name)
            if layer is None or (layer.sync and not alone):
                continue
            try:
                layer.restore_states(states, parameters)
            except ValueError as error:
                refused.append(str(error))
        if refused:
            runner.logger.warning(
                f'{len(refused)} norms cannot restore their past statistics '
                f'from the checkpoint and fill again. First: {refused[0]}')
        self._loaded = {}

    def _check_teachers(self, runner) -> None:
        # mmdet's MeanTeacherHook updates the submodule named "teacher".
        skips = any(
            type(hook).__name__ == 'MeanTeacherHook' and hook.skip_buffers
            for hook in runner.hooks)
        needing = [
            name for name, layer in self._teaching.items()
            if is_under(name, 'teacher') and layer.track_running_stats
            and layer.example_weight < 1
        ]
        if skips and needing:
            raise SetupError(
                f'{len(needing)} norms of the teacher (first: {needing[0]!r}) '
                'evaluate with running statistics, but MeanTeacherHook('
                'skip_buffer=True) does not update these. Set '
                'skip_buffer=False')
        if self._teaching:
            runner.logger.info(
                f'{len(self._teaching)} norms are in a frozen detector '
                'inside the model and stay in evaluation mode')

    def _check_wrapper(self, runner) -> None:
        if get_world_size() > 1 and (
                getattr(runner.model, 'broadcast_buffers', False)
                and not all(layer.sync for layer in self._norms.values())):
            runner.logger.warning(
                'with broadcast_buffers=True all processes use the running '
                'statistics of the main process. Set broadcast_buffers=False '
                "in model_wrapper_cfg, and add dict(type='SyncBuffersHook') "
                'to custom_hooks, which averages them at the end of an epoch')
