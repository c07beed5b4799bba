"""bench.py: the cost of a step, by part, and of the input."""
import json

import pytest

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
