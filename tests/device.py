"""Where the tests make their tensors: pytest's ``--device``."""
import torch


def device_type():
    """Its type, for autocast."""
    return torch.get_default_device().type


def seeded(seed):
    """A generator of random numbers there."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)
