"""Verdict and advice about a model's batch norms, from a diagnosis."""
import math
import statistics
from typing import Dict, List, NamedTuple, Optional, Tuple

from ..words import counted, some
from .diagnosis import Diagnosis

# Half way between the lowest agreement where BatchNorm lost no accuracy and
# the highest agreement where it did, in the study's regimes plain, video and
# hasty detector. docs/doctor.md checks it on the other regimes.
THRESHOLD = 0.5
FINE, HURTS, UNSURE = 'fine', 'hurts', 'cannot tell'
# A window is worth its memory if its error, relative to BatchNorm's, is below
# this.
WORTH = 0.7
# Statistics of each image are worth a try if small-batch statistics lower the
# loss by at least this fraction.
GAIN = 0.1
# The correlation of randomly chosen images stays below this value, within two
# standard deviations.
ALIKE = 0.6


class Advice(NamedTuple):
    """One recommended change.

    Attributes:
        title (str): The change in a few words.
        reasons (list[str]): Sentences with the reasons and their numbers.
        norm_cfg (dict, optional): Norm that replaces BatchNorm. None:
            BatchNorm stays.
        conv_cfg (dict, optional): Convolutions that the norm needs.
        hook (str, optional): Hook that the change needs: ``'BurnInHook'`` or
            ``'FreezeStatisticsHook'``.
        folds (bool): True if the norms then fold into the convolutions.
        setting (str, optional): Name of the same setting in the study.
    """
    title: str
    reasons: List[str]
    norm_cfg: Optional[dict] = None
    conv_cfg: Optional[dict] = None
    hook: Optional[str] = None
    folds: bool = True
    setting: Optional[str] = None


def agreement_of(diagnosis: Diagnosis,
                 images: Optional[int] = None) -> Tuple[float, float]:
    """Return the agreement relative to the floor, and its standard error.

    Args:
        diagnosis (Diagnosis): The measurements.
        images (int, optional): Number of images that are normalised together.
            None: those of one batch.

    Returns:
        tuple[float, float]: Agreement, at most 1, and standard error. The
        floor is the agreement with fixed statistics; see :class:`Diagnosis`.
    """
    values = diagnosis.agreement.get(images or diagnosis.images, [])
    mean, error = mean_and_error(values)
    floor = max(mean_and_error(diagnosis.floor)[0], 0.05)
    return min(mean / floor, 1.), error / floor


def agreements(diagnosis: Diagnosis) -> Dict[int, Tuple[float, float]]:
    """Return :func:`agreement_of` for each measured number of images."""
    return {size: agreement_of(diagnosis, size)
            for size in diagnosis.agreement}


def is_frozen(diagnosis: Diagnosis) -> bool:
    """Return True if the measured norms stay in evaluation mode."""
    return bool(diagnosis.layers) and (
        diagnosis.layers[0].name in diagnosis.asleep)


def mean_and_error(values: List[float]) -> Tuple[float, float]:
    """Return mean and standard error; NaN where they are undefined."""
    if not values:
        return math.nan, math.nan
    if len(values) < 2:
        return values[0], math.nan
    return (statistics.mean(values),
            statistics.stdev(values) / len(values)**0.5)


def verdict_of(diagnosis: Diagnosis) -> str:
    """Return ``'fine'``, ``'hurts'`` or ``'cannot tell'``.

    The verdict is ``'cannot tell'`` if the threshold lies within one standard
    error of the agreement.
    """
    if not diagnosis.agreement:
        return FINE  # the batch is at least as large as the reference
    mean, error = agreement_of(diagnosis)
    if abs(mean - THRESHOLD) < error:
        return UNSURE
    return FINE if mean > THRESHOLD else HURTS


def best_window(diagnosis: Diagnosis) -> Optional[int]:
    """Return CBN's window with the lowest error; None if none is worth it."""
    errors = {window: error for window, (_, error)
              in diagnosis.windows.items() if error is not None and window > 1}
    if not errors or 1 not in diagnosis.windows:
        return None
    best = min(errors, key=lambda window: errors[window])
    plain = diagnosis.windows[1][0]
    return best if errors[best] < WORTH * plain else None


def summary_of(diagnosis: Diagnosis) -> List[str]:
    """Return the verdict in words: the headline, then its explanation."""
    if not diagnosis.layers:
        others = ', '.join(f'{count} {kind}' for kind, count
                           in sorted(diagnosis.others.items()))
        return ['The model has no BatchNorm that depends on the batch.',
                f'Its norms are {others}. They normalise each image alone.'
                if others else 'It has no GroupNorm, LayerNorm or '
                'InstanceNorm either.']
    name = counted(diagnosis.images, 'image')
    whole = diagnosis.reference
    if not diagnosis.agreement:
        return [f'A batch of {name} is large enough. Leave the norms as they '
                'are.',
                f'The tool compares small batches with a batch of {whole} '
                'images. This batch is not smaller.']
    mean, error = agreement_of(diagnosis)
    verdict = verdict_of(diagnosis)
    asleep = is_frozen(diagnosis)
    if asleep:
        head = {
            FINE: f'BatchNorm could train with {name}, but it is frozen.',
            HURTS: 'Keep BatchNorm frozen, or use another norm. BatchNorm '
                   f'would train badly with {name}.',
            UNSURE: 'BatchNorm is frozen, and the tool cannot tell whether '
                    f'it could train with {name}.'
        }[verdict]
    else:
        head = {
            FINE: f'BatchNorm is fine with {name}.',
            HURTS: f'BatchNorm suffers with {name}.',
            UNSURE: 'The tool cannot tell whether BatchNorm suffers with '
                    f'{name}.'
        }[verdict]
    said = [head, (
        f'The gradient with {name} per batch agrees to {mean:.2f} ± '
        f'{error:.2f} with the gradient of {whole} images in one batch (1: '
        'identical). In the study BatchNorm lost accuracy below an '
        f'agreement of {THRESHOLD:g}.')]
    if verdict is UNSURE:
        said.append('The threshold is within the error. More --images reduce '
                    'the error.')
    if asleep:
        said.append(
            'Every BatchNorm '
            f'({len(diagnosis.asleep)}) stays in evaluation mode (norm_eval '
            'or frozen_stages), so the batch does not affect them now. The '
            'tool measured them as if they trained.')
    elif diagnosis.asleep:
        said.append(
            'The batch does not affect norms in evaluation mode (norm_eval '
            f'or frozen_stages): {some(diagnosis.asleep, 1)}.')
    return said + _remarks(diagnosis)


def _remarks(diagnosis: Diagnosis) -> List[str]:
    """Return remarks on peculiarities of the model and the data."""
    said = []
    if diagnosis.alike > ALIKE:
        said.append(
            'The images of a batch resemble each other (correlation '
            f'{diagnosis.alike:.2f}). Shuffle the training images if you '
            'can: it costs nothing.')
    shared = [layer for layer in diagnosis.layers if layer.calls > 1]
    if shared:
        said.append(
            'Some norms share one set of running statistics between '
            f'{shared[0].calls} feature maps: '
            f'{some([layer.name for layer in shared], 1)}. '
            'Evaluation changes their outputs by '
            f'{statistics.mean(s.disagreement for s in shared):.2f} '
            'standard deviations. By default GN and BGN do not use running '
            'statistics.')
    if diagnosis.single:
        said.append(
            'Some norms see one value per channel: '
            f'{some(diagnosis.single, 1)}. BatchNorm cannot train there. '
            'Use GN or no norm.')
    return said


def advise(diagnosis: Diagnosis,
           detects: bool = True,
           trained: bool = False) -> List[Advice]:
    """Return the recommended changes, the most promising first.

    Args:
        diagnosis (Diagnosis): The measurements.
        detects (bool): True if the model regresses boxes. In the study, MABN
            lost accuracy in detectors and gained it in all other models.
        trained (bool): True if the model is already trained.

    Returns:
        list[Advice]: Empty if no change is needed.
    """
    verdict = verdict_of(diagnosis)
    if verdict is FINE or not diagnosis.layers:
        return []
    frozen = is_frozen(diagnosis)
    found = []
    if frozen:
        found.append(Advice(
            'Keep BatchNorm frozen',
            ['Frozen BatchNorm uses the pretrained statistics, which do not '
             'depend on the batch. This is usual with a pretrained '
             'backbone.'],
            setting='BN, frozen'))
    elif trained:
        found.append(Advice(
            'Try inference example weights on the trained model',
            ['They need no training. Run tools/sweep_example_weight.py '
             'CONFIG CHECKPOINT. In the study they recovered most of the '
             'lost accuracy in all regimes except the head.'],
            folds=False, setting='BN, the best example weight'))
    cbn = _cbn(diagnosis)
    if detects:
        if not frozen:
            found.append(_freeze_late())
    else:
        found.append(_mabn(diagnosis))
    return [*found, *cbn, _group_norm(diagnosis),
            *_own_statistics(diagnosis), *_sync(diagnosis)]


def _freeze_late() -> Advice:
    return Advice(
        'Train the last quarter with running statistics',
        ['BatchNorm stays. The hook costs nothing. In the study\'s detectors '
         'it recovered at least three quarters of the lost accuracy, and '
         'lost nothing where the batch was large enough.'],
        hook='FreezeStatisticsHook', setting='BN, frozen late')


def _mabn(diagnosis: Diagnosis) -> Advice:
    known = [(layer.g_noise, layer.psi_noise) for layer in diagnosis.layers
             if not math.isnan(layer.g_noise + layer.psi_noise)]
    measured = []
    if known:
        g, psi = (statistics.mean(values) for values in zip(*known))
        measured = [f'Noise is {100 * g:.0f}% of g and {100 * psi:.0f}% of '
                    'Psi, the gradient statistics of a batch.']
    buffer = min(max(32 // diagnosis.images, 4), 16)
    return Advice(
        f'MABN with CenConv, buffer of {buffer} iterations',
        [*measured, 'MABN averages also the gradient statistics. In the '
         "study's classifiers, segmenter and head it recovered all of the "
         'lost accuracy, within 5%.'],
        norm_cfg=dict(type='MABN', buffer_size=buffer),
        conv_cfg=dict(type='CenConv'), hook='BurnInHook', setting='MABN')


def _cbn(diagnosis: Diagnosis) -> List[Advice]:
    window = best_window(diagnosis)
    if window is None:
        return []
    plain, followed = diagnosis.windows[window]
    reasons = [
        'The error of its statistics changes the output by '
        f'{followed:.3f} standard deviations, that of BatchNorm by '
        f'{diagnosis.windows[1][0]:.3f}. Without compensation for the weight '
        f'changes it would be {plain:.3f}.',
        f'The weights change by {100 * diagnosis.moved:.1f}% in 16 '
        'iterations. CBN needs small changes. In the study it recovered at '
        'least four fifths of the lost accuracy in a detector at a learning '
        'rate of 0.001. With 2 images and a learning rate of 0.003 it was '
        'worse than BatchNorm.'
    ]
    return [Advice(
        f'CBN with a window of {window} iterations', reasons,
        norm_cfg=dict(type='CBN', window_size=window), hook='BurnInHook',
        setting='CBN')]


def _group_norm(diagnosis: Diagnosis) -> Advice:
    return Advice(
        'GroupNorm with weight standardisation',
        ['It does not depend on the batch. In the study it was about as good '
         'as BatchNorm with 16 images, or better. If the backbone is '
         'pretrained, also change its weights (init_cfg) and unfreeze it '
         '(frozen_stages=-1).'],
        norm_cfg=dict(type='GN', num_groups=_groups(
            [layer.channels for layer in diagnosis.layers])),
        conv_cfg=dict(type='ConvWS'), folds=False,
        setting='GN, weight standardisation')


def _own_statistics(diagnosis: Diagnosis) -> List[Advice]:
    batch, whole = (diagnosis.loss[key] for key in ('batch', 'reference'))
    gain, error = mean_and_error([1 - b / w for b, w in zip(batch, whole)])
    if not gain - error >= GAIN:  # NaN, too
        return []
    return [Advice(
        'GhostBN on each image alone, in training and at inference',
        [f'With the statistics of small batches the loss is {100 * gain:.0f}% '
         f'lower than with those of {diagnosis.reference} images. Images '
         'differ in properties that their own statistics remove, such as '
         'light. A norm that trains with a small batch loses this advantage '
         'in evaluation.'],
        norm_cfg=dict(type='GhostBN', ghost_size=1, example_weight=1.),
        folds=False)]


def _groups(channels: List[int]) -> int:
    """Return 32, or the next smaller power of 2 that fits all layers.

    Each group then has at least two channels.
    """
    groups = 32
    while groups > 1 and any(c % groups or c < 2 * groups for c in channels):
        groups //= 2
    return groups


def _sync(diagnosis: Diagnosis) -> List[Advice]:
    enough = agreements(diagnosis)
    enough[diagnosis.reference] = 1., 0.
    for size, (mean, error) in enough.items():
        if size > diagnosis.images and mean - error > THRESHOLD:
            return [Advice(
                f'SyncBN over {size // diagnosis.images} GPUs',
                [f'With {size} images normalised together the agreement is '
                 f'{mean:.2f}. Gradient accumulation does not help: it '
                 'still normalises each batch alone.'],
                norm_cfg=dict(type='SyncBN'))]
    return []
