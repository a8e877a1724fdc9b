"""The parts of the sweep that need no detector."""
import re
from pathlib import Path

import pytest
from rich.console import Console

from mmdet_smallbn.cli.sweep_example_weight import (Results, best_weight,
                                                    identity_of, main,
                                                    parse_args, prepare,
                                                    report)
from mmdet_smallbn.errors import SetupError

AP = 'coco/bbox_mAP'


def test_results_are_kept_and_told_apart(tmp_path):
    path = tmp_path / 'folder' / 'sweep.json'
    results = Results(path, dict(checkpoint='a', exclude=[]))
    assert results.metrics == {}
    results.add(0.2, {AP: 0.4})
    results.add(0.1, {AP: 0.5})
    again = Results(path, dict(checkpoint='a', exclude=[]))
    assert again.metrics == {0.1: {AP: 0.5}, 0.2: {AP: 0.4}}
    with pytest.raises(SetupError, match='differs in checkpoint.*--work-dir'):
        Results(path, dict(checkpoint='b', exclude=[]))
    path.write_text('{"weig')
    with pytest.raises(SetupError, match='sweep.json was not written by'):
        Results(path, {})


def test_the_best_of_equals():
    metrics = {0.: {AP: 0.4}, 0.1: {AP: 0.5}, 0.2: {AP: 0.5}}
    assert best_weight(metrics, AP) == best_weight(metrics, AP, 0.) == 0.1
    assert best_weight(metrics, AP, 0.2) == 0.2


def test_the_report_names_the_best_and_how_to_use_it():
    console = Console(record=True, width=120)
    metrics = {0.: {AP: 0.4}, 0.1: {AP: 0.412}}
    report(metrics, AP, 0., ['backbone'], console)
    text = console.export_text()
    assert 'best: 0.1, coco/bbox_mAP 0.4120 (+0.0120 over the model' in text
    assert ("dict(type='ExampleWeightHook', weight=0.1, "
            "exclude=['backbone'])") in text
    assert re.search(r'0 \(as trained\) .* 0\.4000', text)
    report(metrics, AP, 0.1, [], console)
    text = console.export_text()
    assert 'as trained: there is nothing to gain' in text
    assert 'ExampleWeightHook' not in text
    with pytest.raises(SetupError, match='coco/segm_mAP is not among coco/b'):
        report(metrics, 'coco/segm_mAP', 0.1, [], console)


CONFIG = ('configs/demo/faster-rcnn_r18_fpn_bn-all_1xb2_shapes-coco.py', )


def test_what_the_results_depend_on():

    def identity(*arguments, calibrated=True):
        args = parse_args([*CONFIG, 'none.pth', *arguments])
        return identity_of(args, prepare(args), calibrated)

    plain = identity()
    for options, changed in (
        (['--exclude', 'neck'], 'exclude'),
        (['--cfg-options', 'test_evaluator.ann_file=x'], 'settings'),
        (['--cfg-options', 'test_dataloader.dataset.ann_file=x'], 'settings'),
        (['--cfg-options', 'model.test_cfg.rcnn.score_thr=0.1'], 'settings'),
        (['--calibration-images', '3'], 'settings'),
        (['--cfg-options', 'test_dataloader.num_workers=0'], None),
        (['--weights', '0.5'], None),
    ):
        other = identity(*options)
        assert [k for k in plain if plain[k] != other[k]] == (
            [changed] if changed else [])
    assert identity('--calibration-images', '3', calibrated=False) == (
        identity(calibrated=False))


def test_a_weight_that_the_config_sets_stands_back(tmp_path):
    """Its hook would overwrite each weight of the sweep."""
    path = tmp_path / 'with_hook.py'
    base = Path(CONFIG[0]).resolve()
    path.write_text(
        f"_base_ = '{base}'\n"
        "custom_hooks = [dict(type='ExampleWeightHook', weight=0.3),\n"
        "                dict(type='NumClassCheckHook')]\n")
    cfg = prepare(parse_args([str(path), 'none.pth']))
    assert [hook.type for hook in cfg.custom_hooks] == ['NumClassCheckHook']


def test_a_weight_out_of_range_is_refused_before_any_work(capsys):
    with pytest.raises(SystemExit):
        main(['config.py', 'checkpoint.pth', '--weights', '0', '1.5'])
    assert 'error: the example weight must be a number from 0 to 1, ' \
        'but got 1.5' in capsys.readouterr().err
