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


def voc_size(width, height):
    return f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"


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
            text = f"<annotation>{voc_size(60, 48)}{objects[name]}</annotation>"
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
    """COCO 2017 of tiny images; train, val: the splits' annotations, unless the usual four."""
    (root / "annotations").mkdir(parents=True)
    for split, content in (("train", train), ("val", val)):
        content = content or coco_content()
        (root / f"{split}2017").mkdir()
        for one in content["images"]:
            number = int(Path(one["file_name"]).stem)
            path = root / f"{split}2017" / f"{number:012}.jpg"
            Image.new("RGB", (60, 48), (90, 90, number)).save(path)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


def noise_masks(count, height=23, width=31):
    """Patches of noise, some of them at the borders, and extremes -> (n, height, width) uint8."""
    rng = np.random.default_rng(0)
    masks = np.zeros((count, height, width), np.uint8)
    for mask in masks:
        y, x = rng.integers(0, height), rng.integers(0, width)
        mask[y:y + 12, x:x + 9] = rng.random(mask[y:y + 12, x:x + 9].shape) < rng.random()
    masks[0], masks[1] = 1, 0
    masks[1, -1, -1] = masks[2, 0, 0] = masks[3, -1, 0] = masks[4, :, 3] = masks[5, 5] = 1
    return masks


class Oracle(nn.Module):
    """Answers with the truth of the images in order, without crowds.

    Boxes are shifted by a part of their size; masks stay.
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
                one["masks"] = target["masks"][:, None].bool()
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
        assert torch.equal(masks, mirrored[1]["masks"])  # not enlarged
        for box, mask in zip(boxes * 128 / height, masks.numpy()):
            assert box.tolist() == pytest.approx(mask_box(mask), abs=1e-4)
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
    assert [Path(path).stem for path in paths] == ["000001", "000003", "000004"]  # 2 has no object
    assert "VOC2012" in paths[2] and source.sizes.tolist() == [[60, 48]] * 3
    (image, target), index = source[0]
    assert image.size == (60, 48) and index == 0 and "masks" not in target
    # from 0, the last pixel one before the end
    assert target["boxes"].tolist() == [[10, 5, 30, 25], [30, 10, 50, 40]]
    assert [source.classes[label - 1] for label in target["labels"]] == ["person", "dog"]
    assert target["crowd"].tolist() == [False, True]
    (_, target), _ = val[1]
    assert target["boxes"].shape == (0, 4) and target["labels"].dtype == torch.int64
    assert target["crowd"].shape == (0,)
    (_, target), _ = source[1]
    assert target["boxes"].tolist() == [[0, 0, 60, 48]] and target["labels"].tolist() == [1]
    assert len(val) == 3 and "VOC2007" in val.path(2) and len(val.classes) == 20


def test_coco_reader(tmp_path, capsys):
    content = coco_content()
    del content["annotations"][5]["iscrowd"]  # missing: 0
    source, val = common.boxes.open_sources(str(coco_tree(tmp_path, content)), "coco-c4")
    output = capsys.readouterr()
    notes = [f"note: {tmp_path}/annotations/instances_{split}2017.json: objects: 1 whose box has "
             "no area in its image left out" for split in ("train", "val")]
    assert output.out == "" and output.err.splitlines() == notes
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


def test_voc_without_objects_to_find_is_refused(tmp_path):
    listed = voc_tree(tmp_path) / "VOCdevkit/VOC2007/ImageSets/Main/test.txt"
    listed.write_text("000002\n")
    with pytest.raises(care.InputError, match="no object to find"):
        common.boxes.open_sources(str(tmp_path), "voc-c4")


@pytest.mark.parametrize("protocol", ["voc-c4", "coco-c4"])
def test_an_image_of_another_size_than_its_annotations_is_refused(protocol, tmp_path):
    coco_tree(voc_tree(tmp_path))
    source, _ = common.boxes.open_sources(str(tmp_path), protocol)
    Image.new("RGB", (30, 24)).save(source.path(1))
    with pytest.raises(care.InputError, match=r"jpg: of \(30, 24\) .* for \(60, 48\)"):
        source[1]


def test_voc_without_sizes_is_taken_as_it_is(tmp_path):
    path = voc_tree(tmp_path) / "VOCdevkit/VOC2007/Annotations/000001.xml"
    for size in ("", voc_size(0, 0), voc_size("0.0", "0"), "<size/>"):
        path.write_text(f"<annotation>{size}{voc_thing('dog', (31, 11, 90, 40))}</annotation>")
        source, _ = common.boxes.open_sources(str(tmp_path), "voc-c4")
        assert source[0][0][1]["boxes"].tolist() == [[30, 10, 60, 40]]


@pytest.mark.parametrize("protocol", ["voc-c4", "coco-c4"])
@pytest.mark.parametrize("code, undo", [
    (1, None), (2, Image.FLIP_LEFT_RIGHT), (3, Image.ROTATE_180), (4, Image.FLIP_TOP_BOTTOM),
    (5, Image.TRANSPOSE), (6, Image.ROTATE_90), (7, Image.TRANSVERSE), (8, Image.ROTATE_270)])
def test_photos_that_exif_turns_are_as_their_annotations_have_them(code, undo, protocol, tmp_path):
    """Turned, as labelling tools show them; as stored, where only that has the annotated size."""
    pixels = np.full((48, 60, 3), 40, np.uint8)
    pixels[8:28, 10:30] = (255, 0, 0)
    shown = Image.fromarray(pixels)
    stored = shown if undo is None else shown.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = code
    coco_tree(voc_tree(tmp_path))
    annotation = voc_size(60, 48) + voc_thing("cat", (11, 9, 30, 28))
    path = tmp_path / "VOCdevkit/VOC2007/Annotations/000001.xml"
    path.write_text(f"<annotation>{annotation}</annotation>")
    source, _ = common.boxes.open_sources(str(tmp_path), protocol)
    answers = [(stored, exif, 255)]
    if code > 4:  # a picture of 60 x 48 as it is stored
        answers += [(shown, exif, 255)]
    for image, exif, red in answers:
        image.save(source.path(0), exif=exif, quality=95)
        (found, target), _ = source[0]
        x0, y0, x1, y1 = target["boxes"][0].int().tolist()
        assert found.size == (60, 48)
        assert np.asarray(found)[y0 + 2:y1 - 2, x0 + 2:x1 - 2, 0].min() > red - 60
    Image.new("RGB", (48, 60)).save(source.path(0))
    with pytest.raises(care.InputError, match=r"of \(48, 60\) .* for \(60, 48\)"):
        source[0]


# --------------------------------------------------------------------------------------- grouping
class Sized(Dataset):
    """A source of which only the sizes are asked."""

    def __init__(self, sizes):
        self.sizes = np.array(sizes)

    def __len__(self):
        return len(self.sizes)


def test_a_step_has_images_of_one_orientation():
    """In the stream's order, each once; the same after a stop and with any number of ranks."""
    rng = np.random.default_rng(0)
    source = Sized([[(640, 480), (480, 640), (500, 500)][kind]
                    for kind in rng.choice(3, 103, p=(0.6, 0.3, 0.1))])
    stream = data.Stream(source, None, 3, 96)
    steps = list(common.boxes.grouped_batches(stream, 0, 40, 8))
    assert len(steps) == 40
    for batch in steps:
        assert len({bool(np.less(*source.sizes[stream.index(n)][::-1])) for n in batch}) == 1
        assert batch == sorted(batch)
    used = sum(steps, [])
    assert len(set(used)) == len(used) == 320 and max(used) < 320 + 2 * 7
    for wide in (False, True):  # what an orientation has waits in the stream's order
        queue = [n for n in used if (np.subtract(*source.sizes[stream.index(n)]) > 0) == wide]
        assert queue == sorted(queue)
    for start, world in ((0, 2), (13, 1), (13, 4), (39, 8)):
        ranks = [list(common.boxes.grouped_batches(stream, start, 40, 8, rank, world))
                 for rank in range(world)]
        assert [sum(parts, []) for parts in zip(*ranks)] == steps[start:]
    assert list(common.boxes.grouped_batches(stream, 40, 40, 8)) == []


def test_squares_make_the_streams_own_batches():
    stream = data.Stream(scenes(40), None, 0, 40)
    grouped = common.boxes.grouped_batches(stream, 3, 9, 8, 1, 2)
    assert list(grouped) == [list(part) for part in data.stream_batches(3, 9, 8, 1, 2)]


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


def test_detections_and_objects_are_scored_with_their_masks():
    masks = torch.from_numpy(noise_masks(30))
    found = {"boxes": torch.rand(30, 4).cumsum(1), "labels": torch.arange(30)}
    scored = found | {"scores": torch.rand(30), "masks": masks[:, None].bool()}
    truth = found | {"crowd": torch.zeros(30, dtype=torch.bool), "masks": masks}
    for objects in (scored, truth):
        records = detect_eval.as_records(objects, 5, masks=True)
        for n, (one, mask, box) in enumerate(zip(records, masks, found["boxes"].tolist())):
            assert np.array_equal(coco_mask.decode(one["segmentation"]), mask)
            x, y, width, height = one["bbox"]
            assert [x, y, x + width, y + height] == pytest.approx(box)
            assert one["image_id"] == 5 and one["category_id"] == n and one["iscrowd"] == 0
            assert one["score"] == (objects["scores"][n] if "scores" in objects else 0)
    nothing = {name: value[:0] for name, value in scored.items()}
    assert detect_eval.as_records(nothing, 5, masks=True) == []


def ellipse(box, size):
    """The pixels whose centres lie in the ellipse that fills a box: (size, size) uint8."""
    x0, y0, x1, y1 = box
    y, x = np.mgrid[:size, :size] + 0.5
    inside = ((2 * x - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y - y0 - y1) / (y1 - y0)) ** 2 <= 1
    return torch.from_numpy(inside.astype(np.uint8))


@pytest.mark.parametrize("diameter, side", [(12, 28), (32, 28), (20, 14), (96, 14)])
@pytest.mark.parametrize("scale", [1.0, 5 / 3])
def test_a_perfect_mask_comes_back(diameter, side, scale):
    """What the mask head should answer, pasted where it was learned from; at parts of a pixel."""
    rng, size, overlaps, areas = np.random.default_rng(0), 150, [], []
    for _ in range(20):
        sides, centre = diameter * rng.uniform(0.75, 1.25, 2), rng.uniform(65, 85, 2)
        box = [*(centre - sides / 2), *(centre + sides / 2)]
        true, boxes = ellipse(box, size), torch.tensor([box]).float()
        large = (round(scale * size),) * 2  # the detector's image
        answer = detect_eval.crop_masks(true[None], boxes * scale, torch.tensor([0]), large, side)
        assert answer.shape == (1, side, side)
        pasted = detect_eval.paste_masks(answer[:, None], boxes, (size, size))[0, 0]
        overlaps.append(((pasted & true.bool()).sum() / (pasted | true.bool()).sum()).item())
        areas.append((pasted.sum() / true.sum()).item())
    assert min(overlaps) > 0.96 and np.mean(overlaps) > 0.985, overlaps
    assert np.mean(areas) == pytest.approx(1, abs=0.01)


def test_masks_are_pasted_at_the_border_and_in_small_boxes():
    ones = torch.ones(4, 1, 14, 14)
    boxes = torch.tensor([[-6.0, 2, 5, 9], [3, 3, 3.4, 3.4], [17, 9, 31, 14], [0, 0, 20, 10]])
    pasted = detect_eval.paste_masks(ones, boxes, (10, 20))
    assert pasted.shape == (4, 1, 10, 20) and pasted.dtype == torch.bool
    assert pasted.sum((1, 2, 3)).tolist() == [5 * 7, 0, 3 * 1, 200]
    assert pasted[0, 0, 2:9, :5].all() and pasted[2, 0, 9, 17:].all()
    assert detect_eval.paste_masks(ones[:0], boxes[:0], (10, 20)).shape == (0, 1, 10, 20)


def test_equal_scores_of_different_images_have_one_order(monkeypatch):
    """However many ranks gave their records, one after the other."""
    truth = [[(1, [0, 0, 20, 20], False)], [(1, [0, 0, 20, 20], False)]]
    source = [objects(rows, "crowd") for rows in truth]
    found = [objects(rows, "scores") for rows in ([(1, [0, 0, 20, 20], 0.5)],
                                                  [(1, [50, 50, 60, 60], 0.5)])]
    wanted, answers = [], []
    for number in range(2):
        wanted += detect_eval.as_records(source[number], number, False)
        answers += detect_eval.as_records(found[number], number, False)
    scores = detect_eval.voc07_scores(wanted, answers)
    assert scores == detect_eval.voc07_scores(wanted[::-1], answers[::-1])
    assert scores["AP50"] == pytest.approx(600 / 11)


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


def test_a_digest_is_of_images_and_annotations(tmp_path):
    """The same for a copy; another one where an image or an annotation has one more byte."""
    def digests(root, protocol):
        sources = common.boxes.open_sources(str(root), protocol)
        return [common.boxes.digest_with_boxes(source, str(root), split)
                for source, split in zip(sources, ("train", "val"))]

    for protocol, make, names in (
            ("voc-c4", voc_tree, ("VOCdevkit/VOC2007/Annotations/000001.xml",
                                  "VOCdevkit/VOC2007/JPEGImages/000001.jpg")),
            ("coco-c4", coco_tree, ("annotations/instances_train2017.json",
                                    "train2017/000000000012.jpg"))):
        first, copied = (make(tmp_path / protocol / name) for name in ("first", "copied"))
        before = digests(first, protocol)
        assert digests(copied, protocol) == before and before[0] != before[1]
        for name in names:
            with open(first / name, "ab") as file:
                file.write(b" ")
            now = digests(first, protocol)
            assert now[0] != before[0], name
            before = now
    assert common.boxes.digest_with_boxes(scenes(3), "shapes:3", "train") == "scenes 1"
