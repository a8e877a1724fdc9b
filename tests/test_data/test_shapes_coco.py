import json

import cv2
import numpy as np
import pytest
from mmdet.datasets import CocoDataset
from pycocotools.coco import COCO

from mmdet_smallbn.data.shapes import CLASSES, make_image
from mmdet_smallbn.data.shapes_coco import make_shapes_coco
from mmdet_smallbn.pictures import save_sheet


def test_an_image_is_a_function_of_its_seed():
    image, annotations = make_image((0, 1, 2), 96)
    again, same = make_image((0, 1, 2), 96)
    assert image.shape == (96, 96, 3) and image.dtype == np.uint8
    assert (image == again).all() and annotations == same
    assert (make_image((0, 1, 3), 96)[0] != image).any()


def test_conditions_are_of_an_image_and_leave_its_objects_alone():
    """Images then differ in what the pixels of one cannot tell."""
    means = {}
    for conditions in (0., 1.):
        drawn = [make_image((0, 0, i), 64, conditions) for i in range(24)]
        means[conditions] = np.std([image.mean() for image, _ in drawn])
        if conditions:
            assert [a for _, a in drawn] == plain
            again, _ = make_image((0, 0, 5), 64, conditions)
            assert (again == drawn[5][0]).all()
        plain = [a for _, a in drawn]
    assert means[1.] > 1.5 * means[0.]


def test_files_do_not_depend_on_the_processes(tmp_path):
    roots = [
        make_shapes_coco(tmp_path / str(w), 9, 2, 64, seed=3, workers=w)
        for w in (1, 2)
    ]
    files = [
        sorted(p.relative_to(root) for p in root.rglob('*') if p.is_file())
        for root in roots
    ]
    assert files[0] == files[1] and len(files[0]) == 9 + 2 + 2 + 1
    for name in files[0]:
        assert (roots[0] / name).read_bytes() == (roots[1] / name).read_bytes()


def test_splits_share_no_image(tmp_path):
    root = make_shapes_coco(tmp_path / 'data', 4, 4, 64)
    images = [p.read_bytes() for p in root.rglob('*.jpg')]
    assert len(set(images)) == 8


def test_annotations_fit_the_masks(shapes):
    coco = COCO(str(shapes / 'annotations' / 'instances_train.json'))
    assert tuple(c['name'] for c in coco.dataset['categories']) == CLASSES
    overlap = []
    for ann in coco.dataset['annotations']:
        mask = coco.annToMask(ann)
        ys, xs = np.nonzero(mask)
        x, y, w, h = ann['bbox']
        assert abs(xs.min() - x) <= 1 and abs(xs.max() + 1 - x - w) <= 1
        assert abs(ys.min() - y) <= 1 and abs(ys.max() + 1 - y - h) <= 1
        assert 0 <= x and x + w <= 96 and 0 <= y and y + h <= 96
        overlap.append(ann['area'] / mask.sum())
    # A polygon also covers an object in the middle of its own.
    assert np.median(overlap) > 0.99 and min(overlap) > 0.5


def test_objects_are_many_kinds_and_sizes():
    found = [a for i in range(60) for a in make_image((0, 0, i), 192)[1]]
    assert {a['category_id'] for a in found} == set(range(1, 8))
    sides = [max(a['bbox'][2:]) for a in found]
    assert max(sides) > 3 * min(sides)
    assert 3 < len(found) / 60 < 8


def test_loads_in_mmdet(shapes):
    dataset = CocoDataset(
        ann_file='annotations/instances_val.json',
        data_root=str(shapes),
        data_prefix=dict(img='val/'),
        metainfo=dict(classes=CLASSES))
    assert len(dataset) == 8
    info = dataset.get_data_info(0)
    assert cv2.imread(info['img_path']).shape == (96, 96, 3)
    assert all(i['mask'] for i in info['instances'])


def test_the_same_data_set_is_kept_and_another_replaces_it(tmp_path):
    root = make_shapes_coco(tmp_path / 'data', 2, 1, 64)
    file = root / 'train' / '000000.jpg'
    written = file.stat().st_mtime_ns
    make_shapes_coco(root, 2, 1, 64)
    assert file.stat().st_mtime_ns == written
    make_shapes_coco(root, 1, 1, 64, seed=5)
    assert len(list((root / 'train').iterdir())) == 1
    content = json.loads(
        (root / 'annotations' / 'instances_train.json').read_text())
    assert len(content['images']) == 1


def test_an_interrupted_data_set_is_made_again(tmp_path):
    root = make_shapes_coco(tmp_path / 'data', 2, 1, 64)
    marker = root / 'shapes_coco.json'
    marker.write_text(marker.read_text().replace('true', 'false'))
    (root / 'train' / '000001.jpg').unlink()
    make_shapes_coco(root, 2, 1, 64)
    assert (root / 'train' / '000001.jpg').exists()


def test_frames_of_a_scene_share_its_condition(tmp_path):
    """Mean brightness differs less within scenes than between them."""
    root = make_shapes_coco(tmp_path / 'data', 24, 4, 64, conditions=1.,
                            frames=4)
    paths = sorted((root / 'train').iterdir())
    means = np.array([cv2.imread(str(path)).mean() for path in paths])
    scenes = means.reshape(6, 4)
    assert scenes.std(1).mean() < 0.5 * scenes.mean(1).std()
    alone, _ = make_image((0, 0, 5), 64, 1.)
    # A scene's condition is drawn apart from any image of that number.
    images = [make_image((0, 0, 5), 64, 1., scene=(0, 0, 5, last))[0]
              for last in (0, 1)]
    assert (images[0] != images[1]).any() and (images[1] != alone).any()


def test_bad_requests_are_named(tmp_path):
    with pytest.raises(ValueError, match='train=0'):
        make_shapes_coco(tmp_path / 'data', train=0)
    with pytest.raises(ValueError, match='frames=0'):
        make_shapes_coco(tmp_path / 'data', frames=0)
    with pytest.raises(ValueError, match='conditions above 0'):
        make_shapes_coco(tmp_path / 'data', frames=4)
    with pytest.raises(ValueError, match='64 pixels, but got 20'):
        make_shapes_coco(tmp_path / 'data', size=20)
    with pytest.raises(ValueError, match='from 0 to 1, but got 1.5'):
        make_shapes_coco(tmp_path / 'data', conditions=1.5)
    (tmp_path / 'notes.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='not changed'):
        make_shapes_coco(tmp_path)
    assert (tmp_path / 'notes.txt').exists()


def test_sheet(shapes, tmp_path):
    path = tmp_path / 'sheet.png'
    save_sheet(shapes / 'annotations' / 'instances_train.json',
               shapes / 'train', path, 2, 3)
    assert cv2.imread(str(path)).std() > 20
