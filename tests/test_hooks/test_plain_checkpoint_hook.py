"""Checkpoints that torch's safe loader takes, and what a resume takes up."""
import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from mmdet_smallbn.hooks.plain_checkpoint_hook import (make_plain,
                                                       restore_history)
from tests.toy import toy_runner


@pytest.mark.parametrize('hooks', [
    [dict(type='PlainCheckpointHook')],
    [dict(type='BurnInHook', iters=1)],
    [dict(type='BurnInHook', iters=1), dict(type='PlainCheckpointHook')],
], ids=['by itself', 'by the norms', 'both'])
def test_a_training_writes_what_loads_safely(tmp_path, hooks):
    for name in 'abc':
        (tmp_path / name).mkdir()
    runner = toy_runner(tmp_path / 'a', hooks, custom_hooks=hooks)
    runner.train()
    path = tmp_path / 'a' / 'epoch_3.pth'
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint['meta']['epoch'] == 3
    assert checkpoint['message_hub']['log_scalars'] == {}
    # Stock mmengine tests and resumes it, with torch's own default.
    more = dict(
        resume=True,
        load_from=str(path),
        train_cfg=dict(by_epoch=True, max_epochs=4))
    stock = toy_runner(tmp_path / 'b', [], custom_hooks=[], **more)
    stock.train()
    assert stock.epoch == 4
    # With the hook the history of the log goes on.
    resumed = toy_runner(tmp_path / 'c', [], custom_hooks=hooks, **more)
    resumed.train()
    lengths = [
        len(r.message_hub.get_scalar('train/loss').data[0])
        for r in (runner, stock, resumed)
    ]
    assert lengths == [6, 2, 8]


def test_numbers_of_numpy_become_plain_and_the_rest_stays():
    state = torch.nn.Linear(2, 2).state_dict()
    checkpoint = dict(
        state_dict=state,
        meta=dict(a=(np.int64(1), [np.float32(0.5)]), b=np.arange(3)),
        message_hub=dict(
            log_scalars=dict(loss=HistoryBuffer([1., 2.], [1, 1], 7)),
            runtime_info=dict(best=np.float64(0.25)),
            resumed_keys={}))
    make_plain(checkpoint)
    assert checkpoint['state_dict'] is state
    assert type(checkpoint['meta']['a'][0]) is int
    assert type(checkpoint['message_hub']['runtime_info']['best']) is float
    torch.testing.assert_close(checkpoint['meta']['b'],
                               torch.arange(3, device='cpu'))
    restore_history(checkpoint)
    buffer = checkpoint['message_hub']['log_scalars']['loss']
    assert buffer.max_length == 7
    assert buffer.data[0].tolist() == [1., 2.]
    restore_history(dict(state_dict=state))  # of another tool
