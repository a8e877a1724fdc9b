"""What training and testing share: flags, devices, checkpoints."""
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


# Keys of mmdet 2.x that 3.x does not look at.
_OLD_KEYS = ('data', 'optimizer_config', 'lr_config', 'runner',
             'checkpoint_config', 'log_config', 'evaluation')


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The config, and the flags that change what it says."""
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--data',
        metavar='DIR',
        help="a COCO-format folder of your own, instead of the config's data")
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override entries of the config: optim_wrapper.optimizer.lr=0.01 '
        'custom_hooks.0.epochs=1 model.backbone.depth=18; lists as key=a,b or '
        'key="[a,b]", without white space')


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a run: mmdet's, and whether it trusts checkpoints."""
    parser.add_argument('--work-dir', help='folder for logs and results')
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how the processes are started')
    # torch's launcher passes the second spelling.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    add_trust_argument(parser)


def open_config(path: str) -> Config:
    """Read a config file.

    Raises:
        FileNotFoundError: If there is none.
        SetupError: If it describes no model.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f'no config at {path}: check the path, configs are in configs/')
    cfg = Config.fromfile(path)
    old = [key for key in _OLD_KEYS if isinstance(cfg.get(key), dict)]
    if 'optim_wrapper' not in cfg and 'optimizer' in cfg:
        old.append('optimizer')
    if old:
        raise SetupError(
            f'{path} has {", ".join(old)}: that is a config of mmdet 2.x, '
            'whose keys mmdet 3.x ignores. This package is for mmdet 3.x; its '
            'documentation says how to migrate a config')
    if cfg.get('model') is None:
        raise SetupError(f'{path} has no model: it is a part of a config, or '
                         'one of something else')
    return cfg


def read_config(args: argparse.Namespace,
                training: bool = True,
                cfg: Optional[Config] = None,
                check: bool = False) -> Config:
    """Apply what ``add_config_arguments`` adds to the config, or to ``cfg``.

    ``check``: also look into every image of ``--data``.
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
    """As :func:`read_config`, for a run: launcher, work folder."""
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
    """A copy of a config that trains, without evaluation or checkpoints."""
    cfg = deepcopy(cfg)
    for split in ('val', 'test'):
        for name in ('cfg', 'dataloader', 'evaluator'):
            cfg[f'{split}_{name}'] = None
    cfg.setdefault('default_hooks', {})['checkpoint'] = None
    cfg.log_level = 'WARNING'
    return cfg


def enable_auto_scale_lr(cfg: Config) -> None:
    """Let the learning rate follow the batch size.

    Raises:
        SetupError: If the config gives no batch size to scale from.
    """
    if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
        raise SetupError(
            '--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in '
            f'the config, but got {cfg.get("auto_scale_lr")}')
    cfg.auto_scale_lr.enable = True


def images_of(cfg: Config) -> Optional[int]:
    """Training images that a process sees at a time; None if unknown.

    A sampler that mixes sources fills a batch for several passes.
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
    # mmengine's launcher picks a GPU first and its wrapper names one.
    if not is_distributed():
        torch.distributed.init_process_group(backend='gloo')
    wrapper = dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False))
    wrapper.update(cfg.get('model_wrapper_cfg') or {}, device_ids=None)
    cfg.model_wrapper_cfg = wrapper


def check_norms(cfg: Config) -> None:
    """Look at every ``norm_cfg`` before a model is built.

    Raises:
        SetupError: If a type is not registered (mmcv's own message does not
            say which), if one of ours is given a setting that it does not
            take, or if ``sync_bn`` would convert it.
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
    """Check a config's norms, and build its model without weights or words."""
    check_norms(cfg)
    # Heads and necks tell of themselves while they are built.
    MMLogger.get_current_instance().setLevel('WARNING')
    model = cfg.model
    if 'teacher_ckpt' in model:
        # mmdet's detectors that distil load it as soon as they are built.
        model = ConfigDict(model, teacher_ckpt=None)
    return MODELS.build(model)


def find_norm(kind: Any) -> Any:
    """The class of a ``norm_cfg``'s type; None if it is not registered."""
    if not isinstance(kind, str):
        return kind
    with MODELS.switch_scope_and_registry(None) as registry:
        return registry.get(kind)


def is_ours(cls: Any) -> bool:
    """Whether it is a norm of this package."""
    return isinstance(cls, type) and issubclass(cls, SmallBatchNorm)


def _check_settings(path: str, norm_cfg: dict, cls: type) -> None:
    """Build a norm as the model would, but of no size in particular."""
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
