"""What holds for all scripts: the ranges of their flags, and starts beside a user's own modules."""
import argparse
import importlib
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torchvision.models import mobilenet_v3_small

from conftest import ROOT, SMALL, refused, steps

SCRIPTS = ("train", "bench", "linear_eval", "semi_eval", "detect_eval", "visualize", "tables")
# The nearest values that make no sense, by flag; of all other numeric flags -1 is none.
SENSELESS = {
    "0": ("accum_steps", "base_lr", "batch_size", "blocks", "crop_min", "epochs", "head_lr",
          "heads", "hidden_dim", "image_size", "iterations", "jobs", "knn_images", "labels",
          "limit", "log_every", "lr", "max_steps", "min_size", "percent", "predictor_lr", "rois",
          "save_every"),
    "-0.000000001": ("lambda_att", "momentum", "query", "tau_base", "warmup_epochs",
                     "weight_decay"),
    "1": ("momentum",),
    "1.000000001": ("crop_min", "query", "tau_base"),
}


class Parser(Exception):
    """Carries the parser of a script out of it."""


def parser_of(script):
    """The argument parser of a script, as it is when the command line is read."""
    def caught(parser, *_):
        raise Parser(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", caught)
        with pytest.raises(Parser) as found:
            script.main([])
    return found.value.args[0]


def takes_numbers(action):
    """Whether the type of an argument makes a number of some text."""
    for text in ("1", "0.5"):
        try:
            if isinstance(action.type(text), (int, float)):
                return True
        except (TypeError, ValueError, argparse.ArgumentTypeError):  # TypeError: there is no type
            continue
    return False


def required_by(parser):
    """The flags that a command line cannot do without, each with a value that is accepted."""
    words = []
    for action in parser._actions:
        if action.required:
            words += [action.option_strings[-1], "1" if takes_numbers(action) else "random"]
    return words


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_number_has_a_range(name, capsys):
    """Not a number, infinite, negative, or just outside its range: one line and exit code 2."""
    parser = parser_of(importlib.import_module(name))
    script, required = SimpleNamespace(main=parser.parse_args), required_by(parser)
    numbers = [action for action in parser._actions if takes_numbers(action)]
    assert len(numbers) >= 2
    for action in numbers:
        flag = action.option_strings[-1]
        outside = [value for value, names in SENSELESS.items() if action.dest in names]
        for value in ("nan", "inf", "-1", *outside):
            values = [value] * (action.nargs if isinstance(action.nargs, int) else 1)
            line = refused(capsys, *required, flag, *values, script=script)
            problem = rf"{value}: must be |invalid int value: '{value}'|invalid choice: {value} "
            assert re.search(rf"argument (\S*/)?{flag}: ({problem})", line), line


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_fits_a_terminal(name, monkeypatch):
    """80 columns, the description too; every flag says something."""
    monkeypatch.setenv("COLUMNS", "80")
    parser = parser_of(importlib.import_module(name))
    wide = [line for line in parser.format_help().splitlines() if len(line) > 80]
    assert wide == [] and all(action.help for action in parser._actions)


def test_a_users_own_modules_change_nothing(tmp_path):
    """data.py, run.py and a package common, in the current directory and on PYTHONPATH."""
    (tmp_path / "common").mkdir()
    for name in ("data.py", "run.py", "common/__init__.py", "common/data.py", "common/run.py"):
        (tmp_path / name).write_text("raise SystemExit('a module of the user')\n")
    flags = ["resnet18" if flag == "thin" else flag for flag in SMALL]
    command = [sys.executable, ROOT / "train.py", *flags, "--max-steps", "2", "--out", "out"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120,
                            env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    assert [line["step"] for line in steps(tmp_path / "out")] == [1, 2]


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    """As it stands there: it trains the encoder that it saves, and the momentum branch follows."""
    snippet, = re.findall("```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found = {}
    exec(compile(snippet, "README.md", "exec"), found)
    encoder, momentum = found["encoder"], found["model"].momentum.encoder
    saved = torch.load("encoder.pth", weights_only=True)
    assert all(torch.equal(saved[key], value) for key, value in encoder.state_dict().items())
    assert all(value.isfinite().all() for value in saved.values())
    torch.manual_seed(0)
    name = "features.0.0.weight"
    first = mobilenet_v3_small().get_parameter(name)
    assert 0 < (momentum.get_parameter(name) - first).norm() < (saved[name] - first).norm()


@pytest.mark.parametrize("name", ["train", "bench", "linear_eval", "semi_eval", "detect_eval",
                                  "visualize", "tables"])
def test_no_argument_is_empty(name, capsys):
    """As a variable that is not set leaves it: files would go to / or to the current directory."""
    parser = parser_of(importlib.import_module(name))
    script, required = SimpleNamespace(main=parser.parse_args), required_by(parser)
    texts = [action for action in parser._actions
             if action.option_strings and action.nargs != 0 and not takes_numbers(action)
             and action.dest not in ("launcher", "train_flags")]  # empty unless they are given
    assert len(texts) >= 3
    for action in texts:
        flag = action.option_strings[-1]
        for value in ("", " "):
            values = [value] * (action.nargs if isinstance(action.nargs, int) else 1)
            line = refused(capsys, *required, flag, *values, script=script)
            assert f"{flag}: " in line or f"/{flag}: " in line, line
