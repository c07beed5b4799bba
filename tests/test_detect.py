"""detect_eval.py: detectors, protocols and their settings, runs end to end."""
import json
import pickle
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import Subset

import care
import common.boxes
import common.run
import detect_eval
from conftest import header, refused, same_log, steps, torchrun
from common.weights import load_encoder, sha256_of
from test_boxes import (PROTOCOLS, Oracle, batch, coco_tree, detector, evaluate, scenes,
                              voc_tree)

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--pretrained", "random", "--arch", "thin", "--min-size", "64", "--rois", "4",
         "--batch-size", "2", "--workers", "0", "--log-every", "1", "--lr", "0.002"]


# --------------------------------------------------------------------------------------- detectors
@pytest.mark.parametrize("protocol", ["voc-c4", "coco-c4"])
def test_c4_detectors(protocol):
    encoder = care.Encoder("thin")
    model = detect_eval.new_detector(encoder, protocol, 3, [64])
    heads = model.roi_heads
    dim4, dim5 = encoder.dim4, encoder.dim5
    assert model.backbone(torch.randn(2, 3, 64, 96)).shape == (2, dim4, 4, 6)  # stride 16
    assert model.backbone[0] is encoder.conv1 and model.backbone[6] is encoder.layer3
    conv5, norm = heads.box_head
    assert conv5 is encoder.layer4
    assert isinstance(norm, nn.BatchNorm2d) and norm.num_features == dim5
    ramp = torch.arange(6.0).expand(1, dim4, 4, 6)  # x in cells of 16 pixels, centres at 8, 24, ...
    box = torch.tensor([[16.0, 16, 72, 48]])
    pooled = heads.box_roi_pool({"0": ramp}, [box], [(64, 96)])
    assert pooled.shape == (1, dim4, 14, 14)  # a bin is 4 pixels wide, the first's centre at 18
    torch.testing.assert_close(pooled[0, 0, 5], (torch.arange(14) * 4 + 18 - 8) / 16)
    maps = heads.box_head(torch.randn(5, dim4, 14, 14))
    assert maps.shape == (5, dim5, 7, 7)
    assert torch.allclose(maps.mean((0, 2, 3)), torch.zeros(dim5), atol=1e-5)  # the norm comes last
    assert [tuple(out.shape) for out in heads.box_predictor(maps)] == [(5, 4), (5, 16)]
    assert heads.has_mask() == (protocol == "coco-c4")
    if protocol == "coco-c4":
        assert heads.mask_head is heads.box_head
        assert heads.mask_roi_pool is heads.box_roi_pool
        assert heads.mask_predictor(maps).shape == (5, 4, 14, 14)


def test_fpn_detector():
    encoder = care.Encoder("thin")
    model = detect_eval.new_detector(encoder, "coco-fpn", 3, [64])
    assert model.backbone.body.conv1 is encoder.conv1
    assert model.backbone.body.layer4 is encoder.layer4
    shapes = [level.shape for level in model.backbone(torch.randn(1, 3, 64, 64)).values()]
    assert shapes == [(1, 256, side, side) for side in (16, 8, 4, 2, 1)]
    pyramid = model.backbone.fpn
    for part in (pyramid.inner_blocks, pyramid.layer_blocks, model.roi_heads.mask_head):
        assert sum(isinstance(module, nn.BatchNorm2d) for module in part.modules()) == 4
    maps = model.roi_heads.mask_head(torch.randn(2, 256, 14, 14))
    assert model.roi_heads.mask_predictor(maps).shape == (2, 4, 28, 28)
    with torch.no_grad():
        assert model.roi_heads.box_head(torch.randn(2, 256, 7, 7)).shape == (2, 1024)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_layer_and_batch_norm_of_a_detector_trains_once_a_step(protocol):
    model = detector(protocol).train()
    losses = model(*batch(scenes(2)))
    assert ("loss_mask" in losses) == (protocol != "voc-c4")
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad and parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    norms = [module for module in model.modules() if "BatchNorm" in type(module).__name__]
    in_encoder = [name for name in care.Encoder("thin").state_dict() if "running_mean" in name]
    added = {"voc-c4": 1, "coco-c4": 1, "coco-fpn": 8 + 4}[protocol]
    assert len(norms) == len(in_encoder) + added
    for module in norms:
        assert isinstance(module, nn.BatchNorm2d) and module.num_batches_tracked == 1


def test_masks_of_c4_train_on_the_maps_of_their_own_regions():
    model = detector("coco-c4").train()
    heads, seen = model.roi_heads, {}
    heads.box_head.register_forward_hook(lambda module, inputs, out: seen.update(maps=out))
    heads.mask_predictor.register_forward_hook(
        lambda module, inputs, out: seen.update(mask=inputs[0]))
    select = heads.select_training_samples
    heads.select_training_samples = lambda *inputs: seen.setdefault("samples", select(*inputs))
    model(*batch(scenes(2)))
    labels = torch.cat(seen["samples"][2])
    assert 0 < (labels > 0).sum() < len(labels) == len(seen["maps"])
    assert torch.equal(seen["mask"], seen["maps"][labels > 0])


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("empty", [(1,), (0, 1)])
def test_images_without_objects_train(empty, protocol):
    images, targets = batch(scenes(2))
    for number in empty:
        targets[number] = {name: value[:0] for name, value in targets[number].items()}
    model = detector(protocol).train()
    losses = model(images, targets)
    sum(losses.values()).backward()
    assert torch.isfinite(sum(losses.values()))
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("protocol", ["coco-c4", "coco-fpn"])
def test_masks_learn_their_own_object_inside_their_box(protocol, monkeypatch):
    """Two images of other sizes than the detector's: every target is cut from the right mask."""
    model = detector(protocol, rois=32).train()
    seen, images, targets = [], *batch(scenes(2, size=96))
    plain = detect_eval.mask_loss
    monkeypatch.setattr(detect_eval, "mask_loss",
                        lambda *rest: seen.extend(rest) or plain(*rest))
    select, samples = model.roi_heads.select_training_samples, []
    model.roi_heads.select_training_samples = lambda *rest: samples.extend(select(*rest)) or samples
    losses = model(images, targets)
    (logits, labels, inside), (boxes, matches, all_labels, _) = seen, samples
    side = {"coco-c4": 14, "coco-fpn": 28}[protocol]
    assert logits.shape == (len(labels), 11, side, side) and inside.shape == logits[:, 0].shape
    right = torch.sigmoid(logits[range(len(labels)), labels])
    assert losses["loss_mask"].item() == pytest.approx(
        nn.functional.binary_cross_entropy(right, inside).item(), rel=1e-4)
    row = 0
    for image in range(2):
        for box, match, label in zip(boxes[image], matches[image], all_labels[image]):
            if label == 0:
                continue
            x0, y0, x1, y1 = (box * 96 / 64).tolist()  # in the image as it was
            mask = targets[image]["masks"][match]
            x = (x0 + (torch.arange(side) + 0.5) * (x1 - x0) / side).long().clamp(0, 95)
            y = (y0 + (torch.arange(side) + 0.5) * (y1 - y0) / side).long().clamp(0, 95)
            assert labels[row] == label == targets[image]["labels"][match]
            assert (inside[row].round() == mask[y][:, x]).float().mean() > 0.85
            assert inside[row].min() >= 0 and inside[row].max() <= 1
            row += 1
    assert row == len(labels) >= 4


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_boxes_stay_float32_under_bf16(protocol):
    model, seen = detector(protocol, rois=4), []
    for module in (model.rpn.head, model.roi_heads.box_predictor):
        module.register_forward_hook(lambda module, inputs, out: seen.extend(out))
    images, targets = batch(scenes(2))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        losses = model.train()(images, targets)
        model.eval()
        model.roi_heads.score_thresh, model.roi_heads.detections_per_img = 0.0, 5
        found = model(images)
    tensors = []
    for part in seen:
        tensors.extend(part if isinstance(part, list) else [part])
    assert tensors and all(tensor.dtype == torch.float32 for tensor in tensors)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    boxes = torch.cat([one["boxes"] for one in found])
    assert len(boxes) and boxes.dtype == torch.float32
    assert not torch.equal(boxes, boxes.bfloat16().float())


# -------------------------------------------------------------------------------------- protocols
SIDES = {"voc-c4": list(range(480, 801, 32)), "coco-c4": list(range(640, 801, 32)),
         "coco-fpn": list(range(640, 801, 32))}
# Detectron2's keys; values of MoCo's configurations, and of Detectron2 where those say nothing.
SETTINGS = {
    "SOLVER.OPTIMIZER": "SGD", "SOLVER.IMS_PER_BATCH": 16, "SOLVER.BASE_LR": 0.02,
    "SOLVER.MOMENTUM": 0.9, "SOLVER.NESTEROV": False, "SOLVER.DAMPENING": 0,
    "SOLVER.WEIGHT_DECAY": 1e-4, "SOLVER.WEIGHT_DECAY_NORM": 0.0,
    "INPUT.MAX_SIZE_TRAIN": 1333, "INPUT.MAX_SIZE_TEST": 1333, "INPUT.MIN_SIZE_TEST": 800,
    "INPUT.RANDOM_FLIP": 0.5, "PIXEL_MEAN": [0.485, 0.456, 0.406],
    "PIXEL_STD": [0.229, 0.224, 0.225],
    "ANCHOR_GENERATOR.ASPECT_RATIOS": [0.5, 1.0, 2.0],
    "RPN.IOU_THRESHOLDS": [0.3, 0.7], "RPN.BATCH_SIZE_PER_IMAGE": 256,
    "RPN.POSITIVE_FRACTION": 0.5, "RPN.BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0),
    "RPN.NMS_THRESH": 0.7, "RPN.POST_NMS_TOPK_TEST": 1000,
    "ROI_HEADS.IOU_THRESHOLDS": [0.5, 0.5], "ROI_HEADS.BATCH_SIZE_PER_IMAGE": 512,
    "ROI_HEADS.POSITIVE_FRACTION": 0.25, "ROI_HEADS.SCORE_THRESH_TEST": 0.05,
    "ROI_HEADS.NMS_THRESH_TEST": 0.5, "TEST.DETECTIONS_PER_IMAGE": 100,
    "ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (10.0, 10.0, 5.0, 5.0),
}
OF_C4 = {"ANCHOR_GENERATOR.SIZES": [[32, 64, 128, 256, 512]], "RPN.PRE_NMS_TOPK_TRAIN": 12000,
         "RPN.PRE_NMS_TOPK_TEST": 6000, "RPN.POST_NMS_TOPK_TRAIN": 2000}
OF_FPN = {"ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
          "RPN.PRE_NMS_TOPK_TRAIN": 2000, "RPN.PRE_NMS_TOPK_TEST": 1000,
          "RPN.POST_NMS_TOPK_TRAIN": 1000, "ROI_BOX_HEAD.POOLER": ((7, 7), 0, 224, 4),
          "ROI_MASK_HEAD.POOLER": ((14, 14), 0, 224, 4)}


def settings_of(model, protocol):
    """A detector's settings by Detectron2's keys."""
    rpn, heads, transform = model.rpn, model.roi_heads, model.transform
    before, after = rpn._pre_nms_top_n, rpn._post_nms_top_n
    proposal, region = rpn.proposal_matcher, heads.proposal_matcher
    found = {
        "INPUT.MIN_SIZE_TRAIN": list(transform.min_size),
        "INPUT.MIN_SIZE_TEST": transform.min_size[-1],
        "INPUT.MAX_SIZE_TRAIN": transform.max_size, "INPUT.MAX_SIZE_TEST": transform.max_size,
        "PIXEL_MEAN": list(transform.image_mean), "PIXEL_STD": list(transform.image_std),
        "ANCHOR_GENERATOR.SIZES": [list(sizes) for sizes in rpn.anchor_generator.sizes],
        "RPN.IOU_THRESHOLDS": [proposal.low_threshold, proposal.high_threshold],
        "RPN.BATCH_SIZE_PER_IMAGE": rpn.fg_bg_sampler.batch_size_per_image,
        "RPN.POSITIVE_FRACTION": rpn.fg_bg_sampler.positive_fraction,
        "RPN.BBOX_REG_WEIGHTS": rpn.box_coder.weights, "RPN.NMS_THRESH": rpn.nms_thresh,
        "RPN.PRE_NMS_TOPK_TRAIN": before["training"], "RPN.PRE_NMS_TOPK_TEST": before["testing"],
        "RPN.POST_NMS_TOPK_TRAIN": after["training"], "RPN.POST_NMS_TOPK_TEST": after["testing"],
        "ROI_HEADS.IOU_THRESHOLDS": [region.low_threshold, region.high_threshold],
        "ROI_HEADS.BATCH_SIZE_PER_IMAGE": heads.fg_bg_sampler.batch_size_per_image,
        "ROI_HEADS.POSITIVE_FRACTION": heads.fg_bg_sampler.positive_fraction,
        "ROI_HEADS.SCORE_THRESH_TEST": heads.score_thresh,
        "ROI_HEADS.NMS_THRESH_TEST": heads.nms_thresh,
        "TEST.DETECTIONS_PER_IMAGE": heads.detections_per_img,
        "ROI_BOX_HEAD.BBOX_REG_WEIGHTS": heads.box_coder.weights,
    }
    ratios = {tuple(ratios) for ratios in rpn.anchor_generator.aspect_ratios}
    found["ANCHOR_GENERATOR.ASPECT_RATIOS"] = [*ratios.pop()] if len(ratios) == 1 else ratios
    if protocol == "coco-fpn":
        for name, pool in (("BOX", heads.box_roi_pool), ("MASK", heads.mask_roi_pool)):
            found[f"ROI_{name}_HEAD.POOLER"] = (pool.output_size, pool.sampling_ratio,
                                                pool.canonical_scale, pool.canonical_level)
    return found


def falling(fall, again, warm, steps=20):
    """Detectron2's rates of a run of 20 steps: linear from a thousandth, falls to a tenth."""
    rates = [0.02 * (0.001 * (1 - step / warm) + step / warm) for step in range(warm)]
    rates += [0.02] * (fall - warm) + [0.002] * (again - fall) + [0.0002] * (steps - again)
    return rates


@pytest.fixture
def watched(monkeypatch):
    """What reaches the detector and the optimiser in a run whose forward pass is left out.

    model; batches: of each step, pairs of an image and its number; seeds: of each step; optimizer;
    groups: of each step, the settings of its parameter groups.
    """
    seen = SimpleNamespace(model=None, batches=[], seeds=[], optimizer=None, groups=[])
    plain = detect_eval.collate

    def collate(samples):
        images, _, numbers, _ = plain(samples)
        seen.batches.append(list(zip(images, numbers)))
        return plain(samples)

    def forward(model, images, targets):
        seen.model = model
        seen.seeds.append(torch.initial_seed())
        return {"loss_a": next(model.parameters()).sum(), "loss_b": 0 * images[0].sum()}

    def before(optimizer, args, kwargs):
        seen.optimizer = optimizer
        groups = [{name: value for name, value in group.items() if name != "params"}
                  for group in optimizer.param_groups]
        seen.groups.append(groups)

    monkeypatch.setattr(detect_eval, "collate", collate)
    monkeypatch.setattr(detect_eval, "evaluate", lambda *rest: {"AP": 0.0})
    monkeypatch.setattr(detect_eval.GeneralizedRCNN, "forward", forward)
    hook = register_optimizer_step_pre_hook(before)
    yield seen
    hook.remove()


def decays_of(model, optimizer):
    """The weight decays of batch norms' parameters, and of all others, as two sets."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decays, trained = {True: set(), False: set()}, []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            trained.append(name)
            norm = f"{name.rpartition('.')[0]}.running_mean" in model.state_dict()
            decays[norm].add(group["weight_decay"])
    assert sorted(trained) == sorted(names.values())  # each once
    return decays[True], decays[False]


def only(values):
    """The value that all of them are."""
    (value,) = set(values)
    return value


@pytest.mark.parametrize("protocol, falls", [("voc-c4", (15, 18)), ("coco-c4", (13, 18)),
                                             ("coco-fpn", (13, 18))])
def test_the_protocol_is_mocos(protocol, falls, watched, tmp_path, monkeypatch):
    """As a run by default really has it, over a whole schedule of 20 steps."""
    source = scenes(40)
    monkeypatch.setattr(detect_eval, "open_sources", lambda *where: (source, source))
    detect_eval.main(["--pretrained", "random", "--arch", "thin", "--protocol", protocol,
                      "--iterations", "20", "--out", str(tmp_path)])
    found = settings_of(watched.model, protocol)
    found["SOLVER.OPTIMIZER"] = type(watched.optimizer).__name__
    found["SOLVER.IMS_PER_BATCH"] = only(len(images) for images in watched.batches)
    for name in ("momentum", "nesterov", "dampening"):
        values = [group[name] for groups in watched.groups for group in groups]
        found[f"SOLVER.{name.upper()}"] = only(values)
    norms, others = decays_of(watched.model, watched.optimizer)
    found["SOLVER.WEIGHT_DECAY_NORM"], found["SOLVER.WEIGHT_DECAY"] = only(norms), only(others)
    rates = [only(group["lr"] for group in groups) for groups in watched.groups]
    found["SOLVER.BASE_LR"] = max(rates)
    numbers = [[number for _, number in images] for images in watched.batches]
    for first, second in zip(numbers[::2], numbers[1::2]):  # an epoch has two whole batches
        assert len({*first, *second}) == 32
    assert len(set(map(tuple, numbers))) == 20 == len(set(watched.seeds))
    flips = []
    for images in watched.batches:
        for image, number in images:
            plain, _ = common.boxes.as_tensors(source[number][0])
            flips.append(not torch.equal(image, plain))
    found["INPUT.RANDOM_FLIP"] = 0.5 if 0.4 < np.mean(flips) < 0.6 else np.mean(flips)

    expected = SETTINGS | (OF_FPN if protocol == "coco-fpn" else OF_C4)
    assert found == expected | {"INPUT.MIN_SIZE_TRAIN": SIDES[protocol]}
    assert rates == pytest.approx(falling(*falls, warm=2))
    assert [line["lr"] for line in steps(tmp_path)][-1] == rates[-1]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_full_schedules(protocol):
    args = detect_eval.parse_args(["--pretrained", "random", "--protocol", protocol])
    voc = protocol == "voc-c4"
    assert args.iterations == (24000 if voc else 90000)
    assert args.data == ("voc" if voc else "coco") and args.min_size == SIDES[protocol]
    warm, first, second = (100, 18000, 22000) if voc else (1000, 60000, 80000)
    at = {0: 0.001, warm // 2: 0.5005, warm: 1, first - 1: 1, first: 0.1, second - 1: 0.1,
          second: 0.01, args.iterations - 1: 0.01}
    for step, part in at.items():
        assert detect_eval.lr_at(step, args) == pytest.approx(0.02 * part), step


def test_anchors_and_levels_scale_with_the_images():
    model = detect_eval.new_detector(care.Encoder("thin"), "coco-fpn", 3, [300, 400])
    sizes = [list(sizes) for sizes in model.rpn.anchor_generator.sizes]
    assert sizes == [[16], [32], [64], [128], [256]]
    assert model.roi_heads.box_roi_pool.canonical_scale == 112
    assert model.roi_heads.mask_roi_pool.canonical_scale == 112
    model = detect_eval.new_detector(care.Encoder("thin"), "coco-c4", 3, [64], rois=8)
    assert model.rpn._post_nms_top_n == {"training": 2000, "testing": 16}


@pytest.mark.parametrize("arch, blocks, convs", [("resnet50", (3, 4, 6, 3), 3),
                                                 ("resnet18", (2, 2, 2, 2), 2)])
def test_export_to_detectron2(arch, blocks, convs, tmp_path):
    torch.manual_seed(0)
    encoder = care.Encoder(arch)
    for value in encoder.state_dict().values():
        if value.is_floating_point():
            value.uniform_(-1, 1)
    torch.save(encoder.state_dict(), tmp_path / "encoder.pth")
    detect_eval.main(["--pretrained", str(tmp_path / "encoder.pth"),
                      "--export-detectron2", str(tmp_path / "out.pkl")])
    content = pickle.loads((tmp_path / "out.pkl").read_bytes())
    model = content.pop("model")
    assert content == {"__author__": "CARE", "matching_heuristics": True}
    places = {"stem.conv1": "conv1", "stem.conv1.norm": "bn1"}
    for stage, count in enumerate(blocks, 2):
        for block in range(count):
            theirs, ours = f"res{stage}.{block}", f"layer{stage - 1}.{block}"
            for conv in range(1, convs + 1):
                places[f"{theirs}.conv{conv}"] = f"{ours}.conv{conv}"
                places[f"{theirs}.conv{conv}.norm"] = f"{ours}.bn{conv}"
        if stage > 2 or convs == 3:  # the first block changes the width
            places[f"res{stage}.0.shortcut"] = f"layer{stage - 1}.0.downsample.0"
            places[f"res{stage}.0.shortcut.norm"] = f"layer{stage - 1}.0.downsample.1"
    pairs = {}
    for theirs, ours in places.items():
        norm = ("weight", "bias", "running_mean", "running_var")
        for part in norm if theirs.endswith("norm") else ("weight",):
            pairs[f"{theirs}.{part}"] = f"{ours}.{part}"
    assert model.keys() == pairs.keys()
    state = {pairs[name]: torch.from_numpy(array) for name, array in model.items()}
    missing, unexpected = getattr(torchvision.models, arch)().load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.startswith("fc.") or key.endswith("num_batches_tracked") for key in missing)
    for key, value in encoder.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(state[key], value), key


# -------------------------------------------------------------------------------------- the script
def detect(out, *flags):
    """Run the script in this process with small settings; `flags` override. -> its step lines."""
    detect_eval.main([*SMALL, "--out", str(out), *map(str, flags)])
    return steps(out)


class PooledHead(nn.Sequential):
    """In place of TwoMLPHead, whose 13 million weights make a checkpoint of 100 MB."""

    def __init__(self, width, outputs):
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, outputs), nn.ReLU())


class Upright(common.boxes.Scenes):
    """Scenes of 96 pixels, of which every third stands and the others lie: 64 are left."""

    def __init__(self, length):
        super().__init__("train", length, 96)
        self.sizes = np.array([(64, 96) if n % 3 == 0 else (96, 64) for n in range(length)])

    def __getitem__(self, index):
        (image, target), number = super().__getitem__(index)
        width, height = self.sizes[index].tolist()
        target["masks"] = target["masks"][:, :height, :width]
        return (image.crop((0, 0, width, height)), target), number


@pytest.fixture
def few(monkeypatch):
    """Images of 64 pixels, three for scoring, at most ten detections in each, and a small head."""
    plain = detect_eval.new_detector

    def open_sources(where, protocol):
        return scenes(int(where.partition(":")[2])), scenes(3, "val")

    def new_detector(*rest):
        model = plain(*rest)
        model.roi_heads.detections_per_img = 10
        return model

    monkeypatch.setattr(detect_eval, "open_sources", open_sources)
    monkeypatch.setattr(detect_eval, "new_detector", new_detector)
    monkeypatch.setattr(detect_eval.faster_rcnn, "TwoMLPHead", PooledHead)


@pytest.mark.parametrize("protocol, iterations", [("voc-c4", 4), ("coco-c4", 4), ("coco-fpn", 2)])
def test_a_run_resumes_exactly_and_scores(protocol, iterations, few, tmp_path, capsys, monkeypatch):
    encoder = care.Encoder("thin")
    torch.save(encoder.state_dict(), tmp_path / "encoder.pth")
    flags = ["--pretrained", tmp_path / "encoder.pth", "--protocol", protocol, "--data", "shapes:5",
             "--iterations", iterations, "--min-size", 64, 96]
    whole = detect(tmp_path / "whole", *flags)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    masks = ["AP_mask", "AP50_mask", "AP75_mask"] if protocol != "voc-c4" else []
    scores = ["AP", "AP50", "AP75", *masks]
    assert list(result)[:len(scores)] == scores
    assert [line["step"] for line in whole] == list(range(1, iterations + 1))
    for line in whole:
        total = sum(value for name, value in line.items() if name.startswith("loss_"))
        assert line["loss"] == pytest.approx(total, rel=1e-4)
        assert ("loss_mask" in line) == (protocol != "voc-c4")

    with monkeypatch.context() as patch:  # a signal while scoring
        patch.setattr(common.run, "catch_signals", lambda: [signal.SIGTERM])
        detect(tmp_path / "whole", *flags)
    assert capsys.readouterr().out.endswith("stopped while scoring; the same command resumes it\n")

    torch.rand(7)  # the random state outside the script does not matter
    half = iterations // 2
    detect(tmp_path / "cut", *flags, "--max-steps", half)
    assert capsys.readouterr().out.endswith(
        f"cut: step {half} of {iterations}: as --max-steps says; with a larger one, or without it, "
        "the same command resumes it\n")
    detect(tmp_path / "cut", *flags)
    assert same_log(tmp_path / "cut", tmp_path / "whole")
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again | {"out": 0} == result | {"out": 0}
    states = [torch.load(tmp_path / name / "last.pth", weights_only=True)["model"]
              for name in ("whole", "cut")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0][next(iter(states[0]))], encoder.conv1.weight)


def test_the_last_line_tells_all(few, tmp_path, capsys):
    """What it takes to repeat a run, and which scores these are."""
    encoder = tmp_path / "encoder.pth"
    torch.save(care.Encoder("thin").state_dict(), encoder)
    detect(tmp_path / "run", "--pretrained", encoder, "--data", "shapes:5", "--iterations", 1,
           "--seed", 3, "--min-size", 32, 64)
    printed = capsys.readouterr().out.splitlines()[-1]
    result = json.loads(printed)
    expected = {
        "metric": "VOC07, 11 points of recall", "protocol": "voc-c4", "protocol_version": 2,
        "encoder": str(encoder), "sha256": sha256_of(load_encoder(encoder)),
        "arch": "thin", "data": "shapes:5", "images": 5, "val_images": 3, "iterations": 1,
        "batch_size": 2, "lr": 0.002, "min_size": [32, 64], "max_size": 1333, "rois": 4, "seed": 3,
        "precision": "fp32", "world_size": 1, "torch": torch.__version__,
        "torchvision": torchvision.__version__, "numpy": np.__version__}
    assert {name: result.get(name) for name in expected} == expected
    assert "threads" in result["device"]
    assert (tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1] == printed
    assert header(tmp_path / "run")["args"]["protocol_version"] == 2


def test_a_run_that_began_with_another_protocol_is_refused(few, tmp_path, capsys):
    flags = ["--data", "shapes:4", "--iterations", 3, "--max-steps", 1]
    detect(tmp_path, *flags)
    path = tmp_path / "last.pth"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["args"]["protocol_version"]  # before it was numbered
    torch.save(checkpoint, path)
    capsys.readouterr()
    refused(capsys, *SMALL, *flags, "--out", tmp_path, match="protocol_version was 1, is 2",
            script=detect_eval)


def test_a_runs_steps_have_images_of_one_orientation(watched, tmp_path, monkeypatch):
    """Images of 64 x 96 and 96 x 64 pixels: no step pads either."""
    source = Upright(40)
    monkeypatch.setattr(detect_eval, "open_sources", lambda *where: (source, source))
    detect_eval.main([*SMALL, "--data", "shapes:40", "--iterations", "9", "--batch-size", "4",
                      "--out", str(tmp_path)])
    shapes = [{tuple(image.shape) for image, _ in images} for images in watched.batches]
    assert len(shapes) == 9 and {len(one) for one in shapes} == {1}
    assert len(set.union(*shapes)) == 2


def test_a_signal_stops_training_with_a_checkpoint(few, tmp_path, capsys, monkeypatch):
    received = []
    plain = detect_eval.train_step

    def train_step(*rest, **named):
        received.append(signal.SIGTERM)
        return plain(*rest, **named)

    monkeypatch.setattr(common.run, "catch_signals", lambda: received)
    monkeypatch.setattr(detect_eval, "train_step", train_step)
    detect(tmp_path, "--data", "shapes:4", "--iterations", 3)
    assert "step 1 of 3: stopped, the same command resumes it" in capsys.readouterr().out
    assert torch.load(tmp_path / "last.pth", weights_only=True)["step"] == 1


def test_losses_do_not_depend_on_workers_and_fall(few, tmp_path, monkeypatch):
    monkeypatch.setattr(detect_eval, "evaluate", lambda *rest: {"AP": 0.0})
    flags = ["--protocol", "coco-c4", "--data", "shapes:2", "--iterations", 12, "--lr", 0.01,
             "--rois", 16]
    lines = detect(tmp_path / "none", *flags)
    assert np.mean([line["loss"] for line in lines[-3:]]) < 0.7 * lines[0]["loss"], lines
    detect(tmp_path / "two", *flags, "--workers", 2, "--max-steps", 2)
    two = steps(tmp_path / "two")
    assert [line["loss"] for line in two] == [line["loss"] for line in lines[:2]]


def test_two_ranks_train_and_score(tmp_path):
    coco_tree(tmp_path / "coco")
    done = torchrun(2, "detect_eval.py", *SMALL, "--protocol", "coco-c4", "--iterations", 1,
                    "--data", tmp_path / "coco", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    result = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(result) == 1 and 0 <= result[0]["AP"] < 5
    assert result[0]["world_size"] == 2 and result[0]["val_images"] == 4
    assert [line["step"] for line in steps(tmp_path / "run")] == [1]


def score_a_shard(out):
    """On one of two ranks: the first answers with the truth, the other beside it; five images."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    source = scenes(5, "val")
    oracle = Oracle(Subset(source, range(rank, 5, 2)), shift=float(rank))
    scores = evaluate(oracle, source, "coco-c4", rank, 2)
    (Path(out) / f"{rank}.json").write_text(json.dumps(scores))
    torch.distributed.destroy_process_group()


def test_ranks_score_all_images_together(tmp_path):
    done = torchrun(2, score_a_shard, tmp_path)
    assert done.returncode == 0, done.stderr
    scores = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert scores[1] == {} and scores[0]["AP_mask"] == pytest.approx(100)
    assert 40 < scores[0]["AP"] < 95


# -------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("flags, match", [
    (["--data", "nowhere"], "no such folder"),
    (["--data", "shapes:no"], "number of training images"),
    (["--data", "shapes:1"], "--batch-size 2: must be .* at most 1, the number of training images"),
    (["--lr", 0], "--lr: 0: must be a number above 0"),
    (["--min-size", 16], "--min-size"),
    (["--min-size", 100], "multiple of 32"),
    (["--min-size", 2016], "--min-size: 2016: must be a multiple of 32, up to 1333"),
    (["--iterations", 0], "--iterations: 0: must be a whole number of at least 1"),
    (["--rois", 0], "--rois: 0: must be a whole number of at least 1"),
    (["--batch-size", 0], "--batch-size: 0: must be a whole number of at least 1"),
    (["--protocol", "voc-fpn"], "invalid choice"),
    (["--pretrained", "nofile.pth"], "nofile.pth"),
    (["--log-every", 0], "--log-every: 0: must be a whole number of at least 1"),
])
def test_bad_arguments(flags, match, tmp_path, capsys):
    refused(capsys, *SMALL, "--data", "shapes:4", "--max-steps", 1, "--out", tmp_path / "run",
            *flags, match=match, script=detect_eval)


def test_bad_encoders_and_folders(tmp_path, capsys):
    def check(*flags, match):
        refused(capsys, *SMALL, "--data", "shapes:4", "--max-steps", 1, "--out", tmp_path / "run",
                *flags, match=match, script=detect_eval)

    torch.save(care.Encoder("resnet18", "cifar").state_dict(), tmp_path / "cifar.pth")
    check("--arch", "resnet18", "--pretrained", tmp_path / "cifar.pth", match="stem")
    torch.save(care.Encoder("resnet34").state_dict(), tmp_path / "34.pth")
    check("--arch", "resnet18", "--pretrained", tmp_path / "34.pth", match="arch resnet18")
    check("--export-detectron2", tmp_path / "no" / "out.pkl", match="no/out.pkl")
    (tmp_path / "empty").mkdir()
    check("--data", tmp_path / "empty", match="must hold VOCdevkit/VOC2007 with .* of trainval")
    flags = ("--protocol", "coco-fpn", "--data")
    check(*flags, tmp_path / "empty", match="cannot read .*/instances_train2017.json")
    path = coco_tree(tmp_path / "coco") / "annotations" / "instances_train2017.json"
    for broken in (path.read_text()[:200], "[1, 2]", '{"images": [{}], "annotations": []}'):
        path.write_text(broken)
        check(*flags, tmp_path / "coco", match="cannot read .*train2017.json as annotations")
    assert not (tmp_path / "run" / "last.pth").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_image_ends_a_run_in_one_line_after_a_checkpoint(workers, tmp_path, capsys,
                                                                   monkeypatch):
    """In the process itself, and in one that loads; and before the first step."""
    def restore_and_lose(run, *rest, **named):
        restore(run, *rest, **named)
        for path in (tmp_path / "VOCdevkit").rglob("*.jpg"):
            path.unlink()

    restore = common.run.Run.restore
    voc_tree(tmp_path)
    flags = [*SMALL, "--data", tmp_path, "--iterations", 4, "--out", tmp_path / "run"]
    detect_eval.main([*map(str, flags), "--max-steps", "1"])
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(common.run.Run, "restore", restore_and_lose)
        refused(capsys, *flags, "--workers", workers, match="No such file .*jpg",
                script=detect_eval)
    refused(capsys, *flags, "--workers", workers, match="No such file .*jpg", script=detect_eval)
    assert torch.load(tmp_path / "run" / "last.pth", weights_only=True)["step"] == 1


def test_a_picture_that_no_one_can_decode_cannot_be_scored(tmp_path, capsys):
    voc_tree(tmp_path)
    (tmp_path / "VOCdevkit/VOC2007/JPEGImages/000003.jpg").write_bytes(b"no image")
    _, val = common.boxes.open_sources(str(tmp_path), "voc-c4")
    with pytest.raises(SystemExit) as caught:
        evaluate(detector("voc-c4", classes=20), val, "voc-c4")
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert re.search(r"cannot read .*000003\.jpg \(.+\), taking", error)
    assert error.splitlines()[-1] == "error: val cannot be scored without the images named above"


def test_too_many_such_pictures_end_training(tmp_path, capsys):
    for path in voc_tree(tmp_path).rglob("*.jpg"):
        path.write_bytes(b"no image")
    with pytest.raises(SystemExit) as caught:
        detect_eval.main([*SMALL, "--data", str(tmp_path), "--out", str(tmp_path / "run")])
    assert caught.value.code == 2
    assert "images cannot be read" in capsys.readouterr().err.splitlines()[-1]


def test_without_pycocotools(tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "pycocotools"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    refused(capsys, *SMALL, "--data", "shapes:4", "--max-steps", 1, "--out", tmp_path / "run",
            match="pip install pycocotools", script=detect_eval)
    assert not (tmp_path / "run").exists()
    for script in (detect_eval, common.boxes):
        text = Path(script.__file__).read_text()
        assert not re.search("^(import|from) pycocotools", text, re.MULTILINE)
    # exporting does without
    torch.save(care.Encoder("thin").state_dict(), tmp_path / "encoder.pth")
    detect_eval.main(["--pretrained", str(tmp_path / "encoder.pth"),
                      "--export-detectron2", str(tmp_path / "out.pkl")])
    assert (tmp_path / "out.pkl").exists()


def test_a_run_of_other_arguments_is_left_alone(few, tmp_path, capsys):
    flags = ["--data", "shapes:4", "--iterations", 3, "--max-steps", 1, "--out", tmp_path / "run"]
    detect(tmp_path / "run", *flags)
    capsys.readouterr()
    before = (tmp_path / "run" / "last.pth").read_bytes()
    refused(capsys, *SMALL, *flags, "--rois", 5, match="rois was 4, is 5", script=detect_eval)
    assert (tmp_path / "run" / "last.pth").read_bytes() == before


def test_other_annotations_are_another_run(tmp_path, capsys):
    """Of the same images, in the same folder; the result says of which it is."""
    voc_tree(tmp_path)
    out, flags = tmp_path / "run", ["--data", tmp_path, "--iterations", 1]
    detect(out, *flags)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    source, val = common.boxes.open_sources(str(tmp_path), "voc-c4")
    for name, one, split in (("data_digest", source, "train"), ("val_digest", val, "val")):
        expected = common.boxes.digest_with_boxes(one, str(tmp_path), split)
        assert result[name] == header(out)["args"][name] == expected
    annotation = tmp_path / "VOCdevkit/VOC2012/Annotations/000004.xml"
    assert "<xmin>5<" in annotation.read_text()
    annotation.write_text(annotation.read_text().replace("<xmin>5<", "<xmin>6<"))  # as long
    refused(capsys, *SMALL, *flags, "--out", out, match=r"\(data_digest was", script=detect_eval)


def test_an_export_replaces_no_checkpoint(tmp_path, capsys):
    torch.save(care.Encoder("thin").state_dict(), tmp_path / "encoder.pth")
    refused(capsys, "--pretrained", tmp_path / "encoder.pth", "--export-detectron2",
            tmp_path / "encoder.pth", match="must be a name that ends in .pkl", script=detect_eval)
    assert len(torch.load(tmp_path / "encoder.pth", weights_only=True)) > 1
