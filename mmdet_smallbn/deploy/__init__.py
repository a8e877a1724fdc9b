"""Out of the lab: folding, converting and exporting trained models."""
from .fuse import fuse_norm

__all__ = ['fuse_norm']
