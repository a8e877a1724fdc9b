"""What training and testing share: flags, devices, checkpoints."""
import argparse
import os
import pickle
from pathlib import Path
from typing import Optional

import torch
from mmengine.config import Config, DictAction
from mmengine.dist import is_distributed
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import CheckpointLoader, Runner


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that mmdet's train.py and test.py have in common."""
    parser.add_argument('--work-dir', help='folder for logs and results')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override entries of the config: optim_wrapper.optimizer.lr=0.01 '
        'custom_hooks.0.epochs=1 model.backbone.depth=18; lists as key=a,b or '
        'key="[a,b]", without white space')
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how the processes are started')
    # torch's launcher passes the second spelling.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def load_config(args: argparse.Namespace) -> Config:
    """Read the config, apply the command line, settle the work folder."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if not Path(args.config).is_file():
        raise FileNotFoundError(f'no config at {args.config}')
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(args.config).stem)
    return cfg


def build_runner(cfg: Config) -> Runner:
    """Build the runner, on CPUs too where several processes are launched."""
    if cfg.launcher != 'none' and not torch.cuda.is_available():
        _prepare_cpu_processes(cfg)
    register_checkpoint_loader()
    if 'runner_type' in cfg:
        return RUNNERS.build(cfg)
    return Runner.from_cfg(cfg)


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


def register_checkpoint_loader() -> None:
    """Let mmengine load its own checkpoints on torch >= 2.6.

    Those hold message buffers beside the tensors, which torch's safe loading
    refuses. A local file is tried safely first, and loaded as older versions
    did if that fails: it is the one that the user named. Whatever comes from
    an address is left to the toolbox.
    """
    CheckpointLoader.register_scheme(
        prefixes='', loader=load_from_local, force=True)


def load_from_local(filename: str, map_location: Optional[str] = None):
    """Load a local checkpoint, safely where that is possible.

    Args:
        filename (str): Path of the checkpoint.
        map_location (str, optional): As for ``torch.load``.

    Returns:
        dict: The checkpoint.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a checkpoint.
    """
    path = Path(filename).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f'no checkpoint at {filename}')
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError:
        print_log(
            f'{path.name} holds more than tensors: loading it unpickles what '
            'it contains. Use files from sources that you trust', 'current')
    try:
        return torch.load(path, map_location=map_location, weights_only=False)
    except pickle.UnpicklingError as error:
        raise ValueError(f'{filename} is not a checkpoint') from error
