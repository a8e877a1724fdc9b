import json
import os
import shutil
import tracemalloc

import pytest
from mmdet.datasets import CocoDataset
from PIL import Image

from mmdet_smallbn.data.coco_bounds import MEMORY
from mmdet_smallbn.data.coco_check import check_images
from mmdet_smallbn.data.coco_folder import find_coco_split


def _write(path, image, **changes):
    content = dict(
        images=[dict(id=1, file_name=image, width=4, height=4)],
        annotations=[dict(id=1, bbox=[0, 0, 2, 2], area=4, iscrowd=0)],
        categories=[dict(id=3, name='cat'), dict(id=7, name='dog')])
    content.update(changes)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


@pytest.mark.parametrize('ann_file, image_dir', [
    ('annotations/instances_train2017.json', 'train2017'),
    ('annotations/instances_train.json', 'train'),
    ('annotations/instances_train2017.json', 'images/train2017'),
    ('annotations/train.json', 'images'),
    ('train/_annotations.coco.json', 'train'),
    ('instances_train.json', '.'),
])
def test_layouts(tmp_path, ann_file, image_dir):
    _write(tmp_path / ann_file, 'a.jpg')
    _touch(tmp_path / image_dir / 'a.jpg')
    split = find_coco_split(tmp_path, 'train')
    assert split.ann_file == tmp_path / ann_file
    assert split.image_dir.resolve() == (tmp_path / image_dir).resolve()
    assert split.classes == ('cat', 'dog') and split.num_images == 1


def test_the_split_whose_images_are_there_is_taken(tmp_path):
    for year in (2014, 2017):
        _write(tmp_path / f'annotations/instances_val{year}.json',
               f'{year}.jpg')
    _touch(tmp_path / 'val2014' / '2014.jpg')
    assert 'val2014' in str(find_coco_split(tmp_path, 'val').ann_file)


def test_valid_is_a_name_for_val(tmp_path):
    _write(tmp_path / 'valid/_annotations.coco.json', 'a.jpg')
    _touch(tmp_path / 'valid' / 'a.jpg')
    assert find_coco_split(tmp_path, 'val').image_dir == tmp_path / 'valid'


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='no data set folder.*nowhere'):
        find_coco_split(tmp_path / 'nowhere', 'train')
    with pytest.raises(
            FileNotFoundError, match='no train annotations.*looked'):
        find_coco_split(tmp_path, 'train')
    _write(tmp_path / 'annotations/instances_train.json', 'a.jpg')
    with pytest.raises(FileNotFoundError, match="'a.jpg'.*looked in"):
        find_coco_split(tmp_path, 'train')


def test_every_image_must_be_there(tmp_path):
    names = ['a.jpg', 'in/b.jpg', 'in/c.jpg', 'out/d.jpg']
    _write(
        tmp_path / 'annotations/instances_train.json',
        'a.jpg',
        images=[
            dict(id=i, file_name=name, width=4, height=4)
            for i, name in enumerate(names)
        ])
    for name in names[:2]:
        _touch(tmp_path / 'train' / name)
    with pytest.raises(
            FileNotFoundError, match="2 of the 4 images .*first is 'in/c.jpg'"):
        find_coco_split(tmp_path, 'train')
    for name in names[2:]:
        _touch(tmp_path / 'train' / name)
    assert find_coco_split(tmp_path, 'train').num_images == 4


@pytest.mark.parametrize('categories', [
    [dict(id=1, name='cat'), dict(id=2, name='cat')],
    [dict(id=1, name='cat'), dict(id=2)],
])
def test_categories_have_names_of_their_own(tmp_path, categories):
    _write(tmp_path / 'train.json', 'a.jpg', categories=categories)
    _touch(tmp_path / 'a.jpg')
    with pytest.raises(ValueError, match='every category needs a unique name'):
        find_coco_split(tmp_path, 'train')


def test_a_byte_order_mark_is_no_matter(tmp_path):
    path = tmp_path / 'train.json'
    _write(path, 'a.jpg')
    _touch(tmp_path / 'a.jpg')
    path.write_text(path.read_text(), encoding='utf-8-sig')
    assert find_coco_split(tmp_path, 'train').classes == ('cat', 'dog')


@pytest.mark.parametrize('segmentation, has', [
    ([[0, 0, 1, 0, 1, 1]], True),
    (dict(counts='abc', size=[3, 3]), True),
    ([[]], False),
    ([], False),
    (None, False),
])
def test_masks(tmp_path, segmentation, has):
    _write(
        tmp_path / 'train.json',
        'a.jpg',
        annotations=[
            dict(
                id=1, bbox=[0, 0, 2, 2], area=4, iscrowd=0,
                segmentation=segmentation)
        ])
    _touch(tmp_path / 'a.jpg')
    assert find_coco_split(tmp_path, 'train').has_masks == has


def test_other_json_is_refused(tmp_path):
    _write(tmp_path / 'annotations/train.json', 'a.jpg', categories=[])
    with pytest.raises(ValueError, match='no categories'):
        find_coco_split(tmp_path, 'train')
    (tmp_path / 'annotations/train.json').write_text('{"half": ')
    with pytest.raises(ValueError, match='not a COCO annotation file'):
        find_coco_split(tmp_path, 'train')


def _folder(tmp_path, shapes):
    """A copy of a data set of one's own, to damage."""
    root = tmp_path / 'own'
    shutil.copytree(shapes, root)
    return root


def _edit(root, split, change):
    path = root / 'annotations' / f'instances_{split}.json'
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return content


def test_what_follows_from_boxes_and_images_is_filled_in(
        tmp_path, shapes, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    root = _folder(tmp_path, shapes)
    whole = find_coco_split(root, 'train')
    assert whole.filled == '' and whole.ann_file.parent.parent == root

    def strip(content):
        for annotation in content['annotations']:
            for key in ('area', 'iscrowd', 'segmentation', 'id'):
                del annotation[key]
        del content['images'][0]['width']

    _edit(root, 'train', strip)
    split = find_coco_split(root, 'train')
    assert 'lacks area' in split.filled and str(split.ann_file) in split.filled
    assert split.ann_file.parent == tmp_path / 'cache' / 'mmdet_smallbn'
    found = json.loads(split.ann_file.read_text())
    wanted = json.loads(whole.ann_file.read_text())
    for annotation in found['annotations']:
        assert annotation['area'] == (
            annotation['bbox'][2] * annotation['bbox'][3])
        assert annotation['iscrowd'] == 0
    ids = [annotation['id'] for annotation in found['annotations']]
    assert len(set(ids)) == len(ids)
    size = find_coco_split(shapes, 'train')
    assert found['images'][0]['width'] == json.loads(
        size.ann_file.read_text())['images'][0]['width']
    assert len(wanted['images']) == len(found['images'])
    # Again: the same file.
    assert find_coco_split(root, 'train').ann_file == split.ann_file


def test_an_object_without_a_box_is_named(tmp_path, shapes):
    root = _folder(tmp_path, shapes)
    _edit(root, 'train', lambda c: c['annotations'][3].pop('bbox'))
    with pytest.raises(ValueError, match='object 3 of image .* needs a bbox'):
        find_coco_split(root, 'train')


def test_images_that_cannot_be_used_are_named(tmp_path, shapes):
    root = _folder(tmp_path, shapes)
    find_coco_split(root, 'train', check=True)
    content = _edit(root, 'train', lambda c: c['images'][2].update(width=5))
    names = [image['file_name'] for image in content['images']]
    (root / 'train' / names[0]).write_bytes(b'')
    cut = (root / 'train' / names[1]).read_bytes()
    (root / 'train' / names[1]).write_bytes(cut[:len(cut) // 2])
    (root / 'train' / names[3]).write_text('no image')
    with pytest.raises(ValueError) as error:
        find_coco_split(root, 'train', check=True)
    text = str(error.value)
    assert text.startswith(f'4 of the {len(names)} images')
    assert f'{names[0]!r} is empty' in text
    assert f'{names[1]!r} cannot be read' in text
    assert f'{names[2]!r} has ' in text and 'the annotations say 5 x' in text
    assert f'{names[3]!r} cannot be read' in text


def test_an_image_that_is_turned_has_its_own_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (40, 20)).save(tmp_path / 'a.jpg', exif=exif)
    check_images(tmp_path, [dict(file_name='a.jpg', width=20, height=40)], '')
    with pytest.raises(ValueError, match='has 20 x 40 pixels'):
        check_images(
            tmp_path, [dict(file_name='a.jpg', width=40, height=20)], '')


def _named(*names):
    return [dict(id=i, file_name=name, width=4, height=4)
            for i, name in enumerate(names)]


@pytest.mark.parametrize('name', ['../../out.jpg', '{outside}/out.jpg',
                                  'elsewhere/../out.jpg'])
@pytest.mark.parametrize('first', [True, False])
def test_annotations_do_not_lead_out_of_the_folder(tmp_path, name, first):
    root, outside = tmp_path / 'own', tmp_path
    (tmp_path / 'disk').mkdir()
    _touch(outside / 'out.jpg')
    _touch(root / 'train' / 'a.jpg')
    # By way of a link, '..' is another folder than it seems.
    (root / 'train' / 'elsewhere').symlink_to(tmp_path / 'disk')
    names = ['a.jpg', name.format(outside=outside)]
    _write(root / 'annotations/train.json', '',
           images=_named(*(names[::-1] if first else names)))
    with pytest.raises(ValueError, match='train.json: .*out.jpg. is outside '
                       'of .*own. Put the image or a link'):
        find_coco_split(root, 'train')


def test_names_and_links_that_stay_or_are_the_users(tmp_path):
    """Images on another disk, and names relative to the annotations."""
    disk, root = tmp_path / 'disk', tmp_path / 'own'
    for name in ('a.jpg', 'b.jpg'):
        _touch(disk / name)
    root.mkdir()
    (root / 'train').symlink_to(disk)
    _touch(root / 'val' / 'c.jpg')
    _write(root / 'annotations/train.json', '',
           images=_named('a.jpg', 'b.jpg'))
    assert find_coco_split(root, 'train').num_images == 2
    _write(root / 'annotations/val.json', '', images=_named(
        '../val/c.jpg', str(root / 'val' / 'c.jpg')))
    assert find_coco_split(root, 'val').num_images == 2
    (tmp_path / 'link').symlink_to(root)
    assert find_coco_split(tmp_path / 'link', 'val').num_images == 2


def test_what_no_line_can_show_is_escaped(tmp_path):
    name = 'a\n\x1b[2J.jpg'
    _write(tmp_path / 'train.json', '', images=_named('a.jpg', name))
    with pytest.raises(FileNotFoundError, match='looked in') as missing_first:
        find_coco_split(tmp_path, 'train')
    _touch(tmp_path / 'a.jpg')
    with pytest.raises(FileNotFoundError, match='The first') as missing:
        find_coco_split(tmp_path, 'train')
    Image.new('RGB', (2, 2)).save(tmp_path / 'a.jpg')
    Image.new('RGB', (2, 2)).save(tmp_path / name)
    with pytest.raises(ValueError, match='2 x 2 pixels') as wrong:
        find_coco_split(tmp_path, 'train', check=True)
    _write(tmp_path / 'train.json', '', images=_named(name, 'a.jpg'))
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match='looked in') as gone:
        find_coco_split(tmp_path, 'train')
    for error in (missing_first, missing, wrong, gone):
        assert str(error.value).isprintable()
    for error in (missing, wrong, gone):
        assert repr(name) in str(error.value)


def test_a_folder_that_no_line_can_show_is_refused(tmp_path):
    for root in (tmp_path / 'no\nwhere', tmp_path):
        _write(tmp_path / 'annotations/train\x1b.json', 'a.jpg')
        with pytest.raises(ValueError, match='control character') as error:
            find_coco_split(root, 'train')
        assert str(error.value).isprintable()


@pytest.mark.parametrize('image', [dict(id=1), dict(id=1, file_name=''),
                                   dict(id=1, file_name=7)])
def test_an_image_without_a_name_is_told(tmp_path, image):
    _write(tmp_path / 'train.json', '', images=[image])
    with pytest.raises(ValueError, match='image 0 needs a file_name, but'):
        find_coco_split(tmp_path, 'train')


@pytest.mark.parametrize('content', [b'\xff\xfe', b'[' * 100000],
                         ids=['bytes', 'nested'])
def test_other_content_is_no_annotation_file(tmp_path, content):
    (tmp_path / 'train.json').write_bytes(content)
    with pytest.raises(ValueError, match='train.json is not a COCO annot'):
        find_coco_split(tmp_path, 'train')


@pytest.mark.skipif(
    not os.path.exists('/proc/meminfo'), reason='Linux says what is free')
def test_what_memory_does_not_hold_is_not_read(tmp_path):
    """The file is a hole: it takes no disk."""
    path = tmp_path / 'train.json'
    path.touch()
    os.truncate(path, 10**13)
    with pytest.raises(ValueError, match=r'train.json has 10000.0 GB. Reading '
                       r'it needs about 80000 GB of memory, but only \d+ GB'):
        find_coco_split(tmp_path, 'train')


def test_reading_takes_about_the_memory_that_is_said(tmp_path):
    path = tmp_path / 'train.json'
    _write(path, '', images=_named(*map('{:012d}.jpg'.format, range(3000))),
           annotations=[
               dict(id=i, image_id=i % 3000, category_id=3, area=4.5,
                    bbox=[0.5, 0.25, 123.5, 2.25], iscrowd=0,
                    segmentation=[[i + j / 100 for j in range(25, 65)]])
               for i in range(10000)
           ])
    tracemalloc.start()
    CocoDataset(ann_file=str(path), data_prefix=dict(img=''), pipeline=[],
                metainfo=dict(classes=('cat', 'dog')))
    peak = tracemalloc.get_traced_memory()[1] / path.stat().st_size
    tracemalloc.stop()
    assert MEMORY / 2 < peak < 1.5 * MEMORY
