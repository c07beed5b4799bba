"""train.py: its arguments, what a run leaves, its protocol, the step, ranks, kNN, a GPU."""
import argparse
import contextlib
import ctypes
import hashlib
import inspect
import json
import math
import os
import pickle
import shutil
import shlex
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import care
import linear_eval
import train
from care import CARE, Encoder
from common import data, views
from common import run as run_module
from common.run import Run
from conftest import (CPU, SMALL, class_folders, gpu, header, images, memory, refused,
                      same_encoder, same_log, steps, torchrun, train_small)

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = SimpleNamespace(autocast=contextlib.nullcontext(),  # of a run in float32
                        scaler=torch.amp.GradScaler("cpu", enabled=False))


# ---------------------------------------------------------------------------------------- arguments
def test_the_defaults_are_the_papers_run():
    """Sec. 4.1 and the release: 100 epochs on 8 GPUs, no flag but --arch."""
    wanted = {
        "data": "imagenet", "arch": "resnet50", "stem": "imagenet", "image_size": [224, 224],
        "crop_min": 0.08, "augment": "device", "method": "care", "lambda_att": 100, "blocks": 5,
        "heads": 4, "position": "relative", "tap": "conv4", "detach_trunk": False,
        "hidden_dim": 4096, "tau_base": 0.99, "epochs": 100, "warmup_epochs": 10,
        "batch_size": 1024, "accum_steps": 1, "base_lr": 0.05, "predictor_lr": 1, "momentum": 0.9,
        "weight_decay": 1e-4, "precision": "auto", "seed": 0, "knn_every": 0, "max_steps": None,
        "att_loss": "mse", "sync_bn": "all", "init": None,
    }
    args = vars(train.parse_args(["--arch", "resnet50"]))
    assert {name: args[name] for name in wanted} == wanted
    for epochs, warmup in ((5, 0.5), (50, 5), (200, 10), (400, 10), (800, 10)):
        assert train.parse_args(["--epochs", str(epochs)]).warmup_epochs == warmup


@pytest.mark.parametrize("name", data.RECIPES)
def test_the_first_line_is_the_recipe_as_flags(name):
    """Typed, they give the same run; --out follows from data and method."""
    args = train.parse_args(["--data", name])
    for key in train.RECIPE_ARGS:
        if key not in ("image_size", "warmup_epochs"):
            assert getattr(args, key) == data.RECIPES[name][key]
    assert vars(train.parse_args(train.recipe_flags(args).split())) == vars(args)
    assert args.out == ("runs/care_resnet50" if name == "folder" else f"runs/{name}")
    assert train.parse_args(["--data", name, "--method", "byol"]).out.endswith(
        "byol_resnet50" if name == "folder" else f"{name}_byol")


@pytest.mark.parametrize("flags, name", [
    ("--arch resnet50 --blocks 4 --epochs 200 --seed 1", "care_resnet50_blocks4_epochs200_seed1"),
    ("--seed 1 --epochs 200 --blocks 4", "care_resnet50_blocks4_epochs200_seed1"),
    ("--lambda-att 0 --batch-size 1024 --max-steps 9 --workers 2", "care_resnet50_lambda_att0"),
    ("--lambda-att 0.25", "care_resnet50_lambda_att0.25"),
    ("--arch resnet18 --tap conv5 --data photos", "care_resnet18_tap-conv5"),
    ("--epochs 50 --warmup-epochs 5", "care_resnet50_epochs50"),
    ("--epochs 50 --warmup-epochs 4", "care_resnet50_epochs50_warmup_epochs4"),
    ("--data shapes:99 --detach-trunk --position none", "shapes99_detach_trunk_position-none"),
    ("--data shapes --arch resnet34 --method byol", "shapes_byol_arch-resnet34"),
    ("--data clutter --method sequential --tap conv5", "clutter_sequential"),
    ("--data clutter --image-size 64 64", "clutter"),
    ("--data clutter --image-size 96 64 --seed 12345678", "clutter_image_size96x64_seed12345678"),
    ("--data shapes --predictor-lr 1", "shapes_predictor_lr1")])
def test_the_default_directory_tells_runs_apart(flags, name):
    """By all that counts and is not usual; not by what may differ when a run is resumed."""
    assert train.parse_args(flags.split()).out == f"runs/{name}"


def test_bad_data(tmp_path, capsys):
    flags = [*SMALL, "--out", tmp_path / "run", "--data"]
    refused(capsys, *flags, tmp_path / "nowhere", match="nowhere: no such folder")
    (tmp_path / "empty").mkdir()
    refused(capsys, *flags, tmp_path / "empty", match="no images")
    images(tmp_path / "few", 3)
    refused(capsys, *flags, tmp_path / "few", match="3 images, fewer than --batch-size 8")
    refused(capsys, *flags, "shapes:many", match="number of training images")
    refused(capsys, *flags, tmp_path / "few", "--batch-size", 2, "--knn-every", 1, match="few")


@pytest.mark.parametrize("flags, match", [
    (["--batch-size", 9, "--accum-steps", 2], "--batch-size 9: must be a multiple of 1 ranks x 2"),
    (["--batch-size", 1], "at least 2 images"),
    (["--image-size", 48], "multiples of 32"),
    (["--image-size", 36, "--stem", "cifar"], "multiples of 8"),
    (["--image-size", 32, 32, 32], "one or two numbers"),
    (["--precision", "fp16"], "fp16 needs a GPU"),
    (["--warmup-epochs", 2], "--warmup-epochs 2: must be below --epochs 2"),
    (["--method", "sequential", "--tap", "conv4"], "sequential always reads conv5"),
    (["--method", "sequential", "--detach-trunk"], "sequential always reads conv5"),
    (["--arch", "alexnet"], "invalid choice"),
    (["--lam", 5], "unrecognized arguments"),
])
def test_bad_arguments(flags, match, tmp_path, capsys):
    refused(capsys, *SMALL, "--out", tmp_path, *flags, match=match)


def test_every_flag_of_the_model_reaches_it(monkeypatch):
    """Whatever CARE takes can be said, but for out_dim, the paper's 256."""
    given = {"arch": "resnet34", "image_size": [64, 32], "method": "byol", "blocks": 3, "heads": 2,
             "position": "absolute", "tap": "conv5", "detach_trunk": True, "lambda_att": 7.5,
             "att_loss": "norm", "hidden_dim": 32, "stem": "cifar"}
    assert {*given, "out_dim"} == set(inspect.signature(CARE).parameters)
    args = argparse.Namespace(**vars(train.parse_args(SMALL)) | given)
    found = {}
    monkeypatch.setattr(train, "CARE", lambda **named: found.update(named) or CARE())
    train.new_model(args, CPU)
    assert found == given


@pytest.mark.parametrize("flags", [
    ("--method", "byol"), ("--method", "sequential"), ("--tap", "conv5"), ("--augment", "worker"),
    ("--position", "sincos"), ("--detach-trunk",), ("--stem", "cifar"), ("--precision", "bf16"),
    ("--att-loss", "norm"),
    ("--image-size", "32", "64"),
])
def test_ablations_train(flags, tmp_path):
    line = train_small(tmp_path, *flags, "--max-steps", 2)[-1]
    assert line["step"] == 2 and math.isfinite(line["loss"])
    assert ("loss_c" in line) == (flags[-1] != "sequential")
    assert ("loss_t" in line) == (flags[-1] != "byol")
    args = header(tmp_path)["args"]
    name, *values = flags
    given = args[name[2:].replace("-", "_")]
    assert given == ([32, 64] if len(values) == 2 else values[0] if values else True)


# ------------------------------------------------------------------ what a run leaves, its settings
def test_train_leaves_what_it_promises(reference, tmp_path):
    train_small(tmp_path, "--arch", "resnet18", "--max-steps", 1)
    weights = torch.load(tmp_path / "encoder.pth", weights_only=True)
    missing, unexpected = torchvision.models.resnet18().load_state_dict(weights, strict=False)
    assert missing == ["fc.weight", "fc.bias"] and unexpected == []
    first, lines = header(reference), steps(reference)
    assert first["args"]["arch"] == "thin" and first["args"]["images"] == 32
    assert first["world_size"] == 1 and first["torch"] == torch.__version__
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert set(lines[0]) == {"step", "epoch", "lr", "tau", "loss", "loss_c", "loss_t", "loss_att",
                             "std_c", "std_t", "images/s", "memory_gib", "unreadable"}
    for line in lines:
        total = line["loss_c"] + line["loss_t"] + 100 * line["loss_att"]
        assert line["loss"] == pytest.approx(total, rel=1e-4)
    assert lines[-1]["epoch"] == 2 and lines[2]["epoch"] == 0.75
    assert not list(reference.glob("*.tmp"))


def test_kept_epochs(tmp_path):
    train_small(tmp_path, "--keep-epochs", 1)
    names = sorted(path.name for path in tmp_path.glob("epoch*"))
    assert names == ["epoch0001.pth", "epoch0002.pth"]
    assert torch.load(tmp_path / "epoch0001.pth", weights_only=True)["step"] == 4


def new_model():
    """The model of a small run, as it is before the first step."""
    torch.manual_seed(0)
    return train.new_model(train.parse_args(SMALL), CPU)[0]


def losses_of(model, numbers, parts):
    """What a small run logs of a step on these samples, in so many parts."""
    stream = data.Stream(data.open_images("shapes:32", "pretrain", size=32),
                         views.TwoViews((32, 32), crop_min=0.2), 0, 32)
    losses = {}
    for part in np.split(np.array(numbers), parts):
        batch = data.collate([stream[int(n)] for n in part])
        x1, x2 = train.make_views(batch, CPU, "device")
        for out in (model(x1, x2), model(x2, x1)):
            for name, value in out.items():
                share = 0.5 if name.startswith("std") else 1
                losses[name] = losses.get(name, 0) + share * value.item() / parts
    return losses


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_logged_losses_are_the_models(accum_steps, tmp_path):
    """Losses summed over both orders, stds averaged, all averaged over accumulation steps."""
    found = train_small(tmp_path, "--accum-steps", accum_steps, "--max-steps", 1)[0]
    for name, value in losses_of(new_model(), range(8), accum_steps).items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


def test_learning_rate_schedule():
    rates = [train.lr_at(step, 100, 10, 0.2) for step in range(101)]
    assert rates[0] == 1e-6 and rates[10] == 0.2 and rates[100] == 0
    assert rates[5] == pytest.approx((1e-6 + 0.2) / 2)
    assert rates[55] == pytest.approx(0.1)
    assert train.lr_at(0, 100, 0, 0.2) == 0.2  # without a warm-up


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """20 epochs of 2 steps on a folder, and what reached optimiser, model and crops, in order."""
    root, seen = tmp_path_factory.mktemp("watched"), []
    images(root / "set", 17)

    def step(optimizer, *_):
        seen.append(("step", type(optimizer), [dict(group) for group in optimizer.param_groups]))

    def update_momentum(model, tau):
        before = next(model.momentum.parameters()).detach().clone()
        update(model, tau)
        seen.append(("momentum", tau, before))

    def new_model(*args):
        model, optimizer = build(*args)
        seen.append(("model", model, optimizer))
        return model, optimizer

    def make_views(batch, *args, **named):
        seen.append(("views", batch[0][1], batch[0][0].shape))
        return make(batch, *args, **named)

    def get_params(image, scale, ratio):
        seen.append(("crop", scale, ratio))
        return crop(image, scale, ratio)

    update, build, make = CARE.update_momentum, train.new_model, train.make_views
    crop = torchvision.transforms.RandomResizedCrop.get_params
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CARE, "update_momentum", update_momentum)
        patch.setattr(train, "new_model", new_model)
        patch.setattr(train, "make_views", make_views)
        patch.setattr(views.transforms.RandomResizedCrop, "get_params", staticmethod(get_params))
        hook = register_optimizer_step_pre_hook(step)
        train.main(["--data", str(root / "set"), "--arch", "thin", "--image-size", "32",
                    "--hidden-dim", "64", "--batch-size", "8", "--epochs", "20", "--workers", "0",
                    "--out", str(root / "run"), "--log-every", "1", "--rank-every", "0"])
        hook.remove()
    return seen, steps(root / "run")


def test_what_reaches_the_optimiser_is_the_papers(watched):
    """SGD, momentum 0.9, weight decay 1e-4 on all; warm-up to 0.05 x B / 256, cosine to 0."""
    seen, lines = watched
    updates = [entry[1:] for entry in seen if entry[0] == "step"]
    assert len(updates) == len(lines) == 40
    peak, warmup = 0.05 * 8 / 256, 4  # two epochs, a tenth
    model = next(entry[1] for entry in seen if entry[0] == "model")
    trainable = {id(p) for name, p in model.named_parameters() if not name.startswith("momentum.")}
    for step, ((kind, groups), line) in enumerate(zip(updates, lines)):
        if step < warmup:
            lr = np.interp(step, [0, warmup], [1e-6, peak])
        else:
            lr = peak * math.cos(math.pi / 2 * (step - warmup) / (40 - warmup)) ** 2
        assert kind is torch.optim.SGD and line["lr"] == pytest.approx(lr, rel=1e-9)
        assert {id(p) for group in groups for p in group["params"]} == trainable
        for group in groups:
            settings = {name: group[name] for name in ("momentum", "dampening", "weight_decay",
                                                       "nesterov", "maximize")}
            assert group["lr"] == line["lr"] and settings == {
                "momentum": 0.9, "dampening": 0, "weight_decay": 1e-4, "nesterov": False,
                "maximize": False}


def test_the_momentum_branch_follows_each_step_with_tau_of_the_next(watched):
    """tau(t + 1) after optimiser step t: from 0.99 towards 1 by a cosine; the last step is 1."""
    seen, lines = watched
    order = [entry[0] for entry in seen if entry[0] in ("step", "momentum")]
    assert order == ["step", "momentum"] * 40
    taus = [entry[1] for entry in seen if entry[0] == "momentum"]
    wanted = [1 - 0.01 * math.cos(math.pi / 2 * (step + 1) / 40) ** 2 for step in range(40)]
    assert taus == pytest.approx(wanted, abs=1e-12) and taus == [line["tau"] for line in lines]


def test_views_are_drawn_with_the_papers_chances(watched):
    """40 steps of 8 pairs: jitter 0.8, gray 0.2, blur 1 and 0.1, solarize 0 and 0.2; crops."""
    seen, _ = watched
    drawn = torch.cat([entry[1] for entry in seen if entry[0] == "views"])  # (320, 2, 9)
    assert drawn.shape == (320, 2, 9)
    chances = {"jitter": (0.8, 0.8), "gray": (0.2, 0.2), "sigma": (1, 0.1), "solarize": (0, 0.2)}
    for name, wanted in chances.items():
        share = (drawn[:, :, views.PARAMETERS.index(name)] > 0).float().mean(0)
        for view in range(2):
            tolerance = 3.5 * math.sqrt(wanted[view] * (1 - wanted[view]) / 320)
            assert abs(share[view] - wanted[view]) <= tolerance, (name, view)
    crops = {entry[1:] for entry in seen if entry[0] == "crop"}
    assert crops == {((0.08, 1.0), (3 / 4, 4 / 3))}


@pytest.mark.parametrize("method, names", [
    ("care", {"predictor_c", "predictor_t"}), ("sequential", {"predictor_t"}),
    ("byol", {"predictor_c"})])
def test_predictors_learn_at_their_own_rate(method, names, tmp_path):
    """--predictor-lr 3: after a step without momentum they are three times as far, all else not."""
    flags = [*SMALL, "--method", method, "--momentum", "0", "--weight-decay", "0"]
    moved = []
    for factor in ("1", "3"):
        args = train.parse_args([*flags, "--predictor-lr", factor])
        torch.manual_seed(0)
        model, optimizer = train.new_model(args, CPU)
        model.double()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        views = torch.randn(1, 2, 4, 3, 32, 32, dtype=torch.float64)
        train.pretrain_step(model, optimizer, PLAIN, views, tuple, lr=0.01, tau=1.0)
        moved.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
        assert len(optimizer.param_groups) == (1 if factor == "1" else 2)
    found = set()
    for name, step in moved[0].items():
        first = name.partition(".")[0]
        if first.startswith("predictor"):
            found.add(first)
            step = 3 * step
        torch.testing.assert_close(moved[1][name], step, rtol=1e-6, atol=1e-12)
    assert found == names and moved[0]["predictor_" + max(names)[-1] + ".0.weight"].any()


def test_predictors_own_rate_resumes(tmp_path, capsys):
    """Bit for bit, logged, in the schedule; another factor is refused, and none where one was."""
    flags = ["--predictor-lr", 10]
    whole = train_small(tmp_path / "whole", *flags)
    assert [line["lr_predictor"] for line in whole] == [10 * line["lr"] for line in whole]
    train_small(tmp_path / "parts", *flags, "--max-steps", 3)
    train_small(tmp_path / "parts", *flags)
    assert same_log(tmp_path / "whole", tmp_path / "parts")
    assert same_encoder(tmp_path / "whole", tmp_path / "parts")
    for other in (1, 3):
        refused(capsys, *SMALL, "--predictor-lr", other, "--out", tmp_path / "whole",
                match=rf"predictor_lr was 10\.0, is {other}\.0")


def test_a_run_older_than_predictor_lr_had_none(tmp_path, capsys):
    """Whatever the recipe of its data says now: 1, and an optimiser of one group."""
    train_small(tmp_path, "--max-steps", 1)
    checkpoint = torch.load(tmp_path / "last.pth", weights_only=True)
    assert checkpoint["args"].pop("predictor_lr") == 1
    assert len(checkpoint["optimizer"]["param_groups"]) == 1
    torch.save(checkpoint, tmp_path / "last.pth")
    refused(capsys, *SMALL, "--predictor-lr", 10, "--out", tmp_path,
            match=r"\(predictor_lr was 1, is 10\.0\)")
    lines = train_small(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 9))


def test_the_seed_decides_weights_and_samples(monkeypatch):
    """Another one: other initial weights, other images, other views of them."""
    seen = []

    def restore(run, parts, total, *rest, **named):
        run.step, run.total, run.lines = total, total, []
        seen.append(parts["model"].online.encoder.conv1.weight.clone())
        return total

    def batches(run, stream, *rest):
        seen.append(([stream.index(n) for n in range(8)], stream[0][0][1]))
        return []

    monkeypatch.setattr(Run, "restore", restore)
    monkeypatch.setattr(Run, "batches", batches)
    monkeypatch.setattr(run_module, "open_directory", lambda *_: None)
    for seed in (0, 0, 1):
        train.main([*SMALL, "--seed", str(seed), "--out", "nowhere"])
    weights, draws = seen[0::2], seen[1::2]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert draws[0][0] == draws[1][0] != draws[2][0]
    assert torch.equal(draws[0][1], draws[1][1]) and not torch.equal(draws[0][1], draws[2][1])


def test_views_of_the_device_are_those_of_the_worker(reference, tmp_path):
    """Both ways to augment give the same losses, but for PIL's rounding to 8 bits."""
    line = train_small(tmp_path, "--augment", "worker", "--max-steps", 1)[0]
    for name in ("loss_c", "loss_t", "loss_att", "std_c"):
        assert line[name] == pytest.approx(steps(reference)[0][name], rel=0.02), name


def test_torchvision_sets(tmp_path, monkeypatch):
    """CIFAR-10 and STL-10, a few made-up images each in their files' layout, and a step on them."""
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    cifar, stl = tmp_path / "cifar-10-batches-py", tmp_path / "stl10_binary"
    cifar.mkdir()
    stl.mkdir()
    rng = np.random.RandomState(0)
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5",
                 "test_batch"):
        pixels = rng.randint(0, 256, (10, 3072)).astype(np.uint8)
        entry = {"data": pixels, "labels": list(range(10))}
        (cifar / name).write_bytes(pickle.dumps(entry))
    (cifar / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    for part, count in (("unlabeled", 6), ("train", 4), ("test", 3)):
        (stl / f"{part}_X.bin").write_bytes(rng.bytes(count * 3 * 96 * 96))
        (stl / f"{part}_y.bin").write_bytes(bytes(range(1, count + 1)))
    (stl / "class_names.txt").write_text("a\nb\nc\nd\n")
    sizes = [len(data.open_images(name, split, str(tmp_path)))
             for name in ("cifar10", "stl10") for split in ("pretrain", "train", "val")]
    assert sizes == [50, 50, 10, 6, 4, 3]
    flags = ["--data", "cifar10", "--data-root", tmp_path, "--max-steps", 1, "--knn-every", 1]
    before, line = train_small(tmp_path / "run", *flags)
    assert line["step"] == 1 and before["knn"] >= 0
    assert header(tmp_path / "run")["args"]["stem"] == "cifar"


def test_hostile_images(tmp_path):
    """One pixel, very wide, very tall, a decompression bomb: replaced or used, never a crash."""
    for name, size in (("one", (1, 1)), ("wide", (20_000, 3)), ("tall", (3, 20_000)),
                       ("bomb", (20_000, 20_000)), ("plain", (50, 40))):
        Image.new("1", size).save(tmp_path / f"{name}.png")
    files = data.ImageFiles(str(tmp_path))
    stream = data.Stream(files, views.TwoViews((32, 32)), 0, len(files))
    bad = set()
    for n in range(len(files)):
        (crops, parameters), _, unreadable = stream[n]
        assert crops.shape == (2, 3, 32, 32)
        assert torch.isfinite(views.augment(crops, parameters)).all()
        bad |= {files.name(index) for index, _ in unreadable}
    assert bad == {"bomb.png"}


def test_a_slip_in_the_model_is_a_traceback(tmp_path, monkeypatch):
    """Not the one line that users get for their own mistakes."""
    monkeypatch.setattr(care, "map_shapes", lambda *_: [(1, 2), (3, 4)])
    with pytest.raises(ValueError, match="unpack"):
        train_small(tmp_path)


# ------------------------------------------------------------------------------------------- a step
def test_a_step_is_the_plain_one():
    """One loss over both orders and all parts, SGD, then the momentum branch; in float64."""
    models, optimizers = [], []
    for _ in range(2):
        torch.manual_seed(0)
        model = CARE("thin", image_size=32, blocks=1, hidden_dim=32, out_dim=16).double()
        models.append(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizers.append(torch.optim.SGD(trained, lr=0.02, momentum=0.9, weight_decay=1e-4))
    for _ in range(3):
        parts = torch.randn(2, 2, 4, 3, 32, 32, dtype=torch.float64)
        train.pretrain_step(models[0], optimizers[0], PLAIN, parts, tuple, lr=0.02, tau=0.9)
        losses = [models[1](x, y)["loss"] for x1, x2 in parts for x, y in ((x1, x2), (x2, x1))]
        optimizers[1].zero_grad()
        (sum(losses) / 2).backward()
        optimizers[1].step()
        for old, new in zip(models[1].momentum.parameters(), models[1].online.parameters()):
            old.data.copy_(0.9 * old + 0.1 * new)
    for found, wanted in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def measure_activations(out):
    """Peak memory of a step in two halves and of one on the summed loss, above what stays, MiB."""
    ctypes.CDLL(None).mallopt(-3, 2 ** 16)  # M_MMAP_THRESHOLD: freed tensors go back to the system
    torch.manual_seed(0)
    model = CARE("resnet18", 96, blocks=1, hidden_dim=64).to(memory_format=torch.channels_last)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9)

    def half_steps(x1, x2):
        train.pretrain_step(model, optimizer, PLAIN, [(x1, x2)], tuple, lr=0.01, tau=0.99)

    def summed_loss(x1, x2):
        (model(x1, x2)["loss"] + model(x2, x1)["loss"]).backward()

    half_steps(*torch.randn(2, 2, 3, 96, 96))  # gradients and momentum stay
    x1, x2 = torch.randn(2, 8, 3, 96, 96)
    peaks, before = {}, memory("VmRSS")
    for step in (half_steps, summed_loss):
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        step(x1, x2)
        peaks[step.__name__] = memory("VmHWM") - before
    Path(out).write_text(json.dumps(peaks))


def test_half_steps_halve_the_activations(tmp_path):
    """Peak memory less model, gradients and optimiser: 96 px, batch 8, float32, CPU."""
    result = torchrun(1, measure_activations, tmp_path / "peaks")
    assert result.codes == [0], result.stderr
    peaks = json.loads((tmp_path / "peaks").read_text())
    print(peaks)
    assert 50 < peaks["half_steps"] < 0.6 * peaks["summed_loss"], peaks


# A GPU in pretence: CPU tensors that claim to be on `meta`. It shows what waits, or mixes devices.
META = torch.device("meta")
WAITING = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2",
           "unique_dim")


class Moved(torch.Tensor):
    """`here`, a CPU tensor, as if it were on META."""

    @staticmethod
    def __new__(cls, here):
        moved = cls._make_wrapper_subclass(cls, here.shape, here.stride(), dtype=here.dtype,
                                           device=META)
        moved.here = here
        return moved

    @classmethod
    def __torch_dispatch__(cls, function, *_):
        raise RuntimeError(f"{function}: not within a Pretence")


class Pretence(TorchDispatchMode):
    """Computes with Moved tensors. waits: operations for which the CPU would wait for a device."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        known = {id(x.here): x for x in tensors if isinstance(x, Moved)}
        if not known and kwargs.get("device") != META:
            return function(*args, **kwargs)
        leaving, arriving = False, False
        if name in ("_to_copy", "copy_"):
            target = kwargs.get("device") or tensors[0].device
            leaving = known and target == CPU
            arriving = target == META and not isinstance(tensors[-1], Moved)
        elif any(x.dim() for x in tensors if not isinstance(x, Moved)):
            raise RuntimeError(f"{name}: tensors on two devices")
        counting = name.startswith("index") and any(x.dtype == torch.bool for x in tensors[1:])
        copying = arriving and not kwargs.get("non_blocking")
        if name in WAITING or counting or leaving or copying:
            self.waits.append(name)

        def there(x):
            if isinstance(x, Moved):
                return x.here
            return CPU if x == META else x

        def wrap(x):
            return known.get(id(x), Moved(x)) if isinstance(x, torch.Tensor) else x

        out = function(*tree_map(there, args), **tree_map(there, kwargs))
        return out if leaving else tree_map(wrap, out)


def test_the_loop_never_waits_for_the_device(reference, monkeypatch, tmp_path):
    """Outside logging and saving. The losses are the CPU's."""
    pretence, losses, new_model = Pretence(), [], train.new_model

    def model_there(*args):
        found = new_model(*args)
        pretence.waits.clear()
        return found

    def check(run):
        losses.append(run.meters["loss"].here.item())
        return {}, 0

    monkeypatch.setattr(train, "new_model", model_there)
    monkeypatch.setattr(run_module, "join_ranks", lambda: (0, 1, META, 1))
    monkeypatch.setattr(run_module, "set_precision", lambda *_: (PLAIN.autocast, PLAIN.scaler))
    monkeypatch.setattr(Run, "check", check)
    monkeypatch.setattr(Run, "save", lambda *_: None)
    with pretence:
        train.main([*SMALL, "--out", str(tmp_path)])
    assert pretence.waits == [] and losses == [line["loss"] for line in steps(reference)]


# ------------------------------------------------------------------------------------ several ranks
def test_train_on_two_ranks(two_ranks, tmp_path):
    """Losses of the first steps are one process's with --accum-steps 2, and so is the first kNN."""
    flags, out = two_ranks
    one = train_small(tmp_path, *flags, "--accum-steps", 2, "--max-steps", 2)
    two = steps(out)[:3]
    assert [line["step"] for line in one] == [line["step"] for line in two] == [0, 1, 2]
    assert one[0]["knn"] == two[0]["knn"]
    for a, b in zip(one[1:], two[1:]):
        for key in ("loss", "loss_c", "loss_t", "loss_att", "std_c", "std_t"):
            assert a[key] == pytest.approx(b[key], rel=1e-5)
    assert header(out)["world_size"] == 2


def test_another_number_of_ranks_goes_on_with_the_same_batches(tmp_path, monkeypatch):
    """One process, then two ranks, then one: each goes on with the losses of the next samples."""
    for stop, world in ((4, 1), (5, 2), (6, 1)):
        flags = [*SMALL, "--out", tmp_path, "--max-steps", stop]
        model = new_model()
        if stop > 4:
            model.load_state_dict(torch.load(tmp_path / "last.pth", weights_only=True)["model"])
            wanted = losses_of(model, range(8 * stop - 8, 8 * stop), parts=world)
        assert torchrun(world, "train.py", *flags).codes == [0] * world
        if stop > 4:
            for name, value in wanted.items():
                assert steps(tmp_path)[-1][name] == pytest.approx(value, rel=1e-5), name
    assert [line["step"] for line in steps(tmp_path)] == [1, 2, 3, 4, 5, 6]


# ------------------------------------------------------------------------------------------ monitor
def test_knn_changes_nothing_and_is_neither_lost_nor_repeated(labelled, tmp_path, capsys):
    """Weights and losses with and without it, bit for bit; its scores over stops and resumes."""
    flags = ["--data", labelled]
    train_small(tmp_path / "off", *flags)
    train_small(tmp_path / "on", *flags, "--knn-every", 1)
    shown = capsys.readouterr().out.splitlines()
    lines = steps(tmp_path / "on")
    scores = [line for line in lines if "knn" in line]
    assert [(line["step"], line["epoch"]) for line in scores] == [(0, 0), (4, 1), (8, 2)]
    assert all(set(line) == {"step", "epoch", "knn", "knn_images"} for line in scores)
    losses = [[line["loss"] for line in steps(tmp_path / name) if "loss" in line]
              for name in ("on", "off")]
    assert losses[0] == losses[1] and same_encoder(tmp_path / "on", tmp_path / "off")
    first, last = scores[0]["knn"], scores[-1]["knn"]
    assert shown[-2] == f"kNN top-1 on val: {first:.1f} random encoder, {last:.1f} after step 8"
    assert shown[-1].startswith("next: python linear_eval.py --data")
    for stop in (3, 4, 6, 8, 8):
        train_small(tmp_path / "parts", *flags, "--knn-every", 1, "--max-steps", stop)
    assert same_log(tmp_path / "parts", tmp_path / "on")
    assert same_encoder(tmp_path / "parts", tmp_path / "on")


@pytest.mark.parametrize("score", [0, 1, 2])
def test_a_signal_during_knn_saves_first(score, labelled, tmp_path, monkeypatch, capsys):
    """And the score comes after the resume: before step 1, after step 4, after the last."""
    flags, calls, knn = ["--data", labelled, "--knn-every", 1], [], train.knn
    last = tmp_path / "parts" / "last.pth"

    def saved():
        return torch.load(last, weights_only=True)["step"] if last.exists() else 0

    def interrupted(run, *args, **named):
        calls.append(0)
        if len(calls) == score + 1:
            assert saved() == 4 * score
            os.kill(os.getpid(), signal.SIGTERM)
        return knn(run, *args, **named)

    train_small(tmp_path / "whole", *flags)
    capsys.readouterr()
    monkeypatch.setattr(train, "knn", interrupted)
    train_small(tmp_path / "parts", *flags)
    ending = f"step {4 * score} of 8: stopped, the same command resumes it"
    if score == 2:
        ending = "stopped while scoring; the same command resumes it"
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path}/parts: {ending}"
    assert sum("knn" in line for line in steps(tmp_path / "parts")) == score
    assert saved() == 4 * score
    train_small(tmp_path / "parts", *flags)
    assert same_log(tmp_path / "parts", tmp_path / "whole")
    assert same_encoder(tmp_path / "parts", tmp_path / "whole")


def test_scores_of_knn_are_all_of_as_many_images(labelled, tmp_path, capsys):
    """Those of another --knn-images stay in the log, and are not compared with."""
    flags = ["--data", labelled, "--knn-every", 1]
    train_small(tmp_path, *flags, "--knn-images", 6, "--max-steps", 4)
    lines = train_small(tmp_path, *flags, "--knn-images", 4)
    scores = [(line["step"], line["knn_images"]) for line in lines if "knn" in line]
    assert scores == [(0, 6), (4, 6), (4, 4), (8, 4)]
    assert "after step 4, " in capsys.readouterr().out.splitlines()[-2]


def test_knn_may_begin_late(labelled, tmp_path, capsys):
    """Switched on at a resume: scores from the next epoch on, of no random encoder."""
    train_small(tmp_path, "--data", labelled, "--max-steps", 3)
    lines = train_small(tmp_path, "--data", labelled, "--knn-every", 1)
    assert [line["step"] for line in lines if "knn" in line] == [4, 8]
    assert "after step 4, " in capsys.readouterr().out.splitlines()[-2]


def test_the_bar_shows_the_last_score(labelled, tmp_path, monkeypatch):
    def set_postfix(bar, fields, **_):
        shown.append(fields["knn"])

    shown = []
    monkeypatch.setattr(run_module.tqdm, "set_postfix", set_postfix)
    scores = [line["knn"] for line in train_small(tmp_path, "--data", labelled, "--knn-every", 1)
              if "knn" in line]
    first, second, third = (f"{score:.1f}" for score in scores)
    assert shown == [first] * 5 + [second] * 5 + [third]  # at once, and over the four steps behind


# ----------------------------------------------------------------------------------------- on a GPU
@gpu
def test_views_on_a_gpu_are_the_cpus():
    stream = data.Stream(data.open_images("shapes:16", "pretrain"), views.TwoViews((64, 64)), 0, 16)
    (crops, parameters), _, _ = data.collate([stream[n] for n in range(16)])
    found = views.augment(crops[:, 0].cuda(), parameters[:, 0]).cpu()
    wanted = views.augment(crops[:, 0], parameters[:, 0])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)


@gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_on_a_gpu_stays_close_to_float32(precision, tmp_path):
    flags = ["--arch", "resnet18", "--precision"]
    found = [line["loss"] for line in train_small(tmp_path / precision, *flags, precision)]
    wanted = [line["loss"] for line in train_small(tmp_path / "fp32", *flags, "fp32")]
    alike = 2 if precision == "fp16" else 8  # the scaler leaves out steps until its scale fits
    assert found[:alike] == pytest.approx(wanted[:alike], rel=0.05)
    assert all(map(math.isfinite, found))


@gpu
def test_a_step_on_a_gpu_never_waits_for_it(monkeypatch, tmp_path):
    step = train.pretrain_step

    def watched(*args, **named):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(*args, **named)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(train, "pretrain_step", watched)
    assert len(train_small(tmp_path, "--max-steps", 3, "--precision", "fp32")) == 3


# ------------------------------------------------------------------------------------------- RankMe
def test_rankme_changes_nothing_and_is_neither_lost_nor_repeated(labelled, tmp_path, capsys):
    """As for kNN: weights and losses bit for bit; over stops and resumes; beside kNN's scores."""
    flags = ["--data", labelled, "--knn-every", 2]
    train_small(tmp_path / "off", *flags)
    train_small(tmp_path / "on", *flags, "--rank-every", 1)
    lines = steps(tmp_path / "on")
    ranks = [line for line in lines if "rankme" in line]
    assert [(line["step"], line["epoch"]) for line in ranks] == [(0, 0), (4, 1), (8, 2)]
    assert all(set(line) == {"step", "epoch", "rankme"} for line in ranks)
    assert all(1 < line["rankme"] < 32 for line in ranks)  # 32 images
    assert len({line["rankme"] for line in ranks}) == 3
    plain, other = ([{key: line[key] for key in line if key not in ("images/s", "memory_gib")}
                     for line in steps(tmp_path / name) if "rankme" not in line]
                    for name in ("off", "on"))
    assert plain == other and same_encoder(tmp_path / "on", tmp_path / "off")
    for stop in (3, 4, 6, 8, 8):
        train_small(tmp_path / "parts", *flags, "--rank-every", 1, "--max-steps", stop)
    assert same_log(tmp_path / "parts", tmp_path / "on")
    assert same_encoder(tmp_path / "parts", tmp_path / "on")


def test_rankme_watches_folders_by_default(tmp_path, monkeypatch):
    """Without labels, where kNN cannot; on the bar too; --rank-every 0 leaves it out."""
    shown = []
    monkeypatch.setattr(run_module.tqdm, "set_postfix",
                        lambda bar, fields, **_: shown.append(fields.get("rankme")))
    flags = list(SMALL)
    at = flags.index("--rank-every")
    del flags[at:at + 2]
    images(tmp_path / "flat", 17)
    flags += ["--data", str(tmp_path / "flat"), "--out", str(tmp_path / "run"), "--max-steps", "2"]
    train.main(flags)
    found = [line["rankme"] for line in steps(tmp_path / "run") if "rankme" in line]
    assert len(found) == 2 and shown[0] == f"{found[0]:.1f}" and shown[-1] == f"{found[1]:.1f}"
    assert not any("rankme" in line for line in train_small(
        tmp_path / "off", "--data", tmp_path / "flat", "--max-steps", 1))

# ------------------------------------------------------------------------------------------- --init
def before_the_first_step(monkeypatch, *flags):
    """The weights of a small run before its first step, by name."""
    seen = {}

    def restore(run, parts, total, *rest, **named):
        seen.update({key: value.clone() for key, value in parts["model"].state_dict().items()})
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "restore", restore)
        patch.setattr(run_module, "open_directory", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            train.main([*SMALL, "--out", "nowhere", *map(str, flags)])
    return seen


@pytest.fixture(scope="module")
def weights_of_another(tmp_path_factory):
    """The directory of a short run with another seed, whose momentum branch lags behind."""
    out = tmp_path_factory.mktemp("another")
    train_small(out, "--seed", 5, "--max-steps", 2)
    return out


def test_init_from_an_encoder_or_a_whole_model(weights_of_another, monkeypatch, capsys):
    plain = before_the_first_step(monkeypatch)
    encoder = torch.load(weights_of_another / "encoder.pth", weights_only=True)
    found = before_the_first_step(monkeypatch, "--init", weights_of_another / "encoder.pth")
    for key, value in found.items():
        own = key.removeprefix("online.encoder.").removeprefix("momentum.encoder.")
        assert torch.equal(value, plain[key] if own == key else encoder[own]), key
    assert capsys.readouterr().err == ""
    last = torch.load(weights_of_another / "last.pth", weights_only=True)["model"]
    found = before_the_first_step(monkeypatch, "--init", weights_of_another / "last.pth")
    assert all(torch.equal(value, last[key]) for key, value in found.items())
    found = before_the_first_step(monkeypatch, "--init", weights_of_another / "last.pth",
                                  "--image-size", 64)
    note = capsys.readouterr().err
    assert note.count("\n") == 1 and "tables resized from [32, 32] to [64, 64] px" in note
    assert torch.equal(found["predictor_c.0.weight"], last["predictor_c.0.weight"])


def test_init_tells_arch_and_stem(tmp_path, capsys):
    torch.save({"state_dict": Encoder("thin", "cifar").state_dict()}, tmp_path / "e.pth")
    flags = ["--data", "shapes", "--init", str(tmp_path / "e.pth")]
    args = train.parse_args(flags)
    assert (args.arch, args.stem) == ("thin", "cifar")
    assert args.init_sha256 == hashlib.sha256((tmp_path / "e.pth").read_bytes()).hexdigest()
    refused(capsys, *flags, "--arch", "resnet18",
            match="e.pth: arch resnet18 was asked for, but the file holds thin")
    refused(capsys, *flags, "--stem", "imagenet", match="stem imagenet was asked for")
    (tmp_path / "e.pth").write_bytes(b"no weights")
    refused(capsys, *flags, match="e.pth: truncated, not a checkpoint")
    (tmp_path / "e.pth").unlink()
    refused(capsys, *flags, "--out", tmp_path / "run", match="--init .*e.pth: no such file")
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_a_run_begun_from_weights_resumes(weights_of_another, tmp_path, capsys):
    """Bit for bit, by its own checkpoint, also when the file has gone; not from another file."""
    file = tmp_path / "begin.pth"
    shutil.copy(weights_of_another / "last.pth", file)
    whole = train_small(tmp_path / "whole", "--init", file)
    assert whole[0]["loss"] != train_small(tmp_path / "plain", "--max-steps", 1)[0]["loss"]
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert header(tmp_path / "whole")["args"]["init_sha256"] == sha256
    assert header(tmp_path / "whole")["args"]["init"] == str(file)
    out = capsys.readouterr().out
    assert f"/whole/encoder.pth, begun from {file} (sha256 {sha256})\n" in out

    parts = tmp_path / "parts"
    train_small(parts, "--init", file, "--max-steps", 3)
    assert capsys.readouterr().err == ""
    train_small(parts, "--init", file, "--max-steps", 5)
    line = f"note: {parts}/last.pth keeps its own weights; --init {file} is not loaded\n"
    assert capsys.readouterr().err == line
    flags = [*SMALL, "--out", parts]
    refused(capsys, *flags, match=f"init_sha256 was {sha256}, is None")
    refused(capsys, *SMALL, "--out", tmp_path / "plain", "--init", tmp_path / "gone.pth",
            match="init_sha256 was None, is unknown")
    file.rename(tmp_path / "gone.pth")
    train_small(parts, "--init", file, "--max-steps", 7)
    shutil.copy(weights_of_another / "encoder.pth", file)
    capsys.readouterr()
    refused(capsys, *flags, "--init", file, match=f"init_sha256 was {sha256}, is [0-9a-f]{{64}}")
    (tmp_path / "gone.pth").rename(file)
    train_small(parts, "--init", file)
    assert same_log(parts, tmp_path / "whole") and same_encoder(parts, tmp_path / "whole")


def test_init_in_the_name_of_the_directory(weights_of_another, tmp_path):
    flags = ["--data", "shapes", "--seed", "3", "--init"]
    file = weights_of_another / "encoder.pth"
    name = f"runs/shapes_arch-thin_seed3_init-{weights_of_another.name}"
    assert train.parse_args([*flags, str(file)]).out == name
    shutil.copy(file, tmp_path / "r18.tar.pth")
    assert train.parse_args([*flags, str(tmp_path / "r18.tar.pth")]).out == (
        "runs/shapes_arch-thin_seed3_init-r18.tar")


def test_init_of_a_model_of_another_shape(weights_of_another, tmp_path, capsys):
    flags = [*SMALL, "--out", tmp_path, "--init", weights_of_another / "last.pth"]
    refused(capsys, *flags, "--method", "byol", match="holds a model of --method care; give the")
    refused(capsys, *flags, "--blocks", 2, "--hidden-dim", 32,
            match="holds a model of --blocks 1 --hidden-dim 64; give the same")


# --------------------------------------------------------------------------------------- --sync-bn
def test_sync_bn_on_a_cpu_is_one_line(tmp_path, capsys):
    """And counts when the run is resumed, since on GPUs it changes what is computed."""
    train_small(tmp_path, "--sync-bn", "cnn", "--max-steps", 1)
    assert capsys.readouterr().err == ("note: --sync-bn has no effect on a CPU or on one GPU: "
                                       "nothing is synchronised there\n")
    refused(capsys, *SMALL, "--out", tmp_path, match="sync_bn was cnn, is all")
    refused(capsys, *SMALL, "--out", tmp_path, "--sync-bn", "head", match="invalid choice: 'head'")


# ----------------------------------------------------------------------------- lines to be typed
def test_what_is_printed_to_be_typed_can_be_typed(tmp_path, capsys):
    """The recipe and the next command, with folders that have a space, a quote and a dollar."""
    folder, out = tmp_path / "my photos", tmp_path / "it's $mine"
    for split in ("train", "val"):
        class_folders(folder / split, ["cat", "dog"], count=8)
    flags = ["--data", folder, "--data-root", tmp_path / "a b", "--knn-every", 1, "--epochs", 1]
    train_small(out, *flags)
    lines = capsys.readouterr().out.splitlines()
    python, script, *words = shlex.split(lines[-1].removeprefix("next: "))
    assert (python, script) == ("python", "linear_eval.py")
    args = linear_eval.parse_args(words)
    assert (args.data, args.pretrained) == (str(folder), f"{out}/encoder.pth")
    assert args.data_root == str(tmp_path / "a b")
    args = train.parse_args(shlex.split(lines[0].removeprefix("recipe: ")))
    assert args.data == str(folder) and args.epochs == 1
