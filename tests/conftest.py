"""What the tests share: the device, small runs in this process, ranks in processes of their own.

Without -m, `pytest` runs all but what pyproject.toml marks as slow or as in need of a GPU.
"""
import atexit
import contextlib
import importlib
import json
import math
import multiprocessing
import os
import re
import signal
import socket
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageDraw
from torchvision import transforms

import common.run as run_module
import test_care  # noqa: F401  --arch thin, in this process and those of `start`
from care import Encoder
from common import data

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent  # where the scripts are
CPU = torch.device("cpu")
slow, gpu = pytest.mark.slow, pytest.mark.gpu


# ------------------------------------------------------------------------- device, signals, threads
def pytest_collection_modifyitems(items):
    """Tests that need a GPU come first: from all others it is hidden, for good."""
    items.sort(key=lambda item: item.get_closest_marker("gpu") is None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Where no GPU is asked for, none is seen: a repeated run is exact on the CPU."""
    if item.get_closest_marker("gpu") is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.cuda.device_count = int  # 0
        torch.cuda.is_available = bool  # False
    elif not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    numbers = run_module.STOP_SIGNALS
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.join()


@contextlib.contextmanager
def single_thread():
    """As ranks have it: another number of threads rounds differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_thread():
    with single_thread():
        yield


# --------------------------------------------------------------------------------------- small runs
SMALL = ["--data", "shapes:32", "--arch", "thin", "--image-size", "32", "--blocks", "1",
         "--hidden-dim", "64", "--batch-size", "8", "--base-lr", "0.05", "--predictor-lr", "1",
         "--epochs", "2", "--tau-base", "0.99", "--crop-min", "0.2", "--knn-every", "0",
         "--rank-every", "0", "--workers", "0", "--log-every", "1"]


def train_small(out, *flags):
    """Run train.py in this process with small settings, which `flags` override -> its steps."""
    importlib.import_module("train").main([*SMALL, "--out", str(out), *map(str, flags)])
    return steps(out)


def steps(out):
    """The lines of a run's log that have a step."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "step" in line]


def header(out):
    """The first line of a run's log."""
    return json.loads((Path(out) / "log.jsonl").read_text().splitlines()[0])


def same_log(a, b):
    """Whether two runs have the same steps, bit for bit in all but speed and memory."""
    def measured(out):
        speed = ("images/s", "memory_gib")
        return [{key: line[key] for key in line if key not in speed} for line in steps(out)]

    return measured(a) == measured(b)


def same_encoder(a, b):
    """Whether two runs have the same encoder.pth, bit for bit."""
    a, b = (torch.load(Path(out) / "encoder.pth", weights_only=True) for out in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def refused(capsys, *flags, code=2, match="", script=None):
    """Assert that the script ends with this exit code and one line on stderr -> the line."""
    with pytest.raises(SystemExit) as caught:
        (script or importlib.import_module("train")).main([*map(str, flags)])
    found, line = caught.value.code, capsys.readouterr().err.strip()
    if isinstance(found, str):  # Python prints it on stderr and exits with 1
        found, line = 1, f"{line}{found}"
    assert found == code
    assert "\n" not in line and line.startswith("error: ") and re.search(match, line), line
    return line


def bare_run(args, rank=0, world=1, signals=()):
    """A Run on the CPU that has joined no ranks and opened no directory."""
    run = object.__new__(importlib.import_module("common.run").Run)
    run.args, run.rank, run.world, run.device = args, rank, world, CPU
    run.signals, run.autocast = list(signals), contextlib.nullcontext()
    run.scaler, run.out = torch.amp.GradScaler("cpu", enabled=False), None
    return run


def photo(seed, height=80, width=100):
    """A smooth, colourful image: random coarse noise, enlarged."""
    coarse = np.random.RandomState(seed).randint(0, 256, (8, 10, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.BICUBIC)


def images(folder, count, size=(40, 36)):
    """Write 000.png, 001.png, ... -> the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        photo(i, *size).save(folder / f"{i:03d}.png")
    return folder


def class_folders(root, names, count=2):
    """A folder a name, with some images each -> root."""
    for name in names:
        images(root / name, count, size=(32, 32))
    return root


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


# --------------------------------------------------------------------------- processes of their own
# Forked from a server that has imported torch once: a start takes a tenth of a second, not three.
os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{HERE}"
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["conftest", "train"])
STARTED = []


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def in_process(script, argv, output, folder, environment, before):
    """What `python SCRIPT ARGV` does in a folder, after before(); to OUTPUT.out and OUTPUT.err."""
    for number, kind in ((1, "out"), (2, "err")):
        with open(f"{output}.{kind}", "a") as file:
            os.dup2(file.fileno(), number)
    os.chdir(folder)
    os.environ.update(environment)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of loading processes, as usual
    if before:
        before()
    main = script if callable(script) else importlib.import_module(script.removesuffix(".py")).main
    try:
        main(*argv) if callable(script) else main(argv)
    finally:
        atexit._run_exitfuncs()  # as Python does, while a traceback keeps what it names


def start(world, script, *flags, output, folders=None, before=None):
    """Start a script, or a function of a module, on `world` ranks with torchrun's variables.

    -> the processes. output: of all ranks, less its suffix: they add to OUTPUT.out and OUTPUT.err.
    folders: of each rank. before: a function of a module, called first in each.
    """
    processes, port = [], str(free_port())
    for rank in range(world):
        environment = {}  # the GPUs are those of this process: all, or none where it hides them
        if "CUDA_VISIBLE_DEVICES" in os.environ:
            environment["CUDA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]
        if world > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        folder = folders[rank] if folders else ROOT
        args = (script, [*map(str, flags)], output, folder, environment, before)
        process = FORKS.Process(target=in_process, args=args)
        process.start()
        processes.append(process)
    STARTED.extend(processes)
    return processes


def torchrun(world, script, *flags, output=None, **options):
    """`start`, and wait, at most ten seconds longer than for the first rank that fails.

    -> returncode: the first that is not 0, or 0; codes by rank (None: had no end); stdout, stderr.
    """
    output = output or tempfile.mkdtemp() + "/output"
    processes = start(world, script, *flags, output=output, **options)
    deadline = time.time() + 120
    while any(process.is_alive() for process in processes) and time.time() < deadline:
        if any(process.exitcode for process in processes):
            deadline = min(deadline, time.time() + 10)
        time.sleep(0.02)
    codes = [process.exitcode for process in processes]
    failed = [code for code in codes if code != 0]
    stdout, stderr = (Path(f"{output}.{kind}").read_text() for kind in ("out", "err"))
    return SimpleNamespace(returncode=failed[0] if failed else 0, codes=codes, stdout=stdout,
                           stderr=stderr)


def wait_for_step(out, step, process, output, seconds=120):
    """Wait until the log of a run that goes on has this step."""
    deadline = time.time() + seconds
    while not (Path(out) / "log.jsonl").exists() or not any(x["step"] >= step for x in steps(out)):
        assert process.is_alive() and time.time() < deadline, Path(f"{output}.err").read_text()
        time.sleep(0.01)


def memory(kind, pid="self"):
    """MiB of a process: VmRSS, resident, or VmHWM, the most so far."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) / 1024


# --------------------------------------------------------------- evaluations of a classifier, small
RANDOM = ["--pretrained", "random", "--arch", "thin"]


@pytest.fixture
def few_validation_images(monkeypatch):
    """100 of them, not 1,000, of the embedded sets -> open_images as it is without this."""
    plain = data.open_images

    def open_fewer(name, split, *where, **named):
        source = plain(name, split, *where, **named)
        if split == "val" and hasattr(source, "renderer"):
            source.targets = source.targets[:100]
        return source

    monkeypatch.setattr(data, "open_images", open_fewer)
    return plain


def final_line(capsys, script, *flags):
    """Run an evaluation script in this process -> its last line on stdout, as a dict."""
    script.main([*map(str, flags)])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def stopped(capsys, script, *flags):
    """Run a script that stops before its end -> its last line on stdout."""
    with pytest.raises(SystemExit) as caught:
        script.main([*map(str, flags)])
    assert caught.value.code == 0
    return capsys.readouterr().out.splitlines()[-1]


@contextlib.contextmanager
def signal_after_step(number):
    """Inside, a run is asked to stop when it has made this step."""
    received, after = [], run_module.Run.after

    def after_and_signal(run, done, *rest, **named):
        after(run, done, *rest, **named)
        if done == number:
            received.append(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "catch_signals", lambda: received)
        patch.setattr(run_module.Run, "after", after_and_signal)
        yield


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
    for model in (importlib.import_module("linear_eval").Probe,
                  importlib.import_module("semi_eval").FineTune):
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
    assert weight.shape == (10, Encoder("thin").dim5) and bias.eq(0).all()
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


# -------------------------------------------------------------------------------- texts of a figure
@pytest.fixture
def texts(monkeypatch):
    """Every text drawn: (id and size of its image, its box in pixels, itself)."""
    drawn = []
    write = ImageDraw.ImageDraw.text

    def text(self, xy, text, fill=None, font=None, anchor=None, spacing=4):
        box = self.textbbox(xy, text, font, anchor=anchor, spacing=spacing)
        drawn.append((self.im, self.im.size, box, text))
        write(self, xy, text, fill, font, anchor, spacing)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return drawn


def check_legible(texts):
    """Every text lies within its image, and none on another."""
    for number, (image, (width, height), box, text) in enumerate(texts):
        left, top, right, bottom = box
        assert left >= 0 and top >= 0 and right <= width and bottom <= height, (text, box)
        for other_image, _, other, other_text in texts[:number]:
            apart = (right <= other[0] or other[2] <= left
                     or bottom <= other[1] or other[3] <= top)
            assert other_image is not image or apart, (text, other_text)


# -------------------------------------------------------------------------------------- shared runs
@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """An uninterrupted small run of eight steps."""
    out = tmp_path_factory.mktemp("reference")
    with single_thread():
        train_small(out)
    return out


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """A folder of two classes: 32 training and 12 validation images."""
    root = tmp_path_factory.mktemp("labelled")
    for split, count in (("train", 16), ("val", 6)):
        for number, name in enumerate(("cat", "dog")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                photo(100 * number + i + (split == "val") * 50, 40, 36).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory, labelled):
    """Eight steps on two ranks, with kNN -> the flags, the run directory."""
    flags = [*SMALL, "--data", labelled, "--knn-every", 1]
    out = tmp_path_factory.mktemp("two_ranks") / "run"
    result = torchrun(2, "train.py", *flags, "--out", out)
    assert result.codes == [0, 0], result.stderr
    return flags, out
