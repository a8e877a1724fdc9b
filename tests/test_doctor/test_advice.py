"""What the norm doctor says."""
import math

import pytest

from mmdet_smallbn.doctor import (Diagnosis, Layer, advise, summary_of,
                                  verdict_of)
from mmdet_smallbn.doctor.advice import THRESHOLD, agreement_of, best_window
from mmdet_smallbn.doctor.report import as_text, layer_table, summary_json

HURTS, FINE = [THRESHOLD - 0.3] * 4, [THRESHOLD + 0.3] * 4


def layer(name='neck.0.bn', **kwargs):
    return Layer(**dict(
        dict(name=name, channels=64, calls=1, values=100, units=2.,
             mean_noise=0.1, var_noise=0.2, g_noise=0.9, psi_noise=0.8,
             between=0.1, effective=10., disagreement=0.2, agreement=0.3),
        **kwargs))


def diagnosis(agreement=HURTS, **kwargs):
    return Diagnosis(**dict(
        dict(images=2, reference=16, layers=[layer()],
             agreement=agreement and {2: agreement, 4: HURTS, 8: FINE},
             floor=[1.] * 4,
             loss=dict(batch=[1., 1.1], fixed=[1., 1.], reference=[1., 1.]),
             windows={1: (0.2, 0.2), 2: (0.16, 0.15), 4: (0.2, 0.1),
                      8: (0.3, 0.12)},
             moved=0.02, asleep=[], alike=0., single=[],
             others={}), **kwargs))


def titles(*args, **kwargs):
    return [advice.title for advice in advise(*args, **kwargs)]


@pytest.mark.parametrize('agreement, verdict', [
    (HURTS, 'hurts'), (FINE, 'fine'),
    ([THRESHOLD + d for d in (-0.2, 0.3, -0.1, 0.1)], 'cannot tell'),
])
def test_verdict(agreement, verdict):
    found = diagnosis(agreement)
    assert verdict_of(found) == verdict
    said = '\n'.join(summary_of(found))
    assert {'hurts': 'BatchNorm suffers with 2 images',
            'fine': 'BatchNorm is fine with 2 images',
            'cannot tell': 'The tool cannot tell'}[verdict] in said
    assert (titles(found) == []) == (verdict == 'fine')
    assert ('More --images' in said) == (verdict == 'cannot tell')


def test_a_detector_and_another_model():
    found = titles(diagnosis())
    assert found[0] == 'Train the last quarter with running statistics'
    assert 'CBN with a window of 4 iterations' in found
    assert not any('MABN' in title for title in found)
    found = titles(diagnosis(), detects=False)
    assert found[0] == 'MABN with CenConv, buffer of 16 iterations'
    assert 'SyncBN over 4 GPUs' in found
    assert any('example weights' in title
               for title in titles(diagnosis(), trained=True)[:1])


def test_frozen_norms():
    found = diagnosis(asleep=['neck.0.bn'])
    assert titles(found)[0] == 'Keep BatchNorm frozen'
    said = '\n'.join(summary_of(found))
    assert 'Every BatchNorm (1) stays in evaluation mode' in said
    partly = diagnosis(asleep=['backbone.bn1'],
                       layers=[layer(), layer('neck.1.bn')])
    assert titles(partly)[0] != 'Keep BatchNorm frozen'
    assert ('does not affect norms in evaluation mode (norm_eval or '
            'frozen_stages): backbone.bn1.') in '\n'.join(summary_of(partly))


def test_a_window_that_does_not_help_is_not_advised():
    assert best_window(diagnosis()) == 4
    for windows in ({}, {1: (0.2, None), 2: (0.1, None)},
                    {1: (0.2, 0.2), 2: (0.19, 0.18)}):
        found = diagnosis(windows=windows)
        assert best_window(found) is None
        assert not any('CBN' in title for title in titles(found))


def test_statistics_of_each_image():
    lower = dict(batch=[0.5, 0.52], fixed=[1., 1.], reference=[1., 1.])
    assert any('GhostBN' in title for title in titles(diagnosis(loss=lower)))
    assert not any('GhostBN' in title for title in titles(diagnosis()))


def test_groups_fit_the_channels():
    for channels, groups in (([64, 256], 32), ([32, 64], 16), ([6], 2),
                             ([7], 1)):
        found = advise(diagnosis(layers=[layer(channels=c)
                                         for c in channels]))
        norm_cfg, = [a.norm_cfg for a in found if 'GroupNorm' in a.title]
        assert norm_cfg['num_groups'] == groups


def test_remarks():
    said = '\n'.join(summary_of(diagnosis(
        alike=0.8, single=['head.bn'], layers=[layer(calls=5)])))
    assert 'Shuffle the training images' in said
    assert 'between 5 feature maps: neck.0.bn.' in said
    assert 'one value per channel: head.bn.' in said


def test_models_without_a_batch():
    said = '\n'.join(summary_of(diagnosis(layers=[], agreement={},
                                          others=dict(GroupNorm=3))))
    assert 'no BatchNorm that depends' in said and '3 GroupNorm' in said
    large = diagnosis(images=16, agreement={})
    assert 'Leave the norms as they are' in summary_of(large)[0]
    assert titles(large) == []


def test_the_report():
    found = diagnosis(layers=[layer(), layer('neck.1.bn', agreement=math.nan)])
    rows = layer_table(found)
    assert len(rows) == 2 and rows[1][:3] == ['neck', '2', '100']
    assert rows[1][-1] == '0.30'
    assert [row[0] for row in layer_table(found, each=True)[1:]] == [
        'neck.0.bn', 'neck.1.bn']
    advice = advise(found)
    text = as_text(found, advice, ['a = 1\nb = 2'] * len(advice))
    assert '1. Train the last quarter' in text and '       b = 2' in text
    held = summary_json(found, advice, [''] * len(advice))
    assert held['verdict'] == 'hurts'
    assert held['layers'][1]['agreement'] is None


def test_the_floor_is_taken_out():
    found = diagnosis([0.3, 0.3, 0.34, 0.34], floor=[0.5, 0.3])
    mean, error = agreement_of(found)
    assert mean == pytest.approx(0.32 / 0.4)
    assert error == pytest.approx(0.0115 / 0.4, abs=1e-3)
    assert agreement_of(diagnosis([0.6] * 4, floor=[0.5] * 2))[0] == 1
    assert verdict_of(found) == 'fine'


def test_noise_that_was_not_measured_is_not_told():
    unknown = diagnosis(layers=[layer(g_noise=math.nan)])
    assert 'nan' not in str(advise(unknown, detects=False))


def test_sync_bn_over_as_many_gpus_as_it_takes():
    low = {2: HURTS, 4: HURTS, 8: HURTS}
    assert 'SyncBN over 8 GPUs' in titles(diagnosis()._replace(agreement=low))
