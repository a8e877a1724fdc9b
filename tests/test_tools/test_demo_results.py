"""The demo's trainings, kept and compared."""
from mmdet_smallbn.cli import demo_results

HOW = dict(detector='FasterRCNN', data=dict(train=8), size=64, images=2,
           parts=1, iterations=4, lr=1e-3, options={})


def _run(norm, seed, ap, **how):
    return dict(norm=norm, seed=seed, ap=ap, trained_as=dict(HOW, **how),
                command=f'python tools/demo.py {norm}.py')


def test_a_training_is_kept_once(tmp_path):
    path = tmp_path / 'results' / 'demo.json'
    assert demo_results.read_results(path) == []
    for run in (_run('CBN', 0, 0.3), _run('BN', 1, 0.2), _run('BN', 0, 0.1),
                _run('BN', 0, 0.4), _run('BN', 0, 0.5, images=4, parts=2),
                dict(_run('BN', 0, 0.6, detector='YOLOX'), mask_ap=0.5)):
        demo_results.record(path, run)
    runs = demo_results.read_results(path)
    assert [(run['norm'], run['seed'], run['ap']) for run in runs] == [
        ('BN', 0, 0.4), ('BN', 1, 0.2), ('CBN', 0, 0.3), ('BN', 0, 0.5),
        ('BN', 0, 0.6)]
    assert demo_results.results_table(runs)[1:] == [
        ['FasterRCNN', 'BN', '2', '4', '0.400 (0), 0.200 (1)',
         '0.300 ± 0.141', ''],
        ['FasterRCNN', 'CBN', '2', '4', '0.300 (0)', '0.300', ''],
        ['FasterRCNN', 'BN', '4 x 2', '4', '0.500 (0)', '0.500', ''],
        ['YOLOX', 'BN', '2', '4', '0.600 (0)', '0.600', '0.500']]


def test_batch_norm_is_shown_if_it_was_trained_in_the_same_way():
    runs = [_run('BN', 0, 0.2), _run('BN', 1, 0.4), _run('CBN', 0, 0.9)]
    assert demo_results.batch_norm_note(runs, HOW) == (
        'BatchNorm, trained in the same way: 0.300 ± 0.141 AP (2 seeds, '
        'python tools/demo.py BN.py)')
    assert demo_results.batch_norm_note(runs, dict(HOW, lr=1e-4)) == ''
