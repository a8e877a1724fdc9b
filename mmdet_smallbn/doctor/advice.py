"""What to do about a model's batch norms, with the numbers behind it."""
import math
import statistics
from typing import Dict, List, NamedTuple, Optional, Tuple

from ..words import counted, some
from .diagnosis import Diagnosis

# Half way between the least agreement without a fall and the largest with one,
# in the regimes plain, video and hasty detector of the study. docs/doctor.md
# holds it against the others.
THRESHOLD = 0.5
FINE, HURTS, UNSURE = 'fine', 'hurts', 'cannot tell'
# A window is worth its memory if its error is below this part of BatchNorm's.
WORTH = 0.7
# Own statistics help if they lower the loss by more than this part.
GAIN = 0.1
# Images by chance stay below this correlation, within two deviations.
ALIKE = 0.6


class Advice(NamedTuple):
    """One thing to do.

    Attributes:
        title (str): What to do, in a few words.
        reasons (list[str]): Sentences with the numbers behind it.
        norm_cfg (dict, optional): The norm to put in BatchNorm's place. None:
            it stays.
        conv_cfg (dict, optional): The convolutions beside it.
        hook (str, optional): The hook that it needs: ``'BurnInHook'`` or
            ``'FreezeStatisticsHook'``.
        folds (bool): Whether the model folds into plain convolutions.
        setting (str, optional): Its name in the study.
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
    """Agreement, as a part of its floor, and its standard error.

    Args:
        diagnosis (Diagnosis): What was measured.
        images (int, optional): How many images are normalised together.
            None: those of a batch.
    """
    values = diagnosis.agreement.get(images or diagnosis.images, [])
    mean, error = mean_and_error(values)
    floor = max(mean_and_error(diagnosis.floor)[0], 0.05)
    return min(mean / floor, 1.), error / floor


def agreements(diagnosis: Diagnosis) -> Dict[int, Tuple[float, float]]:
    """:func:`agreement_of` all numbers of images."""
    return {size: agreement_of(diagnosis, size)
            for size in diagnosis.agreement}


def is_frozen(diagnosis: Diagnosis) -> bool:
    """Whether the measured norms are kept in evaluation mode."""
    return bool(diagnosis.layers) and (
        diagnosis.layers[0].name in diagnosis.asleep)


def mean_and_error(values: List[float]) -> Tuple[float, float]:
    """Mean and standard error; NaN of nothing."""
    if not values:
        return math.nan, math.nan
    if len(values) < 2:
        return values[0], math.nan
    return (statistics.mean(values),
            statistics.stdev(values) / len(values)**0.5)


def verdict_of(diagnosis: Diagnosis) -> str:
    """Whether the batch hurts BatchNorm: ``fine``, ``hurts`` or ``cannot
    tell``, if the threshold is within a standard error."""
    if not diagnosis.agreement:
        return FINE  # the batch is as large as the reference
    mean, error = agreement_of(diagnosis)
    if abs(mean - THRESHOLD) < error:
        return UNSURE
    return FINE if mean > THRESHOLD else HURTS


def best_window(diagnosis: Diagnosis) -> Optional[int]:
    """The window of CBN with the least error; None if none is worth it."""
    errors = {window: error for window, (_, error)
              in diagnosis.windows.items() if error is not None and window > 1}
    if not errors or 1 not in diagnosis.windows:
        return None
    best = min(errors, key=lambda window: errors[window])
    plain = diagnosis.windows[1][0]
    return best if errors[best] < WORTH * plain else None


def summary_of(diagnosis: Diagnosis) -> List[str]:
    """The verdict in words: the headline, and the sentences behind it."""
    if not diagnosis.layers:
        others = ', '.join(f'{count} {kind}' for kind, count
                           in sorted(diagnosis.others.items()))
        return ['The model has no BatchNorm that depends on the batch.',
                f'Its norms are {others}: they see one image at a time.'
                if others else 'It has no GroupNorm, LayerNorm or '
                'InstanceNorm either.']
    name = counted(diagnosis.images, 'image')
    whole = diagnosis.reference
    if not diagnosis.agreement:
        return [f'A batch of {name} is large enough. Leave the norms as they '
                'are.',
                f'The tool compares small batches with {whole} images, and '
                'this one is no smaller.']
    mean, error = agreement_of(diagnosis)
    verdict = verdict_of(diagnosis)
    asleep = is_frozen(diagnosis)
    if asleep:
        head = {
            FINE: f'BatchNorm could train with {name}, but it is frozen.',
            HURTS: 'Keep BatchNorm frozen, or take another norm: with '
                   f'{name} it would train badly.',
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
        f'The gradient of {name} at a time agrees to {mean:.2f} ± '
        f'{error:.2f} with that of {whole} images at once (1: it is the '
        f'same). In the study BatchNorm lost accuracy below '
        f'{THRESHOLD:g}.')]
    if verdict is UNSURE:
        said.append('The threshold is within the error. More --images make '
                    'the error smaller.')
    if asleep:
        said.append(
            'Every BatchNorm '
            f'({len(diagnosis.asleep)}) stays in evaluation mode (norm_eval '
            'or frozen_stages): today the batch does not touch them. They '
            'were measured as if they trained.')
    elif diagnosis.asleep:
        said.append(
            'In evaluation mode (norm_eval or frozen_stages), and untouched '
            f'by the batch: {some(diagnosis.asleep, 1)}.')
    return said + _remarks(diagnosis)


def _remarks(diagnosis: Diagnosis) -> List[str]:
    """What is special about the model or the data."""
    said = []
    if diagnosis.alike > ALIKE:
        said.append(
            'The images of a batch are alike (correlation '
            f'{diagnosis.alike:.2f}). Shuffle them if you can: that costs '
            'nothing.')
    shared = [layer for layer in diagnosis.layers if layer.calls > 1]
    if shared:
        said.append(
            f'With one set of running statistics for {shared[0].calls} '
            f'feature maps: {some([layer.name for layer in shared], 1)}. '
            'Evaluation changes their outputs by '
            f'{statistics.mean(s.disagreement for s in shared):.2f} '
            'deviations. GN or BGN has no running statistics.')
    if diagnosis.single:
        said.append(
            f'With one value a channel: {some(diagnosis.single, 1)}. '
            'BatchNorm cannot train there. Take GN, or no norm.')
    return said


def advise(diagnosis: Diagnosis,
           detects: bool = True,
           trained: bool = False) -> List[Advice]:
    """What to do, the most promising first.

    Args:
        diagnosis (Diagnosis): What was measured.
        detects (bool): Whether the model regresses boxes. Norms of the MABN
            kind lost in the study's detectors, and won everywhere else.
        trained (bool): Whether the model is trained already.

    Returns:
        list[Advice]: Empty, if nothing has to be done.
    """
    verdict = verdict_of(diagnosis)
    if verdict is FINE or not diagnosis.layers:
        return []
    frozen = is_frozen(diagnosis)
    found = []
    if frozen:
        found.append(Advice(
            'Keep BatchNorm frozen',
            ['The pretrained statistics do not depend on the batch. That is '
             'the usual way with a pretrained backbone.'],
            setting='BN, frozen'))
    elif trained:
        found.append(Advice(
            'Try example weights on the model as it is',
            ['They need no training: tools/sweep_example_weight.py CONFIG '
             'CHECKPOINT. In the study they took back most of the fall '
             'in all regimes but the head.'],
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
         'it took back at least three quarters of the fall, and lost nothing '
         'where the batch was enough.'],
        hook='FreezeStatisticsHook', setting='BN, frozen late')


def _mabn(diagnosis: Diagnosis) -> Advice:
    known = [(layer.g_noise, layer.psi_noise) for layer in diagnosis.layers
             if not math.isnan(layer.g_noise + layer.psi_noise)]
    measured = []
    if known:
        g, psi = (statistics.mean(values) for values in zip(*known))
        measured = [f'{100 * g:.0f}% of g and {100 * psi:.0f}% of Psi, the '
                    'gradient statistics of a batch, are noise.']
    buffer = min(max(32 // diagnosis.images, 4), 16)
    return Advice(
        f'MABN with CenConv, buffer of {buffer} iterations',
        [*measured, 'MABN averages the gradient statistics, too. In the '
         "study's classifiers, segmenter and head it took back all of the "
         'fall, within 5%.'],
        norm_cfg=dict(type='MABN', buffer_size=buffer),
        conv_cfg=dict(type='CenConv'), hook='BurnInHook', setting='MABN')


def _cbn(diagnosis: Diagnosis) -> List[Advice]:
    window = best_window(diagnosis)
    if window is None:
        return []
    plain, followed = diagnosis.windows[window]
    reasons = [
        f'Its statistics change the output by {followed:.3f} deviations, '
        f'BatchNorm\'s by {diagnosis.windows[1][0]:.3f}. Without following '
        f'the weights it would be {plain:.3f}.',
        f'The weights move by {100 * diagnosis.moved:.1f}% in 16 '
        'iterations. CBN needs small steps: in the study '
        'it took back at least four fifths of the fall in a detector at a '
        'learning rate of 0.001, but with 2 images and a rate of 0.003 it '
        'was below BatchNorm.'
    ]
    return [Advice(
        f'CBN with a window of {window} iterations', reasons,
        norm_cfg=dict(type='CBN', window_size=window), hook='BurnInHook',
        setting='CBN')]


def _group_norm(diagnosis: Diagnosis) -> Advice:
    return Advice(
        'GroupNorm with weight standardisation',
        ['It does not depend on the batch. In the study it was about as good '
         'as BatchNorm with 16 images, or better. With a pretrained '
         'backbone, change its weights (init_cfg) as well, and thaw it '
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
        'GhostBN of each image by itself, in training and at inference',
        [f'With statistics of its own batch the loss is {100 * gain:.0f}% '
         'lower than with those of '
         f'{diagnosis.reference} images: images differ in what their own '
         'statistics remove, such as light. A norm with a small batch loses '
         'that in evaluation.'],
        norm_cfg=dict(type='GhostBN', ghost_size=1, example_weight=1.),
        folds=False)]


def _groups(channels: List[int]) -> int:
    """32, or the next power of 2 with two channels in each group."""
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
                [f'{size} images normalised together agree to {mean:.2f}. '
                 'Accumulating gradients does not help: each batch is still '
                 'normalised by itself.'],
                norm_cfg=dict(type='SyncBN'))]
    return []
