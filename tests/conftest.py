"""Options, data and reports that the tests share."""
import os

# Tensors are tiny: threads would wait for each other, above all where others
# are at work. Before torch is imported, and for the tools that tests start.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest  # noqa: E402
import torch  # noqa: E402

from tests import versions  # noqa: E402


def pytest_addoption(parser):
    parser.addoption(
        '--device',
        default='cpu',
        help='where tensors are made: cpu, or cuda for tests/test_layers, '
        'tests/test_functional and tests/test_hooks')
    parser.addoption(
        '--record',
        metavar='SUITE',
        help='name of the suite: add the versions and the results of this run '
        'to docs/versions.md')


def pytest_report_header():
    return ', '.join(map(' '.join, versions.found().items()))


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    suite = config.getoption('record')
    # Not if the run was broken off.
    if suite and exitstatus in (pytest.ExitCode.OK,
                                pytest.ExitCode.TESTS_FAILED):
        stats = terminalreporter.stats
        counts = {name: len(stats.get(name, ())) for name in versions.COUNTS}
        counts['failed'] += len(stats.get('error', ()))
        versions.record(config.rootpath / 'docs', suite, counts)


def pytest_configure(config):
    device = torch.device(config.getoption('--device'))
    if device.type == 'cpu':
        # mmengine trains on a GPU wherever it sees one.
        os.environ['CUDA_VISIBLE_DEVICES'] = ''
        return
    if not torch.cuda.is_available():
        raise pytest.UsageError(
            f'--device {device}: this torch sees no GPU. Leave the option out '
            'to test on the CPU')
    os.environ['CUBLAS_WORKSPACE_CONFIG'] = ':4096:8'
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.set_default_device(device)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def shapes(tmp_path_factory):
    """A few small ShapesCOCO images."""
    from mmdet_smallbn.data.shapes_coco import make_shapes_coco
    return make_shapes_coco(
        tmp_path_factory.mktemp('data') / 'shapes',
        train=24,
        val=8,
        size=96,
        seed=1)
