"""Deployment of trained models: folding, conversion and export."""
from .fuse import fuse_norm

__all__ = ['fuse_norm']
