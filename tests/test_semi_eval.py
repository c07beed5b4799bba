"""semi_eval.py: its protocol, its grid, its lists of images, and what it refuses."""
import os

import pytest
import torch

import care
import semi_eval
from care import Encoder
from common import data
from common.run import Diverged
from conftest import (RANDOM, SGD, Recorder, check_head, check_views, class_folders, cosine,
                      final_line, header, images, refused, signal_after_step, steps, stopped)

pytestmark = pytest.mark.usefixtures("few_validation_images")
SEMI = ["--image-size", "32", "--workers", "0", "--log-every", "1", "--data", "shapes:400",
        "--percent", "10", "--batch-size", "20", "--epochs", "2"]


def evaluated(capsys, out, *flags):
    """Run semi_eval.py in this process -> its final line."""
    return final_line(capsys, semi_eval, *SEMI, "--out", out, *flags)


def stop_early(capsys, out, *flags):
    """Run semi_eval.py, which stops before its end -> its last line on stdout."""
    return stopped(capsys, semi_eval, *SEMI, "--out", out, *flags)


def refuse(capsys, match, *flags):
    return refused(capsys, *SEMI, *flags, match=match, script=semi_eval)


# ---------------------------------------------------------------------------- protocol and settings
def test_the_semi_supervised_protocol(recorded, tmp_path, capsys):
    """SGD, Nesterov 0.9, no decay, cosine per step, encoder in train mode, plain linear head."""
    evaluated(capsys, tmp_path, *RANDOM, "--head-lr", 0.3, "--epochs", 6)
    optimizer, = recorded.optimizers
    for group in optimizer.param_groups:
        assert {key: group[key] for key in (*SGD, "nesterov")} == SGD | {"nesterov": True}
    wanted = zip(cosine(0.05, 12), cosine(0.3, 12))
    assert optimizer.rates == [[pytest.approx(a), pytest.approx(b)] for a, b in wanted]
    assert len(optimizer.initial[0]) == len(list(Encoder("thin").parameters()))
    check_head(optimizer.initial[1], "linear")
    check_views(recorded, 20, steps=12)
    assert all(training for _, _, training in recorded.batches)


def test_defaults_are_byols():
    args = vars(semi_eval.parse_args(["--pretrained", "random", "--percent", "1"]))
    expected = {"lr": [0.05], "epochs": [50], "batch_size": 1024, "head_lr": None,
                "image_size": [224, 224]}
    assert {key: args[key] for key in expected} == expected


# --------------------------------------------------------------------------------------------- runs
def test_semi_supervised_evaluation(tmp_path, capsys):
    """The subset that a run has written gives the same run."""
    result = evaluated(capsys, tmp_path / "drawn", *RANDOM, "--head-lr", 0.3)
    expected = {"protocol": "semi", "percent": 10, "labels": 40, "batch_size": 20, "lr": 0.05,
                "head_lr": 0.3, "epochs": 2, "head": "linear", "seed": 0, "image_size": [32, 32],
                "precision": "fp32"}
    assert {key: result[key] for key in expected} == expected
    lines = steps(tmp_path / "drawn" / "final_lr0.05_epochs2")
    assert lines[0]["lr"] == [0.05, 0.3] and 0 <= lines[0]["train_top1"] <= 100
    names = (tmp_path / "drawn" / "subset.txt").read_text().split("\n")[:-1]
    assert len(set(names)) == 40
    for kind in data.Shapes.classes:
        assert sum(name.startswith(f"{kind}/") for name in names) == 4
    again = evaluated(capsys, tmp_path / "read", *RANDOM, "--head-lr", 0.3,
                      "--subset", tmp_path / "drawn" / "subset.txt")
    assert again == result


def test_a_grid_grows(tmp_path, capsys, monkeypatch):
    """Runs that are there are not repeated; one that diverges scores as the worst."""
    made = []
    monkeypatch.setattr(Recorder, "made", made)
    monkeypatch.setattr(torch.optim, "SGD", Recorder)
    small = evaluated(capsys, tmp_path, *RANDOM, "--lr", 0.01, 0.1, "--epochs", 1,
                      "--batch-size", 1024)
    assert len(small["choice"]) == 2 and small["batch_size"] == 40  # clamped to the subset
    assert [len(one.rates) for one in made] == [1, 1, 1]
    made.clear()
    grown = evaluated(capsys, tmp_path, *RANDOM, "--lr", 1e30, 0.01, 0.1,
                      "--epochs", 1, 2, "--batch-size", 1024)
    assert [len(one.rates) for one in made[:6]] == [1, 1, 0, 2, 0, 2]
    assert grown["choice"]["lr 0.01, 1 epochs"] == small["choice"]["lr 0.01, 1 epochs"]
    assert len(grown["choice"]) == 6 and grown["choice"]["lr 1e+30, 2 epochs"] == -1
    best = max(grown["choice"], key=grown["choice"].get)
    assert best == f"lr {grown['lr']:g}, {grown['epochs']} epochs"
    final = f"final_lr{grown['lr']:g}_epochs{grown['epochs']}"
    counts = [header(tmp_path / name)["args"]["images"] for name in ("lr0.1_epochs2", final)]
    assert counts == [30, 40]
    assert header(tmp_path / "lr0.1_epochs2")["args"]["lr"] == 0.1
    with pytest.raises(Diverged, match="final_lr1e.30_epochs2: step 1: loss or weights not finite"):
        evaluated(capsys, tmp_path / "lost", *RANDOM, "--lr", 1e30)


def test_semi_supervised_resumes(tmp_path, capsys):
    flags = [*RANDOM, "--lr", 0.02, 0.1]
    whole = evaluated(capsys, tmp_path / "whole", *flags)
    line = stop_early(capsys, tmp_path / "parts", *flags, "--max-steps", 1)
    assert "lr0.02_epochs2: step 1 of 2: as --max-steps says" in line
    assert evaluated(capsys, tmp_path / "parts", *flags) == whole


def test_all_labels_from_random_weights(tmp_path, capsys):
    """Supervised, from scratch."""
    flags = ["--data", "shapes:50", "--percent", 100]
    result = evaluated(capsys, tmp_path, *RANDOM, *flags)
    assert (result["labels"], result["percent"], result["encoder"]) == (50, 100, "random")


# --------------------------------------------------------------------------------------- the subset
def test_another_subset_does_not_go_on(tmp_path, capsys):
    """Also where the list has the same path and length."""
    names = semi_eval.names_of(data.Shapes("train", 400))
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(names[:40]))
    flags = [*RANDOM, "--subset", listed, "--out", tmp_path / "out"]
    evaluated(capsys, tmp_path / "out", *flags)
    listed.write_text("\n".join(names[10:50]))
    refuse(capsys, "subset.txt: lists other images than", *flags)
    (tmp_path / "out" / "subset.txt").unlink()
    refuse(capsys, "subset_sha256 was", *flags)


@pytest.mark.parametrize("count, percent, fits", [
    (40, 10, True), (44, 10, True), (36, 10, True), (45, 10, False), (35, 10, False),
    (40, 1, False), (400, 100, True), (350, 100, False)])
def test_a_list_is_of_the_size_that_percent_says(count, percent, fits, tmp_path, capsys):
    """Within a tenth; else a score at 10 % would stand as one at 1 %."""
    listed, out = tmp_path / "list.txt", tmp_path / "out"
    listed.write_text("\n".join(semi_eval.names_of(data.Shapes("train", 400))[:count]))
    flags = [*RANDOM, "--percent", percent, "--subset", listed, "--out", out]
    if fits:
        stop_early(capsys, out, *flags, "--max-steps", 1)
    else:
        refuse(capsys, rf"{count / 4:.3g} % of the training images \({count} of 400\), where "
               f"--percent says {percent}", *flags)


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
    first = evaluated(capsys, tmp_path / "a", *flags)
    listed = tmp_path / "a" / "subset.txt"
    assert first["labels"] == 20 and listed.read_bytes().count(b"caf\xe9 \xff") == 2
    again = evaluated(capsys, tmp_path / "b", *flags, "--subset", listed)
    assert again == first


# ------------------------------------------------------------------------------- signals, bad input
def test_a_signal_while_training(tmp_path, capsys):
    """It saves and stops; the same command resumes it."""
    with signal_after_step(1):
        line = stop_early(capsys, tmp_path, *RANDOM)
    out = tmp_path / "final_lr0.05_epochs2"
    assert line == f"{out}: step 1 of 4: stopped, the same command resumes it"
    assert torch.load(out / "last.pth", weights_only=True)["step"] == 1
    assert "top1" in evaluated(capsys, tmp_path, *RANDOM)
    assert [line["step"] for line in steps(out)] == [1, 2, 3, 4]


@pytest.mark.parametrize("match, flags", [
    ("no image for 10 classes", ["--data", "shapes:100", "--percent", 1]),
    ("No such file", ["--subset", "none.txt"]),
    ("need at least 2 images each", ["--batch-size", 1]),
    ("too few a class to hold a fifth out",
     ["--data", "shapes:20", "--percent", 100, "--lr", 0.1, 0.2]),
    ("--head-lr: -1: must be a number above 0", ["--head-lr", -1]),
])
def test_bad_arguments_of_semi_eval(match, flags, tmp_path, capsys):
    refuse(capsys, match, *RANDOM, "--out", tmp_path, *flags)


def test_lists_in_another_form_of_unicode(tmp_path):
    """Names of a Mac's archive, in a list from Linux; and two files whose names look alike."""
    images(tmp_path / "set" / "cat", 1)
    (tmp_path / "set" / "cat" / "t\u00eate.png").write_bytes(b"")
    for name in ("che\u0300vre.png", "fe\u0300ve.png", "f\u00e8ve.png"):
        (tmp_path / "set" / "cat" / name).write_bytes(b"")
    source = data.ImageFiles(tmp_path / "set", labelled=True)
    names = ["cat/000.png", "cat/che\u0300vre.png"]
    assert read_list(tmp_path, "ch\u00e8vre.png\n000.png", source) == names
    assert read_list(tmp_path, "cat/ch\u00e8vre.png", source) == names[1:]
    assert read_list(tmp_path, "te\u0302te.png", source) == ["cat/t\u00eate.png"]
    assert read_list(tmp_path, "cat/f\u00e8ve.png", source) == ["cat/f\u00e8ve.png"]
    with pytest.raises(care.InputError, match=r"\('f.xe8ve.png'\) is the name of 2 images"):
        read_list(tmp_path, "f\u00e8ve.png", source)


def test_a_refused_run_changes_nothing(tmp_path, capsys):
    """subset.txt stays the list of the images that were trained on."""
    evaluated(capsys, tmp_path, *RANDOM)
    listed = (tmp_path / "subset.txt").read_text()
    for flags in (["--seed", 1], ["--seed", 1, "--lr", 0.1]):  # a training of its own
        refuse(capsys, "subset.txt: lists other images than", *RANDOM, *flags, "--out", tmp_path)
    refuse(capsys, "batch_size was", *RANDOM, "--batch-size", 10, "--out", tmp_path)
    assert (tmp_path / "subset.txt").read_text() == listed
