"""The norms of the study."""
import copy
from typing import Any, Dict, Optional

from ..layers import suggested_window_size


def _norm(type: str, conv: Optional[str] = None, **kwargs: Any) -> dict:
    norm = dict(norm_cfg=dict(type=type, **kwargs))
    if conv is not None:
        norm['conv_cfg'] = dict(type=conv)
    return norm


SETTINGS: Dict[str, dict] = {
    'BN': _norm('BN'),
    'BN, CenConv': _norm('BN', 'CenConv'),
    'GN': _norm('GN', num_groups=4),
    'GN, weight standardisation': _norm('GN', 'ConvWS', num_groups=4),
    'BRN': _norm('BRN'),
    'BGN': _norm('BGN', num_groups=4),
    'NaiveCBN': _norm('NaiveCBN'),
    'CBN': _norm('CBN'),
    'CBN, released gradient': _norm('CBN', gradient='released'),
    'CBN, CenConv': _norm('CBN', 'CenConv'),
    'MABN': _norm('MABN', 'CenConv'),
    # Batch normalisation with averages over 8 batches in both passes.
    'MABN, centred': _norm(
        'MABN', centered=True, forward_statistics='sma', buffer_size=8),
}


def norm_of(setting: str, images: int) -> dict:
    """A setting's norm for batches of so many images."""
    norm = copy.deepcopy(SETTINGS[setting])
    if norm['norm_cfg']['type'] in ('CBN', 'NaiveCBN'):
        norm['norm_cfg'].setdefault('window_size',
                                    suggested_window_size(images))
    return norm
