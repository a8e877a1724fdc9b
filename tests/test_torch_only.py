"""What docs/torch_only.md says, where torch and mmengine are all there is."""
import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmdet_smallbn.version import BOUNDS

ROOT = Path(__file__).resolve().parents[1]
# Languages and texts of the fenced blocks.
BLOCKS = re.findall(r'^```(\w*)\n(.*?)^```$',
                    (ROOT / 'docs' / 'torch_only.md').read_text(),
                    re.M | re.S)

# As if it were not installed: what the package can use, and neither torch nor
# an import of mmengine needs.
BLOCK = '''
import sys
for name in ('mmcv', 'mmdet', 'mmpretrain', 'mmseg', 'pycocotools', 'tqdm',
             'matplotlib', 'torchvision', 'onnx', 'onnxruntime', 'pytest'):
    sys.modules[name] = None
'''


def _run(code, folder):
    result = subprocess.run(
        [sys.executable, '-c', BLOCK + code],
        cwd=folder,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True)
    assert result.returncode == 0, result.stderr
    assert 'mmdet_smallbn' not in result.stderr  # no warning of ours
    return result.stdout


@pytest.fixture(scope='module')
def printed(tmp_path_factory):
    code = '\n'.join(text for kind, text in BLOCKS if kind == 'python')
    return _run(code, tmp_path_factory.mktemp('torch_only'))


def test_the_example_prints_what_the_page_shows(printed):
    shown = [text for kind, text in BLOCKS if not kind]
    assert len(shown) == 3
    first, last = re.search(r'loss: (\S+), (\S+) in the end\n',
                            printed).groups()
    assert ''.join(shown) == re.sub('loss: .*\n', '', printed)
    assert float(last) < float(first) / 4


def test_the_reports_of_norms_need_no_mmcv(tmp_path):
    code = '''
from torch import nn
import mmdet_smallbn
from mmdet_smallbn.norm_report import norm_summary
model = nn.Sequential(nn.Conv2d(3, 4, 3), mmdet_smallbn.CBN(4))
print(norm_summary(model, images=2))
'''
    assert '4 iterations x 2 images = 8' in _run(code, tmp_path)


def test_the_bare_installation_needs_torch_and_mmengine():
    setup = configparser.ConfigParser()
    setup.read(ROOT / 'setup.cfg')
    assert setup['options']['install_requires'].split() == ['packaging']
    needed = {name for name, bounds in BOUNDS.items() if not bounds[-1]}
    assert needed == {'torch', 'mmengine'}


def test_what_is_blocked_cannot_be_imported(tmp_path):
    with pytest.raises(AssertionError, match='import of mmcv halted'):
        _run('import mmcv', tmp_path)
