"""Transfer to detection and instance segmentation: the protocols of the paper's Tables 4 and 5.

  torchrun --nproc_per_node 8 detect_eval.py --pretrained runs/care_resnet50/encoder.pth     VOC in ./voc
  python detect_eval.py --pretrained runs/demo/encoder.pth --protocol coco-fpn --data shapes \\
      --batch-size 4 --rois 64 --iterations 300
  python detect_eval.py --pretrained runs/demo/encoder.pth --export-detectron2 encoder.pkl

  voc-c4    Faster R-CNN: conv1-conv4 as backbone, conv5 and an extra batch norm as box head      Table 4
  coco-c4   Mask R-CNN: the same, and the mask head on the box head's map                         Table 4
  coco-fpn  Mask R-CNN: feature pyramid, two linear layers as box head                            Table 5

All layers and batch norms train (MoCo's protocol); what torchvision's models leave open is as in Detectron2.
The last line on stdout is one JSON object with the scores. The same command again resumes.
"""
import contextlib
import io
import json
import math
import pickle
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision.transforms.functional as TF
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader
from torchvision.datasets import CocoDetection, VOCDetection
from torchvision.models.detection import backbone_utils, faster_rcnn, mask_rcnn, roi_heads, rpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, box_convert, clip_boxes_to_image, roi_align
from tqdm import tqdm

from care import ARCHS, InputError
from data import IMAGENET_MEAN, IMAGENET_STD, Shapes, Stream, mask_box, open_images, stream_batches
from train import (Unreadable, add_run_arguments, agree, average, catch_signals, fail, ignore_signals,
                   memory_gib, new_parser, on_rank_0, open_encoder, open_log, open_run, parallelise,
                   positive, restore, save_run, set_precision, setup_ranks, user_errors, write_line,
                   write_whole)

PROTOCOLS = {  # iterations, steps after which the rate falls to a tenth, warm-up, shorter sides in training
    "voc-c4": (24000, (18000, 22000), 100, range(480, 801, 32)),
    "coco-c4": (90000, (60000, 80000), 1000, range(640, 801, 32)),
    "coco-fpn": (90000, (60000, 80000), 1000, range(640, 801, 32)),
}
FREE = ("workers", "out", "save_every", "log_every", "max_steps", "pretrained")  # the encoder's sha256 counts


# ------------------------------------------------------------------------------------------ arguments
def parse_args(argv=None):
    """The command line as a namespace; a mistake in it is one line on stderr and exit code 2."""
    parser = new_parser(__doc__)
    add = parser.add_argument_group("encoder and data").add_argument
    add("--pretrained", required=True, metavar="FILE|random",
        help="encoder.pth, last.pth, the authors' checkpoint, a torchvision or MoCo state dict, or random")
    add("--arch", choices=ARCHS, help="read off the file unless given (random: default resnet50)")
    add("--data", metavar="PATH|shapes", help="folder with VOCdevkit/, or annotations/, train2017/, val2017/ "
        "(default ./voc, ./coco), or embedded scenes; shapes:N has N training images")
    add("--export-detectron2", metavar="OUT.pkl", help="only write the encoder for Detectron2")
    add = parser.add_argument_group("protocol").add_argument
    add("--protocol", choices=PROTOCOLS, default="voc-c4", help="see above (default voc-c4)")
    add("--iterations", type=int, help="the schedule scales with them (default 24000, COCO 90000)")
    add("--batch-size", type=int, default=16, help="images over all ranks (default 16)")
    add("--lr", type=float, default=0.02, help="peak learning rate of SGD (default 0.02)")
    add("--min-size", type=int, nargs="+", metavar="PX", help="shorter sides, one drawn per image; testing "
        "takes the last, and anchors scale with it (default 480-800 by 32, COCO 640-800, shapes 128)")
    add("--rois", type=int, default=512, help="regions per image that train the heads (default 512); testing "
        "looks at twice as many proposals, 1000 at most")
    add = parser.add_argument_group("running").add_argument
    add_run_arguments(add)
    add("--save-every", type=int, default=1000, metavar="STEPS", help="between checkpoints (default 1000)")
    args = parser.parse_args(argv)
    iterations, _, _, sizes = PROTOCOLS[args.protocol]
    args.iterations = iterations if args.iterations is None else args.iterations
    args.data = args.data or args.protocol.partition("-")[0]
    shapes = args.data.partition(":")[0] == "shapes"
    args.min_size = args.min_size or ([128] if shapes else list(sizes))
    positive(args, "iterations", "batch_size", "rois", "save_every")
    if args.lr <= 0:
        fail(f"--lr {args.lr:g}: must be above 0")
    if any(size % 32 or not 32 <= size <= 1333 for size in args.min_size):
        fail(f"--min-size {args.min_size}: must be multiples of 32, up to 1333, the longest side")
    return args


def export_detectron2(encoder, path):
    """Write an encoder as a pickle of numpy arrays in Detectron2's naming, without num_batches_tracked."""
    arrays = {}
    for key, value in encoder.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            key = re.sub(r"^(?!layer)", "stem.", key)
            key = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", key)
            key = re.sub(r"bn(\d)", r"conv\1.norm", key)
            key = key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
            arrays[key] = value.cpu().numpy()
    content = {"model": arrays, "__author__": "CARE", "matching_heuristics": True}
    write_whole(path, partial(pickle.dump, content))


# ----------------------------------------------------------------------------------------------- data
# A source: source[i] -> ((RGB PIL image, target), i); `classes`, the names of labels 1, 2, ...
def new_target(image, boxes, labels, crowd, masks=None):
    """The objects of a PIL image as tensors; boxes are clipped to it, empty ones left out.

    boxes (n, 4) x0, y0, x1, y1 in pixels, float32; labels (n,) int64; crowd (n,) bool: neither right nor
    wrong to find; masks (n, height, width) uint8, where there are any.
    """
    boxes = torch.tensor(np.array(boxes), dtype=torch.float32).reshape(-1, 4)
    boxes = clip_boxes_to_image(boxes, (image.height, image.width))
    target = {"boxes": boxes, "labels": torch.tensor(labels).long(), "crowd": torch.tensor(crowd).bool()}
    if masks is not None:
        masks = torch.from_numpy(np.array(masks, dtype=np.uint8))
        target["masks"] = masks.reshape(-1, image.height, image.width)
    keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return {name: value[keep] for name, value in target.items()}


class Scenes(Shapes):
    """Squares with a few, mostly two to four, of the shapes, later ones in front; fixed by (split, index)."""

    def __getitem__(self, index):
        rng = np.random.RandomState((index * 2 + (self.split == "val")) % 2 ** 32)
        canvas, level = self.ground(rng)
        places, labels, masks = [], [], []
        for _ in range(rng.randint(2, 10)):
            radius = rng.uniform(0.12, 0.22)
            y, x = rng.uniform(radius, 1 - radius, 2)
            if any(math.hypot(y - v, x - u) < 0.8 * (radius + other) for v, u, other in places):
                continue
            places.append((y, x, radius))
            labels.append(rng.randint(10) + 1)
            mask = self.paint(canvas, rng, labels[-1] - 1, (y, x), radius, level)
            masks = [other & ~mask for other in masks] + [mask]
        image = Image.fromarray(np.rint(canvas).astype(np.uint8))
        boxes = [mask_box(mask) for mask in masks]
        return (image, new_target(image, boxes, labels, [False] * len(boxes), masks)), index


class Voc(ConcatDataset):
    """VOC in root/VOCdevkit: trainval07+12 for `train`, test07 for `val`; `difficult` objects are crowd."""

    classes = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
               "person pottedplant sheep sofa train tvmonitor").split()

    def __init__(self, root, split):
        parts = [("2007", "trainval"), ("2012", "trainval")] if split == "train" else [("2007", "test")]
        try:
            super().__init__([VOCDetection(root, year, part) for year, part in parts])
        except (RuntimeError, OSError) as error:
            wanted = " and ".join(f"VOCdevkit/VOC{year} ({part})" for year, part in parts)
            raise InputError(f"--data {root}: must hold {wanted} ({error})") from None
        self.samples = [(path, None) for part in self.datasets for path in part.images]

    def __getitem__(self, index):
        image, tree = super().__getitem__(index)
        objects = tree["annotation"]["object"]
        sides = [[float(o["bndbox"][side]) for side in ("xmin", "ymin", "xmax", "ymax")] for o in objects]
        boxes = [(x0 - 1, y0 - 1, x1, y1) for x0, y0, x1, y1 in sides]  # VOC: from 1, last pixel included
        labels = [self.classes.index(o["name"]) + 1 for o in objects]
        return (image, new_target(image, boxes, labels, [o.get("difficult") == "1" for o in objects])), index


class Coco(CocoDetection):
    """COCO 2017 in root; `train` has no crowds, and no images without other objects."""

    def __init__(self, root, split):
        folder, path = f"{root}/{split}2017", f"{root}/annotations/instances_{split}2017.json"
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                super().__init__(folder, path)
        except (AssertionError, LookupError, TypeError, ValueError, OSError) as error:
            raise InputError(f"--data {root}: cannot read {path} ({error!r})") from None
        categories = self.coco.loadCats(sorted(self.coco.getCatIds()))
        self.split, self.classes = split, [category["name"] for category in categories]
        self.labels = {category["id"]: label for label, category in enumerate(categories, 1)}
        self.ids = [image for image in self.ids if split == "val" or self._load_target(image)]
        self.samples = [(f"{folder}/{self.coco.imgs[image]['file_name']}", None) for image in self.ids]

    def _load_target(self, id):
        usable = lambda o: self.split == "val" or not o["iscrowd"] and min(o["bbox"][2:]) > 0
        return [o for o in super()._load_target(id) if usable(o)]

    def __getitem__(self, index):
        image, objects = super().__getitem__(index)
        boxes = [(x, y, x + width, y + height) for x, y, width, height in (o["bbox"] for o in objects)]
        labels = [self.labels[o["category_id"]] for o in objects]
        masks = [self.coco.annToMask(o) for o in objects]
        return (image, new_target(image, boxes, labels, [o["iscrowd"] for o in objects], masks)), index


def open_source(data, protocol, split):
    """The source for `split` train or val. ValueError, in one line, where there is nothing to read."""
    if data.partition(":")[0] == "shapes":
        return Scenes(split, 200 if split == "val" else len(open_images(data, "train")), size=128)
    if not Path(data).is_dir():
        raise InputError(f"--data {data}: no such folder (nor shapes)")
    return (Voc if protocol == "voc-c4" else Coco)(data, split)


def as_tensors(pair, flip=0.0):
    """(PIL image, target) -> (3, height, width) in 0..1 and target, mirrored with probability `flip`."""
    if isinstance(pair, Image.Image):  # the stream's stand-in where too many cannot be read: the run will end
        pair = pair, new_target(pair, [], [], [], [])
    image, target = TF.to_tensor(pair[0]), dict(pair[1])
    if torch.rand(()) < flip:
        image = image.flip(-1)
        x0, y0, x1, y1 = target["boxes"].unbind(1)
        target["boxes"] = torch.stack((image.shape[-1] - x1, y0, image.shape[-1] - x0, y1), 1)
        if "masks" in target:
            target["masks"] = target["masks"].flip(-1)
    return image, target


def load_batches(stream, sampler, workers, device):
    """Batches of a Stream: images and targets (lists, on the device), image numbers, unreadable ones."""
    for samples in DataLoader(stream, batch_sampler=sampler, num_workers=workers, collate_fn=list,
                              pin_memory=device.type == "cuda", worker_init_fn=ignore_signals):
        pairs, indices, bad = zip(*samples)
        images = [image.to(device, non_blocking=True) for image, _ in pairs]
        targets = [{name: value.to(device, non_blocking=True) for name, value in target.items()}
                   for _, target in pairs]
        yield (images, targets), indices, sum(bad, [])


# ------------------------------------------------------------------------------------------- detector
class SharedHeads(roi_heads.RoIHeads):
    """Heads whose mask head is the box head: conv5 sees a training batch's R regions once (Detectron2)."""

    def forward(self, features, proposals, image_shapes, targets=None):
        if not self.training:
            return super().forward(features, proposals, image_shapes)
        boxes, matches, labels, deltas = self.select_training_samples(proposals, targets)
        maps = self.box_head(self.box_roi_pool(features, boxes, image_shapes))  # (R, C5, 7, 7)
        losses = roi_heads.fastrcnn_loss(*self.box_predictor(maps), labels, deltas)
        objects = [part > 0 for part in labels]
        boxes, matches = ([part[keep] for part, keep in zip(parts, objects)] for parts in (boxes, matches))
        logits = self.mask_predictor(maps[torch.cat(objects)])  # (objects, classes, 14, 14)
        masks, labels = ([target[name] for target in targets] for name in ("masks", "labels"))
        loss_mask = roi_heads.maskrcnn_loss(logits, boxes, masks, labels, matches)
        return [], {"loss_classifier": losses[0], "loss_box_reg": losses[1], "loss_mask": loss_mask}


def as_float32(out):
    """Nested lists and dicts of tensors in float32: torchvision computes boxes in the type it is given."""
    if isinstance(out, dict):
        return {name: as_float32(value) for name, value in out.items()}
    return out.float() if torch.is_tensor(out) else [as_float32(value) for value in out]


def new_detector(encoder, protocol, classes, min_size=(800,), rois=512):
    """A torchvision detector around an encoder's own modules; takes lists of images in 0..1 and of targets.

    classes: without background. Anchors and the pyramid's levels are the protocol's where min_size ends in
    800, and scale with it.
    """
    scale, outputs, width = min_size[-1] / 800, classes + 1, encoder.dim5
    sizes, ratios = [size * scale for size in (32, 64, 128, 256, 512)], (0.5, 1.0, 2.0)
    if protocol == "coco-fpn":
        layers, widths = {f"layer{i + 1}": str(i) for i in range(4)}, [width // 2 ** i for i in (3, 2, 1, 0)]
        backbone = backbone_utils.BackboneWithFPN(encoder, layers, widths, 256, norm_layer=nn.BatchNorm2d)
        anchors, rpn_width = AnchorGenerator([(size,) for size in sizes], [ratios] * 5), 256
        align = partial(MultiScaleRoIAlign, sampling_ratio=0, canonical_scale=224 * scale)
        before_nms = {"training": 2000, "testing": 1000}
        after_nms = {"training": 1000, "testing": min(1000, 2 * rois)}
        box = (align(list("0123"), 7), faster_rcnn.TwoMLPHead(256 * 7 * 7, 1024))
        predictor = faster_rcnn.FastRCNNPredictor(1024, outputs)
        mask = (align(list("0123"), 14), mask_rcnn.MaskRCNNHeads(256, [256] * 4, 1, nn.BatchNorm2d),
                mask_rcnn.MaskRCNNPredictor(256, 256, outputs))
    else:
        backbone = nn.Sequential(encoder.conv1, encoder.bn1, encoder.relu, encoder.maxpool, encoder.layer1,
                                 encoder.layer2, encoder.layer3)
        anchors, rpn_width = AnchorGenerator([sizes], [ratios]), encoder.dim4
        before_nms = {"training": 12000, "testing": 6000}
        after_nms = {"training": 2000, "testing": min(1000, 2 * rois)}
        align = lambda maps, boxes, sizes: roi_align(maps["0"], boxes, 14, 1 / 16, 0, aligned=True)
        box = (align, nn.Sequential(encoder.layer4, nn.BatchNorm2d(width)))  # (R, C5, 7, 7)
        predictor = nn.Sequential(nn.AdaptiveAvgPool2d(1), faster_rcnn.FastRCNNPredictor(width, outputs))
        mask = (*box, mask_rcnn.MaskRCNNPredictor(width, 256, outputs))
    head = rpn.RPNHead(rpn_width, anchors.num_anchors_per_location()[0])
    proposals = rpn.RegionProposalNetwork(anchors, head, 0.7, 0.3, 256, 0.5, before_nms, after_nms, 0.7)
    heads = (SharedHeads if protocol == "coco-c4" else roi_heads.RoIHeads)(
        *box, predictor, 0.5, 0.5, rois, 0.25, None, 0.05, 0.5, 100, *(mask if protocol != "voc-c4" else ()))
    for module in (backbone, head, predictor, mask[-1]):
        module.register_forward_hook(lambda module, inputs, out: as_float32(out))
    transform = GeneralizedRCNNTransform(min_size, 1333, IMAGENET_MEAN, IMAGENET_STD)
    return GeneralizedRCNN(backbone, proposals, heads, transform)


# -------------------------------------------------------------------------------------------- scoring
def annotations(objects, image, masks):
    """COCO's records of the objects, a target's or a detection's, in image number `image`."""
    boxes = box_convert(objects["boxes"].cpu().double(), "xyxy", "xywh").tolist()
    scores, crowds = (objects.get(name, torch.zeros(len(boxes))).tolist() for name in ("scores", "crowd"))
    out = [{"image_id": image, "bbox": box, "area": box[2] * box[3], "category_id": label, "score": score,
            "iscrowd": int(crowd)}
           for box, label, score, crowd in zip(boxes, objects["labels"].tolist(), scores, crowds)]
    if masks and out:
        from pycocotools.mask import encode
        stack = (objects["masks"].flatten(0, -3) > 0.5).permute(1, 2, 0).cpu().numpy()  # (height, width, n)
        codes = encode(stack.astype(np.uint8, order="F"))
        out = [one | {"segmentation": code} for one, code in zip(out, codes)]
    return out


def average_precisions(images, truth, found, masks):
    """COCOeval's AP, AP50, AP75 of boxes and, with `masks`, AP_mask, ..., in percent.

    images: COCO's records of them (id, height, width); truth, found: lists of `annotations`.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    scores, sets = {}, (COCO(), COCO())
    categories = [{"id": label} for label in sorted({one["category_id"] for one in truth})]
    with contextlib.redirect_stdout(io.StringIO()):
        for coco, records in zip(sets, (truth, found)):
            records = [one | {"id": number} for number, one in enumerate(records, 1)]
            coco.dataset = {"images": images, "categories": categories, "annotations": records}
            coco.createIndex()
        for kind, suffix in (("bbox", ""), ("segm", "_mask"))[:1 + masks]:
            result = COCOeval(*sets, kind)
            result.evaluate()
            result.accumulate()
            result.summarize()
            names = ("AP" + suffix, "AP50" + suffix, "AP75" + suffix)
            scores |= dict(zip(names, (100 * result.stats[:3]).tolist()))
    return scores


@torch.no_grad()
def evaluate(model, source, args, rank, world, device, autocast, stopping=()):
    """Scores of a detector on a whole source, {} but on rank 0; None if there is a signal in `stopping`.

    Exit code 2 if an image cannot be read.
    """
    model.eval()
    for buffer in model.buffers() if world > 1 else ():  # running statistics: rank 0's, if not synchronised
        dist.broadcast(buffer, 0)
    mine, size = range(rank, len(source), world), max(1, args.batch_size // world)
    sampler = [mine[i:i + size] for i in range(0, len(mine), size)]
    stream = Stream(source, as_tensors, args.seed, len(source), shuffle=False)
    unreadable = Unreadable(stream)
    batches = map(unreadable.note, load_batches(stream, sampler, args.workers, device))
    batches = tqdm(batches, "val", len(sampler), leave=False, disable=rank > 0 or None)
    masks, records = args.protocol != "voc-c4", ([], [], [])
    together = len(source) // world // size  # batches that every rank has
    for number, ((images, targets), indices, _) in enumerate(batches):
        if number < together and agree(bool(stopping)):
            return None
        with autocast:
            found = model(images)
        for index, image, target, detection in zip(indices, images, targets, found):
            records[0].append({"id": index, "height": image.shape[1], "width": image.shape[2]})
            records[1].extend(annotations(target, index, masks))
            records[2].extend(annotations(detection, index, masks))
    if unreadable.count():
        fail("val cannot be scored without the images named above")
    parts = [records] * world
    if world > 1:
        dist.gather_object(records, parts if rank == 0 else None)
    return average_precisions(*(sum(lists, []) for lists in zip(*parts)), masks) if rank == 0 else {}


# ------------------------------------------------------------------------------------------- training
def lr_at(step, args):
    """Learning rate of step 0, 1, ...: warmed up linearly from a thousandth, twice cut to a tenth."""
    iterations, falls, warmup, _ = PROTOCOLS[args.protocol]
    warmup = max(1, min(warmup, args.iterations // 10))
    fallen = sum(step >= round(fall * args.iterations / iterations) for fall in falls)
    return args.lr * min(1.0, 0.001 + 0.999 * step / warmup) * 0.1 ** fallen


def main(argv=None):
    args = parse_args(argv)
    if args.export_detectron2:
        with user_errors():
            encoder, _ = open_encoder(args.pretrained, args.arch, "imagenet", args.seed)
            export_detectron2(encoder, args.export_detectron2)
        return
    try:
        import pycocotools.cocoeval  # noqa: F401
    except ImportError:
        fail("scoring needs pycocotools: pip install pycocotools")
    stopping = catch_signals()
    rank, world, device = setup_ranks(args)
    torch.backends.cudnn.benchmark = False  # image sizes vary
    autocast, scaler = set_precision(args, device)

    # data, model, and where an earlier run of the same command got to
    parent = "runs/random" if args.pretrained == "random" else Path(args.pretrained).parent
    args.out = args.out or f"{parent}/{args.protocol}"
    with user_errors():
        encoder, args.sha256 = open_encoder(args.pretrained, args.arch, "imagenet", args.seed)
        args.arch = encoder.arch
        source, val = (open_source(args.data, args.protocol, split) for split in ("train", "val"))
        if args.batch_size % world or len(source) < args.batch_size:
            raise InputError(f"--batch-size {args.batch_size}: must be a multiple of {world} ranks, at most "
                             f"{len(source)} training images")
        lock = open_run(args.out) if rank == 0 else None  # held until the process ends
    torch.manual_seed(args.seed)
    model = new_detector(encoder, args.protocol, len(source.classes), args.min_size, args.rois).to(device)
    norms = {p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    groups = [{"params": [p for p in model.parameters() if (p in norms) == norm], "weight_decay": decay}
              for norm, decay in ((True, 0.0), (False, 1e-4))]  # as Detectron2
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    parts, args.images = {"model": model, "optimizer": optimizer, "scaler": scaler}, len(source)
    done, known = restore(args.out, args, parts, FREE)
    model, parallel = parallelise(model, world, device)
    stop = min(args.iterations, args.max_steps or args.iterations)
    per_epoch = len(source) // args.batch_size * args.batch_size
    stream = Stream(source, partial(as_tensors, flip=0.5), args.seed, per_epoch)
    unreadable = Unreadable(stream, known)
    sampler = stream_batches(done, stop, args.batch_size, rank, world)
    log = open_log(args.out, args, done, args.iterations, world, device)
    bar = tqdm(total=stop, initial=done, unit="step", disable=rank > 0 or None)

    # the loop: a step, log, save
    model.train()
    for batch, _, _ in map(unreadable.note, load_batches(stream, sampler, args.workers, device)):
        lr = lr_at(done, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(int(np.random.SeedSequence((args.seed, done, rank)).generate_state(1)[0]))
        with autocast:  # sizes of images and the sampling of regions come from the seed above
            losses = parallel(*batch)
        losses = {"loss": sum(losses.values()), **losses}
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(losses["loss"]).backward()
        scaler.step(optimizer)
        scaler.update()
        bar.update()

        done += 1
        stopped = bool(agree(bool(stopping)))
        saving = done % args.save_every == 0 or done == stop or stopped
        logging = done % args.log_every == 0 or done == args.iterations
        if not (logging or saving):
            continue
        values, count = average(losses, model, done, world), unreadable.count()
        if logging:
            line = {"step": done, "lr": lr, **values, "memory_gib": round(memory_gib(device), 2),
                    "unreadable": count}
            on_rank_0(write_line, log, line)
            bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
        if saving:
            save_run(f"{args.out}/last.pth", args, done, parts, unreadable)
        if stopped:
            break
    bar.close()

    ending = f"{args.out}: stopped after step {done} of {args.iterations}; the same command goes on"
    scores = None
    if done == args.iterations:
        scores = evaluate(model, val, args, rank, world, device, autocast, stopping)
    if scores is not None:
        names = "protocol iterations batch_size lr min_size rois precision seed arch data sha256".split()
        result = scores | {name: getattr(args, name) for name in names} | {"encoder": args.pretrained}
        on_rank_0(write_line, log, result)
        ending = json.dumps(result)
    if rank == 0:
        print(ending)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
