"""Norms and training settings of the study."""
import copy
from typing import Any, Dict, NamedTuple, Optional, Tuple

from ..layers import suggested_window_size


class Setting(NamedTuple):
    """Norm with its training settings.

    Attributes:
        norm (dict): ``norm_cfg``, and ``conv_cfg`` if it needs one.
        burn_in (float): Length of the burn-in, as a fraction of the training.
        frozen_from (float): Fraction of the training after which the norms
            stay in evaluation mode. 1: never.
        rehearsals (int): Number of extra forward passes of a step's batches
            before the pass with gradients.
    """
    norm: dict
    burn_in: float = 0.1
    frozen_from: float = 1.
    rehearsals: int = 0


def _setting(type: str, conv: Optional[str] = None, **kwargs: Any) -> Setting:
    training = {key: kwargs.pop(key) for key in Setting._fields
                if key in kwargs}
    norm = dict(norm_cfg=dict(type=type, **kwargs))
    if conv is not None:
        norm['conv_cfg'] = dict(type=conv)
    return Setting(norm, **training)


def _mabn(forward: str, backward: str, conv: Optional[str]) -> Setting:
    # Momenta from the caption of the MABN paper's Table 4.
    return _setting(
        'MABN', conv, forward_statistics=forward, backward_statistics=backward,
        momentum=0.02 if 'sma' in (forward, backward) else 0.1)


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
    # The window holds the step's batches with the current weights. Only their
    # gradient is then missing.
    'CBN, fresh window': _setting('CBN', rehearsals=3),
    'MABN': _setting('MABN', 'CenConv'),
    # The papers' ablations: other lengths of burn-in, other averages.
    'CBN, burn-in 0%': _setting('CBN', burn_in=0.),
    'CBN, burn-in 30%': _setting('CBN', burn_in=0.3),
    'CBN, burn-in 60%': _setting('CBN', burn_in=0.6),
    'MABN, SMA, SMA': _mabn('sma', 'sma', 'CenConv'),
    'MABN, EMA, EMA': _mabn('ema', 'ema', 'CenConv'),
    'MABN, EMA, batch': _mabn('ema', 'batch', 'CenConv'),
    'MABN, batch, batch': _mabn('batch', 'batch', 'CenConv'),
    'MABN, EMA, SMA, plain weights': _mabn('ema', 'sma', None),
    'MABN, EMA, batch, plain weights': _mabn('ema', 'batch', None),
    'MABN, batch, batch, plain weights': _mabn('batch', 'batch', None),
}

# Ablation tables of the papers: text of each row, by setting and images.
ABLATIONS: Dict[str, Dict[Tuple[str, int], str]] = {
    'MABN paper, Table 4: forward, backward, centred weights': {
        ('MABN', 2): '1: EMA, SMA, yes (MABN)',
        ('MABN, SMA, SMA', 2): '2: SMA, SMA, yes',
        ('MABN, EMA, EMA', 2): '3: EMA, EMA, yes',
        ('MABN, EMA, batch', 2): '4: EMA, batch, yes',
        ('MABN, batch, batch', 2): '5: batch, batch, yes',
        ('MABN, EMA, SMA, plain weights', 2): '6: EMA, SMA, no',
        ('MABN, EMA, batch, plain weights', 2): '7: EMA, batch, no',
        ('MABN, batch, batch, plain weights', 2): '8: batch, batch, no',
        ('BN', 2): '9: BN',
        ('BN, CenConv', 2): '10: BN, yes',
        ('BN, CenConv', 16): '11: BN, yes, 16 images',
    },
    'CBN paper, Fig. 5: burn-in, in parts of the training': {
        ('CBN, burn-in 0%', 2): '0%',
        ('CBN', 2): '10%',
        ('CBN, burn-in 30%', 2): '30%',
        ('CBN, burn-in 60%', 2): '60%',
        ('BN', 2): '100% (BN)',
    },
}


def setting_of(name: str, images: int) -> Setting:
    """Return a setting for batches of the given number of images."""
    setting = copy.deepcopy(SETTINGS[name])
    if setting.norm['norm_cfg']['type'] in ('CBN', 'NaiveCBN'):
        setting.norm['norm_cfg'].setdefault('window_size',
                                            suggested_window_size(images))
    return setting
