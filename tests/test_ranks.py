"""common/ranks.py: joining, the mistakes of one rank, two ranks against one process."""
import os
import socket
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import train
from care import CARE, InputError
from common import ranks
from conftest import SMALL, gpu, images, refused, torchrun

pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------------ joining
def test_launchers_mistakes_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    refused(capsys, *SMALL, "--out", tmp_path,
            match="a rank, but without WORLD_SIZE, MASTER_ADDR, MASTER_PORT: use torchrun")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(capsys, *SMALL, "--out", tmp_path, match="without MASTER_ADDR, MASTER_PORT: ")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        refused(capsys, *SMALL, "--out", tmp_path, match="does another run use MASTER_PORT")


def test_share_of_cores():
    """torchrun's ranks share their host's mask, Slurm's tasks have their own."""
    def host(name, cores):
        return {"host": name, "cores": list(cores), "gpu": None}

    shared = [host("a", range(16))] * 4 + [host("b", range(16))] * 2
    assert [ranks.share_of_cores(shared, rank) for rank in range(6)] == [4, 4, 4, 4, 8, 8]
    own = [host("a", range(12)), host("a", range(12, 24)), host("b", range(12))]
    assert [ranks.share_of_cores(own, rank) for rank in range(3)] == [12, 12, 12]
    assert ranks.share_of_cores([host("a", range(2))] * 8, 5) == 1


def test_choose_backend():
    """NCCL needs a GPU of its own for each rank: counted by UUID, as each may see but one."""
    assert ranks.choose_backend(["GPU-1", "GPU-2", "GPU-3"]) == "cpu:gloo,cuda:nccl"
    assert ranks.choose_backend(["GPU-1", "GPU-2", "GPU-1"]) == "gloo"
    assert ranks.choose_backend([None, None]) == ranks.choose_backend(["GPU-1", None]) == "gloo"


# ------------------------------------------------------------------------------------------- errors
def no_data_on_rank_1():
    def open_images(*args, **named):
        raise InputError("a mistake on rank 1 alone")

    if os.environ["RANK"] == "1":
        train.open_images = open_images


def another_seed_on_rank_1():
    def parse_args(argv=None):
        args = parse(argv)
        args.seed = 7
        return args

    parse = train.parse_args
    if os.environ["RANK"] == "1":
        train.parse_args = parse_args


@pytest.mark.parametrize("before, line", [
    (no_data_on_rank_1, "error: a mistake on rank 1 alone"),
    (another_seed_on_rank_1, "error: seed: rank 0 has 0, rank 1 has 7"),
    (None, "error: images: rank 0 has 8, rank 1 has 9"),
])
def test_a_mistake_of_one_rank_is_one_line_and_all_end(before, line, tmp_path):
    """Raised on one rank, or seen by comparison; each has data of its own, in its own folder."""
    folders = [images(tmp_path / f"{count}" / "set", count).parent for count in (8, 9)]
    result = torchrun(2, "train.py", *SMALL, "--data", "set", "--out", tmp_path / "run",
                      before=before, folders=folders)
    assert result.codes == [2, 2] and result.stderr.splitlines() == [line], result.stderr


# ----------------------------------------------------------------------------------------- training
def drive(out, device):
    """Five float64 optimiser steps on a fixed stream of views; rank 0 saves the weights.

    Of two ranks' parts, one process makes two accumulation steps; on a GPU, whose batch norms are
    synchronised, one batch.
    """
    rank, world, _, _ = ranks.join_ranks()
    torch.manual_seed(0)
    model = CARE("thin", image_size=32, blocks=2, hidden_dim=32, out_dim=16).double().to(device)
    parallel = ranks.parallelise(model, torch.device(device))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0, momentum=0.9, weight_decay=1e-4)
    run = SimpleNamespace(autocast=torch.autocast(device, enabled=False),
                          scaler=torch.amp.GradScaler(device, enabled=False))
    losses = []
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        parts = torch.randn(2, 2, 4, 3, 32, 32, dtype=torch.float64, generator=generator)
        if world > 1:
            parts = parts[rank:rank + 1]
        elif device == "cuda":
            parts = parts.transpose(0, 1).flatten(1, 2)[None]  # (1, 2, 8, 3, 32, 32)
        meters = train.pretrain_step(parallel, optimizer, run, parts.to(device), views_of=tuple,
                                     lr=0.02, tau=0.98)
        losses.append(ranks.average(meters)["loss"])
    if rank == 0:
        torch.save({"model": model.cpu().state_dict(), "losses": losses}, out)
    ranks.leave_ranks()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_two_ranks_are_one_process(device, tmp_path):
    """Parameters to 1e-9 after five steps; a rank's running statistics on a CPU are its own."""
    drive(tmp_path / "one.pth", device)
    result = torchrun(2, drive, tmp_path / "two.pth", device)
    assert result.codes == [0, 0], result.stderr
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pth", "two.pth"))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-6)  # averaged in float32
    assert one["losses"][0] != one["losses"][-1]
    for name, value in one["model"].items():
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(two["model"][name], value, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------- launchers' variables
TWO = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("variables, match", [
    (TWO | {"MASTER_PORT": "abc"}, "MASTER_PORT=abc: must be a whole number"),
    (TWO | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000: ports end at 65535"),
    (TWO | {"RANK": "2"}, "RANK=2: must be below WORLD_SIZE=2"),
    (TWO | {"WORLD_SIZE": "0"}, "RANK=0: must be below WORLD_SIZE=0"),
    (TWO | {"RANK": "1", "LOCAL_RANK": "one"}, "LOCAL_RANK=one: must be a whole number"),
    (TWO | {"RANK": "1", "LOCAL_RANK": "1", "MASTER_PORT": ""}, "without MASTER_PORT: "),
    ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1: must be a whole number"),
    ({"LOCAL_RANK": "1"}, "RANK=: no such folder"),  # a mistake in --data, not there
])
def test_variables_that_make_no_sense(variables, match, tmp_path, capsys, monkeypatch):
    """One line, from the rank that has them, whichever it is."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refused(capsys, *SMALL, "--data", tmp_path / "RANK=", "--out", tmp_path / "run", match=match)


def test_variables_that_are_empty(monkeypatch):
    """As those that are not set."""
    for name in (*TWO, "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
    rank, world, _, _ = ranks.join_ranks()
    assert (rank, world) == (0, 1)


# ---------------------------------------------------------------------------------------- restarts
def meet(port, late):
    """Enter a group by a store that outlives its ranks, as torchrun's; rank `late` comes last."""
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": port}
    ranks.TIMEOUT = timedelta(seconds=10)
    if os.environ["RANK"] == late:
        time.sleep(0.5)
    rank, _, _, _ = ranks.join_ranks()
    assert ranks.gather(rank) == [0, 1]
    ranks.leave_ranks()


def test_a_restart_does_not_wait_for_the_dead():
    """In the store are the addresses of earlier starts: the rank that comes first finds them."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for late in ("1", "0", "1"):
        result = torchrun(2, meet, store.port, late)
        assert result.codes == [0, 0], result.stderr


def test_a_rank_that_does_not_come(monkeypatch, capsys):
    """One line, and the exit code after which torchrun starts all ranks again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in (TWO | {"MASTER_PORT": port}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "TIMEOUT", timedelta(seconds=1))
    with pytest.raises(SystemExit) as caught:
        ranks.join_ranks()
    line = capsys.readouterr().err
    assert caught.value.code == 2 and line.startswith("error: rank 0: no meeting (")
    assert line.endswith("or has a rank not started?\n") and line.count("\n") == 1
