"""linear_eval.py and semi_eval.py: what they compute, and the scripts end to end."""
import json
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch import nn
from torchvision import transforms

import care
import data
import knn
import linear_eval
import semi_eval
from care import Encoder, save_encoder
from conftest import class_folders, header, images, photo, refused, steps, torchrun, train_small

EVAL = ["--image-size", "32", "--workers", "0", "--log-every", "1"]
LINEAR = [*EVAL, "--data", "shapes:60", "--batch-size", "20", "--epochs", "2",
          "--head", "linear-bn"]
SEMI = [*EVAL, "--data", "shapes:400", "--percent", "10", "--batch-size", "20", "--epochs", "2"]
RANDOM = ["--pretrained", "random", "--arch", "thin"]
DIM = Encoder("thin").dim5


@pytest.fixture(autouse=True)
def few_validation_images(monkeypatch):
    """100 of them, not 1,000, of the embedded sets."""
    def open_fewer(name, split, *where, **named):
        source = data.open_images(name, split, *where, **named)
        if split == "val" and hasattr(source, "renderer"):
            source.targets = source.targets[:100]
        return source

    monkeypatch.setattr(knn, "open_images", open_fewer)


def evaluated(capsys, script, out, *flags):
    """Run an evaluation script in this process -> its final line."""
    own = LINEAR if script is linear_eval else SEMI
    script.main([*own, "--out", str(out), *map(str, flags)])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refuse(capsys, match, *flags, script=linear_eval, **named):
    own = LINEAR if script is linear_eval else SEMI
    return refused(capsys, *own, *flags, match=match, script=script, **named)


def stopped(capsys, script, out, *flags):
    """Run a script that stops before its end -> its last line on stdout."""
    own = LINEAR if script is linear_eval else SEMI
    with pytest.raises(SystemExit) as caught:
        script.main([*own, "--out", str(out), *map(str, flags)])
    assert caught.value.code == 0
    return capsys.readouterr().out.splitlines()[-1]


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory):
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("encoder") / "encoder.pth"
    save_encoder(Encoder("thin"), path)
    return path


# ------------------------------------------------------------------------------------ the protocols
class Recorder(torch.optim.SGD):
    """SGD that remembers how it was built and the rates of every step."""

    made = []

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.rates = []
        self.initial = [[parameter.detach().clone() for parameter in group["params"]]
                        for group in self.param_groups]
        Recorder.made.append(self)

    def step(self, *rest, **named):
        self.rates.append([group["lr"] for group in self.param_groups])
        return super().step(*rest, **named)


@pytest.fixture
def recorded(monkeypatch):
    """What a script really does: its optimisers, the batches in, the crops, flips."""
    seen = SimpleNamespace(optimizers=[], batches=[], crops=[], flips=0)
    crop, flip = transforms.RandomResizedCrop.get_params, TF.hflip

    def watch_crop(image, scale, ratio):
        seen.crops.append((tuple(scale), tuple(ratio)))
        return crop(image, scale, ratio)

    def watch_flip(image):
        seen.flips += 1
        return flip(image)

    monkeypatch.setattr(Recorder, "made", seen.optimizers)
    monkeypatch.setattr(torch.optim, "SGD", Recorder)
    monkeypatch.setattr(transforms.RandomResizedCrop, "get_params", staticmethod(watch_crop))
    monkeypatch.setattr(TF, "hflip", watch_flip)
    for model in (linear_eval.Probe, semi_eval.FineTune):
        def forward(self, x, plain=model.forward):
            if self.training:
                seen.batches.append((tuple(x.shape), x.mean((0, 2, 3)), self.encoder.training))
            return plain(self, x)
        monkeypatch.setattr(model, "forward", forward)
    return seen


SGD = {"momentum": 0.9, "weight_decay": 0, "dampening": 0, "maximize": False}  # both protocols


def cosine(base, steps):
    return [base * 0.5 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]


def check_head(parameters, kind):
    """Weights N(0, 0.01), bias 0; the release's batch norm behind it starts as 1 and 0."""
    weight, bias, *norm = parameters
    assert weight.shape == (10, DIM) and bias.eq(0).all()
    assert weight.std().item() == pytest.approx(0.01, rel=0.1) and abs(weight.mean()) < 0.001
    if kind == "linear-bn":
        scale, shift = norm
        assert scale.eq(1).all() and shift.eq(0).all()
    else:
        assert not norm


def check_views(seen, batch_size, steps):
    """Random crops of 8 % to all of the area, flipped half the time; ImageNet's normalisation."""
    assert set(seen.crops) == {((0.08, 1.0), (3 / 4, 4 / 3))}
    assert len(seen.crops) == batch_size * steps
    assert seen.flips / len(seen.crops) == pytest.approx(0.5, abs=0.1)
    shapes = {shape for shape, _, _ in seen.batches}
    assert shapes == {(batch_size, 3, 32, 32)} and len(seen.batches) == steps
    mean = torch.stack([mean for _, mean, _ in seen.batches]).mean(0)
    gray = (0.5 - torch.tensor((0.485, 0.456, 0.406))) / torch.tensor((0.229, 0.224, 0.225))
    torch.testing.assert_close(mean, gray, atol=0.1, rtol=0)


@pytest.mark.parametrize("kind, batch_size", [("linear-bn", 256), ("linear", 64)])
def test_the_linear_protocol_is_the_papers(kind, batch_size, recorded, tmp_path, capsys):
    """SGD, momentum 0.9, no decay, 0.2 x B / 256, cosine per step (paper, Sec. 4.2; release)."""
    flags = [*RANDOM, "--data", "shapes:270", "--batch-size", batch_size, "--head", kind]
    result = evaluated(capsys, linear_eval, tmp_path, *flags, "--epochs", 3)
    count = 3 * (270 // batch_size)
    optimizer, = recorded.optimizers
    group, = optimizer.param_groups
    assert {key: group[key] for key in (*SGD, "nesterov")} == SGD | {"nesterov": False}
    assert optimizer.rates == [[pytest.approx(rate)]
                               for rate in cosine(0.2 * batch_size / 256, count)]
    check_head(optimizer.initial[0], kind)
    check_views(recorded, batch_size, steps=count)
    assert not any(training for _, _, training in recorded.batches)  # the encoder's batch norms
    assert (result["lr"], result["batch_size"], result["epochs"]) == (0.2, batch_size, 3)


def test_the_semi_supervised_protocol(recorded, tmp_path, capsys):
    """SGD, Nesterov 0.9, no decay, cosine per step, encoder in train mode, plain linear head."""
    evaluated(capsys, semi_eval, tmp_path, *RANDOM, "--head-lr", 0.3, "--epochs", 6)
    optimizer, = recorded.optimizers
    for group in optimizer.param_groups:
        assert {key: group[key] for key in (*SGD, "nesterov")} == SGD | {"nesterov": True}
    wanted = zip(cosine(0.05, 12), cosine(0.3, 12))
    assert optimizer.rates == [[pytest.approx(a), pytest.approx(b)] for a, b in wanted]
    assert len(optimizer.initial[0]) == len(list(Encoder("thin").parameters()))
    check_head(optimizer.initial[1], "linear")
    check_views(recorded, 20, steps=12)
    assert all(training for _, _, training in recorded.batches)


@pytest.mark.parametrize("script, flags, expected", [
    (linear_eval, [], {"lr": [0.2], "epochs": 80, "batch_size": 256, "head": "linear-bn",
                       "labels": None, "data": "imagenet", "image_size": [224, 224]}),
    (linear_eval, ["--data", "shapes"], {
        "lr": [0.2], "epochs": 40, "batch_size": 256, "head": "linear", "labels": 1000,
        "image_size": [32, 32]}),
    (linear_eval, ["--data", "cifar10"], {"epochs": 80, "labels": None, "image_size": [32, 32]}),
    (semi_eval, ["--percent", "1"], {"lr": [0.05], "epochs": [50], "batch_size": 1024,
                                     "head_lr": None, "image_size": [224, 224]}),
])
def test_defaults_are_the_papers_and_the_recipes(script, flags, expected):
    args = vars(script.parse_args(["--pretrained", "x", *flags]))
    assert {key: args[key] for key in expected} == expected


# ----------------------------------------------------------------------------------- linear_eval.py
def test_linear_evaluation(encoder_file, tmp_path, capsys):
    """The final line holds all that is needed to repeat it."""
    out = encoder_file.parent / "linear"
    linear_eval.main([*LINEAR, "--pretrained", str(encoder_file), "--seed", "4"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    expected = {
        "encoder": str(encoder_file), "arch": "thin", "stem": "imagenet", "data": "shapes:60",
        "val": None, "protocol": "linear", "protocol_version": linear_eval.PROTOCOL_VERSION,
        "head": "linear-bn", "lr": 0.2, "epochs": 2, "batch_size": 20, "labels": 60, "held_out": 0,
        "seed": 4, "precision": "fp32", "image_size": [32, 32], "torch": torch.__version__,
        "world_size": 1}
    assert {key: result[key] for key in expected} == expected
    assert len(result["sha256"]) == 64 and "torchvision" in result and "device" in result
    assert 0 <= result["top1"] <= result["top5"] <= 100
    assert [line["step"] for line in steps(out)] == [1, 2, 3, 4, 5, 6]
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert last["top1"] == result["top1"] and last["args"]["sha256"] == result["sha256"]
    saved = torch.load(out / "classifier.pth", weights_only=True)
    assert saved["state"]["0.weight"].shape == (10, DIM)


def test_losses_and_training_top_1_are_logged_as_they_are(tmp_path, capsys, monkeypatch):
    seen, cross_entropy = [], F.cross_entropy

    def watch(scores, labels):
        loss = cross_entropy(scores, labels)
        seen.append((100 * (scores.argmax(1) == labels).float().mean().item(), loss.item()))
        return loss

    monkeypatch.setattr(F, "cross_entropy", watch)
    evaluated(capsys, linear_eval, tmp_path, *RANDOM, "--data", "shapes:100", "--lr", 0.1, 5.0)
    for line, heads in zip(steps(tmp_path), zip(seen[::2], seen[1::2]), strict=True):
        assert line["train_top1"] == [pytest.approx(top1, abs=1e-4) for top1, _ in heads]
        assert line["loss"] == [pytest.approx(loss, abs=1e-6) for _, loss in heads]


def test_every_encoder_file_has_a_folder_of_its_own():
    names = ("encoder.pth", "last.pth", "epoch0100.pth", "100_ckpt.pth.tar")
    folders = [linear_eval.default_out(f"a/{name}", "linear") for name in names]
    assert folders == ["a/linear", "a/linear", "a/linear_epoch0100", "a/linear_100_ckpt"]


def test_rates_are_chosen_on_held_out_training_images(tmp_path, capsys, monkeypatch):
    """At most ten images a class, and a tenth of them; the choice never sees val."""
    seen, evaluate = [], linear_eval.evaluate

    def watch(run, args, model, source, *what):
        seen.append(source)
        return evaluate(run, args, model, source, *what)

    monkeypatch.setattr(linear_eval, "evaluate", watch)
    flags = [*RANDOM, "--data", "shapes:1200", "--labels", 1200, "--batch-size", 200, "--epochs", 1]
    result = evaluated(capsys, linear_eval, tmp_path / "a", *flags, "--lr", 0.001, 0.1, 20)
    held_out, val = seen
    assert knn.labels_of(held_out).bincount().tolist() == [10] * 10
    assert held_out.dataset.split == "train" and val.split == "val"
    assert set(result["choice"]) == {"0.001", "0.1", "20.0"}
    assert str(result["lr"]) == max(result["choice"], key=result["choice"].get)
    assert (result["labels"], result["held_out"]) == (1100, 100)
    assert header(tmp_path / "a")["args"]["images"] == 1100
    result = evaluated(capsys, linear_eval, tmp_path / "b", *RANDOM, "--data", "shapes:100",
                       "--lr", 0.1, 0.2)
    assert (result["labels"], result["held_out"]) == (90, 10)
    refuse(capsys, "fewer than 10 images", *RANDOM, "--data", "shapes:60", "--lr", 0.1, 0.2,
           "--out", tmp_path / "c")


def test_a_head_that_diverges_leaves_the_others_alone(tmp_path, capsys):
    """It scores as the worst, also on resume; the others train bit for bit as without it."""
    flags = [*RANDOM, "--data", "shapes:100", "--head", "linear", "--epochs", 3]
    logs = {}
    for name, other in (("fine", 0.2), ("lost", 4e39)):
        evaluated(capsys, linear_eval, tmp_path / name, *flags, "--lr", 0.1, other)
        logs[name] = steps(tmp_path / name)
    for a, b in zip(logs["fine"], logs["lost"], strict=True):
        assert (a["loss"][0], a["lr"][0]) == (b["loss"][0], b["lr"][0])
    assert None in [line["loss"][1] for line in logs["lost"]]
    assert logs["lost"][-1]["lr"][1] == 0  # and all weights: every class is as likely
    assert logs["lost"][-1]["loss"][1] == pytest.approx(math.log(10))
    stopped(capsys, linear_eval, tmp_path / "parts", *flags, "--lr", 0.1, 4e39, "--max-steps", 8)
    result = evaluated(capsys, linear_eval, tmp_path / "parts", *flags, "--lr", 0.1, 4e39)
    assert result["choice"]["4e+39"] == -1 and result["lr"] == 0.1
    assert steps(tmp_path / "parts")[-1]["loss"] == logs["lost"][-1]["loss"]
    with pytest.raises(SystemExit):
        evaluated(capsys, linear_eval, tmp_path / "none", *flags, "--lr", 4e39)
    assert "not finite: choose a smaller --lr" in capsys.readouterr().err


def test_nothing_of_a_diverged_head_is_left():
    model = linear_eval.Probe(Encoder("thin"), [nn.Linear(2, 2), nn.Linear(2, 2)])
    groups = [{"params": list(head.parameters()), "base_lr": 0.1} for head in model.heads]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    (model.heads[0].weight.sum() * math.nan + model.heads[1].weight.sum()).backward()
    optimizer.step()
    assert linear_eval.drop_diverged(model, optimizer, [1.0, 1.0])
    assert [group["base_lr"] for group in optimizer.param_groups] == [0, 0.1]
    assert set(optimizer.state) == {model.heads[1].weight} and not model.heads[0].weight.any()
    assert not linear_eval.drop_diverged(model, optimizer, [1.0, math.inf])


def test_linear_evaluation_resumes(tmp_path, capsys):
    whole = evaluated(capsys, linear_eval, tmp_path / "whole", *RANDOM)
    line = stopped(capsys, linear_eval, tmp_path / "parts", *RANDOM, "--max-steps", 4)
    assert "after step 4 of 6; to go on, raise --max-steps 4" in line
    assert stopped(capsys, linear_eval, tmp_path / "parts", *RANDOM, "--max-steps", 4) == line
    assert evaluated(capsys, linear_eval, tmp_path / "parts", *RANDOM) == whole
    for a, b in zip(steps(tmp_path / "whole"), steps(tmp_path / "parts"), strict=True):
        assert [a[key] for key in ("step", "lr", "loss", "train_top1")] == [
            b[key] for key in ("step", "lr", "loss", "train_top1")]
    a, b = (torch.load(tmp_path / name / "classifier.pth", weights_only=True)["state"]
            for name in ("whole", "parts"))
    assert all(map(torch.equal, a.values(), b.values()))


@pytest.fixture
def finished(tmp_path, capsys):
    evaluated(capsys, linear_eval, tmp_path / "finished", *RANDOM)
    return tmp_path / "finished"


@pytest.mark.parametrize("flags, match", [
    (["--seed", 1], "seed was 0, is 1"),
    (["--labels", 30], "labels was"),
    (["--lr", 0.1], "lr was"),
    (["--head", "linear"], "head was linear-bn, is linear"),
])
def test_another_protocol_does_not_go_on(flags, match, finished, capsys):
    refuse(capsys, match, *RANDOM, "--out", finished, *flags)


def test_a_run_of_an_older_protocol_does_not_go_on(finished, tmp_path, capsys):
    """Arguments that a checkpoint lacks count as defaults; the version is not one of them."""
    saved = torch.load(finished / "last.pth", weights_only=True)
    del saved["args"]["protocol_version"]
    torch.save(saved, tmp_path / "last.pth")
    refuse(capsys, "protocol_version was 1, is", *RANDOM, "--out", tmp_path)


def test_what_does_not_change_the_training_may_change(finished, tmp_path, capsys):
    flags = ["--log-every", 5, "--val", class_folders(tmp_path / "val", data.Shapes.classes)]
    result = evaluated(capsys, linear_eval, finished, *RANDOM, *flags)
    assert len(steps(finished)) == 6 and result["val"] == str(tmp_path / "val")


def test_the_frozen_check_sees_one_bit(tmp_path, capsys, monkeypatch):
    fit = linear_eval.fit

    def fit_and_nudge(*arguments):
        model = fit(*arguments)
        model.encoder.bn1.running_var[3] += 1e-7
        return model

    monkeypatch.setattr(linear_eval, "fit", fit_and_nudge)
    with pytest.raises(SystemExit) as caught:
        evaluated(capsys, linear_eval, tmp_path, *RANDOM)
    assert caught.value.code == 1
    assert "1 tensors, first bn1.running_var" in capsys.readouterr().err
    assert not (tmp_path / "classifier.pth").exists()


def test_a_saved_classifier_is_scored_again(encoder_file, tmp_path, capsys, monkeypatch):
    """Without training: the same score and protocol; on other images by --val, matched by name."""
    flags = ["--pretrained", encoder_file]
    trained = evaluated(capsys, linear_eval, tmp_path / "out", *flags, "--seed", 5)
    monkeypatch.setattr(linear_eval, "fit", None)
    again = evaluated(capsys, linear_eval, tmp_path / "out", *flags, "--evaluate", "--epochs", 99)
    classifier = str(tmp_path / "out" / "classifier.pth")
    assert again | {"choice": {}} == trained | {"classifier": classifier}
    elsewhere = evaluated(capsys, linear_eval, tmp_path / "b", *flags, "--evaluate", classifier)
    assert elsewhere["top1"] == trained["top1"] and elsewhere["seed"] == 5

    names = data.Shapes.classes
    source = data.open_images("shapes", "val", size=32)
    for number, name in enumerate(names):
        (tmp_path / "named" / name).mkdir(parents=True)
        (tmp_path / "numbered" / str(number)).mkdir(parents=True)
        for index in range(number, 100, 10):
            source[index][0].save(tmp_path / "named" / name / f"{index}.png")
            source[index][0].save(tmp_path / "numbered" / str(number) / f"{index}.png")
    for folder in ("named", "numbered"):
        found = evaluated(capsys, linear_eval, tmp_path / "out", *flags, "--evaluate",
                          "--val", tmp_path / folder)
        assert (found["top1"], found["top5"]) == (trained["top1"], trained["top5"])

    refuse(capsys, "not a classifier that was trained on random", *RANDOM, "--evaluate", classifier,
           "--out", tmp_path / "c")
    refuse(capsys, "No such file", *flags, "--evaluate", "--out", tmp_path / "c")
    refuse(capsys, "not allowed with", *flags, "--evaluate", "--knn", "--out", tmp_path / "c")
    torch.save({"sha256": again["sha256"], "classes": ["a"]}, tmp_path / "other.pth")
    refuse(capsys, "other classes than those of shapes:60", *flags, "--out", tmp_path / "c",
           "--evaluate", tmp_path / "other.pth")


def test_folders_of_another_validation_set(tmp_path):
    """By name in any order; by number as in ImageNet-V2, where 10 sorts before 2."""
    classes = [f"class {letter}" for letter in "abcdefghijkl"]
    numbered = class_folders(tmp_path / "numbered", map(str, range(12)), count=1)
    source = linear_eval.open_val(numbered, classes)
    for index in range(12):
        assert source.targets[index] == int(Path(source.path(index)).parent.name)
    named = class_folders(tmp_path / "named", ["x", "y", "z"])
    source = linear_eval.open_val(named, ["z", "x", "y"])
    assert source.classes == ["z", "x", "y"] and source.targets.tolist() == [1, 1, 2, 2, 0, 0]
    assert source[5][1] == 0
    digits = class_folders(tmp_path / "digits", ["0", "10", "2"])
    assert linear_eval.open_val(digits, ["0", "10", "2"]).targets.tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(care.InputError, match="differ from the 2 classes in 1 names, first z"):
        linear_eval.open_val(tmp_path / "named", ["x", "y"])
    with pytest.raises(care.InputError, match="differ"):
        linear_eval.open_val(numbered, [f"c{i}" for i in range(11)])


def test_one_classifier_for_last_and_encoder_files(tmp_path, capsys):
    """A classifier belongs to an encoder's tensors, not to a file's bytes."""
    train_small(tmp_path, "--max-steps", 1)
    names = ("encoder.pth", "last.pth")
    shas = [linear_eval.open_encoder(tmp_path / name, None, None, 0)[1] for name in names]
    assert shas[0] == shas[1]
    other = Encoder("thin")
    state = torch.load(tmp_path / "encoder.pth", weights_only=True)
    state["layer4.0.bn2.running_var"][0] += 1e-6
    other.load_state_dict(state)
    save_encoder(other, tmp_path / "other.pth")
    assert linear_eval.open_encoder(tmp_path / "other.pth", None, None, 0)[1] != shas[0]


def test_evaluation_refuses_another_encoder_on_resume(encoder_file, tmp_path, capsys):
    evaluated(capsys, linear_eval, tmp_path, *RANDOM)
    refuse(capsys, "sha256 was", "--out", tmp_path, "--pretrained", encoder_file)


def test_labels_flag_reaches_linear_and_knn(tmp_path, capsys):
    result = evaluated(capsys, linear_eval, tmp_path / "a", *RANDOM, "--labels", 40)
    assert result["labels"] == 40 and steps(tmp_path / "a")[-1]["step"] == 4
    result = evaluated(capsys, linear_eval, tmp_path / "b", *RANDOM, "--labels", 40, "--knn")
    found = [result[key] for key in ("protocol", "k", "temperature", "labels")]
    assert found == ["knn", 20, 0.07, 40] and "head" not in result
    assert 10 < result["top1"] <= result["top5"] <= 100 and "top5_k200" in result


@pytest.mark.usefixtures("one_thread")
def test_linear_evaluation_on_two_ranks(tmp_path, capsys, monkeypatch):
    """The standard head has no batch norm: two ranks train and score as one process does."""
    flags = [*RANDOM, "--head", "linear", "--lr", "0.1", "0.3", "--data", "shapes:100"]
    result = torchrun(2, "linear_eval.py", *LINEAR, *flags, "--out", tmp_path / "two")
    assert result.returncode == 0, result.stderr
    monkeypatch.setattr(knn, "open_images", data.open_images)  # as the ranks: all of val
    one = evaluated(capsys, linear_eval, tmp_path / "one", *flags)
    two = json.loads(result.stdout.splitlines()[-1])
    assert len(steps(tmp_path / "one")) == len(steps(tmp_path / "two")) == 8
    for a, b in zip(steps(tmp_path / "one"), steps(tmp_path / "two")):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["train_top1"] == pytest.approx(b["train_top1"], abs=5.1)  # an image of 20
    assert one["top1"] == pytest.approx(two["top1"], abs=0.21) and two["world_size"] == 2


# ------------------------------------------------------------------------------------- semi_eval.py
def test_semi_supervised_evaluation(tmp_path, capsys):
    """The subset that a run has written gives the same run."""
    result = evaluated(capsys, semi_eval, tmp_path / "drawn", *RANDOM, "--head-lr", 0.3)
    expected = {"protocol": "semi", "percent": 10, "labels": 40, "batch_size": 20, "lr": 0.05,
                "head_lr": 0.3, "epochs": 2, "head": "linear", "seed": 0, "image_size": [32, 32],
                "precision": "fp32"}
    assert {key: result[key] for key in expected} == expected
    lines = steps(tmp_path / "drawn" / "final_lr0.05_epochs2")
    assert lines[0]["lr"] == [0.05, 0.3] and 0 <= lines[0]["train_top1"][0] <= 100
    names = (tmp_path / "drawn" / "subset.txt").read_text().split("\n")[:-1]
    assert len(set(names)) == 40
    for kind in data.Shapes.classes:
        assert sum(name.startswith(f"{kind}/") for name in names) == 4
    again = evaluated(capsys, semi_eval, tmp_path / "read", *RANDOM, "--head-lr", 0.3,
                      "--subset", tmp_path / "drawn" / "subset.txt")
    assert again == result


def test_a_grid_grows(tmp_path, capsys, monkeypatch):
    """Runs that are there are not repeated; one that diverges scores as the worst."""
    made = []
    monkeypatch.setattr(Recorder, "made", made)
    monkeypatch.setattr(torch.optim, "SGD", Recorder)
    small = evaluated(capsys, semi_eval, tmp_path, *RANDOM, "--lr", 0.01, 0.1, "--epochs", 1,
                      "--batch-size", 1024)
    assert len(small["choice"]) == 2 and small["batch_size"] == 40  # clamped to the subset
    assert [len(one.rates) for one in made] == [1, 1, 1]
    made.clear()
    grown = evaluated(capsys, semi_eval, tmp_path, *RANDOM, "--lr", 1e30, 0.01, 0.1,
                      "--epochs", 1, 2, "--batch-size", 1024)
    assert [len(one.rates) for one in made[:6]] == [1, 2, 0, 2, 0, 2]
    assert grown["choice"]["lr 0.01, 1 epochs"] == small["choice"]["lr 0.01, 1 epochs"]
    assert len(grown["choice"]) == 6 and grown["choice"]["lr 1e+30, 2 epochs"] == -1
    best = max(grown["choice"], key=grown["choice"].get)
    assert best == f"lr {grown['lr']:g}, {grown['epochs']} epochs"
    final = f"final_lr{grown['lr']:g}_epochs{grown['epochs']}"
    counts = [header(tmp_path / name)["args"]["images"] for name in ("lr0.1_epochs2", final)]
    assert counts == [30, 40]
    assert header(tmp_path / "lr0.1_epochs2")["args"]["lr"] == 0.1
    with pytest.raises(SystemExit):
        evaluated(capsys, semi_eval, tmp_path / "lost", *RANDOM, "--lr", 1e30)
    assert "choose a smaller --lr" in capsys.readouterr().err


def test_semi_supervised_resumes(tmp_path, capsys):
    flags = [*RANDOM, "--lr", 0.02, 0.1]
    whole = evaluated(capsys, semi_eval, tmp_path / "whole", *flags)
    line = stopped(capsys, semi_eval, tmp_path / "parts", *flags, "--max-steps", 1)
    assert "lr0.02_epochs2: stopped after step 1 of 2; to go on, raise --max-steps 1" in line
    assert evaluated(capsys, semi_eval, tmp_path / "parts", *flags) == whole


def test_all_labels_from_random_weights(tmp_path, capsys):
    """The supervised row of a table."""
    flags = ["--data", "shapes:50", "--percent", 100]
    result = evaluated(capsys, semi_eval, tmp_path, *RANDOM, *flags)
    assert (result["labels"], result["percent"], result["encoder"]) == (50, 100, "random")


def test_another_subset_does_not_go_on(tmp_path, capsys):
    """Also where the list has the same path and length."""
    names = semi_eval.names_of(data.Shapes("train", 400))
    listed = tmp_path / "list.txt"
    for first, match in ((0, None), (10, "subset was")):
        listed.write_text("\n".join(names[first:first + 20]))
        flags = [*RANDOM, "--subset", listed, "--out", tmp_path / "out"]
        if match:
            refuse(capsys, match, *flags, script=semi_eval)
        else:
            evaluated(capsys, semi_eval, tmp_path / "out", *flags)


def test_subsets_are_drawn_by_class_and_seed():
    source = data.Shapes("train", 1200)
    drawn = semi_eval.draw_subset(source, 1, seed=0)
    assert len(drawn) == 10 and sorted(index % 10 for index in drawn) == list(range(10))
    assert list(drawn) != list(semi_eval.draw_subset(source, 1, seed=1))
    assert len(semi_eval.draw_subset(source, 10, seed=0)) == 120
    assert list(semi_eval.draw_subset(source, 100, seed=0)) == list(range(1200))
    with pytest.raises(care.InputError, match="no image for 10 classes, first disk-stripes"):
        semi_eval.draw_subset(data.Shapes("train", 400), 0, seed=0)


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
    """ImageNet's names in n01 and n02; in `deep` two folders with the same names."""
    root = tmp_path_factory.mktemp("nested")
    for kind in ("n01", "n02"):
        folder = images(root / kind, 3)
        for path in folder.glob("*.png"):
            path.rename(folder / f"{kind}_{path.name}")
    images(root / "deep" / "a", 2)
    images(root / "deep" / "b", 2)
    return data.ImageFiles(root, labelled=True)


def read_list(tmp_path, content, source):
    path = tmp_path / "list.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [semi_eval.names_of(source)[index] for index in semi_eval.read_subset(path, source)]


@pytest.mark.parametrize("content", [
    "n02_001.png\nn01_002.png\ndeep/a/000.png\n",
    "n02/n02_001.png\nn01/n01_002.png\na/000.png",
    "n02_001.png\r\nn01_002.png\r\ndeep/a/000.png\r\n",
    b"\xef\xbb\xbfn02_001.png\nn01_002.png\n\ndeep/a/000.png\n",
])
def test_lists_name_images_in_several_ways(content, nested, tmp_path):
    """SimCLR's, class/file, a path below the class; line ends of Windows, a byte-order mark."""
    names = ["deep/a/000.png", "n01/n01_002.png", "n02/n02_001.png"]
    assert read_list(tmp_path, content, nested) == names


def test_lists_of_older_runs_are_read(tmp_path):
    """They put the class before the name: cat_000.png."""
    class_folders(tmp_path / "train", ["cat", "dog"])
    source = data.ImageFiles(tmp_path / "train", labelled=True)
    found = read_list(tmp_path, "cat_001.png\ndog_000.png", source)
    assert found == ["cat/001.png", "dog/000.png"]


@pytest.mark.parametrize("content, match", [
    ("n01_002.png\nn09_1.JPEG\nn09_2.JPEG\n", "2 of 3 names are not in .*, first n09_1.JPEG, n09"),
    ("n01_002.png\nn02_001.png\n000.png\n", "000.png is the name of 2 images; give class/file"),
    ("deep/000.png\n", "deep/000.png is the name of 2 images"),
    ("n01_002.png\n", "no image for 2 classes, first deep"),
    (b"n01_\xe9.png\n", r"first n01_\\udce9.png"),
])
def test_lists_that_do_not_tell_are_refused(content, match, nested, tmp_path):
    with pytest.raises(care.InputError, match=match):
        read_list(tmp_path, content, nested)


def test_a_written_list_gives_the_same_images_back(nested, tmp_path, capsys):
    """Equal names in nested folders, and names that are no UTF-8."""
    root = tmp_path / "set"
    for split in ("train", "val"):
        for kind in ("cat", "dog"):
            for folder in ("x", "y"):
                images(root / split / kind / folder, 5, size=(32, 32))
            odd = root / split / kind / "x"
            os.rename(odd / "000.png", os.fsencode(odd) + b"/caf\xe9 \xff.png")
    flags = [*RANDOM, "--data", root, "--batch-size", 2, "--percent", 100]
    first = evaluated(capsys, semi_eval, tmp_path / "a", *flags)
    listed = tmp_path / "a" / "subset.txt"
    assert first["labels"] == 20 and listed.read_bytes().count(b"caf\xe9 \xff") == 2
    again = evaluated(capsys, semi_eval, tmp_path / "b", *flags, "--subset", listed)
    assert again == first


# ------------------------------------------------------------------------------- signals, bad input
@pytest.mark.parametrize("script, flags", [
    (linear_eval, []), (linear_eval, ["--knn"]), (semi_eval, [])])
def test_a_signal_ends_an_evaluation(script, flags, tmp_path, capsys, monkeypatch):
    """While training it saves and stops, while scoring it stops; the same command goes on."""
    monkeypatch.setattr(linear_eval, "catch_signals", lambda: [signal.SIGTERM])
    line = stopped(capsys, script, tmp_path, *RANDOM, *flags)
    assert "stopped" in line and line.endswith("the same command goes on")
    saved = [torch.load(path, weights_only=True)["step"] for path in tmp_path.rglob("last.pth")]
    assert saved == ([] if flags else [1])
    monkeypatch.setattr(linear_eval, "catch_signals", list)
    assert "top1" in evaluated(capsys, script, tmp_path, *RANDOM, *flags)
    for path in tmp_path.rglob("last.pth"):
        assert [line["step"] for line in steps(path.parent)] in ([1, 2, 3, 4], [1, 2, 3, 4, 5, 6])


def test_a_signal_while_scoring_val(tmp_path, capsys, monkeypatch):
    received, fit = [], linear_eval.fit

    def fit_and_stop(*arguments):
        model = fit(*arguments)
        received.append(signal.SIGTERM)
        return model

    monkeypatch.setattr(linear_eval, "catch_signals", lambda: received)
    monkeypatch.setattr(linear_eval, "fit", fit_and_stop)
    line = stopped(capsys, linear_eval, tmp_path, *RANDOM)
    assert line == "stopped while scoring; the same command goes on"
    assert not (tmp_path / "classifier.pth").exists()


@pytest.mark.parametrize("match, flags", [
    ("up to 60", ["--batch-size", 100]),
    ("multiples of 32", ["--image-size", 40]),
    ("--lr 0.0", ["--lr", 0]),
    ("--epochs 0", ["--epochs", 0]),
    ("fewer than the 10 classes|--labels 3", ["--labels", 3]),
    ("at least 2 images on each rank", ["--batch-size", 1]),
    ("No such file", ["--pretrained", "none.pth"]),
])
def test_bad_arguments_of_linear_eval(match, flags, tmp_path, capsys):
    refuse(capsys, match, *RANDOM, "--out", tmp_path, *flags)


@pytest.mark.parametrize("match, flags", [
    ("no image for 10 classes", ["--data", "shapes:100", "--percent", 1]),
    ("No such file", ["--subset", "none.txt"]),
    ("need at least 2 images each", ["--batch-size", 1]),
    ("too few a class to hold a fifth out",
     ["--data", "shapes:20", "--percent", 100, "--lr", 0.1, 0.2]),
    ("--head-lr -1", ["--head-lr", -1]),
])
def test_bad_arguments_of_semi_eval(match, flags, tmp_path, capsys):
    refuse(capsys, match, *RANDOM, "--out", tmp_path, *flags, script=semi_eval)


def test_bad_encoders_and_folders(encoder_file, tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    flags = ["--pretrained", encoder_file, "--arch", "resnet50"]
    refuse(capsys, "resnet50 was asked for", *flags, *out)
    images(tmp_path / "set" / "train" / "cat", 3)
    refuse(capsys, "no folder val", *RANDOM, *out, "--data", tmp_path / "set")
    images(tmp_path / "set" / "val" / "dog", 3)
    refuse(capsys, "differ in classes .cat, dog", *RANDOM, *out, "--data", tmp_path / "set")
    refuse(capsys, "folders differ from the 10 classes", *RANDOM, *out, "--val", tmp_path / "set")


def test_an_unreadable_image_cannot_be_scored(tmp_path, capsys):
    """In training the next one takes its place; in val, or a bank, there is no score without it."""
    for split in ("train", "val"):
        class_folders(tmp_path / "set" / split, ["cat", "dog"], count=4)
    flags = [*RANDOM, "--data", tmp_path / "set", "--batch-size", 4]
    (tmp_path / "set" / "train" / "cat" / "000.png").write_bytes(b"")
    result = evaluated(capsys, linear_eval, tmp_path / "a", *flags)
    assert "top1" in result and steps(tmp_path / "a")[-1]["unreadable"] == 1
    photo(0, 32, 32).save(tmp_path / "set" / "train" / "cat" / "000.png")
    for folder, more in (("train", ["--knn"]), ("val", [])):
        broken = tmp_path / "set" / folder / "cat" / "001.png"
        broken.write_bytes(b"")
        with pytest.raises(SystemExit) as caught:
            evaluated(capsys, linear_eval, tmp_path / "b", *flags, *more)
        error = capsys.readouterr().err
        what = "train features" if more else "val"
        assert caught.value.code == 2 and f"error: {what} cannot be scored" in error
        assert "001.png" in error
        photo(0, 32, 32).save(broken)


def test_a_refusal_to_read_is_one_line(tmp_path, capsys, monkeypatch):
    """An OSError in the middle of training or scoring, whatever its file."""
    for split in ("train", "val"):
        class_folders(tmp_path / "set" / split, ["cat", "dog"], count=4)
    read = data.read_image

    def fail_in(folder):
        def refuse_one(path, *rest):
            if f"/{folder}/dog/003" in str(path):
                raise PermissionError(13, "Permission denied", path)
            return read(path, *rest)
        return refuse_one

    for folder in ("train", "val"):
        monkeypatch.setattr(data, "read_image", fail_in(folder))
        refuse(capsys, f"Permission denied: .*{folder}/dog/003.png", *RANDOM, "--data",
               tmp_path / "set", "--batch-size", 4, "--out", tmp_path / "out")
