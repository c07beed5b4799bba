"""common/run.py through train.py: resuming, mistakes and slips, disks, signals, kills."""
import contextlib
import errno
import importlib
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from care import InputError
from common import data, shapes
from common import run as run_module
from conftest import (CPU, RANDOM, ROOT, SMALL, Code, class_folders, final_line, gpu, header,
                      images, memory, photo, refused, same_encoder, same_log, single_thread, slow,
                      start, steps, torchrun, train_small, wait_for_step)

pytestmark = pytest.mark.usefixtures("one_thread")
KNOWN = ["resnet18" if flag == "thin" else flag for flag in SMALL]  # to processes not forked here
LONG = [*SMALL, "--workers", "1", "--epochs", "8", "--save-every", "2"]  # 32 steps


# ----------------------------------------------------------------------------------------- resuming
def test_same_losses_for_any_number_of_workers(reference, tmp_path):
    for workers in (1, 2):
        train_small(tmp_path / f"{workers}", "--workers", workers)
        assert same_log(tmp_path / f"{workers}", reference)
        assert same_encoder(tmp_path / f"{workers}", reference)


def test_resume_is_exact(reference, tmp_path):
    for stop in (1, 4, 7):
        train_small(tmp_path, "--max-steps", stop)
        assert [line["step"] for line in steps(tmp_path)] == list(range(1, stop + 1))
    train_small(tmp_path)
    assert same_log(tmp_path, reference) and same_encoder(tmp_path, reference)
    train_small(tmp_path)  # a finished run stays as it is
    assert same_log(tmp_path, reference) and same_encoder(tmp_path, reference)


def test_resume_is_exact_with_large_relative_tables(tmp_path):
    """256 positions at conv4: a gather by index has an inexact backward from 32,768 elements on."""
    flags = ["--image-size", 256, "--position", "relative", "--blocks", 1, "--batch-size", 4,
             "--epochs", 3, "--data", "shapes:4"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_small(whole, *flags)
    train_small(parts, *flags, "--max-steps", 2)
    train_small(parts, *flags)
    assert same_log(parts, whole) and same_encoder(parts, whole)


def rewrite(path, **changes):
    """Change entries of a checkpoint's arguments; None removes one."""
    checkpoint = torch.load(path, weights_only=True)
    args = {name: value for name, value in (checkpoint["args"] | changes).items()
            if value is not None or name == "bench"}
    torch.save(checkpoint | {"args": args}, path)


def test_arguments_younger_than_a_checkpoint(tmp_path, capsys):
    """Absent, they were the paper's; train.py --bench was an argument once."""
    old = {"hidden_dim": None, "knn_every": None, "knn_images": None, "bench": None,
           "predictor_lr": None}
    train_small(tmp_path / "paper", "--hidden-dim", 4096, "--max-steps", 1)
    rewrite(tmp_path / "paper" / "last.pth", **old)
    lines = train_small(tmp_path / "paper", "--hidden-dim", 4096, "--max-steps", 2)
    assert [line["step"] for line in lines] == [1, 2]
    train_small(tmp_path / "other", "--max-steps", 1)
    rewrite(tmp_path / "other" / "last.pth", **old)
    capsys.readouterr()
    refused(capsys, *SMALL, "--out", tmp_path / "other", match=r"\(hidden_dim was 4096, is 64\)")


def test_data_is_where_it_lies_however_it_is_written(tmp_path, capsys, monkeypatch):
    """Moved with as many images: one line says so. Another number, or a named set: refused."""
    monkeypatch.chdir(tmp_path)
    images(tmp_path / "flat", 17)
    for stop, name in enumerate(("flat", "flat/", str(tmp_path / "flat"), "./flat/../flat"), 1):
        assert train_small("run", "--data", name, "--max-steps", stop)[-1]["step"] == stop
    assert capsys.readouterr().err == ""
    (tmp_path / "flat").rename("moved")
    (tmp_path / "flat").symlink_to("moved")
    train_small("run", "--data", "flat", "--max-steps", 3)
    assert capsys.readouterr().err == ""
    (tmp_path / "flat").unlink()
    rewrite("run/last.pth", data="flat")
    train_small("run", "--data", "moved")
    assert capsys.readouterr().err == "note: the data has moved from flat to moved\n"
    (tmp_path / "moved" / "016.png").unlink()
    flags = [*SMALL, "--out", "run", "--data"]
    refused(capsys, *flags, "moved", match="images was 17, is 16")
    train_small("rendered", "--data", "shapes:16", "--max-steps", 1)
    capsys.readouterr()
    refused(capsys, *SMALL, "--out", "rendered", "--data", "moved",
            match="data was shapes:16, is moved")


def test_a_directory_with_another_run_is_left_alone(reference, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    before = (out / "last.pth").read_bytes()
    flags = [*SMALL, "--out", out]
    refused(capsys, *flags, "--method", "byol", match="method was care, is byol")
    line = refused(capsys, *flags, "--seed", 1, "--lambda-att", 10,
                   match="lambda_att was 100.0, is 10.0")
    assert "seed was 0, is 1" in line
    (out / "last.pth").write_bytes(before[:100_000])
    refused(capsys, *flags, match="last.pth: truncated.*a kept epochNNNN.pth can take its place")
    refused(capsys, *SMALL, "--out", out / "log.jsonl", match="log.jsonl: is a file")
    assert (out / "last.pth").read_bytes() == before[:100_000]
    assert (out / "log.jsonl").read_bytes() == (reference / "log.jsonl").read_bytes()


def test_a_broken_checkpoint_says_what_is_wrong(reference, tmp_path, capsys):
    good = torch.load(reference / "last.pth", weights_only=True)
    key = "online.encoder.conv1.weight"
    for value, match in ((good["model"][key] * math.nan, f"not finite: {key}"),
                         (torch.zeros(64, 3, 5, 5), r"is \(64, 3, 5, 5\), not"),
                         (None, f"missing {key}")):
        model = {name: entry for name, entry in (good["model"] | {key: value}).items()
                 if entry is not None}
        torch.save(good | {"model": model}, tmp_path / "last.pth")
        refused(capsys, *SMALL, "--out", tmp_path, match=f"last.pth: .*{match}")
    torch.save({"model": good["model"]}, tmp_path / "last.pth")
    refused(capsys, *SMALL, "--out", tmp_path, match="last.pth: not a checkpoint of this script")
    (tmp_path / "last.pth").write_bytes(pickle.dumps(Code(str(tmp_path / "ran")), protocol=2))
    refused(capsys, *SMALL, "--out", tmp_path, match="last.pth: .*more than tensors")
    assert not (tmp_path / "ran").exists()


def test_rank_0_reads_for_all(two_ranks, tmp_path):
    """Ranks with directories of their own, without a checkpoint or with an older one: its step."""
    flags, whole = two_ranks
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    for stop in (1, 5, 8):
        result = torchrun(2, "train.py", *flags, "--out", "run", "--max-steps", stop,
                          folders=folders)
        assert result.codes == [0, 0], result.stderr
        if stop == 1:  # from now on rank 1 has another run's step
            assert not (folders[1] / "run").exists()
            shutil.copytree(folders[0] / "run", folders[1] / "run")
    assert same_log(folders[0] / "run", whole) and same_encoder(folders[0] / "run", whole)
    assert torch.load(folders[1] / "run" / "last.pth", weights_only=True)["step"] == 1


def test_the_schedule_ends_a_run(tmp_path):
    """A larger --max-steps, and as many as there are."""
    assert len(train_small(tmp_path / "more", "--max-steps", 99)) == 8
    assert len(train_small(tmp_path / "equal", "--max-steps", 8)) == 8


def test_a_finished_run_is_not_one_of_fewer_steps(tmp_path, capsys):
    """Its encoder would be taken for one that was stopped there."""
    train_small(tmp_path)
    assert ": encoder in " in capsys.readouterr().out
    train_small(tmp_path, "--max-steps", 4)
    shown = capsys.readouterr().out.splitlines()[-1]
    assert shown == f"{tmp_path}: step 8 of 8: already beyond --max-steps 4"


@pytest.mark.parametrize("signalled", [None, 3, 4])
def test_the_end_says_how_to_go_on(signalled, tmp_path, monkeypatch, capsys):
    """--max-steps 4 is reached, without a signal or with one in the last step; or one in step 3."""
    calls, pretrain_step = [], train.pretrain_step

    def step(*args, **named):
        calls.append(0)
        if len(calls) == signalled:
            os.kill(os.getpid(), signal.SIGTERM)
        return pretrain_step(*args, **named)

    monkeypatch.setattr(train, "pretrain_step", step)
    train_small(tmp_path, "--max-steps", 4)
    shown = capsys.readouterr().out.splitlines()[-1]
    if signalled == 3:
        assert shown == f"{tmp_path}: step 3 of 8: stopped, the same command resumes it"
    else:
        assert shown == (f"{tmp_path}: step 4 of 8: as --max-steps says; with a larger one, or "
                         "without it, the same command resumes it")


# --------------------------------------------------------------------- mistakes of users, and slips
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error, code", [
    (ValueError("a slip"), None), (KeyError("a slip"), None),
    (InputError("7.xml: mend this"), 2),
    (PermissionError(errno.EACCES, "Permission denied", "7.png"), 2),
])
def test_errors_while_reading(error, code, workers, tmp_path, monkeypatch, capsys):
    """A slip is a traceback, a user's mistake or a refusal one line, out of a worker too."""
    read = shapes.Shapes.__getitem__

    def getitem(source, index):
        if index == third:
            raise error
        return read(source, index)

    third = data.Stream(data.open_images("shapes:32", "pretrain"), None, 0, 32).index(20)
    monkeypatch.setattr(shapes.Shapes, "__getitem__", getitem)
    flags = ["--workers", workers, "--max-steps", 4]
    if code is None:
        with pytest.raises(type(error), match="a slip"):
            train_small(tmp_path, *flags)
        return
    line = refused(capsys, *SMALL, "--out", tmp_path, *flags, code=code)
    assert line == f"error: {error}"
    assert torch.load(tmp_path / "last.pth", weights_only=True)["step"] == 2  # the third has it


def slip_while_reading():
    """From the ninth image on, in the loading process."""
    read = shapes.Shapes.__getitem__

    def getitem(source, index):
        seen.append(index)
        assert len(seen) < 9, "a slip"
        return read(source, index)

    seen = []
    shapes.Shapes.__getitem__ = getitem


def test_a_slip_ends_a_run_whose_workers_live(tmp_path):
    """Workers ignore SIGTERM: Python, which sends it and waits, would wait for ever."""
    result = torchrun(1, "train.py", *LONG, "--out", tmp_path, before=slip_while_reading)
    assert result.codes == [1] and result.stderr.rstrip().endswith("AssertionError: a slip")


def test_unreadable_images_are_replaced_and_counted(tmp_path, capsys):
    folder = images(tmp_path / "set", 12)
    cut = (folder / "003.png").read_bytes()[:200]
    (folder / "003.png").write_bytes(cut)
    flags = ["--data", folder, "--batch-size", 4, "--epochs", 3]
    train_small(tmp_path / "run", *flags, "--max-steps", 4)
    assert train_small(tmp_path / "run", *flags)[-1]["unreadable"] == 1  # from the checkpoint
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert warnings[0].startswith(f"warning: cannot read {folder}/003.png (")
    (folder / "007.png").write_bytes(b"")
    with pytest.raises(SystemExit) as caught:
        train_small(tmp_path / "again", *flags)
    assert caught.value.code == 2
    assert "2 of 12 images cannot be read" in capsys.readouterr().err.splitlines()[-1]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys, monkeypatch):
    train_small(tmp_path, "--max-steps", 3)
    good = (tmp_path / "last.pth").read_bytes()
    step = train.pretrain_step

    def broken(*args, **named):
        return {name: value * math.nan for name, value in step(*args, **named).items()}

    monkeypatch.setattr(train, "pretrain_step", broken)
    refused(capsys, *SMALL, "--out", tmp_path, code=1,
            match=r"step 4: .*not finite \(loss nan, .*loss_c nan")
    assert (tmp_path / "last.pth").read_bytes() == good


def infinite_variance():
    """From the third step on, on the last rank alone, a running variance is infinite."""
    calls, step = [], train.pretrain_step

    def broken(model, *args, **named):
        meters = step(model, *args, **named)
        calls.append(0)
        world = int(os.environ.get("WORLD_SIZE", 1))
        if len(calls) >= 3 and int(os.environ.get("RANK", 0)) == world - 1:
            getattr(model, "module", model).momentum.encoder.bn1.running_var[0] = math.inf
        return meters

    train.pretrain_step = broken


def test_statistics_that_are_not_finite_are_never_saved(tmp_path, capsys, monkeypatch):
    """Also when only the last of two ranks has them: all end."""
    monkeypatch.setattr(train, "pretrain_step", train.pretrain_step)  # what it was, afterwards
    infinite_variance()
    refused(capsys, *SMALL, "--out", tmp_path / "one", "--save-every", 2, code=1,
            match="step 3: loss or weights not finite")
    result = torchrun(2, "train.py", *SMALL, "--out", tmp_path / "two", "--save-every", 2,
                      before=infinite_variance)
    assert result.codes == [1, 1] and result.stderr.count(": step 3: ") == 1, result.stderr
    for name in ("one", "two"):
        assert torch.load(tmp_path / name / "last.pth", weights_only=True)["step"] == 2


def test_nothing_broken_is_saved_on_a_signal(tmp_path, capsys, monkeypatch):
    """Between two checkpoints, in a step that is not logged."""
    monkeypatch.setattr(train, "pretrain_step", train.pretrain_step)
    infinite_variance()
    step, calls = train.pretrain_step, []

    def stop_in_the_third(*args, **named):
        calls.append(0)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **named)

    train.pretrain_step = stop_in_the_third
    refused(capsys, *SMALL, "--out", tmp_path, "--log-every", 50, "--save-every", 50, code=1,
            match="step 3: loss or weights not finite")
    assert not (tmp_path / "last.pth").exists()


# -------------------------------------------------------------------------------------------- disks
def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    """One warning, and the run goes on; any other refusal ends it."""
    def refusal(number):
        def lockf(*_):
            raise OSError(number, os.strerror(number))
        return lockf

    for number in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
        monkeypatch.setattr(run_module.fcntl, "lockf", refusal(number))
        run_module.open_directory(tmp_path / "run")
        assert capsys.readouterr().err == (
            f"warning: {tmp_path}/run/lock: no locks here ({os.strerror(number)}): no other run "
            "may use this directory\n")
    assert train_small(tmp_path / "run", "--max-steps", 1)[-1]["step"] == 1
    for number, match in ((errno.EAGAIN, "another process"), (errno.EIO, "Input/output error")):
        monkeypatch.setattr(run_module.fcntl, "lockf", refusal(number))
        capsys.readouterr()
        refused(capsys, *SMALL, "--out", tmp_path / "run", match=match)


def outage_on_the_last_rank(first=20, last=10 ** 6, number=errno.EIO):
    """Opening an image fails from the rank's first-th time to its last-th; pauses are short."""
    count = [0]

    def open_or_fail(path, mode):
        count[0] += 1
        if first <= count[0] <= last:
            raise OSError(number, os.strerror(number))
        return open(path, mode)

    data.PAUSES = (0.01, 0.01)
    if os.environ.get("RANK", "1") == "1":
        data.open = open_or_fail


def test_an_outage_of_the_disk(tmp_path, monkeypatch, capsys):
    """A short one is waited for; a long one ends the run with a checkpoint and the reason."""
    folder = images(tmp_path / "set", 32)
    train_small(tmp_path / "whole", "--data", folder)
    capsys.readouterr()
    monkeypatch.setattr(data, "PAUSES", ())  # to be restored afterwards
    monkeypatch.setattr(data, "open", open, raising=False)
    outage_on_the_last_rank(last=21, number=errno.ESTALE)
    train_small(tmp_path / "run", "--data", folder)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2 and all("trying again in 0.01 s" in line for line in warnings)
    assert same_log(tmp_path / "run", tmp_path / "whole")
    outage_on_the_last_rank()
    with pytest.raises(SystemExit) as caught:
        train_small(tmp_path / "away", "--data", folder)
    assert caught.value.code == 2
    reason = capsys.readouterr().err.splitlines()[-1]
    assert reason.startswith(f"error: [Errno 5] Input/output error: '{folder}/")
    assert torch.load(tmp_path / "away" / "last.pth", weights_only=True)["step"] == 2
    monkeypatch.setattr(data, "open", open)
    train_small(tmp_path / "away", "--data", folder)
    assert same_log(tmp_path / "away", tmp_path / "whole")


def test_an_outage_of_one_ranks_disk(tmp_path):
    """Both stop after the same step; the reason is given once."""
    folder = images(tmp_path / "set", 32)
    result = torchrun(2, "train.py", *SMALL, "--data", folder, "--out", tmp_path / "run",
                      before=outage_on_the_last_rank)
    assert result.codes == [2, 2], result.stderr
    assert result.stderr.count("error: [Errno 5] Input/output error: '") == 1
    assert torch.load(tmp_path / "run" / "last.pth", weights_only=True)["step"] == 4


def test_a_full_disk_leaves_the_last_checkpoint(reference, tmp_path, capsys, monkeypatch):
    train_small(tmp_path, "--max-steps", 3)
    good, flags = (tmp_path / "last.pth").read_bytes(), [*SMALL, "--out", tmp_path]
    write_whole, full = run_module.write_whole, OSError(errno.ENOSPC, "No space left on device")

    def fail(*_):
        raise full

    def fail_at_last(path, content):
        return fail() if Path(path).name == "last.pth" else write_whole(path, content)

    def fail_to_add(path, mode="r"):
        return fail() if mode == "a+b" else open(path, mode)

    for place, name, function, code, match in (
            (os, "fsync", fail, 1, f"cannot write to {tmp_path} .*No space left"),  # at once
            (run_module, "write_whole", fail_at_last, 1,
             f"cannot write to {tmp_path} .*No space left"),
            (run_module, "open", fail_to_add, 1, "cannot write .*log.jsonl .*No space left")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, function, raising=False)
            refused(capsys, *flags, code=code, match=match)
    assert (tmp_path / "last.pth").read_bytes() == good
    (tmp_path / "epoch0001.pth.tmp").write_bytes(b"half a file")
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 4, "loss')  # half a line
    train_small(tmp_path)
    assert same_log(tmp_path, reference) and same_encoder(tmp_path, reference)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """Until the last moment the old one is there, whatever stops the new one."""
    run_module.write_whole(tmp_path / "file", b"old")

    def stop(*_):
        assert (tmp_path / "file").read_bytes() == b"old"
        raise KeyboardInterrupt

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, stop)
            with pytest.raises(KeyboardInterrupt):
                run_module.write_whole(tmp_path / "file", b"new")
        assert (tmp_path / "file").read_bytes() == b"old"
    run_module.write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_an_unwritable_directory(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    refused(capsys, *SMALL, "--out", tmp_path / "file" / "run", match="Not a directory")


# ----------------------------------------------------------- signals, kills: processes of their own
@pytest.fixture(scope="module")
def long_reference(tmp_path_factory):
    out = tmp_path_factory.mktemp("long")
    with single_thread():
        train.main([*LONG, "--out", str(out)])
    return out


def saved_step(out):
    return torch.load(Path(out) / "last.pth", weights_only=True)["step"]


def test_a_signal_ends_the_run_with_a_checkpoint(long_reference, tmp_path):
    """To the whole process group, as Ctrl-C sends it: a worker leaves it to the main process."""
    done, endings, out = 0, [], tmp_path / "run"
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        process, = start(1, "train.py", *LONG, "--out", out, output=out, before=os.setpgrp)
        wait_for_step(out, done + 3, process, output=out)
        os.killpg(process.pid, number)
        process.join(60)
        assert process.exitcode == 0
        before, done = done, saved_step(out)
        assert before + 3 <= done < 32 and steps(out)[-1]["step"] == done
        endings.append(f"{out}: step {done} of 32: stopped, the same command resumes it")
    shown = Path(f"{out}.out").read_text().splitlines()
    assert shown[2::3] == endings and Path(f"{out}.err").read_text() == ""
    train.main([*LONG, "--out", str(out)])
    assert same_log(out, long_reference) and same_encoder(out, long_reference)


def wait_for_signals():
    run_module.catch_signals()
    print("up", flush=True)
    time.sleep(1)
    time.sleep(60)


def wait_for(text, path):
    deadline = time.time() + 60
    while not Path(path).exists() or text not in Path(path).read_text():
        assert time.time() < deadline
        time.sleep(0.01)


def test_a_second_signal_ends_at_once(tmp_path):
    process, = start(1, wait_for_signals, output=tmp_path / "run")
    wait_for("up", tmp_path / "run.out")
    os.kill(process.pid, signal.SIGTERM)
    process.join(0.3)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGTERM)
    process.join(10)
    assert process.exitcode == -signal.SIGTERM


def hold(out):
    lock = run_module.open_directory(out)
    print("up", lock.name, flush=True)
    time.sleep(60)


def test_a_directory_in_use_is_refused(tmp_path, capsys):
    out = tmp_path / "run"
    process, = start(1, hold, out, output=out)
    wait_for("up", f"{out}.out")
    refused(capsys, *SMALL, "--out", out, match="another process is running in this directory")
    process.kill()
    process.join()
    train_small(out, "--max-steps", 1)


def test_a_signal_to_one_rank_stops_all(two_ranks, tmp_path):
    """After the same step, with a checkpoint from which they go on exactly."""
    flags, whole = two_ranks
    out = tmp_path / "run"
    processes = start(2, "train.py", *flags, "--out", out, output=out)
    wait_for_step(out, 2, processes[0], output=out)
    os.kill(processes[1].pid, signal.SIGUSR1)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0], Path(f"{out}.err").read_text()
    done = saved_step(out)
    assert f"{out}: step {done} of 8: stopped" in Path(f"{out}.out").read_text() and done < 8
    assert torchrun(2, "train.py", *flags, "--out", out).codes == [0, 0]
    assert same_log(out, whole) and same_encoder(out, whole)


def launch(output, ranks, *command):
    """Start a script under the real torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    with open(output, "w") as file:
        return subprocess.Popen([*launcher, str(ranks), *map(str, command)], cwd=ROOT, stdout=file,
                                stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})


def ranks_of(process):
    """The processes that torchrun started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = []
    for pid in children:
        with contextlib.suppress(FileNotFoundError):  # it has just ended
            if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                ranks.append(int(pid))
    return ranks


def test_torchrun_passes_sigterm_on(tmp_path):
    """The real one: all ranks save the same step and end; torchrun itself then exits non-zero."""
    out, flags = tmp_path / "run", [*KNOWN, "--epochs", 100]
    process = launch(tmp_path / "output", 2, "train.py", *flags, "--out", out)
    deadline = time.time() + 120
    while not (out / "log.jsonl").exists() or not steps(out):
        assert process.poll() is None and time.time() < deadline, (tmp_path / "output").read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    done = saved_step(out)
    assert steps(out)[-1]["step"] == done < 400
    assert f"{out}: step {done} of 400: stopped" in (tmp_path / "output").read_text()


def kill_and_resume(out, kills, reference):
    """kill -9 at any moment, start-up included, and, in turns, near the write of a checkpoint."""
    random = np.random.RandomState(0)
    for kill in range(kills):
        process, = start(1, "train.py", *LONG, "--out", out, output=out)
        if kill % 2:
            deadline = time.time() + 60
            while not list(Path(out).glob("*.tmp")) and process.is_alive():
                assert time.time() < deadline
            time.sleep(random.uniform(0, 0.02))
        else:
            time.sleep(random.uniform(0, 1.5))
        process.kill()
        process.join()
    process, = start(1, "train.py", *LONG, "--out", out, output=out)
    process.join(180)
    assert process.exitcode == 0, Path(f"{out}.err").read_text()
    assert same_log(out, reference) and same_encoder(out, reference)
    assert not list(Path(out).glob("*.tmp"))


def test_kill_9_loses_nothing(long_reference, tmp_path):
    kill_and_resume(tmp_path / "run", 3, long_reference)


@slow
def test_forty_kills_lose_nothing(long_reference, tmp_path):
    kill_and_resume(tmp_path / "run", 40, long_reference)


@slow
def test_a_dead_rank_restarts_the_run(tmp_path):
    flags = [*KNOWN, "--epochs", 8, "--save-every", 2]
    for name in ("whole", "killed"):
        out = tmp_path / name
        process = launch(tmp_path / "output", 2, "--max-restarts", 3, "train.py", *flags,
                         "--out", out)
        while name == "killed" and (not (out / "log.jsonl").exists() or len(steps(out)) < 5):
            assert process.poll() is None, (tmp_path / "output").read_text()
            time.sleep(0.02)
        if name == "killed":
            os.kill(ranks_of(process)[1], signal.SIGKILL)
        assert process.wait(300) == 0, (tmp_path / "output").read_text()
    assert same_log(tmp_path / "killed", tmp_path / "whole")
    assert same_encoder(tmp_path / "killed", tmp_path / "whole")


@slow
def test_fifty_starts_lose_no_step(tmp_path):
    flags = ["--epochs", 13, "--max-steps"]
    train_small(tmp_path / "whole", *flags, 50)
    for step in range(1, 51):
        train_small(tmp_path / "parts", *flags, step)
    assert same_log(tmp_path / "parts", tmp_path / "whole")
    assert same_encoder(tmp_path / "parts", tmp_path / "whole")


@slow
def test_memory_is_flat(tmp_path):
    """Resident memory of main process and worker over 2,000 steps, from step 200 on: within 3 %.

    Saves every 100 steps: freed memory is kept on a CPU, the largest save's too.
    """
    out, sizes = tmp_path / "run", []
    process, = start(1, "train.py", *LONG, "--epochs", 500, "--save-every", 100, "--out", out,
                     output=out)
    for step in (200, 800, 1400, 1950):
        wait_for_step(out, step, process, output=out, seconds=900)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        sizes.append([memory("VmRSS", pid) for pid in (process.pid, children[0])])
    print("MiB, main and worker:", sizes)
    for first, *later in zip(*sizes):
        assert max(later) < 1.03 * first, sizes


# --------------------------------------------------------------------------------------- the clock
def test_a_clock_that_goes_back_or_stands_still(tmp_path, monkeypatch):
    """The day's time is set back: no negative speed. The other clock stands still: no speed."""
    hours = iter(range(10 ** 6, 0, -1))
    monkeypatch.setattr(time, "time", lambda: 3600.0 * next(hours))
    assert all(line["images/s"] > 0 for line in train_small(tmp_path / "back", "--max-steps", 3))
    monkeypatch.setattr(time, "perf_counter", lambda: 7.0)
    lines = train_small(tmp_path / "still", "--max-steps", 3)
    assert [line["images/s"] for line in lines] == [None, None, None]


# ----------------------------------------------------------------------- what others have in --out
def test_files_of_others_stay(tmp_path, capsys):
    """Only half-written files of a run's own names go; over others' no run begins."""
    for name in ("thesis.tmp", "model.pth.tmp", "lock"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "last.pth.tmp").write_bytes(b"half a file")
    (tmp_path / "scratch.tmp").mkdir()
    train_small(tmp_path, "--max-steps", 1)
    assert all((tmp_path / name).read_text() == "mine"
               for name in ("thesis.tmp", "model.pth.tmp", "lock"))
    assert (tmp_path / "scratch.tmp").is_dir() and not (tmp_path / "last.pth.tmp").exists()
    capsys.readouterr()
    for name, match in (("log.jsonl", "not a run's log"), ("encoder.pth", "would be replaced"),
                        ("classifier.pth", "would be replaced")):
        (tmp_path / name).parent.joinpath(f"{name}.d").mkdir()
        mine = tmp_path / f"{name}.d" / name
        mine.write_text('{"mine": 1}\n')
        refused(capsys, *SMALL, "--out", mine.parent, match=f"{name}: .*{match}")
        assert mine.read_text() == '{"mine": 1}\n'


def killed_in_the_first_step():
    step = train.pretrain_step

    def kill(*args, **named):
        os.kill(os.getpid(), signal.SIGKILL)
        return step(*args, **named)

    train.pretrain_step = kill


def test_a_run_killed_before_its_first_checkpoint_goes_on(reference, tmp_path):
    """Its log, and an encoder.pth that was written before last.pth could be, are its own."""
    assert torchrun(1, "train.py", *SMALL, "--out", tmp_path,
                    before=killed_in_the_first_step).codes == [-signal.SIGKILL]
    shutil.copy(reference / "encoder.pth", tmp_path)
    train_small(tmp_path)
    assert same_log(tmp_path, reference) and same_encoder(tmp_path, reference)


def test_a_runs_files_without_its_checkpoint_are_no_other_runs(tmp_path, capsys):
    """Its encoder would be replaced by that of other arguments; the same ones make it again."""
    train_small(tmp_path)
    (tmp_path / "last.pth").unlink()
    before = (tmp_path / "encoder.pth").read_bytes(), (tmp_path / "log.jsonl").read_bytes()
    refused(capsys, *SMALL, "--seed", 5, "--out", tmp_path,
            match="encoder.pth: not of a run that could go on")
    assert before == ((tmp_path / "encoder.pth").read_bytes(),
                      (tmp_path / "log.jsonl").read_bytes())
    train_small(tmp_path)
    assert (tmp_path / "encoder.pth").read_bytes() == before[0]


def test_the_encoders_file_is_of_the_checkpoint(tmp_path, capsys):
    """Also where no step is left to make: it is gone, or a kept checkpoint has taken its place."""
    train_small(tmp_path, "--keep-epochs", 1)
    (tmp_path / "encoder.pth").rename(tmp_path / "whole.pth")
    train_small(tmp_path)
    assert (tmp_path / "encoder.pth").read_bytes() == (tmp_path / "whole.pth").read_bytes()
    shutil.copy(tmp_path / "epoch0001.pth", tmp_path / "last.pth")
    train_small(tmp_path, "--max-steps", 4)
    half = torch.load(tmp_path / "last.pth", weights_only=True)["model"]
    for name, value in torch.load(tmp_path / "encoder.pth", weights_only=True).items():
        assert torch.equal(value, half[f"online.encoder.{name}"])


@pytest.mark.parametrize("damage", [
    lambda log: log.decode().encode("utf-16"),
    lambda log: log + b'[1, 2]\n"text"\n{"step": "four"}\n\xff\xfe\n',
    lambda log: b"\xef\xbb\xbf" + log.replace(b"\n", b"\r\n"),
])
def test_a_log_that_was_edited(damage, reference, tmp_path, capsys):
    """As UTF-16, with foreign lines, with a byte-order mark: the run goes on, nothing is lost."""
    train_small(tmp_path, "--max-steps", 3)
    log = tmp_path / "log.jsonl"
    before = damage(log.read_bytes())
    log.write_bytes(before)
    capsys.readouterr()
    train_small(tmp_path)
    warnings = capsys.readouterr().err
    if before.startswith(b"\xef"):  # every line of it can be read
        assert same_log(tmp_path, reference) and warnings == ""
    else:
        assert (tmp_path / "log.jsonl.damaged").read_bytes() == before
        assert warnings.startswith(f"note: {log}: lines that cannot be read")
        assert [line["step"] for line in steps(tmp_path)][-5:] == [4, 5, 6, 7, 8]
    assert same_encoder(tmp_path, reference)


# ---------------------------------------------------------------------------------------- loading
def killed_while_loading(number=signal.SIGKILL):
    """A loading process is killed when it reads its 25th image."""
    read, seen = shapes.Shapes.__getitem__, []

    def getitem(source, index):
        seen.append(index)
        if len(seen) == 25:
            os.kill(os.getpid(), number)
        return read(source, index)

    shapes.Shapes.__getitem__ = getitem


def test_a_killed_loading_process(long_reference, tmp_path):
    """As the kernel does when memory is short: one line, the last whole step saved."""
    out = tmp_path / "run"
    result = torchrun(1, "train.py", *LONG, "--save-every", 1000, "--out", out,
                      before=killed_while_loading)
    assert result.codes == [2] and len(result.stderr.splitlines()) == 1, result.stderr
    assert "a loading process was ended by SIGKILL" in result.stderr
    assert 1 <= saved_step(out) == steps(out)[-1]["step"] <= 4
    train.main([*LONG, "--save-every", "1000", "--out", str(out)])
    assert same_log(out, long_reference) and same_encoder(out, long_reference)


def unsendable(samples):
    """A batch that a loading process makes and cannot hand over."""
    return [*data.collate(samples), lambda: None]


def test_a_batch_that_cannot_be_handed_over(capfd):
    """Python drops it, and says so in a thread of the loading process: no wait without end."""
    stream = data.Stream(data.open_images("shapes:8", "pretrain"), np.asarray, 0, 8)
    with pytest.raises(ChildProcessError, match="ended with code 1"):
        next(run_module.load_batches(stream, [[0, 1]], 1, CPU, unsendable))
    assert "warning: a loading process cannot hand over a batch: " in capfd.readouterr().err


def test_too_little_shared_memory(tmp_path, monkeypatch, capsys):
    def getitem(source, index):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_7>: No space")

    monkeypatch.setattr(shapes.Shapes, "__getitem__", getitem)
    line = refused(capsys, *SMALL, "--workers", 1, "--out", tmp_path)
    assert line.startswith("error: unable to allocate shared memory(shm) for file </torch_7>: No "
                           "space: fewer --workers need less")


def long_temporary_folder():
    folder = Path(tempfile.mkdtemp(), "x" * 100)
    folder.mkdir()
    tempfile.tempdir = str(folder)
    multiprocessing.current_process()._config.pop("tempdir", None)


def test_a_temporary_folder_whose_name_is_too_long_for_a_socket(tmp_path):
    result = torchrun(1, "train.py", *SMALL, "--workers", 1, "--out", tmp_path,
                      before=long_temporary_folder)
    assert result.codes == [2] and len(result.stderr.splitlines()) == 1, result.stderr
    assert "x: loading processes need a socket there (AF_UNIX path too long)" in result.stderr


@pytest.mark.parametrize("script", ["linear_eval", "semi_eval"])
def test_data_that_go_away_while_an_evaluation_trains(script, tmp_path, monkeypatch, capsys):
    """The last whole step is saved, between two checkpoints; from it the run goes on."""
    for split in ("train", "val"):
        class_folders(tmp_path / "set" / split, "ab", count=4)
    flags = ["--data", tmp_path / "set", *RANDOM, "--image-size", 32, "--epochs", 4,
             "--batch-size", 4, "--out", tmp_path / "run"]
    flags += ["--percent", 100] if script == "semi_eval" else []
    monkeypatch.setattr(data, "PAUSES", ())  # to be restored afterwards
    monkeypatch.setattr(data, "open", open, raising=False)
    outage_on_the_last_rank()
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as caught:
        module.main([*map(str, flags)])
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: [Errno 5] Input/output")
    last, = (tmp_path / "run").rglob("last.pth")
    assert torch.load(last, weights_only=True)["step"] == 4  # the fifth has the twentieth image
    monkeypatch.setattr(data, "open", open)
    assert final_line(capsys, module, *flags)["top1"] >= 0


# ----------------------------------------------------------------------------------------- memory
NO_MEMORY = [
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate"
                 " memory: you tried to allocate 5368 bytes. Error code 12"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


def raise_in_step(number, error):
    """In pretraining step `number`, behind a forward pass, which moves the running statistics."""
    step, calls = train.pretrain_step, []

    def step_or_raise(parallel, optimizer, run, batches, views_of, **named):
        calls.append(0)
        if len(calls) == number:
            parallel(*views_of(batches[0]))
            raise error
        return step(parallel, optimizer, run, batches, views_of, **named)

    train.pretrain_step = step_or_raise


@pytest.mark.parametrize("error", NO_MEMORY)
def test_out_of_memory_in_a_step(error, reference, tmp_path, capsys, monkeypatch):
    """One line; what is done is saved, without the statistics of the step that failed."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "pretrain_step", train.pretrain_step)
        raise_in_step(4, error)
        line = refused(capsys, *SMALL, "--out", tmp_path, code=1)
    size = re.search(r" \(tried to allocate (5368 bytes|2.00 gib)\)", line)
    assert (size is None) == ("allocate" not in str(error))
    assert line.startswith(f"error: {tmp_path}: out of memory") and line.endswith(
        ": a smaller --batch-size or more --accum-steps needs less, in another --out; saved is "
        "step 3 of 8")
    train_small(tmp_path)
    assert same_log(tmp_path, reference) and same_encoder(tmp_path, reference)


def test_out_of_memory_while_a_step_is_saved(reference, tmp_path, capsys, monkeypatch):
    """The step is whole: its statistics are kept, unlike those of a step that failed."""
    calls, as_bytes = [], run_module.as_bytes

    def once(*args):
        calls.append(0)
        if len(calls) == 1:
            raise MemoryError
        return as_bytes(*args)

    monkeypatch.setattr(run_module, "as_bytes", once)
    line = refused(capsys, *SMALL, "--out", tmp_path, code=1)
    assert line.endswith("saved is step 8 of 8")
    train_small(tmp_path)
    assert same_log(tmp_path, reference) and same_encoder(tmp_path, reference)


def test_a_slip_in_a_step_is_a_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "pretrain_step", train.pretrain_step)
    raise_in_step(4, RuntimeError("a slip"))
    with pytest.raises(RuntimeError, match="a slip"):
        train_small(tmp_path)
    assert not (tmp_path / "last.pth").exists()


def test_out_of_memory_before_the_first_step_and_in_an_evaluation(tmp_path, capsys, monkeypatch):
    def fail(*args, **named):
        raise NO_MEMORY[1]

    four_steps = ["--data", "shapes:80", "--image-size", 32, "--batch-size", 20, "--epochs", 1]
    for script, place, flags in (("train", "new_model", SMALL),
                                 ("linear_eval", "evaluate", [*RANDOM, *four_steps])):
        module = importlib.import_module(script)
        with monkeypatch.context() as patch:
            patch.setattr(module, place, fail)
            line = refused(capsys, *flags, "--out", tmp_path / script, code=1, script=module,
                           match="out of memory .*--batch-size")
        assert ("--accum-steps" in line) == (script == "train")
        assert ("saved is step 4 of 4" in line) == (script == "linear_eval")


def test_nothing_is_saved_where_not_even_a_checkpoint_fits(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "pretrain_step", train.pretrain_step)
    raise_in_step(4, NO_MEMORY[0])
    as_bytes = run_module.as_bytes

    def no_bytes(*what):
        if len(steps(tmp_path)) == 3:
            raise MemoryError
        return as_bytes(*what)

    monkeypatch.setattr(run_module, "as_bytes", no_bytes)
    refused(capsys, *SMALL, "--save-every", 2, "--out", tmp_path, code=1,
            match="; saved is step 2 of 8")
    assert saved_step(tmp_path) == 2


def no_memory_on_rank_0():
    if os.environ["RANK"] == "0":
        raise_in_step(4, NO_MEMORY[1])


def test_out_of_memory_on_one_rank(two_ranks, tmp_path):
    """Rank 0 waits for nobody: it saves its last whole step, and both go on from there."""
    flags, whole = two_ranks
    result = torchrun(2, "train.py", *flags, "--out", tmp_path, before=no_memory_on_rank_0)
    assert result.codes[0] == 1 and result.codes[1] != 0
    assert f"error: {tmp_path}: rank 0: out of memory (tried to allocate 2.00 gib)" in result.stderr
    assert saved_step(tmp_path) == 3
    assert torchrun(2, "train.py", *flags, "--out", tmp_path).codes == [0, 0]
    assert same_log(tmp_path, whole) and same_encoder(tmp_path, whole)


@gpu
def test_out_of_memory_of_a_gpu(tmp_path, capsys, monkeypatch):
    step, calls = train.pretrain_step, []

    def more_than_there_is(*args, **named):
        calls.append(0)
        if len(calls) == 4:
            torch.empty(2 ** 45, dtype=torch.uint8, device="cuda")
        return step(*args, **named)

    monkeypatch.setattr(train, "pretrain_step", more_than_there_is)
    refused(capsys, *SMALL, "--out", tmp_path, code=1,
            match=r"out of memory \(tried to allocate .*; saved is step 3 of 8")


# --------------------------------------------------------------------------- printing, and systems
def close_stderr():
    os.close(2)
    sys.stderr = sys.__stderr__ = None


def leave_a_pipe(number):
    """File descriptor `number` becomes a pipe whose reader has gone, as behind `| head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, number)


@pytest.mark.parametrize("before", [close_stderr, partial(leave_a_pipe, 1),
                                    partial(leave_a_pipe, 2)])
def test_output_that_nobody_reads(before, reference, tmp_path):
    """No stderr, or a reader that left: the run goes on to its end."""
    folder = images(tmp_path / "set", 32)
    (folder / "003.png").write_bytes(b"")  # a warning on stderr
    result = torchrun(1, "train.py", *SMALL, "--data", folder, "--out", tmp_path / "run",
                      before=before)
    assert result.codes == [0] and steps(tmp_path / "run")[-1]["unreadable"] == 1
    assert (before is close_stderr or before.args == (2,)) != ("003.png" in result.stderr)


def fill_the_disk():
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def test_a_full_disk_behind_stdout(tmp_path):
    result = torchrun(1, "train.py", *SMALL, "--out", tmp_path, before=fill_the_disk)
    assert result.codes == [1]
    assert result.stderr == "error: cannot write to stdout: No space left on device\n"


def print_strictly():
    sys.stdout.reconfigure(encoding="ascii", errors="strict")
    sys.__stdout__ = sys.stdout


def test_names_that_cannot_be_printed_end_no_run(tmp_path):
    folder = images(tmp_path / os.fsdecode(b"\xff \xc3\xa9"), 8)
    result = torchrun(1, "train.py", *SMALL, "--epochs", 1, "--data", folder,
                      "--out", tmp_path / "run", before=print_strictly)
    assert result.codes == [0] and r"\udcff \xe9" in result.stdout, result.stderr


def test_a_closed_terminal_and_nohup(monkeypatch):
    """SIGHUP asks to save and stop, unless it is ignored already."""
    for before, received in ((signal.SIG_DFL, [signal.SIGHUP]), (signal.SIG_IGN, [])):
        signal.signal(signal.SIGHUP, before)
        signals = run_module.catch_signals()
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals == received


WINDOWS = """
import os, signal, sys
import torch
sys.modules["fcntl"] = sys.modules["resource"] = None
for module, names in ((signal, ("SIGUSR1", "SIGHUP", "SIGCHLD")),
                      (os, ("uname", "sched_getaffinity"))):
    for name in names:
        delattr(module, name)
import train
train.main(sys.argv[1:])
"""


def test_without_what_windows_lacks(tmp_path):
    """No locks, which is said once, fewer signals, no meter of memory: the rest works."""
    result = subprocess.run([sys.executable, "-c", WINDOWS, *KNOWN, "--max-steps", "1",
                             "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr == (f"warning: {tmp_path}/lock: no locks here (not on this system): no "
                             "other run may use this directory\n")
    assert steps(tmp_path)[-1]["memory_gib"] is None


def no_compiler():
    os.environ |= {"PATH": "", "CXX": "", "TORCHINDUCTOR_CACHE_DIR": tempfile.mkdtemp()}


def test_compile_where_there_is_no_compiler(tmp_path):
    result = torchrun(1, "train.py", *SMALL, "--compile", "--out", tmp_path, before=no_compiler)
    assert result.codes == [2] and len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: --compile: torch.compile does not work here (")
    assert not (tmp_path / "log.jsonl").exists()


# --------------------------------------------------------------------------------------- restarts
@slow
def test_ten_restarts_in_a_row(tmp_path):
    """torchrun's, each after a kill -9 of one rank: while training, and, in turns, in its start."""
    flags = [*KNOWN, "--epochs", 25, "--save-every", 2]  # 100 steps
    random, killed = np.random.RandomState(0), []
    out, output = tmp_path / "run", tmp_path / "output"
    process = launch(output, 2, "--max-restarts", 10, "train.py", *flags, "--out", out)
    for kill in range(10):
        pids = []
        while len(pids) < 2:
            assert process.poll() is None, output.read_text()
            pids = [pid for pid in ranks_of(process) if pid not in killed]
            time.sleep(0.01)
        if kill % 2:
            time.sleep(random.uniform(0, 6))
        else:
            before = steps(out)[-1]["step"] if out.exists() and steps(out) else 0
            wait_for_step(out, before + 1, SimpleNamespace(is_alive=lambda: True), output)
        os.kill(pids[kill // 2 % 2], signal.SIGKILL)
        killed += pids
    assert process.wait(300) == 0, output.read_text()
    launch(tmp_path / "other", 2, "train.py", *flags, "--out", tmp_path / "whole").wait(300)
    assert same_log(out, tmp_path / "whole") and same_encoder(out, tmp_path / "whole")


# ------------------------------------------------------------------------------------ which images
def without_digest(out):
    """Make a run's checkpoint one of before there were digests."""
    path = Path(out) / "last.pth"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["args"]["data_digest"], checkpoint["args"]["val_digest"]
    torch.save(checkpoint, path)


def test_another_folder_is_another_run(tmp_path, capsys):
    """With as many images, in another place or in the same; also when the first has finished."""
    images(tmp_path / "first", 16)
    images(tmp_path / "second", 16, size=(50, 36))
    out, flags = tmp_path / "run", ["--epochs", 1, "--data", tmp_path / "first"]
    train_small(out, *flags)
    encoder = (out / "encoder.pth").read_bytes()
    digest = data.digest_of(data.ImageFiles(str(tmp_path / "first")))
    assert header(out)["args"]["data_digest"] == digest
    capsys.readouterr()
    refused(capsys, *SMALL, *flags[:3], tmp_path / "second", "--out", out,
            match=f"data was .*/first, is .*/second; data_digest was {digest}, is ")
    (tmp_path / "first").rename(tmp_path / "away")
    (tmp_path / "second").rename(tmp_path / "first")
    refused(capsys, *SMALL, *flags, "--out", out, match=rf"\(data_digest was {digest}, is ")
    assert (out / "encoder.pth").read_bytes() == encoder
    assert torch.load(out / "last.pth", weights_only=True)["args"]["data_digest"] == digest


@pytest.mark.parametrize("stop", [1, 2])
def test_a_run_of_before_digests_goes_on_and_gets_one(stop, tmp_path, capsys):
    """With one line, once; from then on it knows its images. Stopped, or finished."""
    images(tmp_path / "set", 16)
    out, flags = tmp_path / "run", ["--epochs", 1, "--data", tmp_path / "set"]
    train_small(out, *flags, "--max-steps", stop)
    without_digest(out)
    capsys.readouterr()
    (tmp_path / "set").rename(tmp_path / "moved")  # nothing tells that these are its images
    refused(capsys, *SMALL, *flags[:3], tmp_path / "moved", "--out", out,
            match=r"of another run \(data was")
    (tmp_path / "moved").rename(tmp_path / "set")
    train_small(out, *flags, "--max-steps", stop)
    line, = capsys.readouterr().err.splitlines()
    assert line == (f"note: {out}/last.pth: did not say of which images it is, only of how many; "
                    f"now it is of those in {tmp_path}/set")
    photo(99, 50, 50).save(tmp_path / "set" / "003.png")
    refused(capsys, *SMALL, *flags, "--out", out, match="data_digest was")
    photo(3, 40, 36).save(tmp_path / "set" / "003.png")
    (tmp_path / "set").rename(tmp_path / "moved")
    assert len(train_small(out, *flags[:3], tmp_path / "moved")) == 2
    assert capsys.readouterr().err == (
        f"note: the data has moved from {tmp_path}/set to {tmp_path}/moved\n")


def test_scores_of_knn_are_all_of_the_same_images(tmp_path, capsys):
    for split, count in (("train", 8), ("val", 4)):
        class_folders(tmp_path / "set" / split, ["cat", "dog"], count)
    out, flags = tmp_path / "run", ["--data", tmp_path / "set", "--knn-every", 1]
    train_small(out, *flags, "--max-steps", 2)
    photo(99, 50, 50).save(tmp_path / "set" / "val" / "cat" / "000.png")
    capsys.readouterr()
    refused(capsys, *SMALL, *flags, "--out", out, match=r"\(val_digest was")
    train_small(out, *flags[:2], "--max-steps", 3)  # kNN is off
    assert len(steps(out)) == 5  # two of them are scores
    refused(capsys, *SMALL, *flags, "--out", out, match=r"\(val_digest was")  # still


def test_a_named_set_is_not_the_folder_of_its_name():
    """Which lies where the name would, if it were a path; also in a run of before digests."""
    parts = {"model": torch.nn.Module()}
    for then, now in (("./shapes", "shapes"), ("shapes", "./shapes")):
        checkpoint = {"args": {"data": then, "images": 4000}, "step": 1, "unreadable": [],
                      "model": {}}
        with pytest.raises(InputError, match=rf"\(data was {then}, is {now}\)"):
            run_module.check_same_run("last.pth", checkpoint, {"data": now, "images": 4000}, parts,
                                      (), {})
        run_module.check_same_run("last.pth", checkpoint, {"data": then, "images": 4000}, parts,
                                  (), {})


def test_ranks_with_different_images_are_refused(tmp_path):
    """With as many of them, in a folder of one name."""
    for rank, side in (("0", 40), ("1", 50)):
        images(tmp_path / rank / "set", 16, size=(side, 36))
    result = torchrun(2, "train.py", *SMALL, "--data", "set", "--out", "run", "--max-steps", 1,
                      folders=[tmp_path / "0", tmp_path / "1"])
    assert result.codes == [2, 2]
    assert "error: data_digest: rank 0 has " in result.stderr


def test_names_of_any_bytes_never_end_a_run(tmp_path):
    """Of data, classes, files passed over and --out: at its start, its end and when it goes on."""
    folder, out = os.fsdecode(b"caf\xe9"), str(tmp_path / os.fsdecode(b"\xe9"))
    for split in ("train", "val"):
        class_folders(tmp_path / folder / split, [os.fsdecode(b"ch\xe8vre"), "dog"], 8)
    (tmp_path / folder / "train" / "dog" / os.fsdecode(b"\xff")).write_bytes(b"")
    flags = ["--data", tmp_path / folder, "--knn-every", 1, "--epochs", 1]
    for stop in (1, 2):
        result = torchrun(1, "train.py", *SMALL, *flags, "--max-steps", stop, "--out", out,
                          before=print_strictly)
        assert result.codes == [0], result.stderr
    shown = result.stdout
    assert "caf\\udce9/train (passed over: 1 \\udcff)" in shown
    assert "step 2 of 2: encoder in " in shown and "\\udce9/encoder.pth" in shown
