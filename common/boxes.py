"""Images with boxes and masks for detect_eval.py: VOC, COCO, and scenes of the embedded shapes.

A source is a data set: source[i] -> ((RGB PIL image, target), i), with `target` as `new_target` has
it; `classes` are the names of labels 1, 2, ...; `sizes` (n, 2) are the images' width and height.
An object is a dict, as annotations.py has it; its mask may also be an array.
A mistake in an annotation is an InputError and ends a run; only an image that cannot be decoded is
passed over.
"""
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import VOCDetection
from torchvision.ops import clip_boxes_to_image

from care import InputError
from common.annotations import (VOC_CLASSES, Objects, check_once, has_area, read_coco, read_voc,
                                tell)
from common.data import Failed, digest_of, digest_of_files, open_images, read_image
from common.shapes import Shapes, render_scene

VOC_PARTS = {"train": (("2007", "trainval"), ("2012", "trainval")), "val": (("2007", "test"),)}


# ---------------------------------------------------------------------------------------- targets
def new_target(image, objects, masks):
    """The objects in a PIL image as tensors; boxes are clipped to it, empty ones left out.

    boxes (n, 4) float32; labels (n,) int64; crowd (n,) bool; masks (n, height, width) uint8.
    """
    size = image.height, image.width
    boxes = torch.tensor([one["box"] for one in objects]).float().reshape(-1, 4)
    boxes = clip_boxes_to_image(boxes, size)
    keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
    objects = [objects[number] for number in keep.nonzero()[:, 0].tolist()]
    labels = torch.tensor([one["label"] for one in objects]).long()
    crowd = torch.tensor([one["crowd"] for one in objects]).bool()
    target = {"boxes": boxes[keep], "labels": labels, "crowd": crowd}
    if masks:
        stack = np.empty((len(objects), *size), np.uint8)
        for mask, one in zip(stack, objects):
            mask[:] = as_mask(one["mask"], *size)
        target["masks"] = torch.from_numpy(stack)
    return target


def as_mask(outline, height, width):
    """An array, or COCO's polygons or compressed run lengths -> (height, width), 1 inside."""
    from pycocotools.mask import decode, frPyObjects, merge
    if isinstance(outline, np.ndarray):
        return outline
    if isinstance(outline, bytes):
        return decode({"size": [height, width], "counts": outline})
    return decode(merge(frPyObjects(outline, height, width)))


def digest_with_boxes(source, root, split):
    """`digest_of` a source of `open_sources`, with what its annotations' files contain."""
    if not hasattr(source, "path"):
        return digest_of(source)
    images = [os.path.relpath(source.path(index), root) for index in range(len(source))]
    annotations = [f"annotations/instances_{split}2017.json"]
    if images[0].startswith("VOCdevkit"):
        others = [name.replace("JPEGImages", "Annotations") for name in images]
        annotations = [os.path.splitext(name)[0] + ".xml" for name in others]
    digest = hashlib.sha256(digest_of_files(root, images).encode())
    for name in annotations:
        with open(os.path.join(root, name), "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


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


def grouped_batches(stream, start, stop, batch_size, rank=0, world=1, accum_steps=1):
    """Sample numbers for a rank, as `stream_batches`, for images of one orientation in each step.

    The stream's samples wait in two queues, wider than high and all others; the first full queue is
    a step's batch. Every rank replays the queues from sample 0, so that a step has the same samples
    in a resumed run and with any number of ranks.
    """
    micro, queues, step = batch_size // (world * accum_steps), ([], []), 0
    for n in count():
        if step >= stop:
            return
        width, height = stream.source.sizes[stream.index(n)]
        queue = queues[int(width > height)]
        queue.append(n)
        if len(queue) == batch_size:
            for part in range(accum_steps if step >= start else 0):
                first = (rank * accum_steps + part) * micro
                yield queue[first:first + micro]
            queue.clear()
            step += 1


# ---------------------------------------------------------------------------------------- sources
class Scenes(Shapes):
    """Squares with a few of the embedded shapes; an image is fixed by (split, index)."""

    def __init__(self, split, length, size=128):
        super().__init__(split, length, size, renderer=render_scene)
        self.sizes = np.full((length, 2), size)

    def __getitem__(self, index):
        pixels, boxes, labels, masks = self.render(index)
        objects = []
        for box, label, mask in zip(boxes, labels, masks):
            objects.append({"box": box.tolist(), "label": label + 1, "crowd": False, "mask": mask})
        image = Image.fromarray(pixels)
        return (image, new_target(image, objects, masks=True)), index


class Strings(Sequence):
    """Strings as bytes in one piece, for the same reason as in `Objects`."""

    def __init__(self, strings):
        pieces = [os.fsencode(string) for string in strings]
        self.content, self.ends = b"".join(pieces), np.cumsum([0, *map(len, pieces)])

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        if index < 0 or index >= len(self):
            raise IndexError(index)
        return os.fsdecode(self.content[self.ends[index]:self.ends[index + 1]])


class Files(Dataset):
    """Image files with `objects`. masks: whether these have any.

    sizes (n, 2): width and height that the annotations say, 0 where they do not.
    """

    def __init__(self, classes, paths, sizes, objects, masks):
        self.classes, self.paths, self.sizes = classes, Strings(paths), np.array(sizes, np.int32)
        self.objects, self.masks = objects, masks

    def __len__(self):
        return len(self.paths)

    def path(self, index):
        return self.paths[index]

    def __getitem__(self, index):
        image = self.read(index)
        return (image, new_target(image, self.objects[index], self.masks)), index

    def read(self, index):
        """The image as its annotations have it: turned as EXIF asks, as labelling tools show it.

        As it is stored where only that has the annotated size. InputError where neither has it.
        """
        path, size = self.paths[index], tuple(self.sizes[index].tolist())
        image = read_image(path, upright=True)
        if image.size != size and all(size):
            shown, image = image.size, read_image(path)
            if image.size != size:
                raise InputError(f"{path}: of {shown} pixels, width first, but its annotations are "
                                 f"for {size}")
        return image


def open_voc(root, split):
    """VOC in root/VOCdevkit: trainval of 2007 and 2012 for `train`, test of 2007 for `val`.

    `train` has no images without objects. Objects marked `difficult` train like others, and are
    crowd when scored.
    """
    paths, sizes, objects, notes = [], [], Objects(), Counter()
    for year, part in VOC_PARTS[split]:
        try:
            listed = VOCDetection(root, year, part)
        except (RuntimeError, OSError) as error:
            raise InputError(f"--data {root}: must hold VOCdevkit/VOC{year} with the images of "
                             f"{part} ({error})") from None
        for path, annotation in zip(listed.images, listed.annotations):
            size, things = read_voc(annotation)
            for box, label, difficult in things:
                if has_area(box, size, notes):
                    objects.append(len(paths), box, label, difficult)
            paths.append(path)
            sizes.append(size)
    check_once(paths, f"--data {root}: image", f"of {split} is listed")
    tell(notes, f"{root}/VOCdevkit, {split}")
    kept = objects.close(len(paths), drop_empty=split == "train")
    return Files(VOC_CLASSES, [paths[i] for i in kept], [sizes[i] for i in kept], objects, False)


def open_coco(root, split, classes=None):
    """COCO 2017 in root. classes: the names of labels, as another split has them."""
    path = f"{root}/annotations/instances_{split}2017.json"
    classes, images, objects = read_coco(path, split == "train", classes)
    paths = [f"{root}/{split}2017/{name}" for name, _, _ in images]
    return Files(classes, paths, [size for _, *size in images], objects, masks=True)


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
    if not len(source):
        raise InputError(f"--data {data}: no object in the images to train on")
    if val.objects.crowds.all():
        raise InputError(f"--data {data}: no object to find in the images that are scored")
    return source, val
