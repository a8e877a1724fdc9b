"""The study of CBN's gradient."""
import json
import statistics

import pytest

from mmdet_smallbn.cli import gradient_study

WHOLE, RELEASED = (f"CBN, gradient='{kind}'" for kind in ('whole', 'released'))


@pytest.mark.slow
def test_gradients_and_trainings_are_measured(shapes, tmp_path, capsys):
    out = tmp_path / 'results' / 'study.json'
    command = [
        '--seeds', '0', '--steps', '8', '--train', '64', '--val', '32',
        '--data', str(shapes), '--iters', '2', '--out', str(out), '--parts'
    ]
    gradient_study.main([*command, 'cosines', 'training'])
    found = json.loads(out.read_text())
    cosines = {name: by['0'] for name, by in found['cosines'].items()}
    assert all(len(row) == 11 for row in cosines.values())
    # At weights that stand still, averages are those of the joined batch.
    assert min(cosines['CBN, averaged gradient statistics']) > 0.999
    means = {name: statistics.mean(row) for name, row in cosines.items()}
    assert means[WHOLE] > max(means[RELEASED], means['BN'])
    regimes = found['training']
    assert list(regimes['16 images']) == ['BN']
    for name in ('normalise 2, accumulate to 16', '2 images a step'):
        assert set(regimes[name]) == set(gradient_study.VARIANTS)
    assert out.with_suffix('.png').stat().st_size > 10_000

    # What is there is kept, and the rest is measured.
    regimes['2 images a step'][WHOLE]['0'] = 2.
    del regimes['2 images a step'][RELEASED]['0']
    out.write_text(json.dumps(found))
    gradient_study.main([*command, 'training', 'orthogonality'])
    found = json.loads(out.read_text())
    assert found['training']['2 images a step'][WHOLE]['0'] == 2.
    assert 0 <= found['training']['2 images a step'][RELEASED]['0'] <= 1
    with pytest.raises(SystemExit, match='give another --out'):
        gradient_study.main([*command, 'training', '--lr', '0.1'])
    with pytest.raises(SystemExit):
        gradient_study.parse_args(['--parts', 'orthogonality'])
    values = found['orthogonality']
    assert set(values) == {'BN', WHOLE, RELEASED}
    assert all(0 < value < 1 for value in values.values())
    assert 'mean absolute' in capsys.readouterr().out
