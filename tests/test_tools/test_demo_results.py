"""The demo's trainings, kept and compared."""
from pathlib import Path

from mmengine.config import Config

from mmdet_smallbn.cli import demo_results
from mmdet_smallbn.cli.demo_config import put_on_shapes, use_norm

HOW = dict(detector='FasterRCNN', model='a', data=dict(train=8), size=64,
           images=2, parts=1, iterations=4, lr=1e-3, options={})


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


def test_models_differ_by_more_than_their_norms():
    def key(name, norm=None):
        cfg = Config.fromfile(f'configs/{name}.py')
        if norm:
            use_norm(cfg, norm)
        if 'shapes_coco' not in cfg:
            put_on_shapes(cfg, Path('configs/_base_'))
        return demo_results.trained_as(cfg), demo_results.norms_in(cfg)

    bn, cbn, mabn = (
        key(f'demo/faster-rcnn_r18_fpn_{norm}-all_1xb2_shapes-coco')
        for norm in ('bn', 'cbn', 'mabn'))
    assert bn[0] == cbn[0] == mabn[0]
    assert (bn[1], cbn[1], mabn[1]) == ('BN', 'CBN', 'MABN, CenConv')
    centred = key('demo/faster-rcnn_r18_fpn_mabn-all_1xb2_shapes-coco', 'BN')
    assert centred == (bn[0], 'BN, CenConv')
    tiny, small = (key(f'cbn/rtmdet_{size}_cbn-all_1xb4-40e_coco')
                   for size in ('tiny', 's'))
    assert tiny[0] != small[0]
    deep = key('cbn/faster-rcnn_r50_fpn_4conv1fc_cbn-all_1xb2-1x_coco')
    assert deep[0] != cbn[0]
