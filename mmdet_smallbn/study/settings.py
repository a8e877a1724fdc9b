"""The norms of the study."""
import copy
from typing import Any, Dict

from ..layers import suggested_window_size


def _norm(type: str, centred: bool = False, **kwargs: Any) -> dict:
    norm = dict(norm_cfg=dict(type=type, **kwargs))
    if centred:
        norm['conv_cfg'] = dict(type='CenConv')
    return norm


SETTINGS: Dict[str, dict] = {
    'BN': _norm('BN'),
    'BN, CenConv': _norm('BN', centred=True),
    'GN': _norm('GN', num_groups=4),
    'BRN': _norm('BRN'),
    'BGN': _norm('BGN', num_groups=4),
    'NaiveCBN': _norm('NaiveCBN'),
    'CBN': _norm('CBN'),
    'CBN, released gradient': _norm('CBN', gradient='released'),
    'MABN': _norm('MABN', centred=True),
    'MABN, centred': _norm(
        'MABN', centered=True, forward_statistics='sma', buffer_size=8),
    'MABN, centred, ema': _norm('MABN', centered=True),
}


def norm_of(setting: str, images: int) -> dict:
    """A setting's norm for batches of so many images."""
    norm = copy.deepcopy(SETTINGS[setting])
    if norm['norm_cfg']['type'] in ('CBN', 'NaiveCBN'):
        norm['norm_cfg'].setdefault('window_size',
                                    suggested_window_size(images))
    return norm
