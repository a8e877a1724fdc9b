"""Safe loading of checkpoints, and the search for the latest one."""
import argparse
import io
import os
import pickle
from pathlib import Path
from typing import BinaryIO, Dict, Optional, Union
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

# First bytes of a torch file in the format before zip archives.
_MAGIC = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
TRUST_FLAG = '--trust-checkpoint'
_trusts_checkpoints = False


def trust_checkpoints(trust: bool) -> None:
    """Set whether local checkpoints may hold more than tensors.

    Loading such a checkpoint can run code that it contains.
    """
    global _trusts_checkpoints
    _trusts_checkpoints = trust


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--trust-checkpoint`` to a tool that loads checkpoints."""
    parser.add_argument(
        TRUST_FLAG,
        action='store_true',
        help='also load a checkpoint that holds more than tensors. Loading it '
        'can run code from the file: use this only for files that you trust')


def load_safely(args: argparse.Namespace) -> None:
    """Make every later checkpoint load safe, as the tool's flags say."""
    register_checkpoint_loader()
    trust_checkpoints(getattr(args, 'trust_checkpoint', False))


def latest_checkpoint(work_dir: str) -> Optional[str]:
    """Return the newest complete checkpoint of a training.

    A training that is killed while it writes a checkpoint leaves an
    incomplete file, or a file that ``last_checkpoint`` does not name yet.

    Args:
        work_dir (str): The work folder.

    Returns:
        str, optional: Path of the checkpoint. None if there is none, or if
        checkpoints are not local files: then mmengine searches for them.

    Raises:
        SetupError: If there are checkpoints, but none is complete.
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
                    f'{named} is not the newest complete checkpoint: '
                    f'resuming from {path}', 'current')
            return str(path)
    if files:
        raise SetupError(
            f'no checkpoint in {folder} is complete: train without --resume, '
            'or give the path of another checkpoint')
    return None


def _is_whole(path: Path) -> bool:
    # A zip archive has its directory at the end, so a cut one has none.
    if is_zipfile(path):
        return True
    try:  # the format of old torch versions is no zip archive
        torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError:
        with path.open('rb') as file:
            return _is_torchs(file)
    except Exception:  # damaged bytes can raise any error
        return False
    return True


def register_checkpoint_loader() -> None:
    """Replace mmengine's checkpoint loaders with safe ones.

    The checkpoints of mmengine 0.10 hold message buffers in addition to
    tensors, and torch's safe loading refuses them. Such a file is loaded only
    if it is local and the user gives ``--trust-checkpoint``. Files from a URL
    are always loaded safely.

    Names of published weights (``torchvision://resnet50``) are looked up in
    mmengine's own lists, which do not need torchvision.
    """
    for prefixes, loader in (
        ('', load_from_local),
        (('http://', 'https://'), load_from_address),
        ((r'(\S+\:)?s3://', r'(\S+\:)?petrel://'), load_from_storage),
        (('torchvision://', 'modelzoo://'), load_from_torchvision),
        (('open-mmlab://', 'openmmlab://'), load_from_openmmlab),
        ('mmcls://', load_from_mmcls)):
        CheckpointLoader.register_scheme(
            prefixes=prefixes, loader=loader, force=True)


def load_from_local(filename: str, map_location: Optional[str] = None):
    """Load a local checkpoint, in torch's safe mode unless it is trusted.

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
            f'no checkpoint at {filename}: check the path. Training writes '
            'checkpoints to its work folder')
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        with path.open('rb') as file:
            if not _is_torchs(file):
                raise _not_a_checkpoint(filename, error) from error
        if not _trusts_checkpoints:
            raise SetupError(
                f'{filename} holds more than tensors. Loading it can run code '
                f'from the file. If you trust its source, add {TRUST_FLAG}'
            ) from error
    except Exception as error:  # damaged bytes can raise any error
        raise _not_a_checkpoint(filename, error) from error
    try:
        return torch.load(path, map_location=map_location, weights_only=False)
    except Exception as error:
        raise _not_a_checkpoint(filename, error) from error


def _is_torchs(file: BinaryIO) -> bool:
    """True if a file is in torch's format, a zip archive or the old one."""
    file.seek(0)
    return file.read(len(_MAGIC)) == _MAGIC or is_zipfile(file)


def _not_a_checkpoint(filename: str, error: Exception) -> SetupError:
    return SetupError(
        f'{filename} is not a checkpoint, or it is damaged '
        f'({type(error).__name__}): copy or download it again')


def load_from_address(filename: str,
                      map_location: Optional[str] = None,
                      model_dir: Optional[str] = None):
    """Download a checkpoint once per machine, and load it safely.

    Args:
        filename (str): The URL.
        map_location (str, optional): As for ``torch.load``.
        model_dir (str, optional): Folder to store the file in. None: torch's
            ``checkpoints`` folder.

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
    with path.open('rb') as file:
        return _load_safely(file, filename, path, map_location)


def load_from_storage(filename: str, map_location: Optional[str] = None):
    """Load a checkpoint from one of mmengine's storage backends, safely.

    Raises:
        SetupError: If the checkpoint holds more than tensors.
    """
    return _load_safely(io.BytesIO(get(filename)), filename, 'a copy of it',
                        map_location)


def _load_safely(file: BinaryIO, filename: str, copy: Union[str, Path],
                 map_location: Optional[str]):
    try:
        return torch.load(file, map_location=map_location, weights_only=True)
    except Exception as error:  # damaged bytes can raise any error
        if not isinstance(error, pickle.UnpicklingError) or not (
                _is_torchs(file)):
            raise _not_a_checkpoint(filename, error) from error
        raise SetupError(
            f'{filename} holds more than tensors, so it is not loaded from a '
            f'URL. If you trust it, give the local file ({copy}) and add '
            f'{TRUST_FLAG}') from error


def load_from_torchvision(filename: str, map_location: Optional[str] = None):
    """Load ``torchvision://NAME``, if possible without torchvision.

    mmengine's own list has the names without a dot, such as ``resnet50``.
    Only other names need the list of torchvision.

    Raises:
        SetupError: If neither list has the name.
    """
    name = filename.partition('://')[2]
    addresses = load(Path(hub_path[0]) / 'torchvision_0.12.json')
    if name not in addresses:
        try:
            addresses = {**addresses, **get_torchvision_models()}
        except Exception as error:  # a broken install can raise any error
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
    """Load the backbone of ``mmcls://NAME``, safely."""
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
