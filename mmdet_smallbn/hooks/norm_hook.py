"""What the training loop tells the norms, and what it keeps for them."""
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

# The key of a checkpoint that holds what norms remember.
_STATES = 'smallbn_states'


@HOOKS.register_module()
class SmallBatchNormHook(Hook):
    """Tell the norms of this package what the training loop knows.

    - Which iteration it is, so that a layer that is called twice in one does
      not take it for two.
    - What the loss is multiplied with (loss scale, accumulation), so that
      MABN's averages are of the loss itself.
    - Whether the optimizer took a step since the last iteration, for CmBN.
    - What the past says at today's weights, for all layers at once.

    It also takes out of the running statistics what is not finite, and tells
    the layers inside activation checkpointing and torch.compile which
    convolution comes before them.

    Checkpoints hold what CBN and MABN remember of past iterations, under a
    key of its own, and a resume takes it up, so that it goes on as if it had
    never stopped. It is that of the main process: the norms of others, and
    all with ``sync=True`` in several processes, fill anew, within
    ``window_size`` or ``buffer_size`` iterations. CBN's takes 32 patches of
    its input for each iteration and layer. Checkpoints load safely, as with
    :class:`PlainCheckpointHook`.

    A frozen detector within the model, the teacher of semi-supervised
    learning or distillation, is a model at work: its norms are put into
    evaluation, which mmdet leaves in training mode.

    Args:
        save_states (bool): Whether checkpoints hold what the norms remember.
            False: it fills anew after a resume.

    Raises:
        SetupError: At the start of training, if a teacher never gets the
            statistics that it evaluates with.

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
        """Find the norms, and those of frozen detectors in the model."""
        self._norms = norms_of(model)
        self._teaching = norms_of_teachers(model)

    def before_train(self, runner) -> None:
        """Take over the layers."""
        model = bare_model(runner)
        self.find_layers(model)
        # Of several such hooks, the first one leads.
        self._leads = next(hook for hook in runner.hooks if isinstance(
            hook, SmallBatchNormHook)) is self
        if not self._leads:
            return
        if not self._norms:
            runner.logger.warning(
                f'{type(self).__name__}: the model holds no norm of this '
                'package. If sync_bn (or use_syncbn) stands in the config, '
                'remove it: it converts every kind of BatchNorm')
        for layer in self._norms.values():
            # Of an earlier training of the same model object.
            layer.reset_state()
        if self._loop is not None:  # of one that ended in an error
            self._loop.release()
        self._loop = TrainingLoop(model)
        self._check_teachers(runner)
        self._check_wrapper(runner)
        self._restore(runner)

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Tell the layers the iteration, and prepare their past."""
        if not self._leads:
            return
        # The training loop puts the whole model into training mode.
        for layer in self._teaching.values():
            layer.eval()
        self._loop.begin(runner.iter, gradient_scale(runner),
                         is_after_step(runner))

    def after_train_iter(self, runner, *args, **kwargs) -> None:
        """Mend the running statistics, before anybody reads them."""
        if self._leads:
            self._loop.end()

    def after_train(self, runner) -> None:
        """Let the layers go: who calls them next has iterations of his own."""
        if self._leads:
            self._loop.release()

    def before_val_epoch(self, runner) -> None:
        """Keep the past: mmdet's SyncNormHook loads a state dict now."""
        self._kept = {
            layer: layer.states
            for layer in self._norms.values() if layer.keeps_states
        }

    def after_val_epoch(self, runner, metrics=None) -> None:
        """The weights are those of before."""
        for layer, states in self._kept.items():
            layer.states = states
        self._kept = {}

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Put the norms' states into a checkpoint."""
        make_plain(checkpoint)
        if not self.save_states or _STATES in checkpoint:
            return  # or another of these hooks has put them there
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
                'the checkpoint holds the averaged weights of an EMAHook, and '
                'without one training goes on from these. What the norms '
                'remember of past iterations was gathered with other weights: '
                'they fill anew. To go on as before, keep the EMAHook')
            return
        # The weights are loaded after this, and empty the norms.
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
                f'{len(refused)} norms do not take up what the checkpoint '
                f'remembers of past iterations, and fill anew: {refused[0]}')
        self._loaded = {}

    def _check_teachers(self, runner) -> None:
        # mmdet's, whose teacher is of that name.
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
                f'{len(needing)} norms of the teacher, '
                f'{needing[0]!r} the first of them, evaluate with running '
                'statistics, which MeanTeacherHook(skip_buffer=True) never '
                'gives them. Set skip_buffer=False')
        if self._teaching:
            runner.logger.info(
                f'{len(self._teaching)} norms are in a frozen detector '
                'within the model, and kept in evaluation mode')

    def _check_wrapper(self, runner) -> None:
        if get_world_size() > 1 and (
                getattr(runner.model, 'broadcast_buffers', False)
                and not all(layer.sync for layer in self._norms.values())):
            runner.logger.warning(
                'with broadcast_buffers=True the running '
                "statistics are the main process's alone. Set "
                'broadcast_buffers=False in model_wrapper_cfg, and '
                "dict(type='SyncBuffersHook') in custom_hooks to average "
                'them at the end of an epoch')
