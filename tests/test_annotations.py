"""annotations.py: polygons, run lengths and boxes as people have them, and mistakes in them."""
import io
import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

import care
from common import annotations, boxes
from test_boxes import (coco_content, coco_tree, noise_masks, square, voc_size, voc_thing,
                        voc_tree)


def runs_of(mask):
    """COCO's run lengths of a mask, column after column, the first of zeros."""
    flat = mask.T.ravel()
    ends = np.flatnonzero(np.diff(flat, prepend=0)).tolist()
    return np.diff([0, *ends, flat.size]).tolist()


@pytest.mark.parametrize("compressed", [False, True])
def test_run_lengths_are_the_masks_that_they_encode(compressed):
    for mask in noise_masks(60):
        outline = {"size": list(mask.shape), "counts": runs_of(mask)}
        if compressed:
            outline["counts"] = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
            assert annotations.decompress(outline["counts"]) == runs_of(mask)
        code = annotations.read_run_lengths(outline, mask.shape[::-1], "here")
        if mask.any():
            assert np.array_equal(boxes.as_mask(code, *mask.shape), mask)
        else:
            assert code == b""


@pytest.mark.parametrize("counts", [
    [10, 5], [], "", [10, 50000], [2880, 1], [-1, 2881], [2880.0], ["2880"], 7, "0", "P", "\x7f",
    "ao2"])
def test_run_lengths_that_are_not_of_the_image_are_refused(counts, tmp_path):
    """pycocotools would fill what is missing with whatever the memory has."""
    content = coco_content()
    content["annotations"][0]["segmentation"] = {"size": [48, 60], "counts": counts}
    coco_tree(tmp_path, content)
    with pytest.raises(care.InputError, match="image 7, annotation 1: its run lengths are not of "
                                              "the image's 60 x 48 pixels"):
        boxes.open_sources(str(tmp_path), "coco-fpn")


def test_polygons_of_fewer_than_three_points_are_dropped_and_told(tmp_path, capsys):
    """The object stays if another part is sound; otherwise it is left out."""
    content = coco_content()
    first, second, last = (content["annotations"][number] for number in (0, 1, 5))
    first["segmentation"] = [[10, 8, 30, 8], *square(10, 8, 20), [], [1, 2, 3, 4]]  # as a box: 4
    second["segmentation"] = [[40, 20, 50, 30], []]
    last["segmentation"] = {"size": [48, 60], "counts": [2880]}
    source, val = boxes.open_sources(str(coco_tree(tmp_path, content)), "coco-fpn")
    assert len(source) == 1 and len(val) == 4
    (_, target), _ = source[0]
    assert target["boxes"].tolist() == [[10, 8, 30, 28]] and target["masks"].sum() == 400
    note = capsys.readouterr().err.splitlines()[0]
    assert "instances_train2017.json: objects: 2 whose outline encloses nothing left out" in note


def test_boxes_over_the_border_are_cut_and_told(tmp_path, capsys):
    content = coco_content()
    content["annotations"][0]["bbox"] = [-5, -2, 70, 20]
    content["annotations"][1]["bbox"] = [40, 20, 20.5, 10]  # by less than a pixel
    content["annotations"][5]["bbox"] = [61, 4, 30, 30]
    source, _ = boxes.open_sources(str(coco_tree(tmp_path, content)), "coco-fpn")
    assert len(source) == 1
    assert source[0][0][1]["boxes"].tolist() == [[0, 0, 60, 18], [40, 20, 60, 30]]
    note = capsys.readouterr().err.splitlines()[0]
    assert "objects: 1 cut off at the border of their image, 2 whose box has no area" in note
    annotation = voc_thing("cat", (1, 1, 90, 90)) + voc_thing("dog", (70, 1, 90, 20))
    path = voc_tree(tmp_path) / "VOCdevkit/VOC2007/Annotations/000002.xml"
    path.write_text(f"<annotation>{voc_size(60, 48)}{annotation}</annotation>")
    source, _ = boxes.open_sources(str(tmp_path), "voc-c4")
    assert source[1][0][1]["boxes"].tolist() == [[0, 0, 60, 48]]
    notes = capsys.readouterr().err.splitlines()
    assert "train: objects: 1 cut off at the border of their image, 1 whose box has" in notes[0]
    assert "val: objects: 1 cut off" in notes[1] and len(notes) == 2


def test_objects_are_read_as_they_are_written(tmp_path):
    """Every polygon, box and label; masks as COCO's own package draws them, bit for bit."""
    rng, content = np.random.default_rng(0), coco_content()
    content["annotations"] = []
    for number in range(60):
        parts = []
        for _ in range(rng.integers(1, 4)):
            points = rng.uniform(-3, 63, 2 * rng.integers(3, 30))
            parts.append(points.round(int(rng.integers(0, 4))).tolist())
        content["annotations"].append(
            {"id": number, "image_id": int(rng.choice([7, 12, 9])), "segmentation": parts,
             "category_id": int(rng.choice([3, 90])), "bbox": rng.uniform(1, 29, 4).tolist()})
    source, _ = boxes.open_sources(str(coco_tree(tmp_path, content)), "coco-fpn")
    assert [Path(path).stem[-2:] for path in source.paths] == ["07", "09", "12"]
    for number, objects, index in zip((7, 9, 12), source.objects, range(3)):
        rows = [row for row in content["annotations"] if row["image_id"] == number]
        assert len(rows) == len(objects)
        for row, one in zip(rows, objects):
            x, y, width, height = row["bbox"]
            assert one["box"] == (x, y, x + width, y + height) and not one["crowd"]
            name = {3: "car", 90: "toothbrush"}[row["category_id"]]
            assert source.classes[one["label"] - 1] == name
            assert [part.tolist() for part in one["mask"]] == row["segmentation"]
        for row, mask in zip(rows, source[index][0][1]["masks"].numpy()):
            codes = coco_mask.frPyObjects(row["segmentation"], 48, 60)
            assert np.array_equal(mask, coco_mask.decode(codes).any(2))
    with pytest.raises(IndexError):
        source.objects[3]


def test_lists_of_coco_may_come_in_any_order(tmp_path):
    content = coco_content()
    usual, _ = boxes.open_sources(str(coco_tree(tmp_path / "usual", content)), "coco-fpn")
    for order in (("annotations", "categories", "images"), ("categories", "annotations", "images")):
        changed = {"info": {"year": 2017}, **{name: content[name] for name in order}}
        where = coco_tree(tmp_path / order[0], changed)
        source, _ = boxes.open_sources(str(where), "coco-fpn")
        assert source.classes == usual.classes and len(source) == len(usual) == 2
        assert str([*source.objects]) == str([*usual.objects])
        names = [[Path(path).name for path in one.paths] for one in (source, usual)]
        assert names[0] == names[1] == ["000000000007.jpg", "000000000012.jpg"]


@pytest.mark.parametrize("content, match", [
    (b"", "'{' is missing at character 0"), (b"\x80{}", "utf-8"), (b"{}", "no object in the im"),
    (b'{"images": [' + b"[" * 200_000, "recursion"), (b'{"images": [' + b"1" * 5000, "digits"),
    (json.dumps(coco_content()).encode("utf-16"), "utf-8"),
    (b'{"images": {"id": 1}}', "one of its images must have id, file_name, width, height"),
    (b'{"images": [], "categories": [7]}', "one of its categories must have id, name, not 7"),
    (json.dumps(coco_content()).encode()[:-30], "at character")])
def test_a_file_that_is_no_annotation_of_cocos_is_refused(content, match, tmp_path):
    path = coco_tree(tmp_path) / "annotations" / "instances_train2017.json"
    path.write_bytes(content)
    with pytest.raises(care.InputError, match=match) as caught:
        boxes.open_sources(str(tmp_path), "coco-fpn")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_the_farthest_point_can_be_drawn():
    inside = boxes.as_mask([np.array([-1e5, -1e5, 1e5, -1e5, 1e5, 1e5, -1e5, 1e5])], 48, 60)
    assert inside.shape == (48, 60) and inside.all()


def test_what_a_source_keeps_is_flat(tmp_path):
    """Loading processes copy the pages of every Python object that they count references of."""
    source, _ = boxes.open_sources(str(coco_tree(tmp_path)), "coco-fpn")
    kept = [*vars(source.objects).values(), *vars(source.paths).values(), source.sizes]
    assert {type(value) for value in kept} == {np.ndarray, bytes}


def test_json_is_read_value_by_value(monkeypatch):
    """As json reads it, wherever the text is cut into chunks; cut short, it is refused."""
    content = {"info": {"year": 2017, "a]": "}\"é", "\u1234": None}, "images": [],
               "annotations": [{"id": 1, "segmentation": [[1.25, 2]]}, {"id": 22}],
               "flat": [1, -2.5e3], "last": 123456}
    expected = []
    for name, value in content.items():
        expected += [(name, one) for one in (value if isinstance(value, list) else [value])]
    for text in (json.dumps(content), json.dumps(content, indent=2, ensure_ascii=False)):
        for chunk in (1, 2, 3, 7, 50, 10000):
            monkeypatch.setattr(annotations.JsonReader, "CHUNK", chunk)
            assert list(annotations.JsonReader(io.StringIO(text)).entries()) == expected
        for length in range(len(text) - 1):
            with pytest.raises(care.InputError, match="at character") as caught:
                list(annotations.JsonReader(io.StringIO(text[:length])).entries())
            assert int(str(caught.value).rpartition(" ")[2]) <= length
    for text, place in (('{"a": [1 2]}', 9), ('{"a" 1}', 5), ('{"a": 1 "b": 2}', 8), ("[1]", 0),
                        ('{"a": [1,]}', 9), ('{"a": [,1]}', 7), ('{"a": 1x', 7)):
        with pytest.raises(care.InputError, match=f"at character {place}$"):
            list(annotations.JsonReader(io.StringIO(text)).entries())


def annotation(number, **changes):
    """A change of COCO's annotations."""
    def change(content):
        content["annotations"][number].update(changes)
        for name, value in changes.items():
            if value is ...:
                del content["annotations"][number][name]
    return change


def new_categories(*names, ids=(90, 3, 4)):
    def change(content):
        content["categories"] = [{"id": i, "name": name} for i, name in zip(ids, names)]
    return change


def without_objects(content):
    content["annotations"] = [one for one in content["annotations"] if one["iscrowd"]]


def image(number, **changes):
    """A change of COCO's images; 0: number 12, 1: number 7."""
    def change(content):
        content["images"][number] = content["images"][number] | changes
    return change


PLACE = "instances_{}2017.json: image 7, annotation 2: "
NO_MASK, PAIRS = PLACE + "no segmentation", PLACE + "its segmentation must be lists of numbers"
REFUSED = [
    ("val", new_categories("toothbrush", "cars"), "'cars' is none of the training set's: car, to"),
    ("val", new_categories("toothbrush", "car", "cat"), "'cat' is none of the training set's"),
    ("val", new_categories("toothbrush", "car", 7), "a name of its categories must be a text"),
    ("val", new_categories("toothbrush", "toothbrush"), "'toothbrush'.* more than once"),
    ("train", new_categories("car", "car"), "train2017.json: category 'car'.* more than once"),
    ("train", new_categories("car", "cat", ids=(3, 3)), "3 is the id of more than one of its cat"),
    ("train", new_categories("car", "cat", ids=(3, "4")), "id of its categories must be a number"),
    ("val", new_categories("toothbrush", ["car"]), "a name of its categories must be a text"),
    ("val", without_objects, "no object to find"),
    ("train", without_objects, "no object in the images to train on"),
    ("train", image(0, id=7), "7 is the id of more than one of its images, .* '000000000007.jpg'"),
    ("val", image(0, file_name="000000000007.jpg"), "image '000000000007.jpg' is there more than"),
    ("val", image(1, width=0), "'000000000007.jpg': its width and height must be .*0, 48"),
    ("val", image(1, height=None), "its width and height must be numbers of pixels"),
    ("train", image(1, id=[7]), "an id of its images must be a number"),
    ("train", annotation(1, image_id=70), "annotation 2: image 70 is none of the file's"),
    ("val", annotation(1, image_id="7"), "annotation 2: image '7' is none of the file's"),
    ("val", annotation(1, image_id=...), "annotation 2: image None is none of the file's"),
    ("val", lambda content: content["annotations"].append(7), "an annotation is no object, but 7"),
    ("train", annotation(1, iscrowd="0"), PLACE.format("train") + "its iscrowd must be 0 or 1"),
    ("val", annotation(1, segmentation=...), NO_MASK.format("val")),
    ("train", annotation(1, segmentation=None), NO_MASK.format("train")),
    ("train", annotation(1, segmentation=[]), NO_MASK.format("train")),
    ("train", annotation(1, segmentation=7), NO_MASK.format("train")),
    ("train", annotation(1, segmentation={}), PLACE.format("train") + "its run lengths are not"),
    ("train", annotation(1, segmentation=[1, 2, 3, 4, 5, 6]), PAIRS.format("train")),
    ("train", annotation(1, segmentation=[[1, 2, 3, 4, 5, 6, 7]]), PAIRS.format("train")),
    ("val", annotation(1, segmentation=[[1, 2, 3, 4, 5, None]]), PAIRS.format("val")),
    ("val", annotation(1, segmentation=[[1, 2, 3, float("nan"), 5, 6]]), PAIRS.format("val")),
    ("val", annotation(1, segmentation=[[1, 2, 3, "4", 5, 6]]), PAIRS.format("val")),
    ("train", annotation(1, segmentation=[[1, 2, 3, 1e9, 5, 6]]), "2: a point of its segm"),
    ("train", annotation(1, segmentation=[[1, 2, 3, 4, 5, -1e9]]), "2: a point of its segm"),
    ("train", annotation(1, segmentation={"size": [60, 48], "counts": [2880]}), "run lengths are"),
    ("val", annotation(1, bbox=...), "annotation 2: its bbox must be four numbers, not None"),
    ("val", annotation(1, bbox=[1, 2, "3", 4]), "annotation 2: its bbox"),
    ("val", annotation(1, bbox=[1, 2, float("inf"), 4]), "annotation 2: its bbox"),
    ("train", annotation(1, bbox=[1, 2, 3]), "annotation 2: its bbox"),
    ("train", annotation(1, category_id=5), "annotation 2: its category is none of the file's"),
    ("train", annotation(1, category_id=[3]), "annotation 2: its category is none of the file's"),
]


@pytest.mark.parametrize("split, change, match", REFUSED)
def test_mistakes_in_coco_are_refused_before_training(split, change, match, tmp_path):
    content = coco_content()
    change(content)
    coco_tree(tmp_path, **{split: content})
    with pytest.raises(care.InputError, match=match) as caught:
        boxes.open_sources(str(tmp_path), "coco-fpn")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text, match", [
    (voc_thing("giraffe", (1, 1, 9, 9)), "000003.xml: 'giraffe' is none of VOC's"),
    (voc_thing("Person", (1, 1, 9, 9)), "'Person' is none of VOC's"),
    ("<object><difficult>0</difficult></object>", "000003.xml: '' is none"),
    ("<object><name>cat</name></object>", "000003.xml: a cat has no box of numbers"),
    (voc_thing("cat", (1, "x", 9, 9)), "a cat has no box of numbers"),
    ("<object>", "000003.xml: no annotation of VOC's"),
    (voc_thing("cat", (1, 1, "nan", 9)), "a cat has no box of numbers"),
    (voc_thing("cat", (1, 1, 9, "inf")), "a cat has no box of numbers"),
    (voc_thing("cat", (1, 1, 9, 9), "true"), "difficult of a cat must be 0 or 1, not 'true'"),
    (voc_size("nan", 48), "its size must be two whole numbers, not .'nan', '48'"),
    (voc_size("60 px", 48), "its size must be two whole numbers, not .'60 px', '48'"),
])
def test_mistakes_in_voc_are_refused_before_training(text, match, tmp_path):
    path = voc_tree(tmp_path) / "VOCdevkit/VOC2007/Annotations/000003.xml"  # of val alone
    path.write_text(f"<annotation>{text}</annotation>")
    with pytest.raises(care.InputError, match=match):
        boxes.open_sources(str(tmp_path), "voc-c4")


def test_an_image_that_is_listed_twice_is_refused(tmp_path):
    listed = voc_tree(tmp_path) / "VOCdevkit/VOC2007/ImageSets/Main/test.txt"
    listed.write_text("000001\n000003\n000001\n")
    with pytest.raises(care.InputError, match="image '.*000001.jpg' of val is listed more than"):
        boxes.open_sources(str(tmp_path), "voc-c4")
