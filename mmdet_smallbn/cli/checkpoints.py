"""Checkpoints: which one to resume, and how they are loaded."""
import argparse
import io
import os
import pickle
from pathlib import Path
from typing import Dict, Optional, Union
from urllib.error import URLError
from urllib.parse import urlparse
from zipfile import is_zipfile

import torch
from mmengine.dist import barrier, get_local_rank
from mmengine.fileio import get, load
from mmengine.hub import __path__ as hub_path
from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import (get_deprecated_model_names,
                                        get_external_models, get_mmcls_models,
                                        get_torchvision_models)

from ..errors import SetupError, did_you_mean
from ..progress import on_terminal

# What torch's files began with before they were archives.
_MAGIC = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
TRUST_FLAG = '--trust-checkpoint'
_trusts_checkpoints = False


def trust_checkpoints(trust: bool) -> None:
    """Say whether local checkpoints may hold more than tensors.

    To load those is to run what is in them.
    """
    global _trusts_checkpoints
    _trusts_checkpoints = trust


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    """The flag that says so, for a tool that loads checkpoints."""
    parser.add_argument(
        TRUST_FLAG,
        action='store_true',
        help='load a checkpoint that holds more than tensors: that runs '
        'what is in it, so use it for files that you trust alone')


def load_safely(args: argparse.Namespace) -> None:
    """Let all that loads a checkpoint do it as a tool's flags say."""
    register_checkpoint_loader()
    trust_checkpoints(getattr(args, 'trust_checkpoint', False))


def latest_checkpoint(work_dir: str) -> Optional[str]:
    """The newest checkpoint of a training that is whole.

    A training that is killed while it writes one leaves a part of a file, or
    a file that ``last_checkpoint`` does not name yet.

    Args:
        work_dir (str): The work folder.

    Returns:
        str, optional: Its path. None if there is none, or if the training
        writes what is not a local file: mmengine looks for itself then.

    Raises:
        SetupError: If there are some, and none is whole.
    """
    record = Path(work_dir) / 'last_checkpoint'
    named = record.read_text().strip() if record.is_file() else ''
    if '://' in named or (named and Path(named).is_dir()):
        return None
    folder = Path(named).parent if named else Path(work_dir)
    files = sorted((path for path in folder.glob('*.pth')
                    if path.is_file() and not path.name.startswith('best_')),
                   key=lambda path: path.stat().st_mtime,
                   reverse=True)
    for path in files:
        if _is_whole(path):
            if named and path != Path(named):
                print_log(
                    f'{named} is not the newest checkpoint that is whole: '
                    f'resuming from {path}', 'current')
            return str(path)
    if files:
        raise SetupError(
            f'no checkpoint in {folder} is whole: train without --resume, '
            'or name another one')
    return None


def _is_whole(path: Path) -> bool:
    # The directory of torch's archives is at their end.
    if is_zipfile(path):
        return True
    try:  # what old versions wrote has none
        torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError:
        return True
    except Exception:  # whatever a file's bytes may lead to
        return False
    return True


def register_checkpoint_loader() -> None:
    """Let mmengine load checkpoints safely, and its own where it is trusted.

    Checkpoints that mmengine 0.10 writes by itself hold message buffers
    beside the tensors, which torch's safe loading refuses. Such a local file
    is loaded if the user says so by ``--trust-checkpoint``. What comes from
    an address is loaded safely or not at all.

    Names of published weights (``torchvision://resnet50``) become addresses
    by mmengine's own lists, which need no torchvision.
    """
    for prefixes, loader in (
        ('', load_from_local),
        (('http://', 'https://'), load_from_address),
        ((r'(\S+\:)?s3://', r'(\S+\:)?petrel://', 'pavi://'),
         load_from_storage),
        (('torchvision://', 'modelzoo://'), load_from_torchvision),
        (('open-mmlab://', 'openmmlab://'), load_from_openmmlab),
        ('mmcls://', load_from_mmcls)):
        CheckpointLoader.register_scheme(
            prefixes=prefixes, loader=loader, force=True)


def load_from_local(filename: str, map_location: Optional[str] = None):
    """Load a local checkpoint, safely unless the user trusts it.

    Args:
        filename (str): Path of the checkpoint.
        map_location (str, optional): As for ``torch.load``.

    Returns:
        dict: The checkpoint.

    Raises:
        FileNotFoundError: If there is no such file.
        SetupError: If the file is not a checkpoint, or holds more than
            tensors and is not trusted.
    """
    path = Path(filename).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f'no checkpoint at {filename}: check the path, training writes '
            'them to its work folder')
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        if not _is_torchs(path):
            raise _not_a_checkpoint(filename, error) from error
        if not _trusts_checkpoints:
            raise SetupError(
                f'{filename} holds more than tensors. To load it is to run '
                'what is in it. If you trust where it comes from, add '
                f'{TRUST_FLAG}') from error
    except Exception as error:  # whatever a file's bytes may lead to
        raise _not_a_checkpoint(filename, error) from error
    try:
        return torch.load(path, map_location=map_location, weights_only=False)
    except Exception as error:
        raise _not_a_checkpoint(filename, error) from error


def _is_torchs(path: Path) -> bool:
    """Whether torch wrote a file: an archive, or what old versions wrote."""
    with path.open('rb') as file:
        begins = file.read(len(_MAGIC))
    return begins == _MAGIC or is_zipfile(path)


def _not_a_checkpoint(filename: str, error: Exception) -> SetupError:
    return SetupError(
        f'{filename} is not a checkpoint, or a damaged one '
        f'({type(error).__name__}): copy or download it again')


def load_from_address(filename: str,
                      map_location: Optional[str] = None,
                      model_dir: Optional[str] = None):
    """Download a checkpoint once a machine, and load it safely.

    Args:
        filename (str): The address.
        map_location (str, optional): As for ``torch.load``.
        model_dir (str, optional): Folder to keep it in. None: torch's.

    Returns:
        dict: The checkpoint.

    Raises:
        SetupError: If it cannot be downloaded, or holds more than tensors.
    """
    folder = Path(model_dir or Path(torch.hub.get_dir()) / 'checkpoints')
    path = folder / Path(urlparse(filename).path).name
    failure = None
    if get_local_rank() == 0 and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        print_log(f'downloading {filename} to {path}', 'current')
        try:
            torch.hub.download_url_to_file(
                filename, str(path), progress=on_terminal())
        except (URLError, OSError, RuntimeError) as error:
            failure = error
    barrier()
    if not path.exists():
        raise SetupError(
            f'{filename} cannot be downloaded'
            f'{f" ({failure})" if failure else ""}. Download it elsewhere '
            f'and put it at {path}, or train without it: --cfg-options '
            'model.backbone.init_cfg=None (load_from=None for a whole '
            'detector)')
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise _unsafe_address(filename, path) from error


def load_from_storage(filename: str, map_location: Optional[str] = None):
    """Load what one of mmengine's storage backends holds, safely.

    Raises:
        SetupError: If it holds more than tensors.
    """
    content = io.BytesIO(get(filename))
    try:
        return torch.load(
            content, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise _unsafe_address(filename, 'a copy of it') from error


def _unsafe_address(filename: str, copy: Union[str, Path]) -> SetupError:
    return SetupError(
        f'{filename} holds more than tensors, and is not loaded from an '
        f'address. If you trust it, name the file, {copy}, and add '
        f'{TRUST_FLAG}')


def load_from_torchvision(filename: str, map_location: Optional[str] = None):
    """Load ``torchvision://NAME``, without torchvision where that will do.

    mmengine asks torchvision for its list of weights. For names without a
    dot, as ``resnet50``, mmengine has that list itself.

    Raises:
        SetupError: If the name is on neither list.
    """
    name = filename.partition('://')[2]
    addresses = load(Path(hub_path[0]) / 'torchvision_0.12.json')
    if name not in addresses:
        try:
            addresses = {**addresses, **get_torchvision_models()}
        except Exception as error:  # whatever its operators may run into
            raise SetupError(
                f'{filename}: names with a dot need torchvision, which '
                f'cannot be imported here ({error}). '
                f'{did_you_mean(name, list(addresses))}') from error
    return load_from_address(
        _address(filename, name, addresses), map_location)


def load_from_openmmlab(filename: str, map_location: Optional[str] = None):
    """Load ``open-mmlab://NAME``, safely."""
    name = filename.partition('://')[2]
    name = get_deprecated_model_names().get(name, name)
    address = _address(filename, name, get_external_models())
    if '://' in address:
        return load_from_address(address, map_location)
    home = os.environ.get('MMENGINE_HOME', '~/.cache/mmengine')
    return load_from_local(str(Path(home) / address), map_location)


def load_from_mmcls(filename: str, map_location: Optional[str] = None):
    """Load ``mmcls://NAME``, safely: its backbone."""
    name = filename.partition('://')[2]
    found = load_from_address(
        _address(filename, name, get_mmcls_models()), map_location)
    state = found.get('state_dict', found)
    return dict(state_dict={
        key[len('backbone.'):]: value
        for key, value in state.items() if key.startswith('backbone.')
    })


def _address(filename: str, name: str, addresses: Dict[str, str]) -> str:
    if name not in addresses:
        raise SetupError(f'{filename} is not known. '
                         f'{did_you_mean(name, list(addresses))}')
    return addresses[name]
