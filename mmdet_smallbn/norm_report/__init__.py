"""Report of the norms in a built model: table, summary and notes."""
from .describe import Norm, describe_norms
from .notes import norm_cfgs, notes
from .table import norm_summary, norm_table

__all__ = [
    'Norm', 'describe_norms', 'norm_summary', 'norm_table', 'norm_cfgs',
    'notes'
]
