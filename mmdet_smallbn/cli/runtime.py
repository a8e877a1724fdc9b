"""Flags, config checks and runner that the command line tools share."""
import argparse
import os
from copy import deepcopy
from pathlib import Path
from typing import Any, Optional

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.dist import is_distributed
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, RUNNERS, init_default_scope
from mmengine.runner import Runner
from torch import nn

from ..errors import SetupError, did_you_mean
from ..hooks import PlainCheckpointHook
from ..layers import SmallBatchNorm, check_settings
from ..norm_report import norm_cfgs
from .checkpoints import (add_trust_argument, load_safely,
                          register_checkpoint_loader)
from .own_data import use_data


# Keys of mmdet 2.x that mmdet 3.x ignores.
_OLD_KEYS = ('data', 'optimizer_config', 'lr_config', 'runner',
             'checkpoint_config', 'log_config', 'evaluation')


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the config argument and the flags that change the config."""
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--data',
        metavar='DIR',
        help="COCO-format folder to use instead of the config's data")
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override config entries, for example '
        'optim_wrapper.optimizer.lr=0.01 custom_hooks.0.epochs=1 '
        'model.backbone.depth=18. Write lists as key=a,b or key="[a,b]", '
        'without white space')


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add mmdet's flags of a run and ``--trust-checkpoint``."""
    parser.add_argument('--work-dir', help='folder for logs and results')
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='launcher that starts the processes (default: none)')
    # torch's launcher uses the second spelling.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    add_trust_argument(parser)


def open_config(path: str) -> Config:
    """Read a config file.

    Raises:
        FileNotFoundError: If the file does not exist.
        SetupError: If it is a config of mmdet 2.x or has no model.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f'no config at {path}: check the path. Configs are in configs/')
    cfg = Config.fromfile(path)
    old = [key for key in _OLD_KEYS if isinstance(cfg.get(key), dict)]
    if 'optim_wrapper' not in cfg and 'optimizer' in cfg:
        old.append('optimizer')
    if old:
        raise SetupError(
            f'{path} has {", ".join(old)}: that is a config of mmdet 2.x, '
            'whose keys mmdet 3.x ignores. This package needs mmdet 3.x. Its '
            'documentation explains how to migrate a config')
    if cfg.get('model') is None:
        raise SetupError(f'{path} has no model: it is only a part of a config '
                         'or no detector config. Give a whole config')
    return cfg


def read_config(args: argparse.Namespace,
                training: bool = True,
                cfg: Optional[Config] = None,
                check: bool = False) -> Config:
    """Read the config and apply the flags of ``add_config_arguments``.

    Args:
        args (argparse.Namespace): Parsed flags.
        training (bool): True if ``--data`` must have training images.
        cfg (Config, optional): Config to change. None: read ``args.config``.
        check (bool): True to check every image of ``--data``.
    """
    load_safely(args)
    cfg = cfg or open_config(args.config)
    if args.data is not None:
        use_data(cfg, args.data, training, check)
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    return cfg


def load_config(args: argparse.Namespace,
                training: bool = True,
                cfg: Optional[Config] = None) -> Config:
    """Read the config for a run: also set launcher and work folder."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    first = os.environ['LOCAL_RANK'] == '0'
    cfg = read_config(args, training, cfg, check=first)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(args.config).stem)
    return cfg


def training_alone(cfg: Config) -> Config:
    """Copy a config, without evaluation and checkpoints."""
    cfg = deepcopy(cfg)
    for split in ('val', 'test'):
        for name in ('cfg', 'dataloader', 'evaluator'):
            cfg[f'{split}_{name}'] = None
    cfg.setdefault('default_hooks', {})['checkpoint'] = None
    cfg.log_level = 'WARNING'
    return cfg


def enable_auto_scale_lr(cfg: Config) -> None:
    """Scale the learning rate with the batch size.

    Raises:
        SetupError: If the config has no ``base_batch_size``.
    """
    if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
        raise SetupError(
            '--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in '
            f'the config, but got {cfg.get("auto_scale_lr")}')
    cfg.auto_scale_lr.enable = True


def images_of(cfg: Config) -> Optional[int]:
    """Return the training batch size of a process, or None if unknown.

    It is unknown with a sampler that mixes sources: one batch then serves
    several forward passes.
    """
    loader = cfg.get('train_dataloader') or {}
    if 'source_ratio' in (loader.get('sampler') or {}):
        return None
    return loader.get('batch_size')


def build_runner(cfg: Config) -> Runner:
    """Build the runner, on CPUs too where several processes are launched."""
    if cfg.launcher == 'pytorch' and not torch.cuda.is_available():
        _prepare_cpu_processes(cfg)
    check_norms(cfg)
    register_checkpoint_loader()
    runner = (
        RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg))
    runner.register_hook(PlainCheckpointHook())
    return runner


def _prepare_cpu_processes(cfg: Config) -> None:
    # mmengine's launcher and wrapper would both choose a GPU.
    if not is_distributed():
        torch.distributed.init_process_group(backend='gloo')
    wrapper = dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False))
    wrapper.update(cfg.get('model_wrapper_cfg') or {}, device_ids=None)
    cfg.model_wrapper_cfg = wrapper


def check_norms(cfg: Config) -> None:
    """Check every ``norm_cfg`` before a model is built.

    Raises:
        SetupError: If a type is not registered (mmcv's own message does not
            name the entry), if a norm of this package gets an unknown or
            invalid setting, or if ``sync_bn`` would convert it.
    """
    import mmcv.cnn  # noqa: F401  registers BN, GN, ...
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    for path, norm_cfg in norm_cfgs(cfg.get('model'), 'model'):
        kind = norm_cfg['type']
        found = find_norm(kind)
        if found is None:
            ours = [k for k, c in MODELS.module_dict.items() if is_ours(c)]
            raise SetupError(f'{path}.type={kind!r} is not a known norm. '
                             f'{did_you_mean(kind, ours)}')
        if not is_ours(found):
            continue
        _check_settings(path, norm_cfg, found)
        if cfg.get('sync_bn') and cfg.get('launcher', 'none') != 'none':
            raise SetupError(
                f'sync_bn={cfg.sync_bn!r} would turn {path}.type={kind!r}, '
                'and every kind of BatchNorm, into SyncBatchNorm: remove '
                'sync_bn from the config')


def build_model(cfg: Config) -> nn.Module:
    """Check a config's norms, and build its model without weights or logs."""
    check_norms(cfg)
    # Heads and necks write log lines while they are built.
    MMLogger.get_current_instance().setLevel('WARNING')
    model = cfg.model
    if 'teacher_ckpt' in model:
        # mmdet's distillation detectors load the checkpoint when built.
        model = ConfigDict(model, teacher_ckpt=None)
    return MODELS.build(model)


def find_norm(kind: Any) -> Any:
    """Return the class of a ``norm_cfg``'s type, or None if unknown."""
    if not isinstance(kind, str):
        return kind
    with MODELS.switch_scope_and_registry(None) as registry:
        return registry.get(kind)


def is_ours(cls: Any) -> bool:
    """True if a class is a norm of this package."""
    return isinstance(cls, type) and issubclass(cls, SmallBatchNorm)


def _check_settings(path: str, norm_cfg: dict, cls: type) -> None:
    """Build a norm with these settings to check them; its size is free."""
    settings = {
        key: value
        for key, value in norm_cfg.items()
        if key not in ('type', 'requires_grad', '_scope_')
    }
    groups = settings.get('num_groups')
    try:
        check_settings(cls, settings)
        cls(groups if isinstance(groups, int) else 1, **settings)
    except (TypeError, ValueError) as error:
        raise SetupError(f'{path}: {error}') from error
