"""The parts of the sweep that need no detector."""
import re

import pytest
from rich.console import Console

from mmdet_smallbn.cli.sweep_example_weight import (Results, best_weight,
                                                    main, report)
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
    with pytest.raises(SetupError, match='another checkpoint.*--work-dir'):
        Results(path, dict(checkpoint='b', exclude=[]))


def test_the_best_is_the_smallest_of_equals():
    assert best_weight({0.: {AP: 0.4}, 0.1: {AP: 0.5}, 0.2: {AP: 0.5}},
                       AP) == 0.1


def test_the_report_names_the_best_and_how_to_use_it():
    console = Console(record=True, width=120)
    metrics = {0.: {AP: 0.4}, 0.1: {AP: 0.412}}
    report(metrics, AP, ['backbone'], console)
    text = console.export_text()
    assert 'best: 0.1, coco/bbox_mAP 0.4120 (+0.0120 over 0)' in text
    assert ("dict(type='ExampleWeightHook', weight=0.1, "
            "exclude=['backbone'])") in text
    assert re.search(r'0 .* 0\.4000', text)


def test_a_weight_out_of_range_is_refused_before_any_work(capsys):
    with pytest.raises(SystemExit):
        main(['config.py', 'checkpoint.pth', '--weights', '0', '1.5'])
    assert 'error: the weight of an example must be a number from 0 to 1, ' \
        'but got 1.5' in capsys.readouterr().err
