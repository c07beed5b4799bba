"""Transfer to detection and instance segmentation: the protocols behind the paper's Tables 4 and 5.

  torchrun --nproc_per_node 8 detect_eval.py --pretrained runs/care_resnet50/encoder.pth     VOC in ./voc/VOCdevkit
  python detect_eval.py --pretrained runs/demo/encoder.pth --protocol coco-fpn --data shapes --iterations 300
  python detect_eval.py --pretrained runs/demo/encoder.pth --export-detectron2 encoder.pkl

  voc-c4    Faster R-CNN, conv1-conv4 as backbone, conv5 and an extra batch norm as box head     Table 4, right
  coco-c4   Mask R-CNN, the same, the mask head on the box head's map                            Table 4, left
  coco-fpn  Mask R-CNN, feature pyramid, two linear layers as box head                           Table 5

All layers train, every batch norm too, as in MoCo's protocol. The detectors are torchvision's; what they leave open
follows Detectron2. The last line on stdout is one JSON object with the scores. The same command again resumes.
"""
import contextlib
import hashlib
import io
import json
import math
import pickle
import re
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision.transforms.functional as TF
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torchvision.datasets import CocoDetection, VOCDetection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image
from tqdm import tqdm

from care import ARCHS, Encoder, load_encoder
from data import IMAGENET_MEAN, IMAGENET_STD, Shapes, Stream, StreamSampler, mask_box
from train import (Unreadable, add_run_arguments, agree, average, catch_signals, default_workers, fail, ignore_signals,
                   load_run, memory_gib, new_parser, open_log, open_run, positive, save_files, set_precision,
                   setup_ranks, user_errors, versions, write_line, write_whole)

PROTOCOLS = {  # iterations, steps at which the rate falls to a tenth, warm-up, shorter sides in training
    "voc-c4": (24000, (18000, 22000), 100, range(480, 801, 32)),
    "coco-c4": (90000, (60000, 80000), 1000, range(640, 801, 32)),
    "coco-fpn": (90000, (60000, 80000), 1000, range(640, 801, 32)),
}
FREE = ("workers", "out", "save_every", "log_every", "max_steps", "pretrained")  # pretrained: its sha256 counts
VOC_CLASSES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
               "pottedplant sheep sofa train tvmonitor").split()


# ------------------------------------------------------------------------------------------ arguments
def parse_args(argv=None):
    """The command line as a namespace; a mistake in it is one line on stderr and exit code 2."""
    parser = new_parser(__doc__)
    add = parser.add_argument_group("encoder and data").add_argument
    add("--pretrained", required=True, metavar="FILE|random",
        help="encoder.pth or last.pth of train.py, the authors' checkpoint, a torchvision or MoCo state dict, or random")
    add("--arch", choices=ARCHS, help="read off the file unless given (random: default resnet50)")
    add("--data", metavar="PATH|shapes", help="folder of VOCdevkit/VOC2007 and VOC2012, or of annotations/, train2017/ "
        "and val2017/ (default ./voc, ./coco), or embedded scenes; shapes:N has N training images")
    add("--export-detectron2", metavar="OUT.pkl", help="write the encoder for Detectron2 (also MoCo's configs) and end")
    add = parser.add_argument_group("protocol").add_argument
    add("--protocol", choices=PROTOCOLS, default="voc-c4", help="see above (default voc-c4)")
    add("--iterations", type=int, help="optimiser steps; the schedule scales with them (default 24000, COCO 90000)")
    add("--batch-size", type=int, default=16, help="images per step over all ranks (default 16)")
    add("--lr", type=float, default=0.02, help="peak learning rate at this batch size (default 0.02)")
    add("--min-size", type=int, nargs="+", metavar="PX", help="shorter sides, one drawn per training image, the "
        "last one in testing; anchors scale with it (default 480-800 by 32, COCO 640-800)")
    add("--max-size", type=int, default=1333, help="longest side in pixels (default 1333)")
    add("--rois", type=int, default=512, help="regions per image that the heads train on, and at most twice as many "
        "proposals in testing (default 512, and 1000)")
    add = parser.add_argument_group("running").add_argument
    add_run_arguments(add)
    add("--save-every", type=int, default=1000, metavar="STEPS", help="between checkpoints (default 1000)")
    args = parser.parse_args(argv)
    iterations, _, _, sizes = PROTOCOLS[args.protocol]
    args.iterations = iterations if args.iterations is None else args.iterations
    args.min_size = args.min_size or list(sizes)
    args.data = args.data or args.protocol.partition("-")[0]
    positive(args, "iterations", "batch_size", "rois", "save_every")
    if args.lr <= 0:
        fail(f"--lr {args.lr:g}: must be above 0")
    if min(args.min_size) < 32 or max(args.min_size) > args.max_size:
        fail(f"--min-size {args.min_size}: must lie between 32 and --max-size {args.max_size}")
    if max(args.min_size) != args.min_size[-1]:
        fail(f"--min-size {args.min_size}: the largest, which is that of testing, must come last")
    return args


def load_pretrained(args):
    """The encoder of --pretrained; fills in arch, stem and sha256. ValueError for what load_encoder refuses."""
    args.sha256 = None
    if args.pretrained == "random":
        torch.manual_seed(args.seed)
        encoder = Encoder(args.arch or "resnet50")
    else:
        encoder = load_encoder(args.pretrained, args.arch, "imagenet")
        args.sha256 = hashlib.sha256(Path(args.pretrained).read_bytes()).hexdigest()
    args.arch = encoder.arch
    return encoder


def export_detectron2(encoder, path):
    """Write an encoder in Detectron2's naming: a pickle of numpy arrays, without num_batches_tracked."""
    names = {r"^(conv1|bn1)": r"stem.\1", r"bn(\d)": r"conv\1.norm", r"downsample\.0": "shortcut",
             r"downsample\.1": "shortcut.norm", r"layer(\d)": lambda match: f"res{int(match[1]) + 1}"}
    arrays = {}
    for key, value in encoder.state_dict().items():
        for ours, theirs in names.items():
            key = re.sub(ours, theirs, key)
        if not key.endswith("num_batches_tracked"):
            arrays[key] = value.cpu().numpy()
    content = {"model": arrays, "__author__": "CARE", "matching_heuristics": True}
    write_whole(path, partial(pickle.dump, content))


# ----------------------------------------------------------------------------------------------- data
def load_coco_tools():
    """pycocotools' COCO, COCOeval and mask functions; exit code 2, with what to install, where there are none."""
    try:
        from pycocotools import mask
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        fail(f"scoring needs pycocotools: pip install pycocotools ({error})")
    return COCO, COCOeval, mask


def make_target(image, boxes, labels, crowd, masks=None):
    """The objects of a PIL image as tensors, boxes clipped to the image, empty ones left out.

    boxes (n, 4) x0, y0, x1, y1 in pixels, float32; labels (n,) from 1, int64; crowd (n,) bool, scored neither as found
    nor as missed; masks (n, height, width) uint8, where there are any.
    """
    boxes = torch.tensor(np.array(boxes), dtype=torch.float32).reshape(-1, 4)
    boxes = clip_boxes_to_image(boxes, (image.height, image.width))
    target = {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64),
              "crowd": torch.tensor(crowd, dtype=torch.bool)}
    if masks is not None:
        masks = np.array(masks, dtype=np.uint8)
        target["masks"] = torch.from_numpy(masks).reshape(-1, image.height, image.width)
    keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return {name: value[keep] for name, value in target.items()}


class Scenes(Dataset):
    """Square scenes of one to four of the embedded shapes, later ones in front; a function of (split, index).

    As all sources here: source[i] -> ((RGB PIL image, target), i).
    """

    classes = Shapes.classes

    def __init__(self, split, length, size=128):
        self.split, self.length, self.shapes = split, length, Shapes(split, length, size)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        rng = np.random.RandomState((index * 2 + (self.split == "val")) % 2 ** 32)
        canvas, places, labels, masks = self.shapes.ground(rng), [], [], []
        for _ in range(rng.randint(1, 5)):
            radius = rng.uniform(0.14, 0.26)
            y, x = rng.uniform(radius, 1 - radius, 2)
            if any(math.hypot(y - other[0], x - other[1]) < 0.8 * (radius + other[2]) for other in places):
                continue
            label = rng.randint(10)
            mask = self.shapes.paint(canvas, rng, label, (y, x), radius)
            masks = [other & ~mask for other in masks] + [mask]
            labels.append(label + 1)
            places.append((y, x, radius))
        image = Image.fromarray(np.rint(canvas).astype(np.uint8))
        return (image, make_target(image, [mask_box(m) for m in masks], labels, [False] * len(masks), masks)), index


class Voc(Dataset):
    """VOC below root/VOCdevkit: trainval07+12 for `train`, test07 for `val`; `difficult` objects are crowd."""

    classes = VOC_CLASSES

    def __init__(self, root, split):
        parts = [("2007", "trainval"), ("2012", "trainval")] if split == "train" else [("2007", "test")]
        try:
            self.parts = ConcatDataset([VOCDetection(root, year, part) for year, part in parts])
        except (RuntimeError, OSError) as error:
            wanted = ", ".join(f"VOCdevkit/VOC{year} ({part})" for year, part in parts)
            raise ValueError(f"--data {root}: does not hold {wanted} ({error})") from None
        self.samples = [(path, None) for part in self.parts.datasets for path in part.images]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        image, tree = self.parts[index]
        objects = tree["annotation"]["object"]
        corners = [[float(thing["bndbox"][side]) for side in ("xmin", "ymin", "xmax", "ymax")] for thing in objects]
        boxes = [(x0 - 1, y0 - 1, x1, y1) for x0, y0, x1, y1 in corners]  # VOC counts pixels from 1, the last included
        labels = [self.classes.index(thing["name"]) + 1 for thing in objects]
        return (image, make_target(image, boxes, labels, [thing.get("difficult") == "1" for thing in objects])), index


class Coco(Dataset):
    """COCO 2017 below root; `train` is without crowds, and without images that have no other objects."""

    def __init__(self, root, split):
        self.split, annotations = split, f"{root}/annotations/instances_{split}2017.json"
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.images = CocoDetection(f"{root}/{split}2017", annotations)
        except (KeyError, TypeError, AssertionError, OSError) as error:
            raise ValueError(f"--data {root}: cannot read {annotations} ({error!r})") from None
        coco = self.images.coco
        categories = coco.loadCats(sorted(coco.getCatIds()))
        self.classes = [category["name"] for category in categories]
        self.labels = {category["id"]: label for label, category in enumerate(categories, 1)}
        if split == "train":
            self.images.ids = [image for image in self.images.ids if self.wanted(coco.imgToAnns[image])]
        self.samples = [(f"{root}/{split}2017/{coco.imgs[image]['file_name']}", None) for image in self.images.ids]

    def wanted(self, objects):
        """Those of an image's annotations that the split uses."""
        return [thing for thing in objects if self.split != "train"
                or not thing["iscrowd"] and min(thing["bbox"][2:]) > 0]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        image, objects = self.images[index]
        objects = self.wanted(objects)
        boxes = [(x, y, x + width, y + height) for x, y, width, height in (thing["bbox"] for thing in objects)]
        labels = [self.labels[thing["category_id"]] for thing in objects]
        crowd = [bool(thing["iscrowd"]) for thing in objects]
        masks = [self.images.coco.annToMask(thing) for thing in objects]
        return (image, make_target(image, boxes, labels, crowd, masks)), index


def open_source(data, protocol, split):
    """The source for `split` train or val; ValueError, in one line, where there is nothing to read."""
    name, _, count = data.partition(":")
    if name == "shapes":
        if count and not (count.isdigit() and int(count)):
            raise ValueError(f"--data {data}: N of shapes:N is the number of training images")
        return Scenes(split, 200 if split == "val" else int(count or 1000))
    if not Path(data).is_dir():
        raise ValueError(f"--data {data}: no such folder (nor shapes)")
    return (Voc if protocol == "voc-c4" else Coco)(data, split)


def as_tensors(pair, flip=0.0):
    """PIL image and target -> uint8 (3, height, width) and target, mirrored with probability `flip`."""
    image, target = TF.pil_to_tensor(pair[0]), dict(pair[1])
    if torch.rand(()) < flip:
        image, width = image.flip(-1), image.shape[-1]
        x0, y0, x1, y1 = target["boxes"].unbind(1)
        target["boxes"] = torch.stack((width - x1, y0, width - x0, y1), 1)
        if "masks" in target:
            target["masks"] = target["masks"].flip(-1)
    return image, target


def collate(samples):
    """List of Stream items -> images with targets, indices, indices of unreadable images."""
    pairs, indices, bad = zip(*samples)
    return pairs, indices, sum(bad, [])


def load_batches(stream, sampler, args, device):
    """Batches of a stream: yields (images float in 0..1, targets, indices, unreadable), the first two on the device."""
    loader = DataLoader(stream, batch_sampler=sampler, num_workers=args.workers, collate_fn=collate,
                        worker_init_fn=ignore_signals)
    for pairs, indices, bad in loader:
        images = [image.to(device, non_blocking=True).float() / 255 for image, _ in pairs]
        targets = [{name: value.to(device) for name, value in target.items()} for _, target in pairs]
        yield images, targets, bad, indices


# ------------------------------------------------------------------------------------------- detector
class Heads(RoIHeads):
    """torchvision's heads, where a mask head that is the box head (C4) reuses its maps in training, as Detectron2's.

    R regions, K classes with background. forward: the losses in train mode, detections in eval mode.
    """

    def forward(self, features, proposals, image_shapes, targets=None):
        if self.training:
            proposals, matches, labels, deltas = self.select_training_samples(proposals, targets)
        maps = self.box_head(self.box_roi_pool(features, proposals, image_shapes))  # (R, C5, 7, 7) or (R, 1024)
        logits, codes = self.box_predictor(maps)  # (R, K), (R, 4K)
        if not self.training:
            boxes, scores, labels = self.postprocess_detections(logits, codes, proposals, image_shapes)
            found = [{"boxes": b, "scores": s, "labels": l} for b, s, l in zip(boxes, scores, labels)]
            if self.has_mask():
                maps = self.mask_head(self.mask_roi_pool(features, boxes, image_shapes))
                for one, masks in zip(found, maskrcnn_inference(self.mask_predictor(maps), labels)):
                    one["masks"] = masks
            return found, {}
        losses = dict(zip(("loss_classifier", "loss_box_reg"), fastrcnn_loss(logits, codes, labels, deltas)))
        if self.has_mask():
            objects = [part > 0 for part in labels]
            proposals, matches = ([part[keep] for part, keep in zip(parts, objects)] for parts in (proposals, matches))
            if self.mask_head is self.box_head:
                maps = maps[torch.cat(objects)]
            else:
                maps = self.mask_head(self.mask_roi_pool(features, proposals, image_shapes))
            masks, labels = ([target[name] for target in targets] for name in ("masks", "labels"))
            losses["loss_mask"] = maskrcnn_loss(self.mask_predictor(maps), proposals, masks, labels, matches)
        return [], losses


def as_float32(out):
    """Nested lists and dicts of tensors in float32: torchvision computes boxes in the type it is given."""
    if isinstance(out, dict):
        return {name: as_float32(value) for name, value in out.items()}
    return out.float() if torch.is_tensor(out) else [as_float32(value) for value in out]


def new_detector(encoder, protocol, classes, min_size=(800,), max_size=1333, rois=512):
    """A detector on an Encoder's own modules: lists of images (3, height, width) in 0..1, of targets in train mode.

    `classes` without background. Anchors are those of a shorter side of 800 in testing, and scale with it.
    """
    fpn, masks, scale, outputs = protocol.endswith("fpn"), protocol != "voc-c4", min_size[-1] / 800, classes + 1
    sizes = [size * scale for size in (32, 64, 128, 256, 512)]
    align = partial(MultiScaleRoIAlign, sampling_ratio=0, canonical_scale=224 * scale)
    if fpn:
        widths = [encoder.dim5 // 8, encoder.dim5 // 4, encoder.dim5 // 2, encoder.dim5]
        layers = {f"layer{level + 1}": str(level) for level in range(4)}
        backbone = BackboneWithFPN(encoder, layers, widths, 256, norm_layer=nn.BatchNorm2d)
        anchors = AnchorGenerator([(size,) for size in sizes], [(0.5, 1.0, 2.0)] * 5)
        width, keep_train, before_nms = 256, 1000, {"training": 2000, "testing": 1000}
        box_pool, box_head, predictor = align(list("0123"), 7), TwoMLPHead(256 * 49, 1024), FastRCNNPredictor(1024, outputs)
        mask_pool, mask_head = align(list("0123"), 14), MaskRCNNHeads(256, [256] * 4, 1, nn.BatchNorm2d)
    else:
        names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
        backbone = nn.Sequential(*(getattr(encoder, name) for name in names))
        anchors = AnchorGenerator([tuple(sizes)], [(0.5, 1.0, 2.0)])
        width, keep_train, before_nms = encoder.dim4, 2000, {"training": 12000, "testing": 6000}
        box_pool = mask_pool = align(["0"], 14)
        box_head = mask_head = nn.Sequential(encoder.layer4, nn.BatchNorm2d(encoder.dim5))  # (R, C5, 7, 7)
        predictor = nn.Sequential(nn.AdaptiveAvgPool2d(1), FastRCNNPredictor(encoder.dim5, outputs))
    mask_parts = (mask_pool, mask_head, MaskRCNNPredictor(256 if fpn else encoder.dim5, 256, outputs))
    rpn = RegionProposalNetwork(anchors, RPNHead(width, anchors.num_anchors_per_location()[0]), 0.7, 0.3, 256, 0.5,
                                before_nms, {"training": keep_train, "testing": min(1000, 2 * rois)}, 0.7)
    heads = Heads(box_pool, box_head, predictor, 0.5, 0.5, rois, 0.25, None, 0.05, 0.5, 100, *(mask_parts if masks else ()))
    for module in (backbone, rpn.head, predictor, mask_parts[-1]):
        module.register_forward_hook(lambda module, inputs, out: as_float32(out))
    return GeneralizedRCNN(backbone, rpn, heads, GeneralizedRCNNTransform(min_size, max_size, IMAGENET_MEAN, IMAGENET_STD))
