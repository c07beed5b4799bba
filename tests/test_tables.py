"""tables.py, common/paper.py: two cells as a user starts them, commands, statistics, the page."""
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

import linear_eval
import tables
from common import data, shapes
from conftest import ROOT, refused

QUICK = ["--only", "table1a", "--seeds", "0"]
REAL = [*QUICK, "--data", "shapes:32"]
TRAIN = "--epochs 10 --batch-size 16 --blocks 1 --hidden-dim 32 --knn-every 0 --log-every 1"
SCORED = {"top1": 1.0, "area": 12.5, "pointing": 30, "energy": 20, "pointing_chance": 8.0,
          "pointing_fixed": 25.0}
DONE = ["step 9 of 9: encoder in x", json.dumps(SCORED)]
SCALE = ["--data", "imagenet", "--launcher", "torchrun --nproc_per_node 8"]
GIVEN = ["--voc", "v", "--coco", "c", "--subset-1", "a", "--subset-10", "b", "--photos", "p",
         "--supervised", "s.pth"]


@pytest.fixture(autouse=True)
def a_place_of_its_own(tmp_path, monkeypatch):
    """--list lets a closed pipe end it, which is not for the tests' own process."""
    before = signal.getsignal(signal.SIGPIPE)
    monkeypatch.chdir(tmp_path)
    yield
    signal.signal(signal.SIGPIPE, before)


@pytest.fixture
def pretence(monkeypatch):
    """No script runs: each says what its end would say -> the commands, as they come."""
    commands = []

    def start(args, words):
        commands.append(words)
        return DONE

    monkeypatch.setattr(tables, "start", start)
    return commands


@pytest.fixture
def imagenet(tmp_path):
    """A tree like ImageNet's, of which --list reads the names at most."""
    for split in ("train", "val"):
        for number in range(20):
            (tmp_path / "imagenet" / split / f"n{number:02d}").mkdir(parents=True)
    return tmp_path / "imagenet"


def lines_of(path="docs/tables.json"):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# ------------------------------------------------------------------------------------------ running
def test_two_cells_interrupted_and_continued(tmp_path, monkeypatch, capsys):
    """SIGTERM while an encoder trains; the same command resumes it; a third starts nothing."""
    monkeypatch.setitem(tables.TABLES["table1a"], "miniature",
                        tables.TABLES["table1a"]["miniature"] | {"columns": ["kNN"]})
    flags = [*REAL, "--train-flags", TRAIN, "--jobs", "2"]  # a thread each
    log = tmp_path / "runs" / "tables_shapes" / "care_seed0" / "log.jsonl"
    program = ("import sys, tables; tables.TABLES['table1a']['miniature']['columns'] = ['kNN']; "
               "tables.main(sys.argv[1:])")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", program, *flags, "--rows", "care"],
                               env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 100
    while not log.exists() or '"step": 2' not in log.read_text():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.02)
    process.terminate()
    assert process.communicate()[1] == "error: stopped; the same command resumes it\n"
    assert process.returncode == 1
    results = "docs/tables_shapes.json"
    assert not Path(results).exists()
    stopped_at = max(json.loads(line).get("step", 0) for line in log.read_text().splitlines())
    assert 2 <= stopped_at < 20

    flags += ["--rows", "random", "care"]
    tables.main(flags)
    assert json.loads(log.read_text().splitlines()[-1])["step"] == 20
    headers = [line for line in log.read_text().splitlines() if "resumed_at" in line]
    assert json.loads(headers[1])["resumed_at"] >= stopped_at
    lines = sorted(lines_of(results), key=lambda line: line["encoder"], reverse=True)
    assert [(line["encoder"], line["seed"], line["score"]) for line in lines] == [
        ("random", 0, "kNN"), ("care", 0, "kNN")]
    for line in lines:
        assert 0 < line["result"]["top1"] < 100 and line["result"]["labels"] == 32
        assert line["result"]["arch"] == "resnet18" and line["result"]["image_size"] == [32, 32]
    assert lines[0]["result"]["sha256"] != lines[1]["result"]["sha256"]
    assert lines[1]["settings"]["train.py"]["epochs"] == 10
    page = Path("docs/tables_shapes.md").read_text()
    for line, name in zip(lines, ("random", "CARE")):
        assert f"| {name} | {line['result']['top1']:.1f} (n = 1) |" in page
    assert "| BYOL |  |  |" in page  # an empty cell
    assert "10 epochs in batches of 16" in page.replace("\n", " ")  # not the recipe's
    assert "train.py --data shapes:32 --seed 0 --epochs 10" in page

    monkeypatch.setattr(tables, "start", lambda *_: pytest.fail("has been run"))
    tables.main(flags)
    assert Path("docs/tables_shapes.md").read_text() == page


def test_a_pretraining_is_shared_and_comes_first(pretence, monkeypatch):
    """By all tables, by several jobs side by side too."""
    tables.main(["--seeds", "0", "--rows", "care", "byol", "--jobs", "3"])
    outs = [words[words.index("--out") + 1] for words in pretence]
    assert len(set(outs)) == len(outs)
    trained = [words for words in pretence if words[0] == "train.py"]
    assert [words[-1] for words in trained] == [f"runs/tables/{name}_seed0"
                                                for name in ("byol", "care")]
    for words in pretence:
        if "--pretrained" in words:
            pretrained = words[words.index("--pretrained") + 1]
            first = next(other for other in trained if f"{other[-1]}/encoder.pth" == pretrained)
            assert pretence.index(first) < pretence.index(words)


def test_a_job_that_fails_does_not_end_the_others(monkeypatch, capsys):
    """It is reported at the end with its error; what needs it does not run."""
    def start(args, words):
        if "byol" in words:
            raise RuntimeError("out of memory")
        return DONE

    monkeypatch.setattr(tables, "start", start)
    with pytest.raises(SystemExit) as caught:
        tables.main(["--only", "table1a", "--seeds", "0"])
    assert caught.value.code == 1
    shown = capsys.readouterr()
    assert "byol, seed 0, pretraining: out of memory" in shown.err
    assert "byol, seed 0, linear: not run: what it needs failed" in shown.err
    assert shown.err.endswith("error: 3 of 9 jobs failed\n")
    assert {line["encoder"] for line in lines_of()} == {"random", "supervised", "care"}
    assert "| CARE | 1.0 (n = 1) |" in Path("docs/tables.md").read_text()


def test_the_error_of_a_script_is_told(tmp_path, monkeypatch, capsys):
    """As it says it itself; also that a process was killed, which says nothing."""
    monkeypatch.setattr(tables, "HERE", tmp_path)
    (tmp_path / "train.py").write_text("import sys; sys.exit('error: 9 images are too few')")
    (tmp_path / "linear_eval.py").write_text("import os; os.kill(os.getpid(), 9)")
    with pytest.raises(SystemExit) as caught:
        tables.main([*QUICK, "--rows", "care", "random"])
    assert caught.value.code == 1
    told = capsys.readouterr().err
    assert "care, seed 0, pretraining: error: 9 images are too few\n" in told
    assert "random, seed 0, kNN: exit code -9\n" in told
    assert not Path("docs/tables.json").exists()


@pytest.mark.parametrize("stopped, said", [
    ("train.py", "step 3 of 9: stopped, the same command resumes it"),
    ("train.py", "step 9 of 9: already beyond --max-steps 4"),
    ("linear_eval.py", "stopped while scoring; the same command resumes it")])
def test_a_job_that_a_signal_stopped_is_not_finished(stopped, said, monkeypatch, capsys):
    """It ends with exit code 0: a half-trained encoder must not be scored, no score not kept."""
    monkeypatch.setattr(tables, "start",
                        lambda args, words: [said] if words[0] == stopped else DONE)
    with pytest.raises(SystemExit):
        tables.main([*QUICK, "--rows", "care"])
    assert f"did not reach its end: {said}\n" in capsys.readouterr().err
    assert not Path("docs/tables.json").exists()


def test_relative_paths_are_the_callers(tmp_path, monkeypatch):
    """Scripts are found from anywhere; runs and results lie where the caller is."""
    args = tables.parse_args([])
    assert (args.runs, args.results) == ("runs/tables", "docs/tables.json")
    command = tables.command_of(args, ["train.py", "--out", "runs/x"])
    assert os.path.samefile(command[1], ROOT / "train.py") and command[-1] == "runs/x"
    monkeypatch.chdir(ROOT)
    assert tables.command_of(args, ["train.py"]) == ["python", "train.py"]


# ----------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize("said, table, key, value", [
    ("tau_base of train.py was 0.8, is 0.5", data.RECIPES["clutter"], "tau_base", 0.5),
    ("epochs of linear_eval.py was 30, is 1", tables.SCORERS, "linear",
     ["linear_eval.py", "--epochs", "1"]),
    ("lambda_att of train.py was 100.0, is 3.0", tables.VARIANTS, "byol",
     ["--method", "byol", "--lambda-att", "3"]),
    (f"protocol_version of linear_eval.py was {linear_eval.PROTOCOL_VERSION}, is 99", linear_eval,
     "PROTOCOL_VERSION", 99),
    ("precision of train.py was 'auto', is 'bf16'", None, "--precision bf16", None)])
def test_jobs_of_other_settings_are_not_mixed(said, table, key, value, pretence, monkeypatch,
                                              capsys):
    """They would stand in one table as if they could be compared."""
    tables.main(["--rows", "byol", "--seeds", "0"])
    before = Path("docs/tables.json").read_text()
    flags = ["--rows", "care", "--seeds", "5"]
    if table is None:
        flags += ["--train-flags", key]
    elif table is linear_eval:
        monkeypatch.setattr(table, key, value)
    else:
        monkeypatch.setitem(table, key, value)
    line = refused(capsys, *flags, script=tables)
    assert re.search(f"docs/tables.json: byol, seed 0, .*: {re.escape(said)}; give the same", line)
    assert Path("docs/tables.json").read_text() == before


def test_what_no_score_depends_on_may_change(pretence, monkeypatch):
    """How often kNN is watched, how often is logged; a random encoder's tau."""
    tables.main(["--rows", "random", "care", "--seeds", "0"])
    monkeypatch.setitem(data.RECIPES["clutter"], "knn_every", 1)
    monkeypatch.setattr(tables, "start", lambda *_: pytest.fail("has been run"))
    flags = ["--rows", "random", "care", "--seeds", "0", "--jobs", "2"]
    tables.main([*flags, "--train-flags", "--log-every 7 --knn-images 99"])
    kept = [line for line in lines_of() if line["encoder"] == "random"]
    Path("docs/tables.json").write_text("".join(json.dumps(line) + "\n" for line in kept))
    monkeypatch.setitem(data.RECIPES["clutter"], "tau_base", 0.5)
    tables.main(["--rows", "random", "--seeds", "0", "--train-flags", "--precision bf16"])


def test_an_argument_younger_than_a_line_was_its_default(pretence, capsys):
    flags = [*QUICK, "--rows", "care", "--train-flags", "--predictor-lr 1"]
    tables.main(flags)
    lines = lines_of()
    for line in lines:
        assert line["settings"]["train.py"].pop("predictor_lr") == 1
    Path("docs/tables.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tables.main(flags)
    refused(capsys, *QUICK, script=tables, match="predictor_lr of train.py was 1, is 10; give")


def test_a_protocol_without_a_number_is_the_first(pretence, capsys):
    """Not today's: what a line of before then scored may be something else."""
    flags = ["--only", "figure4", "--rows", "random", "--seeds", "0"]
    tables.main(flags)
    lines = lines_of()
    for line in lines:
        assert line["settings"]["visualize.py"].pop("protocol_version") > 1
    Path("docs/tables.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    refused(capsys, *flags, script=tables, match="protocol_version of visualize.py was 1, is")


def test_two_at_once_with_other_flags_make_no_page(pretence, monkeypatch, capsys):
    """The lines of the other stand in --results when this one has come to its end."""
    tables.main([*QUICK, "--rows", "byol", "--train-flags", "--precision bf16"])
    theirs = Path("docs/tables.json").read_text()
    for path in ("docs/tables.json", "docs/tables.md"):
        Path(path).unlink()
    start = tables.start

    def slow(args, words):
        Path("docs/tables.json").write_text(theirs)
        return start(args, words)

    monkeypatch.setattr(tables, "start", slow)
    refused(capsys, *QUICK, "--rows", "random", script=tables,
            match="precision of train.py was 'bf16', is 'auto'")
    assert not Path("docs/tables.md").exists()


def test_a_table_that_the_recipe_contradicts_is_left_out(pretence, capsys):
    """CARE has two attention blocks on `shapes`, five in Table 7."""
    assert tables.table_of(tables.parse_args(["--data", "shapes"]), "table7") is None
    assert tables.table_of(tables.parse_args(["--data", "shapes"]), "table6")
    assert tables.table_of(tables.parse_args([]), "table7")
    assert tables.table_of(tables.parse_args(SCALE), "table7")
    _, commands, _ = listed(capsys, "--data", "shapes")
    assert not any("--blocks" in words for words in commands)


def test_a_broken_results_file_is_not_taken_for_an_empty_one(pretence, capsys):
    """A line that is no score, one that was cut short too, is named and nothing is overwritten."""
    tables.main([*QUICK, "--rows", "random"])
    whole = Path("docs/tables.json").read_text()
    number = len(whole.splitlines()) + 1
    for broken in ("<<<<<<< HEAD\n", "[1, 2]\n", '{"encoder": "care"}\n', "3", whole[:40]):
        Path("docs/tables.json").write_text(whole + broken)
        for flags in ([], ["--list"]):
            refused(capsys, *QUICK, *flags, script=tables,
                    match=f"tables.json, line {number}: not a finished score")
        assert Path("docs/tables.json").read_text() == whole + broken


def test_a_table_of_encoders_that_were_scored_otherwise_has_not_run(pretence):
    tables.main(["--only", "table1a", "--seeds", "0"])
    page = Path("docs/tables.md").read_text()
    left = re.search("Not run: (.*?)\n\n", page, re.DOTALL)[1].replace("\n", " ").split("; ")
    titles = {name: tables.TABLES[name] | tables.TABLES[name].get("miniature", {})
              for name in ("table1a", "table3a", "figure4", "table7")}
    for name, table in titles.items():
        assert (f"## {table['title']}\n" in page) == (name == "table1a")
        assert (table["title"].rstrip(".") in " ".join(left)) == (name != "table1a")


@pytest.mark.parametrize("path, least", [("docs/tables.md", 357), ("docs/tables_shapes.md", 60)])
def test_the_recorded_numbers_are_of_todays_commands(path, least, monkeypatch):
    """docs/NAME.json can be gone on with; docs/NAME.md is what its own command makes of it."""
    monkeypatch.chdir(ROOT)
    page = Path(path).read_text()
    command = re.search(r"Made by `python tables.py(.*?)`", page, re.DOTALL)[1]
    args = tables.parse_args(shlex.split(command.replace("\n", " ")))
    results = tables.read_results(args.results)
    assert len(results) >= least and args.seeds == sorted({key[2] for key in results})
    cells = tables.table_cells(args, tables.TABLES, None, sorted({key[2] for key in results}))
    jobs = tables.jobs_of(cells)
    assert set(results) <= set(jobs)
    tables.check_settings(jobs, results, args.results)
    assert tables.page(args, results) == page


def test_the_comparison_that_was_laid_down_is_complete():
    """Every encoder and score of the paragraph in docs/tables.md, with seeds 0 to 9."""
    results = tables.read_results(ROOT / "docs/tables.json")
    for encoder in ("random", "byol", "care", "lambda0", "sequential"):
        for score in ("linear", "kNN", "1 %", "10 %", "figure", "figure conv5"):
            assert sorted(tables.values_of(results, encoder, score, "sha256")) == list(range(10))


def recorded_difference(name, better, worse, score):
    """Difference of two encoders with ten seeds, its 95 % interval, and p, as texts."""
    results = tables.read_results(ROOT / tables.parse_args(["--data", name]).results)
    a, b = ([value for value, in tables.values_of(results, encoder, score, "top1").values()]
            for encoder in (better, worse))
    assert len(a) == len(b) == 10
    difference, half, p = tables.welch(a, b)
    interval = f"{difference - half:+.1f} to {difference + half:+.1f}"
    return f"{difference:+.1f}", interval, "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


PROBED, ALL = ["linear", "kNN"], ["linear", "kNN", "1 %", "10 %"]


@pytest.mark.parametrize("label, name, better, worse, scores", [
    ("CARE less BYOL", "clutter", "care", "byol", ALL),
    ("CARE less lambda 0", "clutter", "care", "lambda0", ALL),
    ("lambda 0 less BYOL", "clutter", "lambda0", "byol", ALL),
    ("CARE less sequential", "clutter", "care", "sequential", ALL),
    ("CARE less BYOL, `shapes`", "shapes", "care", "byol", PROBED)])
def test_the_readme_has_the_recorded_differences(label, name, better, worse, scores):
    cells = [""] * 4
    for i, score in enumerate(scores):
        difference, interval, _ = recorded_difference(name, better, worse, score)
        cells[i] = f"{difference} ({interval})"
    row = " ".join(" | ".join(["", label, *cells, ""]).split())
    assert row in (ROOT / "README.md").read_text().splitlines()


@pytest.mark.parametrize("name, better, worse, scores", [
    ("shapes", "care", "byol", PROBED),
    ("clutter", "care", "byol", ALL),
    ("clutter", "care", "lambda0", ALL),
    ("clutter", "lambda0", "byol", PROBED),
    ("clutter", "care", "sequential", ALL)])
def test_measured_has_the_recorded_differences(name, better, worse, scores):
    """Each with its interval and p."""
    text = " ".join((ROOT / "docs/measured.md").read_text().split())
    for score in scores:
        texts = recorded_difference(name, better, worse, score)
        difference, interval, p = map(re.escape, (texts[0].lstrip("+"), *texts[1:]))
        assert re.search(rf"{difference} [^(]*\([^(]*{interval}, {p}", text)


def test_measured_has_the_recorded_ablations():
    """Seeds 0, 1, 2 of each, with mean and standard deviation; CARE stands in all three tables."""
    results = tables.read_results(ROOT / "docs/tables.json")
    text = (ROOT / "docs/measured.md").read_text()
    rows = {row[2]: what + row[0]
            for name, what in (("table6", ""), ("table7", ""), ("table8", "position encoding: "))
            for row in tables.rows_of(tables.parse_args([]), name)}
    rows["care"] = "CARE: lambda 100, 5 blocks, learnable relative"
    found = 0
    for encoder, label in rows.items():
        cells = []
        for score in PROBED:
            values = tables.values_of(results, encoder, score, "top1")
            values = [values[seed][0] for seed in (0, 1, 2) if seed in values]
            if len(values) == 3:
                cells.append(", ".join(map(str, values)) + f": {statistics.mean(values):.1f} ± "
                             f"{statistics.stdev(values):.1f}")
        if cells:
            assert f"\n| {label} | {' | '.join(cells)} |" in text
            found += 1
    assert found >= 11


@pytest.mark.parametrize("flags, match", [
    (["--only", "table2"], "not in the miniature of clutter"),
    (["--only", "table7", "--data", "shapes"], "not in the miniature of shapes"),
    (["--results", "docs/x.md"], "must end in .json"),
    (["--launcher", "'"], "No closing quotation"),
    (["--train-flags", "'"], "No closing quotation"),
    (["--train-flags=--blocks 2"], "--blocks: what the rows or trials have of their own"),
    (["--only", "table1a", "--train-flags=--method=byol"], "--method=byol: what the rows"),
    (["--only", "table1a", "--train-flags=--seed 5"], "--seed: what the rows"),
    (["--data", "imagenet", "--train-flags=--epochs 1"], "--epochs: what the rows"),
    (["--trials", "--train-flags=--base-lr 0.05"], "--base-lr: what the rows or trials"),
    (["--trials", "--train-flags=--max-steps 9"], "--max-steps: what the rows or trials"),
    (["--rows", "cara"], "--rows cara: no row of these tables"),
    (["--trials", "--only", "table6"], "leave out --only"),
    (["--trials", "--seeds", "3"], "leave out --seeds"),
    (["--trials", "--data", "imagenet"], "for the miniature"),
    (["--train-flags", "--batch-size 0"], "--batch-size: 0: must be"),
    (["--train-flags=--no-such-flag"], "unrecognized arguments: --no-such-flag")])
def test_bad_arguments(flags, match, pretence, capsys):
    refused(capsys, *flags, script=tables, match=match)
    assert os.listdir() == []


# --------------------------------------------------------------------------------------------- list
def listed(capsys, *flags):
    """What --list prints -> lines of shell, commands that need something among them, by words."""
    tables.main([*flags, "--list"])
    text = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    commands, lacking = [], []
    for line in text.splitlines():
        if line.startswith("# needs "):
            lacking.append(shlex.split(line.partition(": ")[2]))
        elif line and not line.startswith("#"):
            commands.append(shlex.split(line, comments=True))
    return text, commands, lacking


def script_and_flags(words, launcher):
    """A printed command -> its script's name, and its flags, parsed by the script's own parser."""
    if words[0] != "python":
        assert words[:len(launcher)] == launcher
        words = words[len(launcher) - 1:]
    name = Path(words[1]).name
    assert os.path.samefile(words[1], ROOT / name)
    for word in words:
        if word.endswith(".pth"):  # --pretrained wants a file that is there
            Path(word).parent.mkdir(parents=True, exist_ok=True)
            Path(word).touch()
    return name, tables.SCRIPTS[name].parse_args(words[2:])


@pytest.mark.parametrize("flags", [SCALE, [*SCALE, *GIVEN, "--seeds", "0", "1"], [], ["--trials"],
                                   ["--data", "shapes", "--train-flags", "--epochs 2"]])
def test_every_printed_command_is_one(flags, imagenet, capsys):
    """It parses, has an --out that no other has, and reads encoders that another writes."""
    _, commands, lacking = listed(capsys, *flags)
    assert len(commands) > 40 and bool(lacking) == (flags == SCALE)
    outs, encoders = [], {"random", "s.pth", "resnet50.pth"}
    for words in commands + lacking:
        assert "--out" in words
        name, args = script_and_flags(words, ["torchrun", "--nproc_per_node", "8"])
        outs.append(str(args.out))
        if name == "train.py":
            encoders.add(f"{args.out}/encoder.pth")
        else:
            pretrained = args.pretrained
            assert set(pretrained if isinstance(pretrained, list) else [pretrained]) <= encoders
    assert len(set(outs)) == len(outs)


def test_the_list_has_what_the_papers_tables_need(imagenet, capsys):
    """Encoders by epochs, ablations, lists, five detection runs a cell, the figure's two."""
    text, commands, _ = listed(capsys, *SCALE, *GIVEN)
    parsed = [script_and_flags(words, ["torchrun", "--nproc_per_node", "8"]) for words in commands]
    trained = [args for name, args in parsed if name == "train.py"]
    plain = {(args.method, args.arch, args.epochs) for args in trained
             if (args.lambda_att, args.blocks, args.position, args.tap, args.detach_trunk)
             == (100, 5, "relative", "conv4", False) and args.method != "sequential"}
    archs = ("resnet50", "resnet50w2", "resnet101", "resnet152")
    wanted = {("care", arch, epochs) for arch in archs for epochs in (100, 200, 400, 800)}
    wanted |= {("byol", arch, epochs) for arch in archs for epochs in (100, 800)}
    wanted |= {("byol", "resnet50", 200), ("byol", "resnet50", 400)}
    assert plain == wanted and len(trained) == len(wanted) + 14
    ablations = [args for args in trained if (args.arch, args.epochs) == ("resnet50", 100)]
    assert {args.lambda_att for args in ablations} == {0, 1, 10, 100, 250}
    assert {args.blocks for args in ablations} == {2, 3, 4, 5, 6}
    assert {args.position for args in ablations} == {"none", "sincos", "absolute", "relative"}
    assert {args.method for args in ablations} == {"care", "byol", "sequential"}
    assert any(args.detach_trunk for args in ablations)
    assert sum(args.method == "care" and args.tap == "conv5" for args in ablations) == 1

    detected = [args for name, args in parsed if name == "detect_eval.py"]
    runs = {}
    for args in detected:
        runs.setdefault((args.protocol, args.pretrained), set()).add(args.seed)
    assert all(seeds == {0, 1, 2, 3, 4} for seeds in runs.values())
    counts = [sum(protocol == name for protocol, _ in runs)
              for name in ("voc-c4", "coco-c4", "coco-fpn")]
    assert counts == [5, 5, 7]
    tuned = [args for name, args in parsed if name == "semi_eval.py"]
    assert len(tuned) == 2 * (3 + 8)
    for args in tuned:
        assert args.subset == {1: "a", 10: "b"}[args.percent]
        assert args.lr == [0.01, 0.02, 0.05, 0.1, 0.005] and args.epochs == [30, 50]
    probes = [args for name, args in parsed if name == "linear_eval.py"]
    assert all((args.head, args.epochs, args.lr) == ("linear-bn", 80, 0.2) for args in probes)
    assert len(probes) == len(trained)
    figure, = [args for name, args in parsed if name == "visualize.py"]
    assert [path.split("/")[-2] for path in figure.pretrained] == [
        "byol_resnet50_epochs200_seed0", "care_resnet50_epochs200_seed0"]
    assert "# linear: the command above with --out" in text


def test_what_is_missing_is_named_in_place(imagenet, capsys):
    text, _, lacking = listed(capsys, *SCALE, "--only", "table3b", "table4", "figure4")
    for flag in ("--voc", "--coco", "--subset-1", "--subset-10", "--photos"):
        assert f"\n# needs {flag}: " in text
    assert "\n# needs --voc and --supervised: torchrun" in text
    assert len(lacking) == 2 * 8 + 2 * 5 * 5 + 1


def test_a_pretraining_that_needs_nothing_is_not_held_up(imagenet, pretence, capsys):
    """Cells that lack a folder are named, the others run."""
    tables.main([*SCALE, "--only", "table4", "table6", "--rows", "lambda0", "random"])
    assert [words[0] for words in pretence] == ["train.py", "linear_eval.py"]
    assert "random_resnet50, VOC C4: needs --voc" in capsys.readouterr().out
    assert [line["encoder"] for line in lines_of("docs/tables_imagenet.json")] == [
        "lambda0_resnet50_epochs100"]
    page = Path("docs/tables_imagenet.md").read_text()
    assert "| lambda 0, ResNet-50, 100 epochs | 1.0 (n = 1) | 70.52 |" in page
    assert "| chance | 5.0 | |" in page  # of twenty classes
    left = re.search("Not run: (.*?)\n\n", page, re.DOTALL)[1].replace("\n", " ").split("; ")
    assert tables.TABLES["table4"]["title"] in left and "## Table 4" not in page
    assert tables.TABLES["table6"]["title"] not in left and len(left) == len(tables.TABLES) - 1


def test_finished_running_or_missing(pretence, capsys):
    """By --results, by what a run has left, by a lock that a live process holds."""
    flags = ["--only", "table1a", "--seeds", "0"]

    def states():
        capsys.readouterr()  # what was said so far
        text, _, _ = listed(capsys, *flags)
        return {Path(shlex.split(line, comments=True)[-1]).relative_to("runs/tables").as_posix():
                line.rpartition("# ")[2] for line in text.splitlines() if not line.startswith("#")
                and line}

    assert set(states().values()) == {"missing"} and len(states()) == 9
    assert os.listdir() == []  # it starts and writes nothing
    tables.main([*flags, "--rows", "byol"])
    found = states()
    assert {name for name, state in found.items() if state == "finished"} == {
        "byol_seed0", "byol_seed0/linear", "byol_seed0/kNN"}

    out = Path("runs/tables/care_seed0")
    (out / "linear").mkdir(parents=True)
    (out / "linear" / "log.jsonl").write_text('{"args": {"sha256": "1"}}\n')
    (out / "log.jsonl").write_text('{"args": {}, "steps": 9}\n{"step": 8}\n')
    assert states()["care_seed0"] == states()["care_seed0/linear"] == "missing"
    (out / "log.jsonl").write_text('{"args": {}, "steps": 9}\n{"step": 9}\n')
    (out / "linear" / "log.jsonl").write_text('{"args": {}}\n{"sha256": "1", "top1": 3}\n')
    assert states()["care_seed0"] == states()["care_seed0/linear"] == "finished"
    (out / "kNN").mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys; file = open(sys.argv[1], 'w'); "
         "fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True); input()", str(out / "kNN" / "lock")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    holder.stdout.readline()
    assert states()["care_seed0/kNN"] == "running"
    holder.communicate("\n")
    assert states()["care_seed0/kNN"] == "missing"


# --------------------------------------------------------------------------------------- statistics
@pytest.mark.parametrize("df, wanted", [
    (1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (10, 2.228), (18, 2.101),
    (30, 2.042), (100, 1.984), (1e5, 1.960)])
def test_t_quantiles_are_the_tabulated(df, wanted):
    """Two-sided, 95 %; and 99 % by the same function: the table of any textbook."""
    assert tables.t_quantile(df) == pytest.approx(wanted, abs=6e-4)
    assert tables.two_sided_p(wanted, df) == pytest.approx(0.05, abs=1e-4)
    assert tables.t_quantile(10, 0.01) == pytest.approx(3.169, abs=6e-4)
    assert tables.two_sided_p(0, df) == pytest.approx(1, abs=1e-9)


def test_welch_on_a_published_example():
    """Equal sizes, unequal variances: t = -2.46, 25.0 degrees of freedom, p = 0.021."""
    a = [27.5, 21.0, 19.0, 23.6, 17.0, 17.9, 16.9, 20.1, 21.9, 22.6, 23.1, 19.6, 19.0, 21.7, 21.4]
    b = [27.1, 22.0, 20.8, 23.4, 23.4, 23.5, 25.8, 22.0, 24.8, 20.2, 21.9, 22.1, 22.9, 20.5, 24.4]
    difference, half, p = tables.welch(a, b)
    assert difference == pytest.approx(statistics.mean(a) - statistics.mean(b))
    assert p == pytest.approx(0.021, abs=5e-4)
    assert half == pytest.approx(2.0595 * difference / -2.46, rel=3e-3)  # t of 25 degrees


def fake(encoder, *values, score="linear", key="top1"):
    """Finished scores of an encoder, one a seed."""
    return {(encoder, score, seed, 0): {"encoder": encoder, "seed": seed, "score": score,
                                        "result": SCORED | {key: value}, "seconds": 60,
                                        "machine": "m", "pretraining_seconds": 0,
                                        "commands": ["python x"]}
            for seed, value in enumerate(values)}


@pytest.mark.parametrize("care, byol, word", [
    ((72.0, 73.0, 74.0), (66.0, 67.0, 68.0), "+6.0 | +3.7 to +8.3 | 3, 3 | significant"),
    ((66.0, 67.0, 68.0), (72.0, 73.0, 74.0), "-6.0 | -8.3 to -3.7 | 3, 3 | significant"),
    ((70.0, 75.0, 80.0), (69.0, 75.0, 79.0), "+0.7 | -10.7 to +12.0 | 3, 3 | not significant"),
    ((50.0, 55.0, 60.0), (44.0, 49.0, 54.0), "+6.0 | -5.3 to +17.3 | 3, 3 | not significant"),
    ((50.0, 55.0, 60.0) * 4, (44.0, 49.0, 54.0) * 4, "+6.0 | +2.4 to +9.6 | 12, 12 | significant"),
    ((70.0,), (60.0, 61.0, 62.0), None),
    ((70.0, 70.0), (60.0, 60.0), None)])
def test_a_difference_is_significant_by_its_interval(care, byol, word):
    """Not by its standard error: with three seeds twice that is still not enough; n counts."""
    results = fake("care", *care) | fake("byol", *byol)
    found = tables.differences(tables.parse_args([]), results, "table1a")
    if word is None:
        assert found == []
    else:
        assert found == [found[0]] and found[0].startswith(f"| CARE less BYOL | linear | {word}")
        assert found[0].endswith(" | +5.5 |")  # the paper's, of 100 epochs


def test_what_is_compared_is_of_the_same_encoder_and_epochs():
    """CARE's row of the same architecture; of the most epochs where none has as many."""
    args = tables.parse_args(["--data", "imagenet"])
    for name, pairs in {"table2": {("resnet101", 800): 800}, "table1a": {("resnet50", 200): 200},
                        "table3a": {("resnet50", 800): 400, ("resnet50", None): 400},
                        "table5": {("resnet50", 800): 400, ("resnet50", 200): 200}}.items():
        rows = tables.rows_of(args, name)
        for row in rows:
            if (row[3], row[4]) in pairs and row[1] != "care":
                ours = tables.care_row(rows, row)
                assert (ours[3], ours[4]) == (row[3], pairs[row[3], row[4]])


def test_detection_runs_are_not_seeds():
    """Five runs of one encoder say how detection varies, not how pretraining does."""
    args = tables.parse_args(["--data", "imagenet"])
    results = {}
    for encoder, base in (("care", 57.0), ("byol", 50.0)):
        for repeat in range(5):
            key = (f"{encoder}_resnet50_epochs200", "VOC C4", 0, repeat)
            results[key] = {"result": dict.fromkeys(("AP", "AP50", "AP75"), base + repeat)}
    row = next(row for row in tables.rows_of(args, "table4") if row[1] == "care" and row[4] == 200)
    assert tables.cell(args, results, row, "VOC AP") == "59.0 ± 1.6 (n = 1, 5 runs each)"
    assert tables.differences(args, results, "table4") == []


# --------------------------------------------------------------------------------------------- page
def test_cells_are_means_and_standard_deviations():
    args, results = tables.parse_args([]), fake("care", 70.0, 72.0, 74.0)
    rows = {row[1]: row for row in tables.rows_of(args, "table1a")}
    assert tables.cell(args, results, rows["care"], "linear") == "72.0 ± 2.0 (n = 3)"
    assert tables.cell(args, results, rows["byol"], "linear") == ""
    results = fake("supervised", 90.0, score="100 %")
    assert tables.cell(args, results, rows["supervised"], "linear") == "90.0 (n = 1)"
    assert tables.cell(args, results, rows["supervised"], "kNN") == ""


def test_chance_stands_in_the_tables():
    """A guess among ten classes; of the maps, what was measured beside the scores."""
    args, results = tables.parse_args([]), fake("care", 30.0, score="figure", key="pointing")
    for name, line in {"table1a": "| chance | 10.0 | 10.0 | |", "table3a": "| chance | 10.0 | 10.0",
                       "figure4": "| chance | 8.0 | 12.5 |  |  | |"}.items():
        assert any(found.startswith(line) for found in tables.table_lines(args, results, name))
    assert "| same position | 25.0 |  |  |  | |" in tables.table_lines(args, results, "figure4")


def test_costs_count_a_pretraining_once():
    """Also where a later start found it finished, and wrote seconds instead of its hours."""
    results = fake("care", 1.0) | fake("care", 1.0, score="kNN") | fake("care", 1.0, score="1 %")
    for line, seconds in zip(results.values(), (6, 3600, 4)):
        line["pretraining_seconds"] = seconds
    line = next(line for line in tables.cost(results) if line.startswith("- m: "))
    assert line == "- m: 3 scores of 1 encoders, 1.1 hours, summed over the jobs."  # 3,780 s
    results["care", "kNN", 0, 0]["machine"] = "another"
    hours = [re.search(r"([0-9.]+) hours", line)[1] for line in tables.cost(results)
             if line.startswith("- ")]
    assert hours == ["1.0", "0.0"]  # of the machine that spent them


def test_a_pretrainings_seconds_are_its_logs(tmp_path):
    """Over all the times that it was started, kNN included, whatever the last start took."""
    out = tmp_path / "runs" / "tables" / "care_seed0"
    out.mkdir(parents=True)
    lines = [{"steps": 30}, {"step": 0, "knn": 9.0}, {"step": 10, "images/s": 32.0},
             {"steps": 30, "resumed_at": 12}, {"step": 20, "images/s": 64.0}]
    (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = tables.pretraining(tables.parse_args([]), "care", 0, [])
    assert job.out == "runs/tables/care_seed0" and job.settings["train.py"]["batch_size"] == 32
    assert tables.logged_seconds(job) == 10 + 5


def test_every_table_is_whole():
    """A number a column in each row that has any; rows and columns that exist."""
    for name, table in tables.TABLES.items():
        for form in (table, table | table.get("miniature", {})):
            assert set(form["columns"]) <= set(tables.COLUMNS), name
            for label, variant, arch, epochs, paper in form["rows"]:
                assert len(paper.split()) in (0, len(table["columns"])), (name, label)
                assert variant in {*tables.VARIANTS, "random", "supervised"}
                assert arch in tables.ARCH_NAMES
                assert (variant in tables.VARIANTS) <= (epochs in (100, 200, 400, 800))
    assert {score for score, _ in tables.COLUMNS.values()} | {"100 %"} == set(tables.SCORERS)


# ------------------------------------------------------------------------------------------- trials
def test_configurations_are_drawn_once():
    """Twelve, all different, always these: a second draw would be a second chance."""
    flat = [tuple(one.values()) for one in tables.CONFIGURATIONS]
    assert len(set(flat)) == 12
    assert flat[:3] == [(10, 0.8, 0.05, 512, 0.45), (10, 0.8, 0.1, 2048, 0.45),
                        (1, 0.8, 0.1, 2048, 0.3)]
    assert flat[-1] == (1, 0.95, 0.1, 512, 0.3)
    for one in tables.CONFIGURATIONS:
        assert all(value in tables.TRIED[name] for name, value in one.items())


def test_each_method_chooses_its_best_trial(monkeypatch, capsys):
    """By the mean over the seeds, once all its trials have been run."""
    def start(args, words):
        if words[0] == "linear_eval.py":
            encoder, seed = re.search(r"tables/(\w+)_seed(\d+)/", words[3]).groups()
            best = {"byol_trial4": 50, "care_trial7": 60}.get(encoder, 20)
            luck = 45 if (encoder, seed) == ("byol_trial2", "11") else 0  # in one seed only
            return [json.dumps({"top1": best + luck})]
        return ["step 500 of 1000: as --max-steps says; with a larger one, or without it, ..."]

    monkeypatch.setattr(tables, "start", start)
    tables.main(["--trials", "--rows", "byol"])
    shown = capsys.readouterr().out
    assert "chooses" not in shown and "   byol: kNN 20, 65, mean 42.5" in shown
    tables.main(["--trials"])
    shown = capsys.readouterr().out
    assert "byol chooses configuration 4\ncare chooses configuration 7" in shown
    assert not Path("docs/trials.md").exists() and len(lines_of("docs/trials.json")) == 48


def test_the_recipe_of_clutter_is_the_choice_of_both():
    """Of the trials in docs/trials.json, which today's commands could go on with."""
    results = tables.read_results(ROOT / "docs/trials.json")
    args = tables.parse_args(["--trials", "--train-flags", "--precision bf16"])
    jobs = tables.jobs_of(tables.trial_cells(args))
    assert {key for key in jobs if key[1] == "kNN"} == set(results)
    tables.check_settings(jobs, results, "docs/trials.json")
    for method in tables.TUNED:
        chosen = tables.CONFIGURATIONS[tables.best_trial(results, method)]
        assert chosen == {name: data.RECIPES["clutter"][name] for name in tables.TRIED}


def test_scores_of_other_images_are_not_mixed(pretence, monkeypatch, capsys):
    """A line of before digests is of a set's first images."""
    tables.main([*QUICK, "--rows", "care", "random"])
    lines = lines_of()
    for line in lines:
        for settings in line["settings"].values():
            assert settings.pop("data_digest") == "clutter 1"
    Path("docs/tables.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tables.main([*QUICK, "--rows", "care", "random"])
    monkeypatch.setitem(shapes.DIGESTS, shapes.render_clutter, "clutter 2")
    refused(capsys, *QUICK, script=tables, match="data_digest of .*'clutter 1', is 'clutter 2'")
