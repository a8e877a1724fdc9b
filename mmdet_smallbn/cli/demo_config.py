"""What the flags of the demo change in a config."""
from pathlib import Path

from mmengine.config import Config

from ..errors import SetupError
from ..layers import suggested_window_size
from ..norm_report import norm_cfgs
from .runtime import find_norm, is_ours

_PARTS = ('shapes_coco.py', 'demo_schedule.py')
_BURN_IN = dict(type='BurnInHook', iters=250)  # the demo's schedule's


def put_on_shapes(cfg: Config, folder: Path) -> None:
    """Let a config train on the demo's images, by the demo's schedule.

    The model, its norms, the batch size and the accumulation stay. Data,
    pipelines and schedule become the demo's, hooks are those that the norms
    want. No weights are loaded, so nothing is frozen. Masks are trained if a
    RoI head has them.

    Args:
        cfg (Config): Of a detector.
        folder (Path): Where ``shapes_coco.py`` and ``demo_schedule.py`` are.

    Raises:
        SetupError: If they are not there.
    """
    missing = [name for name in _PARTS if not (folder / name).is_file()]
    if missing:
        raise SetupError(
            f'{cfg.filename} is no config of the demo. To train it on the '
            f"demo's data, {missing[0]} must be in {folder}: run this in a "
            'checkout of the project, or give --data')
    images = cfg.train_dataloader.batch_size
    parts = cfg.optim_wrapper.get('accumulative_counts', 1)
    for name in _PARTS:
        for key, value in Config.fromfile(folder / name).items():
            cfg[key] = value
    cfg.train_dataloader.batch_size = images
    cfg.optim_wrapper.accumulative_counts = parts
    cfg.load_from = None
    # They would bring images to other sizes.
    cfg.model.data_preprocessor.batch_augments = None
    cfg.model.backbone.init_cfg = None
    for key, value in (('frozen_stages', -1), ('norm_eval', False)):
        if key in cfg.model.backbone:
            cfg.model.backbone[key] = value
    if 'mask_head' in cfg.model.get('roi_head', {}):
        _add_masks(cfg)
    _fit_hooks(cfg)


def _fit_hooks(cfg: Config) -> None:
    """The demo's burn-in if a norm burns in, else what tells the steps."""
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
    """Put another norm, with its defaults, in place of this package's.

    ``eps``, ``momentum`` and ``requires_grad`` stay as the config has them.
    Convolutions stay what they are. Hooks become those that the norm wants.

    Args:
        cfg (Config): Of a detector.
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
                         'package to put it in place of')
    for norm_cfg in found:
        for key in set(norm_cfg) - {'eps', 'momentum', 'requires_grad'}:
            del norm_cfg[key]
        norm_cfg['type'] = kind
    _fit_hooks(cfg)


def use_size(cfg: Config, size: int) -> None:
    """Bring images to a size in pixels, in training and validation."""
    for loader in (cfg.train_dataloader, cfg.val_dataloader,
                   cfg.test_dataloader):
        for transform in loader.dataset.pipeline:
            if transform.type == 'Resize':
                transform.scale = (size, size)


def stretch(cfg: Config, times: float) -> None:
    """Make the schedule longer, all of its parts alike.

    Raises:
        SetupError: If the schedule counts epochs.
    """
    if cfg.train_cfg.get('max_iters') is None:
        raise SetupError(
            '--iters and --images stretch a schedule of iterations, but the '
            f'config has {cfg.train_cfg}. With --data a config trains as it '
            'is: set what you want by --cfg-options')

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
    """Train with another batch size, on as many images in all.

    The schedule gets longer as the batch gets smaller. AdamW's learning rate
    follows the square root of the batch size (arXiv:2205.10287), and CBN's
    window what its paper suggests.

    Raises:
        SetupError: If there is no batch of this size.
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
