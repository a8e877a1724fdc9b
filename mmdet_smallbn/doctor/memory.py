"""Memory that a backward pass needs, and memory that is free."""
import math
import os
from typing import Any, Callable, Dict

import torch
from torch import Tensor, nn


def bytes_kept(forward: Callable[[], Any], model: nn.Module) -> int:
    """Return the bytes that a forward pass keeps for its backward pass.

    Parameters of the model do not count: they take no extra memory.
    """
    held: Dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return sum(size for place, size in held.items() if place not in weights)


def memory_of(device: torch.device) -> float:
    """Return the free bytes of a GPU, or all bytes of the CPU's memory.

    Infinite if the size of the CPU's memory is unknown.
    """
    if device.type == 'cuda':
        return (torch.cuda.mem_get_info(device)[0] +
                torch.cuda.memory_reserved(device) -
                torch.cuda.memory_allocated(device))
    try:
        return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    except (AttributeError, ValueError):
        return math.inf
