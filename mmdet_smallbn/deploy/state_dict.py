"""State dicts in checkpoints of any kind."""
from typing import Any, Dict

from torch import Tensor, nn

from ..errors import SetupError
from ..words import some

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


def load_strictly(model: nn.Module,
                  state: StateDict,
                  message: str,
                  allow_more: bool = False) -> None:
    """Load a state dict that has all of a model's weights.

    Numbers of batches, which evaluation does not need, may be missing.

    Args:
        model (nn.Module): What takes it.
        state (dict[str, Tensor]): What it takes.
        message (str): What an error begins with.
        allow_more (bool): Whether there may be keys that the model has not.

    Raises:
        SetupError: If it does not fit; says what is missing, unexpected or of
            another shape. Nothing is loaded then.
    """
    wanted = model.state_dict()
    found = {
        'missing': [
            key for key in wanted
            if key not in state and not key.endswith('num_batches_tracked')
        ],
        'unexpected': [
            key for key in state if key not in wanted and not allow_more
        ],
        'of another shape': [
            f'{key} {tuple(state[key].shape)} for {tuple(value.shape)}'
            for key, value in wanted.items()
            if key in state and state[key].shape != value.shape
        ]
    }
    faults = [
        f'{len(keys)} {name} ({some(keys)})' for name, keys in found.items()
        if keys
    ]
    if faults:
        raise SetupError(f'{message}: {"; ".join(faults)}')
    model.load_state_dict(state, strict=False)
