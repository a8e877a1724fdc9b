"""Hooks: what the training loop tells the layers."""
from .burn_in_hook import BurnInHook

__all__ = ['BurnInHook']
