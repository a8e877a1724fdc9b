"""Functions that find and load the state dict of a checkpoint."""
from typing import Any, Dict

from torch import Tensor, nn

from ..errors import SetupError
from ..words import some

StateDict = Dict[str, Tensor]


def find_state_dict(checkpoint: Any, name: str) -> StateDict:
    """Return the state dict of a checkpoint, without the prefix ``module.``.

    Args:
        checkpoint: The loaded checkpoint.
        name (str): Name of the file, for the error message.

    Raises:
        SetupError: If the checkpoint has no state dict.
    """
    state = checkpoint
    for key in ('state_dict', 'model'):
        if isinstance(checkpoint, dict) and key in checkpoint:
            state = checkpoint[key]
            break
    if not isinstance(state, dict) or not state or not all(
            isinstance(value, Tensor) for value in state.values()):
        raise SetupError(
            f'{name} has no state dict. Expected names and tensors, under '
            "'state_dict', under 'model' or at the top level, but found "
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
    """Load a state dict that has all weights of a model.

    ``num_batches_tracked`` may be missing: evaluation does not need it.

    Args:
        model (nn.Module): The model.
        state (dict[str, Tensor]): The state dict.
        message (str): Start of the error message.
        allow_more (bool): Accept keys that the model does not have.

    Raises:
        SetupError: If the state dict does not fit the model. The error lists
            the keys that are missing, unexpected or of another shape. Nothing
            is loaded then.
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
