"""What norm each part of a model really carries, for people to read."""
from .describe import Norm, describe_norms
from .notes import norm_cfgs, notes
from .table import norm_summary, norm_table

__all__ = [
    'Norm', 'describe_norms', 'norm_summary', 'norm_table', 'norm_cfgs',
    'notes'
]
