"""The memory that a backward pass takes."""
import math
import os
from typing import Any, Callable, Dict

import torch
from torch import Tensor, nn


def bytes_kept(forward: Callable[[], Any], model: nn.Module) -> int:
    """Bytes that a forward pass keeps for its backward pass.

    The model's parameters do not count: they are there anyway.
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
    """Bytes of a GPU that are free, or of the machine; infinite if unknown."""
    if device.type == 'cuda':
        return (torch.cuda.mem_get_info(device)[0] +
                torch.cuda.memory_reserved(device) -
                torch.cuda.memory_allocated(device))
    try:
        return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    except (AttributeError, ValueError):
        return math.inf
