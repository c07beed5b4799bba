"""boxes.py, and the scores of detect_eval.py: annotations as people have them, VOC, COCO."""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import nn
from torch.utils.data import Dataset
from torchvision.models.detection import roi_heads

import care
from common import data
import common.boxes
import detect_eval
from conftest import bare_run
from common.shapes import mask_box

pytestmark = pytest.mark.usefixtures("one_thread")
PROTOCOLS = ("voc-c4", "coco-c4", "coco-fpn")


def detector(protocol, classes=10, size=64, rois=8, arch="thin"):
    torch.manual_seed(0)
    return detect_eval.new_detector(care.Encoder(arch), protocol, classes, [size], rois)


def scenes(count, split="train", size=64):
    return common.boxes.Scenes(split, count, size)


def batch(source, count=2):
    pairs = [common.boxes.as_tensors(source[index][0]) for index in range(count)]
    return [image for image, _ in pairs], [target for _, target in pairs]


def evaluate(model, source, protocol, rank=0, world=1):
    args = SimpleNamespace(protocol=protocol, batch_size=2, seed=0, workers=0)
    return detect_eval.evaluate(bare_run(args, rank, world), args, model, source)


def voc_thing(name, box, difficult="0", more=""):
    """An object of VOC's annotations in XML; box: xmin, ymin, xmax, ymax."""
    sides = ""
    for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box):
        sides += f"<{side}>{value}</{side}>"
    return (f"<object><name>{name}</name><difficult>{difficult}</difficult>"
            f"<bndbox>{sides}</bndbox>{more}</object>")


def voc_tree(root):
    """VOC of tiny images: a difficult object, one with parts, an image without objects."""
    part = ("<part><name>head</name>"
            "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>4</xmax><ymax>4</ymax></bndbox></part>")
    person = voc_thing("person", (11, 6, 30, 25), more=part)
    objects = {"000001": person + voc_thing("dog", (31, 11, 50, 40), "1"), "000002": "",
               "000003": voc_thing("aeroplane", (1, 1, 60, 48)),
               "000004": voc_thing("cat", (5, 5, 40, 40))}
    for year, names in (("2007", tuple(objects)), ("2012", ("000003", "000004"))):
        folder = root / "VOCdevkit" / f"VOC{year}"
        for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (folder / name).mkdir(parents=True)
        for name in names:
            Image.new("RGB", (60, 48), (100, 50, 20)).save(folder / "JPEGImages" / f"{name}.jpg")
            text = f"<annotation><filename>{name}.jpg</filename>{objects[name]}</annotation>"
            (folder / "Annotations" / f"{name}.xml").write_text(text)
        listed = "000001\n000002\n" if year == "2007" else "000003\n000004\n"
        (folder / "ImageSets/Main/trainval.txt").write_text(listed)
    (root / "VOCdevkit/VOC2007/ImageSets/Main/test.txt").write_text("000001\n000002\n000003\n")
    return root


def square(x, y, side):
    """COCO's polygons of a square."""
    return [[x, y, x + side, y, x + side, y + side, x, y + side]]


def coco_content():
    """COCO annotations of four images: polygons, a crowd as run lengths, an empty image and box."""
    crowd = {"size": [48, 60], "counts": [48 * 32] + [16, 32] * 28}
    crowd_only = {"size": [48, 60], "counts": [0] + [30, 18] * 30 + [48 * 30]}
    fields = ("id", "image_id", "category_id", "bbox", "iscrowd", "segmentation")
    rows = [(1, 7, 90, [10, 8, 20, 20], 0, square(10, 8, 20)),
            (2, 7, 3, [40, 20, 10, 10], 0, square(40, 20, 10)),
            (3, 7, 3, [32, 0, 28, 16], 1, crowd),
            (4, 7, 3, [5, 5, 0, 4], 0, square(5, 5, 1)),
            (5, 9, 3, [0, 0, 30, 30], 1, crowd_only),
            (6, 12, 3, [4, 4, 30, 30], 0, square(4, 4, 30))]
    images = [{"id": number, "file_name": f"{number:012}.jpg", "height": 48, "width": 60}
              for number in (12, 7, 8, 9)]
    return {"images": images, "annotations": [dict(zip(fields, row)) for row in rows],
            "categories": [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}]}


def coco_tree(root, train=None, val=None):
    """COCO 2017 of four tiny images; train, val: the splits' annotations, unless the usual ones."""
    (root / "annotations").mkdir(parents=True)
    for split, content in (("train", train), ("val", val)):
        content = content or coco_content()
        (root / f"{split}2017").mkdir()
        for one in content["images"]:
            path = root / f"{split}2017" / one["file_name"]
            Image.new("RGB", (60, 48), (90, 90, one["id"])).save(path)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


class Oracle(nn.Module):
    """Answers with the truth of the images in order, without crowds.

    Boxes are shifted by a part of their size; masks are whole images with values around 0.5.
    """

    def __init__(self, source, shift=0.0):
        super().__init__()
        self.targets = iter([source[index][0][1] for index in range(len(source))])
        self.shift = shift

    def forward(self, images):
        found = []
        for _ in images:
            target = next(self.targets)
            target = {name: value[~target["crowd"]] for name, value in target.items()}
            sides = (target["boxes"][:, 2:] - target["boxes"][:, :2]).repeat(1, 2)
            one = {"boxes": target["boxes"] + self.shift * sides, "labels": target["labels"],
                   "scores": torch.linspace(0.9, 0.5, len(sides))}
            if "masks" in target:
                one["masks"] = 0.4 + 0.2 * target["masks"][:, None]
            found.append(one)
        return found


# ---------------------------------------------------------------------------------------- sources
def test_flip_and_resize_keep_boxes_inside_and_masks_aligned():
    model = detector("coco-c4")
    model.transform.min_size = (96, 160, 200)
    source, sizes = scenes(12, size=128), set()
    for index in range(len(source)):
        pair = source[index][0]
        plain, mirrored = common.boxes.as_tensors(pair), common.boxes.as_tensors(pair, flip=1.0)
        assert torch.equal(mirrored[0], plain[0].flip(-1))
        assert torch.equal(plain[1]["boxes"], pair[1]["boxes"])
        for box, mask in zip(mirrored[1]["boxes"], mirrored[1]["masks"].numpy()):
            assert box.tolist() == mask_box(mask).tolist()
        if index:  # boxes that do not mirror onto themselves
            assert not torch.equal(mirrored[1]["boxes"], plain[1]["boxes"])
        images, targets = model.transform.train()([mirrored[0]], [mirrored[1]])
        height, width = images.image_sizes[0]
        sizes.add(height)
        boxes, masks = targets[0]["boxes"], targets[0]["masks"]
        assert masks.shape == (len(boxes), height, width)
        assert boxes.min() >= 0
        assert boxes[:, 0::2].max() <= width and boxes[:, 1::2].max() <= height
        for box, mask in zip(boxes, masks.numpy()):
            assert np.abs(box.numpy() - mask_box(mask)).max() <= 2
    assert sizes == {96, 160, 200}


def test_flips_are_drawn_half_the_time_and_belong_to_the_sample():
    stream = data.Stream(scenes(1), lambda pair: common.boxes.as_tensors(pair, flip=0.5), 0, 1)
    plain = common.boxes.as_tensors(stream.source[0][0])[0]
    flips = [not torch.equal(stream[n][0][0], plain) for n in range(40)]
    assert 10 < sum(flips) < 30
    assert flips == [not torch.equal(stream[n][0][0], plain) for n in range(40)]


def test_scenes_are_functions_of_split_and_index():
    source, counts = scenes(20), []
    for index in range(20):
        (image, target), number = source[index]
        again = scenes(5)[index][0]
        assert number == index and image.size == (64, 64) and np.array_equal(image, again[0])
        assert all(torch.equal(target[name], again[1][name]) for name in target)
        assert not np.array_equal(image, scenes(30, "val")[index][0][0])
        assert target["masks"].sum(0).max() == 1  # what is behind is hidden
        assert target["labels"].min() >= 1 and target["labels"].max() <= len(source.classes) == 10
        for box, mask in zip(target["boxes"], target["masks"].numpy()):
            assert box.tolist() == mask_box(mask).tolist()
        counts.append(len(target["labels"]))
    assert min(counts) >= 1 and max(counts) >= 4 and np.mean(counts) > 2


def test_scenes_in_their_numbers():
    source, val = common.boxes.open_sources("shapes:7", "coco-c4")
    assert len(source) == 7 and len(val) == 200
    assert source[0][0][0].size == val[0][0][0].size == (128, 128)
    assert not np.array_equal(source[0][0][0], val[0][0][0])


def test_voc_reader(tmp_path):
    source, val = common.boxes.open_sources(str(voc_tree(tmp_path)), "voc-c4")
    paths = [source.path(index) for index in range(len(source))]
    assert [Path(path).stem for path in paths] == ["000001", "000002", "000003", "000004"]
    assert "VOC2012" in paths[3]
    (image, target), index = source[0]
    assert image.size == (60, 48) and index == 0 and "masks" not in target
    # from 0, the last pixel one before the end
    assert target["boxes"].tolist() == [[10, 5, 30, 25], [30, 10, 50, 40]]
    assert [source.classes[label - 1] for label in target["labels"]] == ["person", "dog"]
    assert target["crowd"].tolist() == [False, True]
    (_, target), _ = source[1]
    assert target["boxes"].shape == (0, 4) and target["labels"].dtype == torch.int64
    assert target["crowd"].shape == (0,)
    (_, target), _ = source[2]
    assert target["boxes"].tolist() == [[0, 0, 60, 48]] and target["labels"].tolist() == [1]
    assert len(val) == 3 and "VOC2007" in val.path(2) and len(val.classes) == 20


def test_coco_reader(tmp_path, capsys):
    content = coco_content()
    del content["annotations"][5]["iscrowd"]  # missing: 0
    source, val = common.boxes.open_sources(str(coco_tree(tmp_path, content)), "coco-c4")
    assert capsys.readouterr().out == ""
    assert source.classes == val.classes == ["car", "toothbrush"]  # by id: 3, 90
    assert [Path(source.path(i)).stem[-2:] for i in range(len(source))] == ["07", "12"]
    assert [Path(val.path(i)).stem[-2:] for i in range(len(val))] == ["07", "08", "09", "12"]
    (image, target), _ = source[0]
    assert np.array(image)[0, 0, 2] == pytest.approx(7, abs=3)
    assert target["boxes"].tolist() == [[10, 8, 30, 28], [40, 20, 50, 30]]
    assert target["labels"].tolist() == [2, 1]
    assert target["masks"].shape == (2, 48, 60) and not target["crowd"].any()
    for box, mask in zip(target["boxes"], target["masks"].numpy()):
        assert box.tolist() == mask_box(mask).tolist()
    assert source[1][0][1]["crowd"].tolist() == [False]
    (_, target), _ = val[0]
    assert target["crowd"].tolist() == [False, False, True]  # the empty box is left out
    masked = mask_box(target["masks"][2].numpy()).tolist()
    assert target["boxes"][2].tolist() == [32, 0, 60, 16] == masked
    (_, target), _ = val[1]
    assert target["boxes"].shape == (0, 4) and target["masks"].shape == (0, 48, 60)


def test_compressed_run_lengths_are_the_mask_that_they_encode(tmp_path):
    inside = np.zeros((48, 60), np.uint8)
    inside[5:20, 30:40] = 1
    code = coco_mask.encode(np.asfortranarray(inside))
    content = coco_content()
    content["annotations"][0] |= {"bbox": [30, 5, 10, 15], "segmentation": {
        "size": code["size"], "counts": code["counts"].decode()}}
    source, _ = common.boxes.open_sources(str(coco_tree(tmp_path, content)), "coco-fpn")
    assert np.array_equal(source[0][0][1]["masks"][0], inside)


@pytest.mark.parametrize("ids, order", [({90: 1, 3: 2}, (0, 1)), ({90: 90, 3: 3}, (1, 0)),
                                        ({90: 3, 3: 90}, (0, 1))])
def test_labels_are_matched_by_name(ids, order, tmp_path):
    """val lists the categories under other ids or in another order: the truth still scores 100."""
    content = coco_content()
    for one in content["annotations"]:
        one["category_id"] = ids[one["category_id"]]
    categories = [{"id": ids[one["id"]], "name": one["name"]} for one in content["categories"]]
    content["categories"] = [categories[number] for number in order]
    changed = coco_tree(tmp_path / "changed", val=content)
    usual = coco_tree(tmp_path / "usual")
    source, val = common.boxes.open_sources(str(changed), "coco-c4")
    _, expected = common.boxes.open_sources(str(usual), "coco-c4")
    assert val.classes == source.classes
    for index in range(len(val)):
        assert torch.equal(val[index][0][1]["labels"], expected[index][0][1]["labels"])
    scores = evaluate(Oracle(expected), val, "coco-c4")
    assert all(value == pytest.approx(100) for value in scores.values())


def test_val_may_lack_a_category(tmp_path):
    content = coco_content()
    content["categories"] = content["categories"][:1]
    content["annotations"] = [one for one in content["annotations"] if one["category_id"] == 90]
    source, val = common.boxes.open_sources(str(coco_tree(tmp_path, val=content)), "coco-c4")
    assert val.classes == source.classes and val[0][0][1]["labels"].tolist() == [2]


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


NO_MASK = r"instances_{}2017.json: image 7, annotation 2: no segmentation"
REFUSED = [
    ("val", new_categories("toothbrush", "cars"), "'cars' is none of the training set's: car, to"),
    ("val", new_categories("toothbrush", "car", "cat"), "'cat' is none of the training set's"),
    ("val", new_categories("toothbrush", "car", 7), "7 is none of the training set's: car, to"),
    ("val", new_categories("toothbrush", "toothbrush"), "'toothbrush'.* more than once"),
    ("train", new_categories("car", "car"), "train2017.json: category 'car'.* more than once"),
    ("train", new_categories("car", "cat", ids=(3, 3)), "category 'ca[rt]'.* more than once"),
    ("val", without_objects, "no object to find"),
    ("val", annotation(1, segmentation=...), NO_MASK.format("val")),
    ("train", annotation(1, segmentation=None), NO_MASK.format("train")),
    ("train", annotation(1, segmentation=[]), NO_MASK.format("train")),
    ("train", annotation(1, segmentation=[[]]), NO_MASK.format("train")),
    ("train", annotation(1, segmentation={}), NO_MASK.format("train")),
    ("train", annotation(1, segmentation=[[1, 2, 3, 4]]), NO_MASK.format("train")),  # not a box
    ("train", annotation(1, segmentation=[1, 2, 3, 4, 5, 6]), NO_MASK.format("train")),
    ("train", annotation(1, segmentation=7), NO_MASK.format("train")),
    ("train", annotation(1, segmentation={"size": [60, 48], "counts": [2880]}), "run lengths of"),
    ("val", annotation(1, bbox=...), "annotation 2: its bbox must be four numbers, not None"),
    ("val", annotation(1, bbox=[1, 2, "3", 4]), "annotation 2: its bbox"),
    ("train", annotation(1, bbox=[1, 2, 3]), "annotation 2: its bbox"),
    ("train", annotation(1, category_id=5), "annotation 2: its category is none of the file's"),
]


@pytest.mark.parametrize("split, change, match", REFUSED)
def test_mistakes_in_coco_are_refused_before_training(split, change, match, tmp_path):
    content = coco_content()
    change(content)
    coco_tree(tmp_path, **{split: content})
    with pytest.raises(care.InputError, match=match) as caught:
        common.boxes.open_sources(str(tmp_path), "coco-fpn")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text, match", [
    (voc_thing("giraffe", (1, 1, 9, 9)), "000003.xml: 'giraffe' is none of VOC's"),
    (voc_thing("Person", (1, 1, 9, 9)), "'Person' is none of VOC's"),
    ("<object><difficult>0</difficult></object>", "000003.xml: '' is none"),
    ("<object><name>cat</name></object>", "000003.xml: a cat has no box of numbers"),
    (voc_thing("cat", (1, "x", 9, 9)), "a cat has no box of numbers"),
    ("<object>", "000003.xml: no annotation of VOC's"),
])
def test_mistakes_in_voc_are_refused_before_training(text, match, tmp_path):
    path = voc_tree(tmp_path) / "VOCdevkit/VOC2007/Annotations/000003.xml"  # of val alone
    path.write_text(f"<annotation>{text}</annotation>")
    with pytest.raises(care.InputError, match=match):
        common.boxes.open_sources(str(tmp_path), "voc-c4")


def test_voc_without_objects_to_find_is_refused(tmp_path):
    listed = voc_tree(tmp_path) / "VOCdevkit/VOC2007/ImageSets/Main/test.txt"
    listed.write_text("000002\n")
    with pytest.raises(care.InputError, match="no object to find"):
        common.boxes.open_sources(str(tmp_path), "voc-c4")


def test_an_image_of_another_size_than_its_annotations_is_refused(tmp_path):
    source, _ = common.boxes.open_sources(str(coco_tree(tmp_path)), "coco-c4")
    Image.new("RGB", (48, 60)).save(source.path(1))
    with pytest.raises(care.InputError, match=r"12.jpg: of \(48, 60\) .* for \(60, 48\)"):
        source[1]


# ---------------------------------------------------------------------------------------- scoring
def test_ground_truth_fed_back_scores_one(tmp_path):
    coco = common.boxes.open_sources(str(coco_tree(tmp_path / "coco")), "coco-c4")[1]
    voc = common.boxes.open_sources(str(voc_tree(tmp_path / "voc")), "voc-c4")[1]
    pairs = [("coco-c4", coco), ("coco-fpn", scenes(5, "val")), ("voc-c4", voc),
             ("voc-c4", scenes(5, "val"))]
    for protocol, source in pairs:
        scores = evaluate(Oracle(source), source, protocol)
        masks = ["AP_mask", "AP50_mask", "AP75_mask"] if protocol != "voc-c4" else []
        assert list(scores) == ["AP", "AP50", "AP75", *masks]
        assert all(value == pytest.approx(100) for value in scores.values()), scores


@pytest.mark.parametrize("protocol", ["voc-c4", "coco-c4"])
def test_scores_fall_as_boxes_move_and_masks_stay(protocol):
    source = scenes(7, "val", size=128)
    scores = evaluate(Oracle(source, shift=0.1), source, protocol)  # IoU 0.81 / 1.19 = 0.68
    assert scores["AP50"] == pytest.approx(100) and scores["AP75"] == 0
    assert scores["AP"] == pytest.approx(40)  # of ten thresholds, .5, .55, .6 and .65
    assert scores.get("AP_mask", 100) == pytest.approx(100)


def test_coco_crowds_are_neither_found_nor_missed(tmp_path):
    _, source = common.boxes.open_sources(str(coco_tree(tmp_path)), "coco-c4")
    truth, found = [], []
    for index in range(len(source)):
        target = source[index][0][1]
        truth += detect_eval.as_records(target, index, True)
        scored = target | {"scores": torch.full((len(target["labels"]),), 0.9)}
        found += detect_eval.as_records(scored, index, True)
    found = [one | {"iscrowd": 0} for one in found]
    images = [{"id": index, "height": 48, "width": 60} for index in range(len(source))]
    plain = [one for one, true in zip(found, truth) if not true["iscrowd"]]
    strays = [one | {"category_id": 2, "score": 1.0} for one in found if one not in plain]
    assert len(plain) == 3 and len(strays) == 2 and len(truth) == 5
    for answer in (found, plain):
        scores = detect_eval.coco_scores(images, truth, answer)
        assert all(value == pytest.approx(100) for value in scores.values())
    assert detect_eval.coco_scores(images, truth, found + strays)["AP"] < 80  # false, and surest
    assert set(detect_eval.coco_scores(images, truth, []).values()) == {0}


class Given(Dataset):
    """A source of blank images with given targets."""

    def __init__(self, targets, size=100):
        self.targets, self.size = targets, size

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return (Image.new("RGB", (self.size, self.size)), self.targets[index]), index


class Answers(nn.Module):
    """Given detections, one image after the other."""

    def __init__(self, found):
        super().__init__()
        self.found = iter(found)

    def forward(self, images):
        return [next(self.found) for _ in images]


def objects(rows, kind):
    """Rows of (label, box, score or whether it is difficult) as a target or a detection."""
    boxes = torch.tensor([row[1] for row in rows], dtype=torch.float32).reshape(-1, 4)
    values = torch.tensor([row[2] for row in rows])
    labels = torch.tensor([row[0] for row in rows], dtype=torch.int64)
    return {"boxes": boxes, "labels": labels, kind: values.bool() if kind == "crowd" else values}


def voc_scores(truth, found):
    """The script's scores; truth, found: rows of `objects`, a list per image."""
    source = Given([objects(rows, "crowd") for rows in truth])
    return evaluate(Answers([objects(rows, "scores") for rows in found]), source, "voc-c4")


def overlap(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    area_a, area_b = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return both / (area_a + area_b - both)


def naive_voc07(truth, found, threshold):
    """Mean over the classes of VOC07's average precision, as its development kit describes it."""
    precisions = []
    for label in {row[0] for rows in truth for row in rows if not row[2]}:
        answers = []
        for image, rows in enumerate(found):
            answers += [(row[2], image, row[1]) for row in rows if row[0] == label]
        answers.sort(key=lambda answer: -answer[0])
        wanted = sum(row[0] == label and not row[2] for rows in truth for row in rows)
        used, right, wrong, curve = set(), 0, 0, []
        for _, image, box in answers:
            largest, which = -1.0, None
            for number, row in enumerate(truth[image]):
                if row[0] == label and overlap(box, row[1]) > largest:
                    largest, which = overlap(box, row[1]), number
            if largest > threshold and truth[image][which][2]:
                continue  # difficult
            if largest > threshold and (image, which) not in used:
                used.add((image, which))
                right += 1
            else:
                wrong += 1
            curve.append((right, right / (right + wrong)))
        points = []
        for tenth in range(11):
            reached = [precision for hits, precision in curve if 10 * hits >= tenth * wanted]
            points.append(max(reached, default=0))
        precisions.append(sum(points) / 11)
    return 100 * sum(precisions) / len(precisions)


def random_boxes(rng, count):
    corners, sides = rng.uniform(0, 60, (count, 2)), rng.uniform(10, 40, (count, 2))
    return np.concatenate((corners, corners + sides), 1)


def random_answers(seed, images=40, classes=4):
    """Objects, a third of them difficult, and detections around, beside and twice on them."""
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for _ in range(images):
        rows = [(int(rng.integers(1, classes + 1)), box.round().tolist(), bool(rng.random() < 0.33))
                for box in random_boxes(rng, rng.integers(0, 7))]
        answers = []
        for label, box, _ in rows:
            for _ in range(rng.integers(0, 4)):
                moved = np.array(box) + rng.normal(0, 2, 4)
                answers.append((label, moved.tolist(), float(rng.random())))
        for box in random_boxes(rng, rng.integers(0, 4)):
            answers.append((int(rng.integers(1, classes + 1)), box.tolist(), float(rng.random())))
        truth.append(rows)
        found.append(answers)
    return truth, found


@pytest.mark.parametrize("seed", range(3))
def test_voc_is_scored_as_a_naive_evaluator_does(seed):
    truth, found = random_answers(seed)
    scores = voc_scores(truth, found)
    expected = [naive_voc07(truth, found, percent / 100) for percent in range(50, 100, 5)]
    assert scores["AP"] == pytest.approx(np.mean(expected), abs=0.01)
    assert scores["AP50"] == pytest.approx(expected[0], abs=0.01)
    assert scores["AP75"] == pytest.approx(expected[5], abs=0.01)
    assert 5 < scores["AP75"] < scores["AP50"] < 90


def test_difficult_objects_are_matched_first_and_do_not_count():
    easy, hard = (1, [0, 0, 20, 20], False), (1, [40, 40, 80, 80], True)

    def ap50(*answers):
        return voc_scores([[easy, hard]], [[(1, *answer) for answer in answers]])["AP50"]

    right = ([0, 0, 20, 20], 0.5)
    assert ap50(right) == pytest.approx(100)
    assert ap50(right, ([40, 40, 80, 80], 0.9)) == pytest.approx(100)  # found: ignored
    assert ap50(right, ([40, 40, 80, 80], 0.9), ([40, 40, 80, 79], 0.8)) == pytest.approx(100)
    assert ap50(right, ([42, 42, 50, 50], 0.9)) == pytest.approx(50)  # in it, IoU below 0.5: wrong
    assert ap50(right, ([0, 0, 20, 19], 0.9)) == pytest.approx(100)  # the surer takes the object
    assert ap50(([0, 0, 20, 10], 0.9)) == 0  # IoU 0.5 is not above 0.5
    assert ap50() == 0


def test_voc_averages_eleven_points_of_recall():
    """One of two objects is found: recall 0.5 is reached at six of the eleven points."""
    truth = [[(1, [0, 0, 20, 20], False), (1, [40, 40, 60, 60], False)]]
    scores = voc_scores(truth, [[(1, [0, 0, 20, 20], 0.5)]])
    assert scores == {name: pytest.approx(600 / 11) for name in ("AP", "AP50", "AP75")}
    # the second class has an object that nobody found, the third but a difficult one
    truth = [truth[0] + [(2, [0, 0, 9, 9], False), (3, [0, 0, 9, 9], True)]]
    assert voc_scores(truth, [[(1, [0, 0, 20, 20], 0.5)]])["AP"] == pytest.approx(300 / 11)


def plain_codes(masks):
    """Every pixel of masks (n, height, width) through pycocotools' own encoder."""
    inside = (np.asarray(masks) > 0.5).astype(np.uint8)
    return coco_mask.encode(np.asfortranarray(inside.transpose(1, 2, 0)))


def test_run_lengths_are_pycocotools_own():
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(40, 23, 31)
    for mask in masks[:20]:  # patches of noise, some of them at the borders
        y, x = (int(torch.randint(0, size, (), generator=generator)) for size in masks.shape[1:])
        mask[y:y + 12, x:x + 9] = torch.rand(mask[y:y + 12, x:x + 9].shape, generator=generator)
    masks[20] = 1
    masks[21, -1, -1] = masks[22, 0, 0] = masks[23, -1, 0] = masks[24, 0, -1] = 1
    masks[25, :, 3] = masks[26, 5] = masks[27, :, 4:9] = 1
    masks[28:] = 0.5 + 0.1 * torch.randn(masks[28:].shape, generator=generator)
    masks[29, 0, 0] = 0.5  # 0.5 is outside
    assert detect_eval.encode_masks(masks) == plain_codes(masks)
    assert detect_eval.encode_masks((masks > 0.5).byte()) == plain_codes(masks)
    assert detect_eval.encode_masks(masks[:0]) == []


def test_detections_are_scored_with_the_masks_that_torchvision_pastes():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(12, 2, generator=generator) * 70
    boxes = torch.cat((corners, corners + 5 + 25 * torch.rand(12, 2, generator=generator)), 1)
    probabilities = torch.rand(12, 1, 14, 14, generator=generator)
    masks = roi_heads.paste_masks_in_image(probabilities, boxes, (100, 90))
    found = {"boxes": boxes, "labels": torch.ones(12, dtype=torch.int64),
             "scores": torch.rand(12, generator=generator), "masks": masks}
    records = detect_eval.as_records(found, 5, masks=True)
    assert [one["segmentation"] for one in records] == plain_codes(masks[:, 0])
    for one, box, score in zip(records, boxes.tolist(), found["scores"].tolist()):
        x, y, width, height = one["bbox"]
        assert [x, y, x + width, y + height] == pytest.approx(box)
        assert one["score"] == score and one["image_id"] == 5 and one["iscrowd"] == 0


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_untrained_detector_scores_near_zero_and_the_truth_100(protocol, monkeypatch):
    """By the same scoring; the detector did find things."""
    source, counts = scenes(3, "val"), []
    plain = detect_eval.as_records
    monkeypatch.setattr(detect_eval, "as_records", lambda objects, *rest: counts.append(
        len(objects["boxes"]) * ("scores" in objects)) or plain(objects, *rest))
    model = detector(protocol, rois=8)
    model.roi_heads.detections_per_img = 10
    scores = evaluate(model, source, protocol)
    assert len(counts) == 6 and sum(counts) > 20
    assert all(0 <= value < 5 for value in scores.values()), scores
    truth = evaluate(Oracle(source), source, protocol)
    assert truth.keys() == scores.keys() and min(truth.values()) == pytest.approx(100)


def test_running_statistics_score(monkeypatch):
    """Detections do not depend on what else is in the batch: batch norms are in evaluation mode."""
    model, source = detector("voc-c4"), scenes(4, "val")
    seen = []
    model.register_forward_hook(lambda module, inputs, out: seen.extend(out))
    model.train()
    evaluate(model, source, "voc-c4")
    alone = model([common.boxes.as_tensors(source[3][0])[0]])[0]
    torch.testing.assert_close(seen[3]["boxes"], alone["boxes"], rtol=1e-4, atol=1e-3)
