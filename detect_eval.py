"""Transfer to detection and instance segmentation, by Tables 4 and 5.

  torchrun --nproc_per_node 8 detect_eval.py \\
      --pretrained runs/care_resnet50/encoder.pth             VOC
  python detect_eval.py --pretrained runs/shapes/encoder.pth \\
      --protocol coco-fpn --data shapes --batch-size 4 --rois 64 \\
      --iterations 300
  python detect_eval.py --pretrained runs/shapes/encoder.pth \\
      --export-detectron2 encoder.pkl

  voc-c4    Table 4  Faster R-CNN: conv1-conv4 as backbone, conv5 and a batch
                     norm as box head
  coco-c4   Table 4  Mask R-CNN: the same, and the mask head on the box head's
                     map
  coco-fpn  Table 5  Mask R-CNN: feature pyramid, two linear layers as box head

All layers and batch norms train (MoCo's protocol); what torchvision's models
leave open is as in Detectron2. VOC is scored as in 2007, COCO by pycocotools.
The last line on stdout is one JSON object: the scores and all that led to
them. The same command again resumes.
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
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import backbone_utils, faster_rcnn, mask_rcnn, roi_heads, rpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import MultiScaleRoIAlign, box_convert, roi_align

from care import ARCHS, InputError
from common.boxes import (as_tensors, collate, digest_with_boxes, grouped_batches,
                          open_sources)
from common.data import Stream
from common.ranks import (fail, gather, note, parallelise, same_on_all_ranks,
                          take_buffers_of_rank_0, user_errors)
from common.run import (STOPPED, Run, add_run_arguments, checked, count, new_parser, not_empty,
                        positive, versions, write_whole)
from common.views import IMAGENET_MEAN, IMAGENET_STD
from common.weights import checkpoint_file, open_encoder, sha256_of

# falls: the steps after which the rate falls to a tenth; sizes: of the shorter side, in pixels
VOC = {"iterations": 24000, "warmup": 100, "falls": (18000, 22000), "sizes": range(480, 801, 32)}
COCO = {"iterations": 90000, "warmup": 1000, "falls": (60000, 80000), "sizes": range(640, 801, 32)}
PROTOCOLS = {"voc-c4": VOC, "coco-c4": COCO, "coco-fpn": COCO}
MAX_SIZE = 1333  # of the longer side, in pixels
PROTOCOL_VERSION = 2  # raised when a resumed run would train in another way than before
# What may differ when a run is resumed (the encoder's sha256 counts, not its path), and what an
# argument was before it existed.
FREE = ("workers", "out", "save_every", "log_every", "max_steps", "pretrained", "val_digest")
DEFAULTS = {"protocol_version": 1}


# -------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    """The command line as a namespace; a mistake in it is one line on stderr and exit code 2."""
    parser = new_parser(__doc__)
    add = parser.add_argument_group("encoder and data").add_argument
    add("--pretrained", required=True, type=checkpoint_file, metavar="FILE|random",
        help="encoder: a file of train.py, the authors, torchvision, MoCo, ...; or random weights")
    add("--arch", choices=ARCHS, metavar="ARCH",
        help=f"encoder: {', '.join(ARCHS)} (default: read off the file; random: resnet50)")
    add("--data", type=not_empty, metavar="PATH|shapes",
        help="folder with VOCdevkit/, or annotations/, train2017/, val2017/ (default ./voc, "
             "./coco), or embedded scenes; shapes:N has N training images")
    pickle_name = checked(str, "a name that ends in .pkl", lambda text: text.endswith(".pkl"))
    add("--export-detectron2", type=pickle_name, metavar="OUT.pkl",
        help="only write the encoder for Detectron2")
    add = parser.add_argument_group("protocol").add_argument
    add("--protocol", choices=PROTOCOLS, default="voc-c4",
        help="what is trained and scored, as said above (default voc-c4)")
    add("--iterations", type=count,
        help="training steps; the schedule scales with them (default 24000, COCO 90000)")
    add("--batch-size", type=count, default=16, help="images a step, over all ranks (default 16)")
    add("--lr", type=positive, default=0.02, help="peak learning rate of SGD (default 0.02)")
    side = checked(int, f"a multiple of 32, up to {MAX_SIZE}, the longest side",
                  lambda value: value % 32 == 0 and 0 < value <= MAX_SIZE)
    add("--min-size", type=side, nargs="+", metavar="PX",
        help="shorter sides, one drawn per image; testing takes the last, and anchors scale with "
             "it (default 480-800 by 32, COCO 640-800, shapes 128)")
    add("--rois", type=count, default=512,
        help="regions per image that train the heads (default 512); testing looks at twice as many "
             "proposals, 1000 at most")
    add = parser.add_argument_group("running").add_argument
    add_run_arguments(add)
    add("--save-every", type=count, default=1000, metavar="STEPS",
        help="steps between checkpoints (default 1000)")
    return fill_in(parser.parse_args(argv))


def fill_in(args):
    """Fill in the defaults that depend on other arguments, and check them."""
    protocol = PROTOCOLS[args.protocol]
    if args.iterations is None:
        args.iterations = protocol["iterations"]
    if args.data is None:
        args.data = args.protocol.partition("-")[0]
    if args.min_size is None:
        shapes = args.data.partition(":")[0] == "shapes"
        args.min_size = [128] if shapes else list(protocol["sizes"])
    if args.out is None:
        parent = "runs/random" if args.pretrained == "random" else Path(args.pretrained).parent
        args.out = f"{parent}/{args.protocol}"
    args.protocol_version = PROTOCOL_VERSION
    return args


def export_detectron2(encoder, path):
    """Write an encoder as a pickle of arrays by Detectron2's names, without num_batches_tracked."""
    arrays = {}
    for key, value in encoder.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            key = re.sub(r"^(?!layer)", "stem.", key)
            key = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", key)
            key = re.sub(r"bn(\d)", r"conv\1.norm", key)
            key = key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
            arrays[key] = value.cpu().numpy()
    content = {"model": arrays, "__author__": "CARE", "matching_heuristics": True}
    write_whole(path, pickle.dumps(content))


# --------------------------------------------------------------------------------------- detector
class Transform(GeneralizedRCNNTransform):
    """Images and boxes to the detector's size and back; masks stay at the size they have."""

    def resize(self, image, target=None):
        masks = target.pop("masks", None) if target else None
        image, target = super().resize(image, target)
        if masks is not None:
            target["masks"] = masks
        return image, target

    def postprocess(self, found, resized, sizes):
        for one, before, size in zip(found, resized, sizes):
            one["boxes"] = resize_boxes(one["boxes"], before, size)
            if "masks" in one:
                one["masks"] = paste_masks(one["masks"], one["boxes"], size)
        return found


def paste_masks(masks, boxes, size):
    """Probabilities (n, 1, M, M) inside boxes (n, 4) in pixels -> (n, 1, *size), whether inside.

    A mask is read bilinearly at each pixel's centre, as in Detectron2.
    """
    height, width = size
    pasted = masks.new_zeros((len(masks), 1, height, width), dtype=torch.bool)
    for mask, (x0, y0, x1, y1), image in zip(masks, boxes.tolist(), pasted):
        left, right = max(0, math.floor(x0)), min(width, math.ceil(x1))
        top, bottom = max(0, math.floor(y0)), min(height, math.ceil(y1))
        x = 2 * (torch.arange(left, right) + 0.5 - x0) / (x1 - x0) - 1  # -1 and 1: the box's sides
        y = 2 * (torch.arange(top, bottom) + 0.5 - y0) / (y1 - y0) - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).to(mask)
        values = F.grid_sample(mask[None], grid[None], align_corners=False)[0]
        image[:, top:bottom, left:right] = values >= 0.5
    return pasted


def crop_masks(masks, boxes, matches, resized, side):
    """What mask heads learn: masks (n, H, W) inside boxes (R, 4) -> (R, side, side), 0 to 1.

    Of each cell the part that is inside; Detectron2 rounds it to 0 or 1. matches (R,): a box's
    mask; resized: the size (height, width) of the image that the boxes lie in.
    """
    boxes = resize_boxes(boxes, resized, masks.shape[1:])
    places = torch.cat((matches[:, None].to(boxes), boxes), 1)
    return roi_align(masks[:, None].to(boxes), places, side, aligned=True)[:, 0]


class Heads(roi_heads.RoIHeads):
    """torchvision's heads, whose masks learn from `crop_masks`.

    A mask head that is the box head, C4's conv5, sees a training batch's R regions once.
    """

    def forward(self, features, proposals, image_shapes, targets=None):
        if not self.training:
            return super().forward(features, proposals, image_shapes)
        boxes, matches, labels, deltas = self.select_training_samples(proposals, targets)
        maps = self.box_head(self.box_roi_pool(features, boxes, image_shapes))  # C4: (R, C5, 7, 7)
        logits, sides = self.box_predictor(maps)
        loss_class, loss_box = roi_heads.fastrcnn_loss(logits, sides, labels, deltas)
        losses = {"loss_classifier": loss_class, "loss_box_reg": loss_box}
        if self.has_mask():
            objects = [part > 0 for part in labels]
            boxes, matches, labels = ([part[keep] for part, keep in zip(parts, objects)]
                                      for parts in (boxes, matches, labels))
            if self.mask_head is self.box_head:
                maps = maps[torch.cat(objects)]
            else:
                maps = self.mask_head(self.mask_roi_pool(features, boxes, image_shapes))
            logits = self.mask_predictor(maps)  # (objects, classes, M, M)
            inside = [crop_masks(target["masks"], *rest, side=logits.shape[-1])
                      for target, *rest in zip(targets, boxes, matches, image_shapes)]
            losses["loss_mask"] = mask_loss(logits, torch.cat(labels), torch.cat(inside))
        return [], losses


def mask_loss(logits, labels, inside):
    """Binary cross-entropy of the masks (n, M, M) of the right classes; 0 where there are none."""
    logits = logits[torch.arange(len(labels), device=labels.device), labels]
    total = F.binary_cross_entropy_with_logits(logits, inside, reduction="sum")
    return total / max(1, inside.numel())


def as_float32(out):
    """Nested lists and dicts of tensors in float32: torchvision computes boxes in their type."""
    if isinstance(out, dict):
        return {name: as_float32(value) for name, value in out.items()}
    if torch.is_tensor(out):
        return out.float()
    return [as_float32(value) for value in out]


def pool_conv4(maps, boxes, image_shapes):
    """RoIAlign of a map at stride 16 to (R, C4, 14, 14)."""
    return roi_align(maps["0"], boxes, 14, spatial_scale=1 / 16, sampling_ratio=0, aligned=True)


def c4_parts(encoder, outputs, masks):
    """-> backbone, its width, and the heads' modules by torchvision's names."""
    backbone = nn.Sequential(encoder.conv1, encoder.bn1, encoder.relu, encoder.maxpool,
                             encoder.layer1, encoder.layer2, encoder.layer3)
    width = encoder.dim5
    box_head = nn.Sequential(encoder.layer4, nn.BatchNorm2d(width))  # (R, C5, 7, 7)
    linear = faster_rcnn.FastRCNNPredictor(width, outputs)
    heads = {"box_roi_pool": pool_conv4, "box_head": box_head,
             "box_predictor": nn.Sequential(nn.AdaptiveAvgPool2d(1), linear)}
    if masks:
        heads |= {"mask_roi_pool": pool_conv4, "mask_head": box_head,
                  "mask_predictor": mask_rcnn.MaskRCNNPredictor(width, 256, outputs)}
    return backbone, encoder.dim4, heads


def fpn_parts(encoder, outputs, scale):
    """As `c4_parts`. scale: of the images; 1 where their shorter side is 800 pixels."""
    layers = {"layer1": "0", "layer2": "1", "layer3": "2", "layer4": "3"}
    widths = [encoder.dim5 // 8, encoder.dim5 // 4, encoder.dim5 // 2, encoder.dim5]
    backbone = backbone_utils.BackboneWithFPN(encoder, layers, widths, 256,
                                              norm_layer=nn.BatchNorm2d)
    align = partial(MultiScaleRoIAlign, ["0", "1", "2", "3"], sampling_ratio=0,
                    canonical_scale=224 * scale)
    heads = {"box_roi_pool": align(output_size=7),
             "box_head": faster_rcnn.TwoMLPHead(256 * 7 * 7, 1024),
             "box_predictor": faster_rcnn.FastRCNNPredictor(1024, outputs),
             "mask_roi_pool": align(output_size=14),
             "mask_head": mask_rcnn.MaskRCNNHeads(256, [256] * 4, 1, nn.BatchNorm2d),
             "mask_predictor": mask_rcnn.MaskRCNNPredictor(256, 256, outputs)}
    return backbone, 256, heads


def new_detector(encoder, protocol, classes, min_size=(800,), rois=512):
    """A torchvision detector around an encoder's own modules.

    Takes lists of images, in 0..1, and of targets. classes: how many, without background. Anchors
    and the pyramid's levels are the protocol's where min_size ends in 800, and scale with it.
    """
    scale = min_size[-1] / 800
    sizes = [size * scale for size in (32, 64, 128, 256, 512)]
    ratios = (0.5, 1.0, 2.0)
    if protocol == "coco-fpn":
        backbone, width, heads = fpn_parts(encoder, classes + 1, scale)
        anchors = AnchorGenerator([[size] for size in sizes], [ratios] * len(sizes))
        before_nms, after_nms = {"training": 2000, "testing": 1000}, {"training": 1000}
    else:
        backbone, width, heads = c4_parts(encoder, classes + 1, masks=protocol == "coco-c4")
        anchors = AnchorGenerator([sizes], [ratios])
        before_nms, after_nms = {"training": 12000, "testing": 6000}, {"training": 2000}
    after_nms["testing"] = min(1000, 2 * rois)
    head = rpn.RPNHead(width, anchors.num_anchors_per_location()[0])
    proposals = rpn.RegionProposalNetwork(
        anchors, head, fg_iou_thresh=0.7, bg_iou_thresh=0.3, batch_size_per_image=256,
        positive_fraction=0.5, pre_nms_top_n=before_nms, post_nms_top_n=after_nms, nms_thresh=0.7)
    regions = Heads(
        **heads, fg_iou_thresh=0.5, bg_iou_thresh=0.5, batch_size_per_image=rois,
        positive_fraction=0.25, bbox_reg_weights=(10.0, 10.0, 5.0, 5.0), score_thresh=0.05,
        nms_thresh=0.5, detections_per_img=100)
    for module in (backbone, head, regions.box_predictor, regions.mask_predictor):
        if module is not None:
            module.register_forward_hook(lambda module, inputs, out: as_float32(out))
    transform = Transform(min_size, MAX_SIZE, IMAGENET_MEAN, IMAGENET_STD)
    return GeneralizedRCNN(backbone, proposals, regions, transform)


# ---------------------------------------------------------------------------------------- scoring
def as_records(objects, image, masks):
    """COCO's records of the objects, a target's or a detector's, in image number `image`.

    masks: whether the objects' are to be scored.
    """
    from pycocotools.mask import encode
    boxes = box_convert(objects["boxes"].cpu().double(), "xyxy", "xywh").tolist()
    nothing = torch.zeros(len(boxes))
    labels = objects["labels"].tolist()
    scores = objects.get("scores", nothing).tolist()
    crowd = objects.get("crowd", nothing).tolist()
    if masks:
        stack = objects["masks"].flatten(0, -3).permute(1, 2, 0).byte()  # (height, width, n)
        codes = encode(np.asfortranarray(stack.cpu().numpy()))
    records = []
    for n, box in enumerate(boxes):
        one = {"image_id": image, "category_id": labels[n], "bbox": box, "area": box[2] * box[3],
               "score": scores[n], "iscrowd": int(crowd[n])}
        if masks:
            one["segmentation"] = codes[n]
        records.append(one)
    return records


def voc07_precision(matches, count, threshold):
    """VOC07's average precision of a class: the mean over recalls 0, 0.1, ..., 1, in percent.

    matches: for each detection, the surest first, the object of its image that it overlaps most,
    and their IoU. Above the threshold it is right, or wrong if a surer one has that object; where
    that object is difficult (crowd), it is neither. count: how many objects there are to find.
    """
    taken, right = set(), []
    for best, overlap in matches:
        if overlap <= threshold:
            right.append(False)
        elif not best["iscrowd"]:
            right.append(id(best) not in taken)
            taken.add(id(best))
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(hits) + 1)
    recall = hits / count
    levels = np.arange(11) / 10
    return 100 * np.mean([precision[recall >= level].max(initial=0) for level in levels])


def voc07_scores(truth, found):
    """AP, AP50, AP75 of boxes in percent; AP is the mean over IoU thresholds 0.5, 0.55, ..., 0.95.

    All are means over the classes that have objects to find. truth, found: lists of `as_records`.
    """
    from pycocotools.mask import iou
    objects, counts, matches = {}, {}, {}
    for one in truth:
        objects.setdefault((one["image_id"], one["category_id"]), []).append(one)
        if not one["iscrowd"]:
            counts[one["category_id"]] = counts.get(one["category_id"], 0) + 1
    for one in sorted(found, key=lambda one: (-one["score"], one["image_id"])):
        others = objects.get((one["image_id"], one["category_id"]), [])
        best, overlap = None, 0.0
        if others:
            overlaps = iou([one["bbox"]], [other["bbox"] for other in others], [0] * len(others))
            best, overlap = others[overlaps[0].argmax()], overlaps.max()
        matches.setdefault(one["category_id"], []).append((best, overlap))
    by_threshold = []
    for threshold in np.arange(50, 100, 5) / 100:
        precisions = [voc07_precision(matches.get(label, []), count, threshold)
                      for label, count in counts.items()]
        by_threshold.append(float(np.mean(precisions)))
    return {"AP": float(np.mean(by_threshold)), "AP50": by_threshold[0], "AP75": by_threshold[5]}


def coco_scores(images, truth, found):
    """COCOeval's AP, AP50, AP75 of boxes, and AP_mask, AP50_mask, AP75_mask, in percent.

    images: COCO's records of them (id, height, width); truth, found: lists of `as_records`.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    categories = [{"id": label} for label in sorted({one["category_id"] for one in truth})]
    scores, sets = {}, (COCO(), COCO())
    with contextlib.redirect_stdout(io.StringIO()):
        for coco, records in zip(sets, (truth, found)):
            numbered = [one | {"id": number} for number, one in enumerate(records, 1)]
            coco.dataset = {"images": images, "categories": categories, "annotations": numbered}
            coco.createIndex()
        for kind, suffix in (("bbox", ""), ("segm", "_mask")):
            result = COCOeval(*sets, kind)
            result.evaluate()
            result.accumulate()
            result.summarize()
            for name, value in zip(("AP", "AP50", "AP75"), result.stats.tolist()):
                scores[name + suffix] = 100 * value
    return scores


@torch.no_grad()
def evaluate(run, args, model, source):
    """Scores of a detector on a whole source, {} except on rank 0; None if a signal asks to stop.

    Exit code 2 if an image cannot be read.
    """
    model.eval()
    take_buffers_of_rank_0(model)
    masks, sizes, truth, found = args.protocol != "voc-c4", [], [], []
    batches = run.in_order(source, as_tensors, "val", args.batch_size, collate)
    for images, targets, numbers in batches:
        with run.autocast:
            detections = model(to_device(images, run.device))
        for number, image, target, detection in zip(numbers, images, targets, detections):
            sizes.append({"id": number, "height": image.shape[1], "width": image.shape[2]})
            truth += as_records(target, number, masks)
            found += as_records(detection, number, masks)
    if run.stopping():
        return None
    shares = gather((sizes, truth, found))
    if run.rank > 0:
        return {}
    sizes, truth, found = (sum(lists, []) for lists in zip(*shares))
    return coco_scores(sizes, truth, found) if masks else voc07_scores(truth, found)


# --------------------------------------------------------------------------------------- training
def lr_at(step, args):
    """Learning rate of step 0, 1, ...: linear from a thousandth of its peak, two falls."""
    protocol = PROTOCOLS[args.protocol]
    warmup = max(1, min(protocol["warmup"], args.iterations // 10))
    scale = args.iterations / protocol["iterations"]
    fallen = sum(step >= round(fall * scale) for fall in protocol["falls"])
    return args.lr * min(1.0, 0.001 + 0.999 * step / warmup) * 0.1 ** fallen


def new_optimizer(model):
    """SGD, with weight decay on all but the batch norms (Detectron2)."""
    norms = set()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            norms.update(module.parameters())
    decayed = [parameter for parameter in model.parameters() if parameter not in norms]
    others = [parameter for parameter in model.parameters() if parameter in norms]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 1e-4}]
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9)


def to_device(tensors, device):
    """A list, or a dict, of tensors on the device."""
    if isinstance(tensors, dict):
        return {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
    return [value.to(device, non_blocking=True) for value in tensors]


def train_step(parallel, optimizer, run, images, targets, lr):
    """One step of the optimiser -> the losses, scalars on the device, by name."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    with run.autocast:
        losses = parallel(images, targets)
    loss = sum(losses.values())
    optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(loss).backward()
    run.scaler.step(optimizer)
    run.scaler.update()
    return {"loss": loss, **losses}


# ------------------------------------------------------------------------------------------- main
def open_all(run, args):
    """The encoder, the images to train on and those to score.

    Fills in arch, sha256, images, data_digest, val_digest.
    """
    with user_errors():
        encoder = open_encoder(args.pretrained, args.arch, "imagenet", args.seed)
        source, val = open_sources(args.data, args.protocol)
        if args.batch_size % run.world or len(source) < args.batch_size:
            raise InputError(f"--batch-size {args.batch_size}: must be a multiple of {run.world} "
                             f"ranks and at most {len(source)}, the number of training images")
        args.data_digest = digest_with_boxes(source, args.data, "train")
        args.val_digest = digest_with_boxes(val, args.data, "val")
    same_on_all_ranks(val_digest=args.val_digest)
    if encoder.left_out:
        note(f"{args.pretrained}: left out {', '.join(encoder.left_out)}")
    args.arch, args.sha256, args.images = encoder.arch, sha256_of(encoder), len(source)
    return encoder, source, val


def transfer(run, args):
    """The whole protocol: train a detector around the encoder, score it."""
    torch.backends.cudnn.benchmark = False  # image sizes vary
    encoder, source, val = open_all(run, args)

    torch.manual_seed(args.seed)
    model = new_detector(encoder, args.protocol, len(source.classes), args.min_size, args.rois)
    model = model.to(run.device)
    optimizer = new_optimizer(model)
    run.restore({"model": model, "optimizer": optimizer}, args.iterations, args.save_every,
                defaults=DEFAULTS)
    if run.world > 1 and run.device.type == "cuda":  # torch's layer: a rank may have no masks
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    parallel = parallelise(model, run.device)

    per_epoch = args.images // args.batch_size * args.batch_size
    stream = Stream(source, partial(as_tensors, flip=0.5), args.seed, per_epoch)
    model.train()
    batches = run.batches(stream, args.batch_size, collate=collate,
                          numbers=partial(grouped_batches, stream))
    for step, [(images, targets, _)] in batches:
        # the sizes of images and the sampling of regions are drawn from this seed
        seed = np.random.SeedSequence((args.seed, step, run.rank)).generate_state(1)[0]
        torch.manual_seed(int(seed))
        images = to_device(images, run.device)
        targets = [to_device(target, run.device) for target in targets]
        lr = lr_at(step, args)
        losses = train_step(parallel, optimizer, run, images, targets, lr=lr)
        run.after(step + 1, losses, lr=lr)

    scores = None if run.unfinished() else evaluate(run, args, model, val)
    if scores is None:
        run.finish(run.unfinished() or STOPPED)
        return
    metric = "VOC07, 11 points of recall" if args.protocol == "voc-c4" else "COCO"
    result = {**scores, "metric": metric, "encoder": args.pretrained, **vars(args),
              "max_size": MAX_SIZE, "val_images": len(val), **versions(run.world, run.device)}
    run.log(result)
    run.finish(json.dumps(result))


def main(argv=None):
    args = parse_args(argv)
    if args.export_detectron2:
        with user_errors():
            encoder = open_encoder(args.pretrained, args.arch, "imagenet", args.seed)
            export_detectron2(encoder, args.export_detectron2)
        return
    try:
        import pycocotools.cocoeval  # noqa: F401
    except ImportError:
        fail("scoring needs pycocotools: pip install pycocotools")
    with Run(args, FREE) as run:
        transfer(run, args)


if __name__ == "__main__":
    main()
