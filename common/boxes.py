"""Images with boxes and masks for detect_eval.py: VOC, COCO, and scenes of the embedded shapes.

A source is a data set: source[i] -> ((RGB PIL image, target), i), with `target` as `new_target` has
it; `classes` are the names of labels 1, 2, ... A mistake in an annotation is an InputError and ends
a run; only an image that cannot be decoded is passed over.
An object is a dict: box (x0, y0, x1, y1) in pixels; label; crowd: whether it is neither right nor
wrong to find; mask: its outline, or what is inside.
"""
import json
import math
from itertools import chain
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import VOCDetection
from torchvision.ops import clip_boxes_to_image

from care import InputError
from common.data import Failed, open_images, read_image
from common.shapes import Shapes, render_scene

VOC_PARTS = {"train": (("2007", "trainval"), ("2012", "trainval")), "val": (("2007", "test"),)}
VOC_CLASSES = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor"]


def new_target(image, objects, masks):
    """The objects in a PIL image as tensors; boxes are clipped to it, empty ones left out.

    boxes (n, 4) float32; labels (n,) int64; crowd (n,) bool; masks (n, height, width) uint8.
    """
    size = image.height, image.width
    boxes = torch.tensor([one["box"] for one in objects]).float().reshape(-1, 4)
    boxes = clip_boxes_to_image(boxes, size)
    labels = torch.tensor([one["label"] for one in objects]).long()
    crowd = torch.tensor([one["crowd"] for one in objects]).bool()
    target = {"boxes": boxes, "labels": labels, "crowd": crowd}
    if masks:
        stack = np.array([as_mask(one["mask"], *size) for one in objects], np.uint8)
        target["masks"] = torch.from_numpy(stack).reshape(-1, *size)
    keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return {name: value[keep] for name, value in target.items()}


def as_mask(outline, height, width):
    """An array, or COCO's polygons or run lengths -> (height, width), 1 inside."""
    from pycocotools.mask import decode, frPyObjects, merge
    if isinstance(outline, np.ndarray):
        return outline
    if isinstance(outline, list):
        return decode(merge(frPyObjects(outline, height, width)))
    if isinstance(outline["counts"], list):
        outline = frPyObjects(outline, height, width)
    return decode(outline)


class Scenes(Shapes):
    """Squares with a few of the embedded shapes; an image is fixed by (split, index)."""

    def __init__(self, split, length, size=128):
        super().__init__(split, length, size, renderer=render_scene)

    def __getitem__(self, index):
        pixels, boxes, labels, masks = self.render(index)
        objects = []
        for box, label, mask in zip(boxes, labels, masks):
            objects.append({"box": box.tolist(), "label": label + 1, "crowd": False, "mask": mask})
        image = Image.fromarray(pixels)
        return (image, new_target(image, objects, masks=True)), index


class Files(Dataset):
    """Image files and a list of objects for each. sizes: (width, height) of each, if with masks."""

    def __init__(self, classes, paths, objects, sizes=None):
        self.classes, self.paths, self.objects, self.sizes = classes, paths, objects, sizes

    def __len__(self):
        return len(self.paths)

    def path(self, index):
        return self.paths[index]

    def __getitem__(self, index):
        image = read_image(self.paths[index])
        if self.sizes and image.size != self.sizes[index]:
            raise InputError(f"{self.paths[index]}: of {image.size} pixels, width first, but its "
                             f"annotations are for {self.sizes[index]}")
        return (image, new_target(image, self.objects[index], masks=bool(self.sizes))), index


def open_voc(root, split):
    """VOC in root/VOCdevkit: trainval of 2007 and 2012 for `train`, test of 2007 for `val`.

    Objects marked `difficult` train like others, and are crowd when scored.
    """
    paths, objects = [], []
    for year, part in VOC_PARTS[split]:
        try:
            listed = VOCDetection(root, year, part)
        except (RuntimeError, OSError) as error:
            raise InputError(f"--data {root}: must hold VOCdevkit/VOC{year} with the images of "
                             f"{part} ({error})") from None
        paths += listed.images
        objects += [read_voc(path) for path in listed.annotations]
    return Files(VOC_CLASSES, paths, objects)


def read_voc(path):
    """The objects in an annotation of VOC's."""
    try:
        things = ElementTree.parse(path).findall("object")
    except ElementTree.ParseError as error:
        raise InputError(f"{path}: no annotation of VOC's ({error})") from None
    objects = []
    for thing in things:
        name = thing.findtext("name", "").strip()
        if name not in VOC_CLASSES:
            raise InputError(f"{path}: {name!r} is none of VOC's twenty classes; others need the "
                             "layout of COCO and --protocol coco-c4")
        sides = [thing.findtext(f"bndbox/{side}", "") for side in ("xmin", "ymin", "xmax", "ymax")]
        try:
            x0, y0, x1, y1 = map(float, sides)
        except ValueError:
            raise InputError(f"{path}: a {name} has no box of numbers, but {sides}") from None
        box = (x0 - 1, y0 - 1, x1, y1)  # VOC counts from 1, and includes the last pixel
        difficult = thing.findtext("difficult", "").strip() == "1"
        objects.append({"box": box, "label": VOC_CLASSES.index(name) + 1, "crowd": difficult})
    return objects


def open_coco(root, split, classes=None):
    """COCO 2017 in root; `train` has no crowds, and no images without other objects.

    classes: names that another split gives to labels; without them, this one's in order of id.
    """
    path = f"{root}/annotations/instances_{split}2017.json"
    try:
        content = json.loads(Path(path).read_bytes())
        categories = sorted((one["id"], one["name"]) for one in content["categories"])
        sizes = {one["id"]: (one["width"], one["height"]) for one in content["images"]}
        files = {one["id"]: f"{root}/{split}2017/{one['file_name']}" for one in content["images"]}
        annotations = [(one["image_id"], one) for one in content["annotations"]]
    except (LookupError, TypeError, ValueError, OSError) as error:
        raise InputError(f"cannot read {path} as annotations of COCO's ({error!r})") from None
    ids, names = [number for number, _ in categories], [name for _, name in categories]
    classes = classes or names
    for number, name in categories:
        if ids.count(number) > 1 or names.count(name) > 1:
            raise InputError(f"{path}: category {name!r}, id {number}: its name or its id is there "
                             "more than once")
        if name not in classes:
            raise InputError(f"{path}: category {name!r} is none of the training set's: "
                             f"{', '.join(map(str, classes))[:300]}")
    labels = {number: classes.index(name) + 1 for number, name in categories}
    objects = {number: [] for number in sorted(files)}
    for number, annotation in annotations:
        unused = split == "train" and annotation.get("iscrowd")
        if number in files and not unused:
            where = f"{path}: image {number}, annotation {annotation.get('id')}"
            one = read_object(annotation, labels, sizes[number], where)
            x0, y0, x1, y1 = one["box"]
            if split == "val" or (x0 < x1 and y0 < y1):
                objects[number].append(one)
    kept = [number for number in objects if split == "val" or objects[number]]
    return Files(classes, [files[number] for number in kept], [objects[number] for number in kept],
                 [sizes[number] for number in kept])


def read_object(annotation, labels, size, where):
    """An object of an annotation of COCO's. labels: by id of category; size: (width, height)."""
    label, box = labels.get(annotation.get("category_id")), annotation.get("bbox")
    outline = annotation.get("segmentation")
    if label is None:
        raise InputError(f"{where}: its category is none of the file's")
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        raise InputError(f"{where}: its bbox must be four numbers, not {box}")
    fits = False
    if isinstance(outline, dict):
        fits = outline.get("size") == [size[1], size[0]] and "counts" in outline
    elif isinstance(outline, list) and outline:
        fits = all(isinstance(part, list) and len(part) >= 6 for part in outline)
    if not fits:
        raise InputError(f"{where}: no segmentation (polygons of three points or more, or run "
                         "lengths of the image's size), which masks need")
    x, y, width, height = box
    return {"box": (x, y, x + width, y + height), "label": label, "mask": outline,
            "crowd": bool(annotation.get("iscrowd", 0))}


def is_number(value):
    """Whether something read from JSON is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def open_sources(data, protocol):
    """-> what a --data has to train on and to score, with the same labels: those of equal names.

    InputError, in one line, where there is nothing to read or to find.
    """
    if data.partition(":")[0] == "shapes":
        return Scenes("train", len(open_images(data, "train"))), Scenes("val", 200)
    if not Path(data).is_dir():
        raise InputError(f"--data {data}: no such folder (nor shapes)")
    if protocol == "voc-c4":
        source, val = open_voc(data, "train"), open_voc(data, "val")
    else:
        source = open_coco(data, "train")
        val = open_coco(data, "val", source.classes)
    if all(one["crowd"] for one in chain.from_iterable(val.objects)):
        raise InputError(f"--data {data}: no object to find in the images that are scored")
    return source, val


def as_tensors(pair, flip=0.0):
    """(PIL image, target) -> (3, height, width) in 0..1, target; mirrored with chance `flip`."""
    image, target = TF.to_tensor(pair[0]), dict(pair[1])
    if torch.rand(()) < flip:
        image, width = image.flip(-1), image.shape[-1]
        x0, y0, x1, y1 = target["boxes"].unbind(1)
        target["boxes"] = torch.stack((width - x1, y0, width - x0, y1), 1)
        if "masks" in target:
            target["masks"] = target["masks"].flip(-1)
    return image, target


def collate(samples):
    """Stream items -> images, targets, numbers, all `bad`, each a list; or the first `Failed`."""
    images, targets, numbers, unreadable = [], [], [], []
    for sample in samples:
        if isinstance(sample, Failed):
            return sample
        images.append(sample[0][0])
        targets.append(sample[0][1])
        numbers.append(sample[1])
        unreadable.extend(sample[2])
    return images, targets, numbers, unreadable
