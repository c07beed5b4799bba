"""linear_eval.py: its protocol, its runs end to end, and what it refuses."""
import json
import signal
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import care
import common.run as run_module
import linear_eval
from care import Encoder
from common import data
from common.ranks import parallelise
from common.views import centre_crop, to_input
from common.weights import open_encoder, sha256_of
from conftest import (CPU, RANDOM, SGD, check_head, check_views, class_folders, cosine, final_line,
                      images, photo, refused, signal_after_step, steps, stopped, torchrun,
                      train_small)

pytestmark = pytest.mark.usefixtures("few_validation_images")
LINEAR = ["--image-size", "32", "--workers", "0", "--log-every", "1", "--data", "shapes:60",
          "--batch-size", "20", "--epochs", "2", "--head", "linear-bn"]


def evaluated(capsys, out, *flags):
    """Run linear_eval.py in this process -> its final line."""
    return final_line(capsys, linear_eval, *LINEAR, "--out", out, *flags)


def stop_early(capsys, out, *flags):
    """Run linear_eval.py, which stops before its end -> its last line on stdout."""
    return stopped(capsys, linear_eval, *LINEAR, "--out", out, *flags)


def refuse(capsys, match, *flags):
    return refused(capsys, *LINEAR, *flags, match=match, script=linear_eval)


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory):
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("encoder") / "encoder.pth"
    torch.save(Encoder("thin").state_dict(), path)
    return path


# ---------------------------------------------------------------------------- protocol and settings
@pytest.mark.parametrize("kind, batch_size", [("linear-bn", 256), ("linear", 64)])
def test_the_linear_protocol_is_the_papers(kind, batch_size, recorded, tmp_path, capsys):
    """SGD, momentum 0.9, no decay, 0.2 x B / 256, cosine per step (paper, Sec. 4.2; release)."""
    flags = [*RANDOM, "--data", "shapes:270", "--batch-size", batch_size, "--head", kind]
    result = evaluated(capsys, tmp_path, *flags, "--epochs", 3)
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


@pytest.mark.parametrize("flags, expected", [
    ([], {"lr": 0.2, "epochs": 80, "batch_size": 256, "head": "linear-bn",
          "labels": None, "data": "imagenet", "image_size": [224, 224]}),
    (["--data", "shapes"], {
        "lr": 0.2, "epochs": 40, "batch_size": 256, "head": "linear", "labels": 1000,
        "image_size": [32, 32]}),
    (["--data", "cifar10"], {"epochs": 80, "labels": None, "image_size": [32, 32]}),
])
def test_defaults_are_the_papers_and_the_recipes(flags, expected):
    args = vars(linear_eval.parse_args(["--pretrained", "random", *flags]))
    assert {key: args[key] for key in expected} == expected


# --------------------------------------------------------------------------------------------- runs
def test_linear_evaluation(encoder_file, tmp_path, capsys):
    """The final line holds all that is needed to repeat it."""
    out = encoder_file.parent / "linear"
    linear_eval.main([*LINEAR, "--pretrained", str(encoder_file), "--seed", "4"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    expected = {
        "encoder": str(encoder_file), "arch": "thin", "stem": "imagenet", "data": "shapes:60",
        "val": None, "protocol": "linear", "protocol_version": linear_eval.PROTOCOL_VERSION,
        "head": "linear-bn", "lr": 0.2, "epochs": 2, "batch_size": 20, "labels": 60, "seed": 4,
        "precision": "fp32", "image_size": [32, 32], "torch": torch.__version__,
        "world_size": 1}
    assert {key: result[key] for key in expected} == expected
    assert len(result["sha256"]) == 64 and "torchvision" in result and "device" in result
    assert 0 <= result["top1"] <= result["top5"] <= 100
    assert [line["step"] for line in steps(out)] == [1, 2, 3, 4, 5, 6]
    assert [line["lr"] for line in steps(out)] == [[pytest.approx(rate)]
                                                   for rate in cosine(0.2 * 20 / 256, 6)]
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert last["top1"] == result["top1"] and last["args"]["sha256"] == result["sha256"]
    saved = torch.load(out / "classifier.pth", weights_only=True)
    assert saved["state"]["0.weight"].shape == (10, Encoder("thin").dim5)


def test_losses_and_training_top_1_are_logged_as_they_are(tmp_path, capsys, monkeypatch):
    seen, cross_entropy = [], F.cross_entropy

    def watch(scores, labels):
        loss = cross_entropy(scores, labels)
        seen.append((100 * (scores.argmax(1) == labels).float().mean().item(), loss.item()))
        return loss

    monkeypatch.setattr(F, "cross_entropy", watch)
    evaluated(capsys, tmp_path, *RANDOM, "--data", "shapes:100", "--lr", 5.0)
    for line, (top1, loss) in zip(steps(tmp_path), seen, strict=True):
        assert line["train_top1"] == pytest.approx(top1, abs=1e-4)
        assert line["loss"] == pytest.approx(loss, abs=1e-6)


def test_every_encoder_file_has_a_folder_of_its_own():
    names = ("encoder.pth", "last.pth", "epoch0100.pth", "100_ckpt.pth.tar")
    folders = [linear_eval.default_out(f"a/{name}", "linear") for name in names]
    assert folders == ["a/linear", "a/linear", "a/linear_epoch0100", "a/linear_100_ckpt"]


def test_a_run_that_diverges_is_one_line(tmp_path):
    """Exit code 1; neither a checkpoint of the broken step nor a classifier is left."""
    flags = [*LINEAR, *RANDOM, "--head", "linear", "--lr", 4e39, "--out", tmp_path]
    result = torchrun(1, "linear_eval.py", *flags)
    assert result.codes == [1]
    assert "top1" not in result.stdout and result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: {tmp_path}: step ")
    assert "loss or weights not finite (loss " in result.stderr
    assert not list(tmp_path.glob("*.pth"))


def test_linear_evaluation_resumes(tmp_path, capsys):
    whole = evaluated(capsys, tmp_path / "whole", *RANDOM)
    line = stop_early(capsys, tmp_path / "parts", *RANDOM, "--max-steps", 4)
    assert f"{tmp_path / 'parts'}: step 4 of 6: as --max-steps says" in line
    assert stop_early(capsys, tmp_path / "parts", *RANDOM, "--max-steps", 4) == line
    assert evaluated(capsys, tmp_path / "parts", *RANDOM) == whole
    for a, b in zip(steps(tmp_path / "whole"), steps(tmp_path / "parts"), strict=True):
        assert [a[key] for key in ("step", "lr", "loss", "train_top1")] == [
            b[key] for key in ("step", "lr", "loss", "train_top1")]
    a, b = (torch.load(tmp_path / name / "classifier.pth", weights_only=True)["state"]
            for name in ("whole", "parts"))
    assert all(map(torch.equal, a.values(), b.values()))


@pytest.fixture
def finished(tmp_path, capsys):
    evaluated(capsys, tmp_path / "finished", *RANDOM)
    return tmp_path / "finished"


def test_another_protocol_or_encoder_does_not_go_on(finished, encoder_file, capsys):
    for flags, match in (
            (["--seed", 1], "seed was 0, is 1"),
            (["--labels", 30], "labels was"),
            (["--lr", 0.1], "lr was 0.2, is 0.1"),
            (["--head", "linear"], "head was linear-bn, is linear"),
            (["--pretrained", encoder_file], "sha256 was")):
        refuse(capsys, match, *RANDOM, "--out", finished, *flags)


def test_a_run_of_an_older_protocol_does_not_go_on(finished, tmp_path, capsys):
    """Arguments that a checkpoint lacks count as defaults; the version is not one of them."""
    saved = torch.load(finished / "last.pth", weights_only=True)
    del saved["args"]["protocol_version"]
    torch.save(saved, tmp_path / "last.pth")
    refuse(capsys, "protocol_version was 1, is", *RANDOM, "--out", tmp_path)


def test_what_does_not_change_the_training_may_change(finished, tmp_path, capsys):
    flags = ["--log-every", 5, "--val", class_folders(tmp_path / "val", data.Shapes.classes)]
    result = evaluated(capsys, finished, *RANDOM, *flags)
    assert len(steps(finished)) == 6 and result["val"] == str(tmp_path / "val")


def test_the_frozen_check_sees_one_bit(tmp_path, capsys, monkeypatch):
    fit = linear_eval.fit

    def fit_and_nudge(run, args, model, *rest):
        fit(run, args, model, *rest)
        model.encoder.bn1.running_var[3] += 1e-7

    monkeypatch.setattr(linear_eval, "fit", fit_and_nudge)
    with pytest.raises(SystemExit) as caught:
        evaluated(capsys, tmp_path, *RANDOM)
    assert caught.value.code == 1
    assert "1 tensors, first bn1.running_var" in capsys.readouterr().err
    assert not (tmp_path / "classifier.pth").exists()


def test_a_saved_classifier_is_scored_again(encoder_file, tmp_path, capsys, monkeypatch):
    """Without training: the same score and protocol; on other images by --val, matched by name."""
    flags = ["--pretrained", encoder_file]
    trained = evaluated(capsys, tmp_path / "out", *flags, "--seed", 5)
    monkeypatch.setattr(linear_eval, "fit", None)
    again = evaluated(capsys, tmp_path / "out", *flags, "--evaluate", "--epochs", 99)
    classifier = str(tmp_path / "out" / "classifier.pth")
    assert again == trained | {"classifier": classifier}
    elsewhere = evaluated(capsys, tmp_path / "b", *flags, "--evaluate", classifier)
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
        found = evaluated(capsys, tmp_path / "out", *flags, "--evaluate",
                          "--val", tmp_path / folder)
        assert (found["top1"], found["top5"]) == (trained["top1"], trained["top5"])

    refuse(capsys, "not a classifier that was trained on random", *RANDOM, "--evaluate", classifier,
           "--out", tmp_path / "c")
    refuse(capsys, "No such file", *flags, "--evaluate", "--out", tmp_path / "c")
    refuse(capsys, r"trained at --image-size \[32, 32\], not \[64, 64\]", *flags, "--evaluate",
           classifier, "--image-size", 64, "--out", tmp_path / "c")
    older = torch.load(classifier, weights_only=True)
    for name in ("image_size", "protocol_version", "data_digest"):
        del older["trained"][name]
    torch.save(older, tmp_path / "older.pth")
    found = evaluated(capsys, tmp_path / "c", *flags, "--evaluate", tmp_path / "older.pth")
    assert found["top1"] == trained["top1"] and found["protocol_version"] is None
    refuse(capsys, "not allowed with", *flags, "--evaluate", "--knn", "--out", tmp_path / "c")
    torch.save({"sha256": again["sha256"], "classes": ["a"]}, tmp_path / "other.pth")
    refuse(capsys, "other classes than those of shapes:60", *flags, "--out", tmp_path / "c",
           "--evaluate", tmp_path / "other.pth")


def test_scores_stay_in_the_log_when_a_run_begins(encoder_file, tmp_path, capsys):
    """kNN's, where the classifier is trained afterwards in the same directory."""
    flags = ["--pretrained", encoder_file]
    first = evaluated(capsys, tmp_path, *flags, "--knn")
    second = evaluated(capsys, tmp_path, *flags)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    scores = [{name: line[name] for name in line if name != "args"}
              for line in lines if "sha256" in line]
    assert scores == [first, second]


def test_a_line_that_a_full_disk_cut_does_not_swallow_the_next(encoder_file, tmp_path, capsys):
    flags = ["--pretrained", encoder_file, "--knn"]
    evaluated(capsys, tmp_path, *flags)
    log = tmp_path / "log.jsonl"
    log.write_bytes(log.read_bytes() + b'{"encoder": "cut')
    evaluated(capsys, tmp_path, *flags)
    whole, cut, last = log.read_text().splitlines()
    assert json.loads(whole)["top1"] == json.loads(last)["top1"] and cut == '{"encoder": "cut'


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
    shas = [sha256_of(open_encoder(tmp_path / name, None, None, 0))
            for name in ("encoder.pth", "last.pth")]
    assert shas[0] == shas[1]
    other = Encoder("thin")
    state = torch.load(tmp_path / "encoder.pth", weights_only=True)
    state["layer4.0.bn2.running_var"][0] += 1e-6
    other.load_state_dict(state)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    assert sha256_of(open_encoder(tmp_path / "other.pth", None, None, 0)) != shas[0]


def test_labels_flag_reaches_linear_and_knn(tmp_path, capsys):
    result = evaluated(capsys, tmp_path / "a", *RANDOM, "--labels", 40)
    assert result["labels"] == 40 and steps(tmp_path / "a")[-1]["step"] == 4
    result = evaluated(capsys, tmp_path / "b", *RANDOM, "--labels", 40, "--knn")
    found = [result[key] for key in ("protocol", "k", "temperature", "labels")]
    assert found == ["knn", 20, 0.07, 40] and "head" not in result
    assert 10 < result["top1"] <= result["top5"] <= 100 and "top5_k200" in result


@pytest.mark.usefixtures("one_thread")
def test_linear_evaluation_on_two_ranks(few_validation_images, tmp_path, capsys, monkeypatch):
    """The standard head has no batch norm: two ranks train and score as one process does."""
    flags = [*RANDOM, "--head", "linear", "--lr", "0.3", "--data", "shapes:100"]
    result = torchrun(2, "linear_eval.py", *LINEAR, *flags, "--out", tmp_path / "two")
    assert result.returncode == 0, result.stderr
    monkeypatch.setattr(data, "open_images", few_validation_images)  # as the ranks: all of val
    one = evaluated(capsys, tmp_path / "one", *flags)
    two = json.loads(result.stdout.splitlines()[-1])
    assert len(steps(tmp_path / "one")) == len(steps(tmp_path / "two")) == 10
    for a, b in zip(steps(tmp_path / "one"), steps(tmp_path / "two")):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["train_top1"] == pytest.approx(b["train_top1"], abs=5.1)  # an image of 20
    assert one["top1"] == pytest.approx(two["top1"], abs=0.21) and two["world_size"] == 2


# ------------------------------------------------------------------------------- signals, bad input
def test_a_signal_while_training(tmp_path, capsys):
    """It saves and stops; the same command resumes it."""
    with signal_after_step(1):
        line = stop_early(capsys, tmp_path, *RANDOM)
    assert line == f"{tmp_path}: step 1 of 6: stopped, the same command resumes it"
    assert torch.load(tmp_path / "last.pth", weights_only=True)["step"] == 1
    assert "top1" in evaluated(capsys, tmp_path, *RANDOM)
    assert [line["step"] for line in steps(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_signal_while_scoring_knn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_module, "catch_signals", lambda: [signal.SIGTERM])
    line = stop_early(capsys, tmp_path, *RANDOM, "--knn")
    assert line == "stopped while scoring; the same command resumes it"
    monkeypatch.setattr(run_module, "catch_signals", list)
    assert "top1" in evaluated(capsys, tmp_path, *RANDOM, "--knn")
    assert not list(tmp_path.rglob("last.pth"))


def test_a_signal_while_scoring_val(tmp_path, capsys, monkeypatch):
    received, fit = [], linear_eval.fit

    def fit_and_stop(*arguments):
        fit(*arguments)
        received.append(signal.SIGTERM)

    monkeypatch.setattr(run_module, "catch_signals", lambda: received)
    monkeypatch.setattr(linear_eval, "fit", fit_and_stop)
    line = stop_early(capsys, tmp_path, *RANDOM)
    assert line == "stopped while scoring; the same command resumes it"
    assert not (tmp_path / "classifier.pth").exists()


@pytest.mark.parametrize("match, flags", [
    ("up to 60", ["--batch-size", 100]),
    ("multiples of 32", ["--image-size", 40]),
    ("--lr: 0: must be a number above 0", ["--lr", 0]),
    ("--epochs: 0: must be a whole number of at least 1", ["--epochs", 0]),
    ("fewer than the 10 classes|--labels 3", ["--labels", 3]),
    ("at least 2 images on each rank", ["--batch-size", 1]),
    ("--pretrained: none.pth: no such file", ["--pretrained", "none.pth"]),
])
def test_bad_arguments_of_linear_eval(match, flags, tmp_path, capsys):
    refuse(capsys, match, *RANDOM, "--out", tmp_path, *flags)


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
    result = evaluated(capsys, tmp_path / "a", *flags)
    assert "top1" in result and steps(tmp_path / "a")[-1]["unreadable"] == 1
    photo(0, 32, 32).save(tmp_path / "set" / "train" / "cat" / "000.png")
    for folder, more in (("train", ["--knn"]), ("val", [])):
        broken = tmp_path / "set" / folder / "cat" / "001.png"
        broken.write_bytes(b"")
        with pytest.raises(SystemExit) as caught:
            evaluated(capsys, tmp_path / "b", *flags, *more)
        error = capsys.readouterr().err
        what = "train features" if more else "val"
        assert caught.value.code == 2 and f"error: {what} cannot be scored" in error
        assert "001.png" in error
        photo(0, 32, 32).save(broken)


def test_a_refusal_to_read_is_one_line(tmp_path, capsys, monkeypatch):
    """An OSError in the middle of training or scoring, whatever its file; what is done is saved."""
    for split in ("train", "val"):
        class_folders(tmp_path / "set" / split, ["cat", "dog"], count=4)
    read = data.read_image

    def fail_in(folder):
        def refuse_one(path, *rest):
            if f"/{folder}/dog/003" in str(path):
                raise PermissionError(13, "Permission denied", path)
            return read(path, *rest)
        return refuse_one

    for folder, step in (("train", 1), ("val", 4)):
        monkeypatch.setattr(data, "read_image", fail_in(folder))
        refuse(capsys, f"Permission denied: .*{folder}/dog/003.png", *RANDOM, "--data",
               tmp_path / "set", "--batch-size", 4, "--out", tmp_path / "out")
        saved = torch.load(tmp_path / "out" / "last.pth", weights_only=True)
        assert saved["step"] == len(steps(tmp_path / "out")) == step


# ------------------------------------------------------------------------------------- features out
@pytest.mark.usefixtures("one_thread")
def test_exported_features_are_those_of_knn(encoder_file, tmp_path, capsys):
    """kNN by numpy on the file finds the last line's score; it is read without pickle."""
    flags = ["--pretrained", encoder_file, "--labels", 40, "--export", tmp_path / "f.npz"]
    result = evaluated(capsys, tmp_path / "out", *flags, "--knn")
    assert result["export"] == str(tmp_path / "f.npz") and result["protocol"] == "knn"
    found = dict(np.load(tmp_path / "f.npz", allow_pickle=False))
    kinds = {"features": np.float32, "labels": np.int64}
    assert set(found) == {f"{split}_{kind}" for split in ("train", "val")
                          for kind in ("features", "labels", "names")}
    for split, size in (("train", 40), ("val", 100)):
        for kind, dtype in kinds.items():
            assert found[f"{split}_{kind}"].dtype == dtype
        assert found[f"{split}_features"].shape == (size, Encoder("thin").dim5)
        names = found[f"{split}_names"]
        assert names.shape == (size,) and names.dtype.kind == "U"
    classes = data.Shapes.classes
    assert found["val_names"][13] == f"{classes[3]}/13" and found["val_labels"][13] == 3
    names = [name.partition("/")[0] for name in found["train_names"]]
    assert [classes.index(name) for name in names] == found["train_labels"].tolist()

    bank, queries = (found[f"{split}_features"].astype(np.float64) for split in ("train", "val"))
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    correct = 0
    for query, truth in zip(queries, found["val_labels"]):
        cosines = bank @ query
        votes = np.zeros(10)
        for index in np.argsort(-cosines)[:20]:
            votes[found["train_labels"][index]] += np.exp(cosines[index] / 0.07)
        correct += votes.argmax() == truth
    assert result["top1"] == pytest.approx(correct)

    encoder = open_encoder(encoder_file, None, None, 0).eval()
    image, _ = data.open_images("shapes:60", "val", size=32)[13]
    with torch.no_grad():
        pooled = encoder(to_input(centre_crop(image, [32, 32])[None], CPU))[1].mean((2, 3))[0]
    np.testing.assert_allclose(found["val_features"][13], pooled, rtol=1e-4, atol=1e-6)


def test_features_of_files_before_the_head_is_trained(tmp_path, capsys):
    """Names are those of the files below train and val; the head's scores stay as without it."""
    for split in ("train", "val"):
        class_folders(tmp_path / "set" / split, ["cat", "d\xf6g"], count=4)
    flags = [*RANDOM, "--data", tmp_path / "set", "--batch-size", 4]
    plain = evaluated(capsys, tmp_path / "a", *flags)
    result = evaluated(capsys, tmp_path / "b", *flags, "--export", tmp_path / "f.npz")
    assert result == plain | {"export": str(tmp_path / "f.npz")}
    found = np.load(tmp_path / "f.npz")
    assert found["val_names"].tolist() == [f"{name}/{number:03d}.png" for name in ("cat", "d\xf6g")
                                           for number in range(4)]
    again = evaluated(capsys, tmp_path / "b", *flags, "--export", tmp_path / "f.npz")
    assert again == result and not list(tmp_path.glob("*.tmp"))


def export_of_rank(out, *flags):
    """Batches of 8 images over both ranks: the last one is of rank 0 alone."""
    run_module.Run.in_order = partialmethod(run_module.Run.in_order, batch_size=8)
    linear_eval.main([*flags, "--export", out])


@pytest.mark.usefixtures("one_thread")
def test_two_ranks_export_the_features_of_one(encoder_file, tmp_path, capsys):
    sets = tmp_path / "set"
    for split, count in (("train", 17), ("val", 5)):
        class_folders(sets / split, ["cat"], count=count)
    flags = ["--image-size", "32", "--workers", "0", "--data", str(sets), "--pretrained",
             str(encoder_file), "--knn", "--out", str(tmp_path / "out")]
    result = torchrun(2, export_of_rank, tmp_path / "two.npz", *flags)
    assert result.returncode == 0, result.stderr
    linear_eval.main([*flags, "--export", str(tmp_path / "one.npz")])
    one, two = (np.load(tmp_path / name) for name in ("one.npz", "two.npz"))
    for name in one:
        if one[name].dtype == np.float32:
            np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-5)
        else:
            assert (one[name] == two[name]).all()


def test_bad_places_for_features(tmp_path, capsys, monkeypatch):
    flags = [*RANDOM, "--knn", "--out", tmp_path, "--export"]
    refuse(capsys, "argument --export: f.csv: must be a name that ends in .npz", *flags, "f.csv")
    refuse(capsys, "no/f.npz: there is no such folder", *flags, tmp_path / "no" / "f.npz")
    (tmp_path / "folder.npz").mkdir()
    refused(capsys, *LINEAR, *flags, tmp_path / "folder.npz", code=1, script=linear_eval,
            match="cannot write .*/folder.npz: ")
    (tmp_path / "folder.npz").rmdir()
    monkeypatch.setattr(run_module, "catch_signals", lambda: [signal.SIGTERM])
    line = stop_early(capsys, tmp_path, *flags, tmp_path / "f.npz")
    assert line == "stopped while scoring; the same command resumes it"
    assert not list(tmp_path.glob("*.npz*"))


# --------------------------------------------------------------------------------------- --sync-bn
def test_sync_bn_of_the_head(tmp_path, capsys, monkeypatch):
    """It reaches what joins the ranks, the result and resuming; on a CPU one line says so."""
    seen = []
    monkeypatch.setattr(linear_eval, "parallelise",
                        lambda *found: seen.append(found[2]) or parallelise(*found))
    result = evaluated(capsys, tmp_path / "all", *RANDOM)
    assert result["sync_bn"] == "all"
    linear_eval.main([*LINEAR, *RANDOM, "--sync-bn", "none", "--out", str(tmp_path / "none")])
    output = capsys.readouterr()
    assert json.loads(output.out.splitlines()[-1]) == result | {"sync_bn": "none"}
    assert output.err == ("note: --sync-bn has no effect on a CPU or on one GPU: nothing is "
                          "synchronised there\n")
    assert seen == [None, []]
    refuse(capsys, "sync_bn was all, is none", *RANDOM, "--sync-bn", "none", "--out",
           tmp_path / "all")
    refuse(capsys, "invalid choice: 'cnn'", *RANDOM, "--sync-bn", "cnn", "--out", tmp_path / "c")
    saved = torch.load(tmp_path / "all" / "last.pth", weights_only=True)
    del saved["args"]["sync_bn"]
    torch.save(saved, tmp_path / "all" / "last.pth")
    assert evaluated(capsys, tmp_path / "all", *RANDOM) == result


# ------------------------------------------------------------------------------------ which images
def class_photos(root, kinds, seed=0, count=10):
    """Photos of one colour a class, in train and val; kinds: folder -> hue."""
    for split in ("train", "val"):
        for name, hue in kinds.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                rng = np.random.default_rng((seed, hue, i, split == "val"))
                pixels = rng.integers(0, 60, (32, 32, 3), np.uint8)
                pixels[..., hue % 3] += np.uint8(60 + 40 * (hue // 3))
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def test_a_result_is_of_the_images_that_are_there(tmp_path, capsys):
    """Of a second folder with as many, never the first one's; what it is of is in all results."""
    first = class_photos(tmp_path / "first", {"red": 0, "blue": 2})
    second = class_photos(tmp_path / "second", {"rose": 2, "sky": 0}, seed=1)
    flags = [*RANDOM, "--batch-size", 4, "--data"]
    result = evaluated(capsys, tmp_path / "out", *flags, first)
    digests = [data.digest_of(data.ImageFiles(first / split)) for split in ("train", "val")]
    assert [result["data_digest"], result["val_digest"]] == digests
    saved = torch.load(tmp_path / "out" / "classifier.pth", weights_only=True)
    assert saved["trained"]["data_digest"] == digests[0]
    refuse(capsys, "data_digest was", *flags, second, "--out", tmp_path / "out")

    other = evaluated(capsys, tmp_path / "out", *flags, first, "--val",
                      class_photos(tmp_path / "third", {"red": 0, "blue": 2}, 2) / "val")
    assert other["data_digest"] == digests[0] and other["val_digest"] != digests[1]
    neighbours = evaluated(capsys, tmp_path / "knn", *flags, second, "--knn")
    assert neighbours["data_digest"] == data.digest_of(data.ImageFiles(second / "train"))

    del saved["trained"]["data_digest"]  # an older classifier does not say
    torch.save(saved, tmp_path / "old.pth")
    again = evaluated(capsys, tmp_path / "e", *flags, first, "--evaluate", tmp_path / "old.pth")
    assert again["data_digest"] is None and again["top1"] == result["top1"]


@pytest.mark.parametrize("classes, folders", [
    ([str(n) for n in range(1, 12)], [str(n) for n in range(11)]),  # from 1, and from 0
    ([str(n) for n in range(12)], [f"{n:03}" for n in range(12)]),
    ([f"{10 * n:04}" for n in range(12)], [str(10 * n) for n in range(12)]),
    ([f"{10 * n:04}" for n in range(12)], [f"{n:02}" for n in range(12)]),
    (["cat", "7", "dog"], ["2", "0", "1"]),
])
def test_numbered_folders_where_classes_may_be_numbers(classes, folders, tmp_path, capsys):
    """By their values, or else their places among the classes, 2 before 10."""
    classes = sorted(classes)
    numeric = all(name.isdecimal() for name in classes)
    in_order = sorted(classes, key=int) if numeric else classes
    right = dict(zip(sorted(folders, key=int), in_order))
    source = linear_eval.open_val(class_folders(tmp_path, folders, count=1), classes)
    for index in range(len(source)):
        folder = Path(source.path(index)).parent.name
        assert classes[source.targets[index]] == right[folder]
    assert source.classes == classes
    first, last = min(folders, key=int), max(folders, key=int)
    note, = capsys.readouterr().err.splitlines()
    assert note.startswith(f"note: --val {tmp_path}: by number: {first} is {right[first]}, ")
    assert note.endswith(f" ..., {last} is {right[last]}")


@pytest.mark.parametrize("classes, folders", [
    (["1", "2", "3"], ["4", "5", "6"]),
    (["a", "b", "c"], ["1", "2", "3"]),
    (["a", "b", "c"], ["0", "1", "01"]),
    (["1", "2"], ["0", "1", "2"]),
    (["a", "b"], ["0", "x"]),
])
def test_numbers_that_do_not_fit_are_refused(classes, folders, tmp_path):
    with pytest.raises(care.InputError, match=f"differ from the {len(classes)} classes in"):
        linear_eval.open_val(class_folders(tmp_path, folders, count=1), classes)


def test_ranks_that_score_different_images_are_refused(tmp_path):
    for rank, side in (("0", 40), ("1", 50)):
        class_folders(tmp_path / rank / "val", data.Shapes.classes, count=1)
        photo(0, side, side).save(tmp_path / rank / "val" / data.Shapes.classes[0] / "000.png")
    flags = [*RANDOM, "--batch-size", 20, "--val", "val", "--out", "out"]
    result = torchrun(2, "linear_eval.py", *LINEAR, *flags,
                      folders=[tmp_path / "0", tmp_path / "1"])
    assert result.codes == [2, 2] and "error: val_digest: rank 0 has " in result.stderr


def test_a_folder_is_no_checkpoint(tmp_path, capsys):
    refuse(capsys, "--pretrained: .*: is a folder; give a file, as encoder.pth in it",
           "--pretrained", tmp_path, "--out", tmp_path)
