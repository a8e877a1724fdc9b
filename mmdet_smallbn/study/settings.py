"""The norms of the study."""
import copy
from typing import Any, Dict, NamedTuple, Optional

from ..layers import suggested_window_size


class Setting(NamedTuple):
    """A norm, and what else it does to a training.

    Attributes:
        norm (dict): ``norm_cfg``, and ``conv_cfg`` if it has one.
        frozen_from (float): Part of the training after which the norms stay
            in evaluation mode; 1: they never do.
        rehearsals (int): How often the batches of a step go through the model
            before the step, without a backward pass.
    """
    norm: dict
    frozen_from: float = 1.
    rehearsals: int = 0


def _setting(type: str, conv: Optional[str] = None, frozen_from: float = 1.,
             rehearsals: int = 0, **kwargs: Any) -> Setting:
    norm = dict(norm_cfg=dict(type=type, **kwargs))
    if conv is not None:
        norm['conv_cfg'] = dict(type=conv)
    return Setting(norm, frozen_from, rehearsals)


SETTINGS: Dict[str, Setting] = {
    'BN': _setting('BN'),
    'BN, frozen': _setting('BN', frozen_from=0.),
    'BN, frozen late': _setting('BN', frozen_from=0.75),
    'BN, CenConv': _setting('BN', 'CenConv'),
    'GN': _setting('GN', num_groups=4),
    'GN, weight standardisation': _setting('GN', 'ConvWS', num_groups=4),
    'BRN': _setting('BRN'),
    'BGN': _setting('BGN', num_groups=4),
    'NaiveCBN': _setting('NaiveCBN'),
    'CBN': _setting('CBN'),
    'CBN, released gradient': _setting('CBN', gradient='released'),
    'CBN, CenConv': _setting('CBN', 'CenConv'),
    # The window holds the step's batches at today's weights: nothing is
    # borrowed, and what CBN still lacks is gradient.
    'CBN, fresh window': _setting('CBN', rehearsals=3),
    'MABN': _setting('MABN', 'CenConv'),
    # Batch normalisation with averages over 8 batches in both passes.
    'MABN, centred': _setting(
        'MABN', centered=True, forward_statistics='sma', buffer_size=8),
}


def setting_of(name: str, images: int) -> Setting:
    """A setting for batches of so many images."""
    setting = copy.deepcopy(SETTINGS[name])
    if setting.norm['norm_cfg']['type'] in ('CBN', 'NaiveCBN'):
        setting.norm['norm_cfg'].setdefault('window_size',
                                            suggested_window_size(images))
    return setting
