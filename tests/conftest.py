"""Made data that the tests share."""
import os

# Tensors are tiny: threads would wait for each other, above all where others
# are at work. Before torch is imported, and for the tools that tests start.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest  # noqa: E402
import torch  # noqa: E402


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
