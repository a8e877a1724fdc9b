"""Made data that the tests share."""
import pytest
import torch


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
