"""tables.py: two cells of a table from the scripts as a user starts them, and the page."""
import json

import pytest

from common import data
import tables

QUICK = ["--only", "table1", "--seeds", "0", "--data", "clutter:32"]
TRAIN = "--epochs 1 --batch-size 16 --blocks 1 --hidden-dim 32 --knn-every 0"


def test_two_cells_of_table_1(tmp_path, monkeypatch, capsys):
    """Run once; the same command again starts nothing and writes the same page."""
    monkeypatch.setitem(tables.TABLES["table1"], "columns", ["kNN"])
    results = tmp_path / "results.json"
    flags = [*QUICK, "--runs", str(tmp_path / "runs"), "--results", str(results)]
    flags += ["--train-flags", TRAIN, "--encoders", "random", "care"]
    tables.main(flags)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(line["encoder"], line["seed"], line["score"]) for line in lines] == [
        ("random", 0, "kNN"), ("care", 0, "kNN")]
    for line in lines:
        assert 0 < line["result"]["top1"] < 100 and line["result"]["labels"] == 32
        assert line["result"]["arch"] == "resnet18" and line["result"]["image_size"] == [64, 64]
    assert lines[0]["result"]["sha256"] != lines[1]["result"]["sha256"]
    page = results.with_suffix(".md").read_text()
    for line, name in zip(lines, ("random", "CARE")):
        assert f"| {name} | {line['result']['top1']:.1f} ± 0.0 (1 seed) |" in page
    assert "| BYOL |  | 66.5" in page  # an empty cell
    assert "train.py --data clutter:32 --seed 0 --epochs 1" in page
    assert "(32 images, " in page and "over the seeds 0." in page

    monkeypatch.setattr(tables, "start", lambda *_: pytest.fail("has been run"))
    tables.main(flags)
    assert results.with_suffix(".md").read_text() == page


@pytest.mark.parametrize("name, table, key, value", [
    ("tau_base", data.RECIPES["clutter"], "tau_base", 0.5),
    ("scorer", tables.SCORERS, "linear", ["linear_eval.py", "--epochs", "1"]),
    ("train_flags", None, None, None)])
def test_jobs_of_other_settings_are_not_mixed(name, table, key, value, tmp_path, monkeypatch,
                                              capsys):
    """They would stand in one table as if they could be compared."""
    monkeypatch.setattr(tables, "start", lambda *_: ['step 9 of 9: encoder in x', '{"top1": 1}'])
    monkeypatch.setitem(tables.TABLES["table1"], "columns", ["linear"])
    results = tmp_path / "results.json"
    flags = [*QUICK, "--runs", str(tmp_path / "runs"), "--results", str(results)]
    tables.main([*flags, "--encoders", "byol"])
    before = results.read_text()
    if table is None:
        flags += ["--train-flags", "--precision bf16"]
    else:
        monkeypatch.setitem(table, key, value)
    with pytest.raises(SystemExit) as caught:
        tables.main([*flags, "--encoders", "care"])
    assert caught.value.code == 2 and f"linear: {name} was " in capsys.readouterr().err
    assert results.read_text() == before


def test_what_was_not_pretrained_outlives_another_recipe(tmp_path, monkeypatch):
    """A random encoder's score depends on how it is scored, not on tau or --train-flags."""
    monkeypatch.setattr(tables, "start", lambda *_: ['{"top1": 1}'])
    results = tmp_path / "results.json"
    flags = [*QUICK, "--encoders", "random", "--results", str(results)]
    flags += ["--runs", str(tmp_path / "runs")]
    tables.main(flags)
    before = results.read_text()
    monkeypatch.setitem(data.RECIPES["clutter"], "tau_base", 0.5)
    monkeypatch.setattr(tables, "start", lambda *_: pytest.fail("has been run"))
    tables.main([*flags, "--train-flags", "--precision bf16"])
    assert results.read_text() == before


def fake(encoder, *values):
    """Finished linear scores of an encoder, one a seed."""
    return {(encoder, "linear", seed): {"encoder": encoder, "seed": seed, "score": "linear",
                                        "result": {"top1": value}, "seconds": 1, "machine": "m",
                                        "pretraining_seconds": 0, "commands": ["python x"]}
            for seed, value in enumerate(values)}


@pytest.mark.parametrize("care, byol, word", [
    ((72.0, 73.0, 74.0), (66.0, 67.0, 68.0), "agrees"),
    ((66.0, 67.0, 68.0), (72.0, 73.0, 74.0), "disagrees"),
    ((70.0, 75.0, 80.0), (69.0, 75.0, 79.0), "cannot be told"),
    ((70.0,), (60.0, 61.0, 62.0), None),
])
def test_verdicts_are_honest_in_sign(care, byol, word):
    """A difference below its standard error tells nothing; neither does a single seed."""
    results = fake("care", *care) | fake("byol", *byol)
    found = tables.verdict(results, "care", "byol", "linear")
    assert (found is None) if word is None else (f": {word} (" in found)


def test_cells_are_means_and_standard_deviations():
    results = fake("care", 70.0, 72.0, 74.0)
    assert tables.cell(results, "care", "linear") == "72.0 ± 2.0"
    assert tables.cell(results, "byol", "linear") == ""


def test_every_table_is_made_of_known_encoders_and_columns():
    for table in tables.TABLES.values():
        known = {encoder for _, encoder, _ in table["rows"]}
        assert known <= {*tables.PRETRAINED, "random", "supervised"}
        assert set(table["columns"]) <= set(tables.COLUMNS)
        for better, worse, column in table["claims"]:
            assert {better, worse} <= known and column in table["columns"]


def test_a_job_that_fails_says_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(tables.TABLES["table1"], "rows", [("CARE", "care", "-")])
    flags = [*QUICK, "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results.json")]
    with pytest.raises(SystemExit) as caught:
        tables.main([*flags, "--train-flags", "--batch-size 0"])
    assert caught.value.code == 1
    assert "--batch-size 0: must lie in" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("stopped, said", [
    ("train.py", "step 3 of 9: stopped, the same command goes on"),
    ("linear_eval.py", "stopped while scoring; the same command goes on")])
def test_a_job_that_a_signal_stopped_is_not_finished(stopped, said, tmp_path, monkeypatch, capsys):
    """It ends with exit code 0: a half-trained encoder must not be scored, no score not kept."""
    def start(command, threads):
        whole = ["step 9 of 9: encoder in x", '{"top1": 1.0}']
        return [said] if command[0] == stopped else whole

    monkeypatch.setattr(tables, "start", start)
    monkeypatch.setitem(tables.TABLES["table1"], "rows", [("CARE", "care", "-")])
    results = tmp_path / "results.json"
    with pytest.raises(SystemExit):
        tables.main([*QUICK, "--runs", str(tmp_path / "runs"), "--results", str(results)])
    assert f"{stopped} --" in (error := capsys.readouterr().err) and "stopped before" in error
    assert not results.exists()
