"""Where the tests make their tensors: pytest's ``--device``."""
import torch


def device():
    """Where."""
    return torch.empty(0).device


def device_type():
    """Its type, for autocast."""
    return device().type


def seeded(seed):
    """A generator of random numbers there."""
    return torch.Generator(device()).manual_seed(seed)
