"""Burn-in: from the runner's iteration to the layers' state."""
from typing import Dict, List, Optional, Sequence, Union

from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import SetupError
from ..layers import (CBN, SmallBatchNorm, is_under, remember_calls,
                      suggested_window_size)
from .model import (bare_model, gradient_scale, kept_asleep,
                    norms_of_teachers)

# The key of a checkpoint that holds what norms remember.
_STATES = 'smallbn_states'


@HOOKS.register_module()
class BurnInHook(Hook):
    """Keep norms to the present batch while the weights still change fast.

    - CBN: window 1 (arXiv:2002.05712, Sec. 3.3: for 3 of 12 epochs on COCO);
      then the window opens and fills.
    - MABN: the batch's statistics in both passes, no renormalisation
      (arXiv:2001.06838, App. B.3: for 10,000 iterations, in the heads). The
      averages fill meanwhile.
    - BRN: r = 1 and d = 0, which is batch normalisation.

    A model may mix them, and norms without a burn-in. The hook also tells all
    of them which iteration it is, so that a layer called twice in one does
    not take it for two, and what the loss is multiplied with (loss scale,
    accumulation), so that MABN's averages are of the loss itself.

    The phase is a function of the runner's epoch or iteration: a resumed run
    is where it was, and ``load_from`` starts burn-in afresh. Without any hook
    the layers do not burn in.

    Checkpoints hold what CBN and MABN remember of past iterations, under a
    key of its own, and a resume takes it up, so that it goes on as if it had
    never stopped. It is that of the main process: the norms of others, and
    all with ``sync=True`` in several processes, fill anew, within
    ``window_size`` or ``buffer_size`` iterations. CBN's takes 32 patches of
    its input for each iteration and layer.

    A frozen detector within the model, the teacher of semi-supervised
    learning or distillation, is a model at work: its norms are put into
    evaluation, which mmdet leaves in training mode.

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
        save_states (bool): Whether checkpoints hold what the norms remember.
            False: it fills anew after a resume.

    Raises:
        ValueError: If not exactly one of ``epochs`` and ``iters`` is given,
            or it is negative.
        SetupError: At the start of training, if no layer burns in, all of
            them stay in evaluation mode, burn-in is as long as the training,
            or a teacher never gets the statistics that it evaluates with.
    """
    priority = 'ABOVE_NORMAL'

    def __init__(self,
                 epochs: Optional[int] = None,
                 iters: Optional[int] = None,
                 prefix: Union[str, Sequence[str], None] = None,
                 save_states: bool = True) -> None:
        if (epochs is None) == (iters is None):
            raise ValueError('BurnInHook takes exactly one of epochs and '
                             f'iters, but got epochs={epochs}, iters={iters}')
        self.unit = 'epochs' if iters is None else 'iters'
        self.length = epochs if iters is None else iters
        if not isinstance(self.length, int) or self.length < 0:
            raise ValueError(f'BurnInHook: {self.unit} must be an integer of '
                             f'at least 0, but got {self.length!r}')
        self.prefixes = (prefix, ) if isinstance(prefix, str) else prefix
        self._layers: Dict[str, SmallBatchNorm] = {}
        self._told: Dict[str, SmallBatchNorm] = {}
        self._teaching: Dict[str, SmallBatchNorm] = {}
        self._burning: Optional[bool] = None
        self._handles: List[RemovableHandle] = []
        self.save_states = save_states
        self._loaded: Dict[str, list] = {}
        self._kept: Dict[SmallBatchNorm, list] = {}

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Put the norms' states into a checkpoint."""
        if not self.save_states or _STATES in checkpoint:
            return  # or another of these hooks has put them there
        alone = get_world_size() == 1
        checkpoint[_STATES] = {
            name: layer.export_states()
            for name, layer in self._told.items()
            if layer.keeps_states and (alone or not layer.sync)
        }

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Keep the norms' states of a checkpoint that is resumed."""
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

    def before_train(self, runner) -> None:
        """Find the layers, and check that the burn-in makes sense."""
        model = bare_model(runner)
        self.find_layers(model)
        for name, layer in self._told.items():
            layer.layer_name = name
            # Of an earlier training of the same model object.
            layer.reset_state()
        self.check_length(
            isinstance(runner.train_loop, EpochBasedTrainLoop),
            runner.max_epochs, runner.max_iters)
        self._check_teachers(runner)
        self._check_wrapper(runner)
        self._burning = None
        self._restore(runner)
        # Of an earlier training that ended in an error, too.
        self._forget_calls()
        self._handles = remember_calls(model)

    def before_val_epoch(self, runner) -> None:
        """Keep the past: mmdet's SyncNormHook loads a state dict now."""
        self._kept = {
            layer: layer._states
            for layer in self._told.values() if layer.keeps_states
        }

    def after_val_epoch(self, runner, metrics=None) -> None:
        """The weights are those of before."""
        for layer, states in self._kept.items():
            layer._states = states
        self._kept = {}

    def find_layers(self, model: nn.Module) -> None:
        """Find the norms, and those of them that burn in.

        Raises:
            SetupError: If there is none in the model, or under a prefix.
        """
        self._told = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, SmallBatchNorm)
        }
        self._teaching = norms_of_teachers(model)
        self._layers = {
            name: layer
            for name, layer in self._told.items()
            if layer.burns_in and self.covers(name)
            and name not in self._teaching
        }
        for prefix in self.prefixes or (None, ):
            if not any(
                    self._under(name, prefix)
                    for name in (*self._layers, *self._teaching)):
                self._raise_no_layer(prefix, model)

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Tell the layers the iteration and the phase."""
        # The training loop puts the whole model into training mode.
        for layer in self._teaching.values():
            layer.eval()
        burning = self.is_burning_in(runner)
        if self._burning is None:
            self._check_modes(runner)
            self._log_examples(runner)
        if burning != self._burning:
            self._log_phase(runner, burning)
            self._burning = burning
        scale = gradient_scale(runner)
        for layer in self._told.values():
            layer.iteration = runner.iter
            layer.gradient_scale = scale
        for layer in self._layers.values():
            layer.burning_in = burning

    def after_train(self, runner) -> None:
        """Let the layers go: who calls them next has iterations of his own."""
        self._forget_calls()
        for layer in self._told.values():
            layer.iteration = None
            layer.gradient_scale = 1.
        for layer in self._layers.values():
            layer.burning_in = False

    def _restore(self, runner) -> None:
        alone = get_world_size() == 1
        refused = []
        for name, states in self._loaded.items():
            layer = self._told.get(name)
            if layer is None or (layer.sync and not alone):
                continue
            try:
                layer.restore_states(states)
            except ValueError as error:
                refused.append(str(error))
        if refused:
            runner.logger.warning(
                f'{len(refused)} norms do not take up what the checkpoint '
                f'remembers of past iterations, and fill anew: {refused[0]}')
        self._loaded = {}

    def _forget_calls(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

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
        where = 'the model' if prefix is None else f'{prefix!r} of the model'
        message = f'BurnInHook: {where} holds no layer that burns in'
        burning = [n for n, layer in self._told.items() if layer.burns_in]
        # torch's, and mmcv's, which is no BatchNorm by its class.
        converted = any(
            type(m).__name__ == 'SyncBatchNorm' for m in model.modules())
        if burning:
            parts = sorted({name.split('.')[0] for name in burning})
            message += f'; such layers are in {", ".join(parts)}'
        elif converted:
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
        if self.unit == 'epochs' and not by_epoch:
            raise SetupError(
                f'BurnInHook: epochs={self.length}, but the training loop '
                'counts iterations. Use iters')
        total = max_epochs if self.unit == 'epochs' else max_iters
        if self.length and total and self.length >= total:
            raise SetupError(
                f'BurnInHook: {self.unit}={self.length} is no shorter than '
                f'the training ({total} {self.unit}), and the norms would '
                "never be used. For a trial run set the hook's "
                f'{self.unit}=0, as by --cfg-options custom_hooks.0.'
                f'{self.unit}=0')

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
                f'BurnInHook: {len(needing)} norms of the teacher, '
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
                and not all(layer.sync for layer in self._told.values())):
            runner.logger.warning(
                'BurnInHook: with broadcast_buffers=True the running '
                "statistics are the main process's alone. Set "
                'broadcast_buffers=False in model_wrapper_cfg, and '
                "dict(type='SyncBuffersHook') in custom_hooks to average "
                'them at the end of an epoch')

    def _check_modes(self, runner) -> None:
        """Norms that should train but are kept in evaluation mode."""
        asleep = kept_asleep(self._layers)
        if not asleep:
            return
        message = (
            f'BurnInHook: {len(asleep)} of {len(self._layers)} norms stay in '
            f'evaluation mode, {asleep[0]!r} the first of them: they are not '
            'frozen, but normalise with their running statistics. Set '
            'norm_eval=False in the backbone if they should train')
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
