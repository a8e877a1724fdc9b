"""State dicts in checkpoints of any kind."""
from typing import Any, Dict, List

from torch import Tensor

from ..errors import SetupError

StateDict = Dict[str, Tensor]


def find_state_dict(checkpoint: Any, name: str) -> StateDict:
    """The tensors of a checkpoint, without a wrapper's ``module.``.

    Args:
        checkpoint: What was loaded.
        name (str): Of the file, for the message.

    Raises:
        SetupError: If it holds none.
    """
    state = checkpoint
    for key in ('state_dict', 'model'):
        if isinstance(checkpoint, dict) and key in checkpoint:
            state = checkpoint[key]
            break
    if not isinstance(state, dict) or not state or not all(
            isinstance(value, Tensor) for value in state.values()):
        raise SetupError(
            f'{name}: it holds no state dict: expected names and tensors, in '
            "'state_dict', in 'model' or by themselves, but found "
            f'{_kind_of(checkpoint)}')
    if all(key.startswith('module.') for key in state):
        state = {key[len('module.'):]: v for key, v in state.items()}
    return dict(state)


def _kind_of(checkpoint: Any) -> str:
    if isinstance(checkpoint, dict):
        return f'a dict with {some(list(map(str, checkpoint)))}'
    return f'a {type(checkpoint).__name__}'


def some(keys: List[str], most: int = 3) -> str:
    """A few keys for a message."""
    if not keys:
        return 'nothing'
    more = f' and {len(keys) - most} more' if len(keys) > most else ''
    return ', '.join(keys[:most]) + more
