"""bench.py: the cost of a step, by part, and of the input."""
import json

import pytest
import torch

import bench
from common import run as run_module
from conftest import CPU, refused

pytestmark = pytest.mark.usefixtures("one_thread")
FLAGS = ["--arch", "thin", "--image-size", "32", "--batch-size", "8", "--hidden-dim", "64",
         "--blocks", "1"]


def test_bench_measures_a_step_and_the_input_pipeline(capsys):
    bench.main(FLAGS)
    found = json.loads(capsys.readouterr().out)
    assert set(found["ms"]) == {"views", "momentum forward", "online forward", "backward",
                                "optimiser", "EMA"}
    assert sum(found["ms"].values()) == pytest.approx(8000 / found["pairs/s"], rel=0.9)
    speed = found["tflop"] * found["pairs/s"]
    supervised_speed = found["supervised tflop"] * found["supervised images/s"]
    assert found["efficiency"] == pytest.approx(speed / supervised_speed)
    # two online and two momentum forwards, two backwards for one of each; transformer and heads
    assert found["tflop"] > 8 * found["supervised tflop"] / 3
    bench.main([*FLAGS, "--data", "shapes:64", "--workers", "1"])
    found = json.loads(capsys.readouterr().out)
    rates = found["pairs/s per worker"]
    assert found["workers"] == 1
    assert set(rates) == {"device", "worker"} and rates["device"] > rates["worker"] > 0


def test_bench_is_for_one_process(capsys, monkeypatch):
    monkeypatch.setattr(run_module, "join_ranks", lambda: (0, 2, CPU, 1))
    refused(capsys, *FLAGS, match="measures one process", script=bench)


@pytest.mark.parametrize("flags", [["--accum-steps", "2"], ["--augment", "worker"]])
def test_what_would_have_no_effect_is_refused(flags, capsys):
    refused(capsys, *FLAGS, *flags, match="leave out --accum-steps and", script=bench)


def test_the_roofline_counts_bytes_and_flop(capsys, monkeypatch):
    """Of each operation, the longer of the two; a step's FLOP are those of the bench."""
    a, x = torch.randn(64, 32), torch.randn(2, 3, 8, 8)
    with bench.Roofline() as product:
        a @ a.T  # a view, a product
    assert product.flop == 2 * 64 * 64 * 32 and product.bytes == 4 * (2 * 64 * 32 + 64 * 64)
    assert product.seconds == product.bytes / bench.BANDWIDTH > product.flop / bench.FLOPS
    with bench.Roofline() as inplace:
        x.relu_()
    assert inplace.bytes == 2 * 4 * x.numel() and inplace.flop == 0
    with bench.Roofline() as norm:
        torch.nn.functional.batch_norm(x, None, None, training=True)
    assert norm.bytes == 3 * 4 * x.numel() + 4 * 2 * 3  # read twice, written; mean and deviation
    monkeypatch.setattr(bench, "PAIRS", 8)
    tflop = []
    for flags in (FLAGS, [*FLAGS, "--roofline"]):
        torch.manual_seed(0)  # as many views are blurred
        bench.main(flags)
        tflop.append(json.loads(capsys.readouterr().out)["tflop"])
    assert tflop[0] == pytest.approx(tflop[1])


@pytest.mark.parametrize("guess", [8, 96, 104, 112, 400])
def test_the_largest_batch_is_found_from_any_guess(guess, monkeypatch):
    def step_memory(run, args, pairs, limit):
        return pairs / 8 if pairs / 8 <= limit else float("inf")

    monkeypatch.setattr(bench, "step_memory", step_memory)
    assert bench.largest_batch(None, None, card=13 + bench.BESIDE, guess=guess) == 8 * 13
    assert bench.largest_batch(None, None, card=0.5 + bench.BESIDE, guess=guess) == 0


def test_memory_needs_a_gpu(capsys):
    refused(capsys, *FLAGS, "--memory", match="needs a GPU", script=bench)
