"""Changes that the demo's flags make to a config."""
from pathlib import Path

from mmengine.config import Config

from ..errors import SetupError
from ..layers import suggested_window_size
from ..norm_report import norm_cfgs
from .runtime import find_norm, is_ours

_PARTS = ('shapes_coco.py', 'demo_schedule.py')
_BURN_IN = dict(type='BurnInHook', iters=250)  # fits the demo's schedule


def put_on_shapes(cfg: Config, folder: Path) -> None:
    """Make a config train on the demo's images with the demo's schedule.

    The model, its norms, the batch size and the accumulation stay. Data,
    pipelines and schedule become the demo's. Hooks are added as the norms
    need them. No weights are loaded, so nothing is frozen. Masks are trained
    if the RoI head has a mask head.

    Args:
        cfg (Config): Config of a detector.
        folder (Path): Folder of ``shapes_coco.py`` and ``demo_schedule.py``.

    Raises:
        SetupError: If the folder lacks one of these files.
    """
    missing = [name for name in _PARTS if not (folder / name).is_file()]
    if missing:
        raise SetupError(
            f'{cfg.filename} is not a demo config, and {missing[0]}, which '
            f"the demo's data needs, is not in {folder}: run this in a "
            'checkout of the project, or give --data')
    images = cfg.train_dataloader.batch_size
    parts = cfg.optim_wrapper.get('accumulative_counts', 1)
    for name in _PARTS:
        for key, value in Config.fromfile(folder / name).items():
            cfg[key] = value
    cfg.train_dataloader.batch_size = images
    cfg.optim_wrapper.accumulative_counts = parts
    cfg.load_from = None
    # Batch augmentations would resize the images.
    cfg.model.data_preprocessor.batch_augments = None
    cfg.model.backbone.init_cfg = None
    for key, value in (('frozen_stages', -1), ('norm_eval', False)):
        if key in cfg.model.backbone:
            cfg.model.backbone[key] = value
    if 'mask_head' in cfg.model.get('roi_head', {}):
        _add_masks(cfg)
    _fit_hooks(cfg)


def _fit_hooks(cfg: Config) -> None:
    """Keep or add the hook that the norms need, and remove the others."""
    norms = [find_norm(norm_cfg['type'])
             for _, norm_cfg in norm_cfgs(cfg.model, 'model')]
    ours = [norm for norm in norms if is_ours(norm)]
    hooks = cfg.get('custom_hooks') or []
    burn_in = [hook for hook in hooks if hook['type'] == 'BurnInHook']
    wanted = []
    if any(norm.burns_in for norm in ours):
        wanted = burn_in or [dict(_BURN_IN)]
    elif ours:
        wanted = [dict(type='SmallBatchNormHook')]
    others = [
        hook for hook in hooks
        if hook['type'] not in ('BurnInHook', 'SmallBatchNormHook')
    ]
    cfg.custom_hooks = others + wanted


def _add_masks(cfg: Config) -> None:
    for transform in cfg.train_dataloader.dataset.pipeline:
        if transform.type == 'LoadAnnotations':
            transform.with_mask = True
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        evaluator.metric = ['bbox', 'segm']


def use_norm(cfg: Config, kind: str) -> None:
    """Replace this package's norms with another norm in its default settings.

    ``eps``, ``momentum`` and ``requires_grad`` keep their values in the
    config. Convolutions do not change. Hooks are set as the norm needs them.

    Args:
        cfg (Config): Config of a detector.
        kind (str): A registered norm, such as ``'BN'``.

    Raises:
        SetupError: If the config has no norm of this package.
    """
    found = [
        norm_cfg for _, norm_cfg in norm_cfgs(cfg.model, 'model')
        if is_ours(find_norm(norm_cfg['type']))
    ]
    if not found:
        raise SetupError(f'--norm {kind}: the config has no norm of this '
                         'package to replace. Remove --norm')
    for norm_cfg in found:
        for key in set(norm_cfg) - {'eps', 'momentum', 'requires_grad'}:
            del norm_cfg[key]
        norm_cfg['type'] = kind
    _fit_hooks(cfg)


def use_size(cfg: Config, size: int) -> None:
    """Resize images to ``size`` pixels in training and validation."""
    for loader in (cfg.train_dataloader, cfg.val_dataloader,
                   cfg.test_dataloader):
        for transform in loader.dataset.pipeline:
            if transform.type == 'Resize':
                transform.scale = (size, size)


def stretch(cfg: Config, times: float) -> None:
    """Multiply all lengths of the schedule by ``times``.

    Raises:
        SetupError: If the schedule counts epochs.
    """
    if cfg.train_cfg.get('max_iters') is None:
        raise SetupError(
            '--iters and --images stretch a schedule of iterations, but the '
            f'config has {cfg.train_cfg}. With --data a config keeps its own '
            'schedule: change it with --cfg-options')

    def longer(holder: dict, *keys: str) -> None:
        for key in keys:
            if holder.get(key):
                holder[key] = max(round(holder[key] * times), 1)

    longer(cfg.train_cfg, 'max_iters', 'val_interval')
    longer(cfg.default_hooks.checkpoint, 'interval')
    for scheduler in cfg.param_scheduler:
        longer(scheduler, 'begin', 'end')
    for hook in cfg.get('custom_hooks') or []:
        longer(hook, 'iters')


def use_images(cfg: Config, images: int) -> None:
    """Change the batch size, and keep the total number of training images.

    A smaller batch makes the schedule longer. AdamW's learning rate is scaled
    with the square root of the batch size (arXiv:2205.10287). CBN's window
    is set to the size that its paper suggests for this batch.

    Raises:
        SetupError: If ``images`` is below 1.
    """
    if images < 1:
        raise SetupError(f'--images must be at least 1, but got {images}')
    times = cfg.train_dataloader.batch_size / images
    cfg.train_dataloader.batch_size = images
    cfg.optim_wrapper.optimizer.lr *= times**-0.5
    stretch(cfg, times)
    for _, norm_cfg in norm_cfgs(cfg.model, 'model'):
        if norm_cfg['type'] in ('CBN', 'NaiveCBN'):
            norm_cfg['window_size'] = suggested_window_size(images)
