"""What the tests share: the device, small runs in this process, ranks in processes of their own.

Without -m, `pytest` runs all but what pyproject.toml marks as slow or as in need of a GPU.
"""
import atexit
import contextlib
import importlib
import json
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
from PIL import Image
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

import care

HERE = Path(__file__).resolve().parent
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
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
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
class Thin(ResNet):  # with fewer than 16 channels oneDNN (torch 2.14) corrupts memory
    """A ResNet with half of a resnet18's blocks and a quarter of its width, for quick steps."""

    def __init__(self, weights=None):
        super().__init__(BasicBlock, [1, 1, 1, 1])
        self.fc = nn.Linear(128, 1000)

    def _make_layer(self, block, planes, *rest, **named):
        return super()._make_layer(block, planes // 4, *rest, **named)


care.ARCHS["thin"] = Thin  # --arch thin, in this process and those of `start`
SMALL = ["--data", "shapes:32", "--arch", "thin", "--image-size", "32", "--blocks", "1",
         "--hidden-dim", "64", "--batch-size", "8", "--base-lr", "0.05", "--epochs", "2",
         "--tau-base", "0.99", "--crop-min", "0.2", "--knn-every", "0", "--workers", "0",
         "--log-every", "1"]


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
    assert caught.value.code == code
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and line.startswith("error: ") and re.search(match, line), line
    return line


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
os.environ["PYTHONPATH"] = str(HERE)
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
        environment = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
        if world > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        folder = folders[rank] if folders else HERE
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
