"""Every table of the paper, at any scale, by one command.

  python tables.py                 in miniature: ResNet-18 on the embedded
                                   `clutter`
  python tables.py --data ./imagenet --launcher 'torchrun --nproc_per_node 8'
                                   the paper's own
  python tables.py --list          every command, as shell, and its state;
                                   starts nothing
  python tables.py --trials        tuning of BYOL and CARE for the miniature

Starts the scripts as a user does: each pretraining once, then the scores that
need it. A finished score is a line of --results, and the page beside it,
NAME.md, is made from these lines. The same command again resumes. A line of
another command, other flags or another protocol is refused by name. A job that
fails is reported at the end and does not end the others.
"""
import argparse
import fcntl
import json
import math
import os
import platform
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import textwrap
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import detect_eval
import linear_eval
import semi_eval
import train
import visualize
from common.data import NAMED_SETS, RENDERERS, digest_of, open_images, recipe_of
from common.paper import ARCH_NAMES, COLUMNS, DETECTION_RUNS, GRID, SCORERS, TABLES, VARIANTS
from common.ranks import fail, user_errors
from common.run import count, natural, new_parser, not_empty, read_lines, write_whole

HERE = Path(__file__).resolve().parent

# Tuning for the miniature: each method gets the same configurations, drawn once, and chooses the
# one of the best mean kNN over the seeds. Both chose the seventh, the recipe of `clutter`.
TRIED = {
    "predictor_lr": (1, 10),
    "tau_base": (0.8, 0.9, 0.95, 0.99),
    "base_lr": (0.05, 0.1, 0.2, 0.4),
    "hidden_dim": (512, 2048),
    "crop_min": (0.2, 0.3, 0.45),
}
CONFIGURATIONS = [dict(zip(TRIED, drawn))
                  for drawn in random.Random(0).sample(list(product(*TRIED.values())), 12)]
TUNED = ("byol", "care")
TRIAL_STEPS = 500  # of 1,000
TRIAL_SEEDS = [10, 11]

SCRIPTS = {"train.py": train, "linear_eval.py": linear_eval, "semi_eval.py": semi_eval,
           "detect_eval.py": detect_eval, "visualize.py": visualize}
# Arguments on which no score depends; --max-steps is free only for a run that will go on.
FREE = {*train.FREE, *linear_eval.FREE, *detect_eval.FREE} - {"max_steps"}


# ---------------------------------------------------------------------------------------- arguments
def shell(text):
    """A type= of argparse: text that a shell can split into words."""
    try:
        shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None
    return text


def parse_args(argv=None):
    """The command line as a namespace; a mistake in it is one line on stderr and exit code 2."""
    parser = new_parser(__doc__)
    add = parser.add_argument_group("what").add_argument
    add("--data", type=not_empty, default="clutter",
        help="clutter, another named set, clutter:N for a quick try: the miniature; a folder: the "
             "paper's encoders and epochs (default clutter)")
    add("--only", choices=TABLES, nargs="+", metavar="TABLE",
        help=f"these tables: {', '.join(TABLES)} (default: all)")
    add("--rows", "--encoders", type=not_empty, dest="rows", nargs="+", metavar="ROW",
        help=f"these rows: {', '.join(VARIANTS)}, random, supervised, or an encoder as --list has "
             "it (default: all)")
    add("--seeds", type=natural, nargs="+",
        help="of the pretrainings (default: of the miniature 0 1 2, of a folder 0)")
    add("--list", action="store_true",
        help="print the commands as shell, each finished, running or missing, and start nothing")
    add("--trials", action="store_true",
        help=f"instead of the tables: {len(CONFIGURATIONS)} configurations of BYOL and of CARE, "
             f"{TRIAL_STEPS} steps, seeds {' '.join(map(str, TRIAL_SEEDS))}")
    add = parser.add_argument_group("how").add_argument
    add("--launcher", type=shell, default="", metavar="'COMMAND'",
        help="what starts a script on several GPUs (default: python)")
    add("--jobs", type=count, default=1, help="jobs side by side; on a CPU they share its cores")
    add("--train-flags", type=shell, default="", metavar="'FLAGS'",
        help="flags of train.py beside the recipe, for all pretrainings, none that a row or a "
             "trial has of its own; a quick try needs its own --results and --runs")
    add("--runs", type=not_empty, metavar="DIR",
        help="where the runs are (default runs/tables; of other data runs/tables_NAME)")
    add("--results", type=not_empty, metavar="FILE",
        help="a line per finished score; the page is made beside it, as .md (default "
             "docs/tables.json; of other data docs/tables_NAME.json; of --trials docs/trials.json)")
    add = parser.add_argument_group("what the paper's scale needs").add_argument
    add("--voc", type=not_empty, metavar="DIR", help="with VOCdevkit/ in it, for Table 4")
    add("--coco", type=not_empty, metavar="DIR", help="COCO 2017, for Tables 4 and 5")
    add("--subset-1", type=not_empty, metavar="FILE",
        help="SimCLR's list of 1 %% of ImageNet, for Table 3")
    add("--subset-10", type=not_empty, metavar="FILE",
        help="SimCLR's list of 10 %% of ImageNet, for Table 3")
    add("--supervised", type=not_empty, metavar="FILE",
        help="torchvision's ResNet-50, for Tables 4 and 5")
    add("--photos", type=not_empty, metavar="DIR", help="images to look at, for Figure 4")
    return fill_in(parser.parse_args(argv))


def fill_in(args):
    """Fill in the defaults that depend on other arguments, and check that all fit together."""
    name = args.data.partition(":")[0]
    args.miniature = name in NAMED_SETS
    suffix = "" if name == "clutter" else f"_{Path(name).resolve().name}"
    if args.seeds is None:
        args.seeds = TRIAL_SEEDS if args.trials else [0, 1, 2] if args.miniature else [0]
    if args.runs is None:
        args.runs = f"runs/tables{suffix}"
    if args.results is None:
        args.results = "docs/trials.json" if args.trials else f"docs/tables{suffix}.json"
    if Path(args.results).suffix != ".json":
        fail(f"--results {args.results}: must end in .json, the page beside it in .md")
    if args.trials and not args.miniature:
        fail("--trials is for the miniature: a folder runs with the paper's settings")
    if args.trials and args.only:
        fail("--trials is no table: leave out --only")
    if args.trials and sorted(args.seeds) != TRIAL_SEEDS:
        fail(f"--trials has seeds of its own, {TRIAL_SEEDS}: leave out --seeds")
    for name in args.only or ():
        if table_of(args, name) is None:
            fail(f"--only {name}: not in the miniature of {args.data}; give --data a folder like "
                 "ImageNet's")
    own = own_flags(args)
    for word in shlex.split(args.train_flags):
        if word.partition("=")[0] in own:
            fail(f"--train-flags {word}: what the rows or trials have of their own; leave it out")
    known = {one for name in TABLES for row in rows_of(args, name) for one in row[1:3]}
    known = set(TUNED) if args.trials else known
    for row in args.rows or ():
        if row not in known:
            fail(f"--rows {row}: no row of these tables; they are {', '.join(sorted(known))}")
    return args


def own_flags(args):
    """The flags of train.py that a command gets from tables.py itself."""
    own = {"--data", "--seed", "--out"}
    if args.trials:
        return own | {"--method", "--max-steps", *flags_of(CONFIGURATIONS[0])[::2]}
    if not args.miniature:
        own |= {"--arch", "--epochs"}
    return own | varied_by(row for name in args.only or TABLES for row in rows_of(args, name))


def varied_by(rows):
    """The flags of train.py in which rows differ from CARE."""
    return {VARIANTS[row[1]][0] for row in rows if VARIANTS.get(row[1])}


# --------------------------------------------------------------------------------------------- jobs
class Job(NamedTuple):
    """A command that tables.py starts, and what it is for."""
    encoder: str
    score: str  # or "pretraining"
    seed: int
    repeat: int  # of detection, 0 to 4; else 0
    words: list  # script and flags, as typed
    out: str
    needs: tuple = ()  # keys of jobs that come first
    lacks: str = ""  # what has to be given before it can run
    settings: dict = {}  # what must not differ between two lines of --results

    @property
    def key(self):
        return self.encoder, self.score, self.seed, self.repeat


def table_of(args, name):
    """A table in the form that it has at this scale, or None.

    None too where CARE by the recipe is not what its row says: `shapes` has two attention blocks,
    Table 7 says five.
    """
    table = TABLES[name]
    if not args.miniature:
        return table
    usual, recipe = recipe_of("folder"), recipe_of(args.data)
    names = [flag.removeprefix("--").replace("-", "_") for flag in varied_by(table["rows"])]
    if "miniature" not in table or any(recipe.get(name) != usual.get(name) for name in names):
        return None
    return table | table["miniature"]


def rows_of(args, name):
    """A table's rows at this scale: [(label, variant, encoder, arch, epochs, paper by column)].

    encoder: the name of its runs. The paper's architecture and epochs are no part of it in the
    miniature, where the recipe's hold.
    """
    table, rows = table_of(args, name), []
    for label, variant, arch, epochs, paper in table["rows"] if table else ():
        encoder = variant
        if not args.miniature:
            label += f", {ARCH_NAMES[arch]}"
            encoder += f"_{arch}"
            if epochs:
                label += f", {epochs} epochs"
                encoder += f"_epochs{epochs}"
        paper = dict(zip(TABLES[name]["columns"], paper.split()))
        rows.append((label, variant, encoder, arch, epochs, paper))
    return rows


def score_of(args, variant, column):
    """The score behind a table's cell, or None; a supervised encoder in miniature has one alone."""
    if args.miniature and variant == "supervised":
        return "100 %" if column == "linear" else None
    return COLUMNS[column][0]


def flags_of(configuration):
    """A configuration's flags of train.py."""
    return [word for name, value in configuration.items()
            for word in (f"--{name.replace('_', '-')}", str(value))]


def settings_of(words):
    """All arguments of a command on which its score depends, by the script's own parser.

    The version of its protocol is one of them. An encoder need not be there yet: this file stands
    for it.
    """
    script, *flags = [__file__ if word.endswith(".pth") else word for word in words]
    settings = vars(SCRIPTS[script].parse_args(flags))
    settings = {name: value for name, value in settings.items() if name not in FREE}
    data = settings.get("data") or settings["rendered"] or ""
    if data.partition(":")[0] in RENDERERS:
        settings["data_digest"] = digest_of(open_images(data, "val"))
    return {script: json.loads(json.dumps(settings))}


def pretraining(args, encoder, seed, flags):
    """The job that pretrains one encoder."""
    out = f"{args.runs}/{encoder}_seed{seed}"
    words = ["train.py", "--data", args.data, "--seed", str(seed), *flags,
             *shlex.split(args.train_flags), "--out", out]
    return Job(encoder, "pretraining", seed, 0, words, out, settings=settings_of(words))


def scoring(args, encoder, score, seed, repeat, before, variant=None, arch=None):
    """The job that scores what the jobs `before` pretrain; without any, random or supervised."""
    script, lacks = SCORERS[score][0], []
    out = f"{args.runs}/{encoder}_seed{seed}/{score.replace(' %', 'percent').replace(' ', '_')}"

    def given(name, usual):
        """A flag of this script that the command cannot do without, or what could stand there."""
        value = getattr(args, name)
        if value is None:
            lacks.append(f"--{name.replace('_', '-')}")
        return value or usual

    if script == "detect_eval.py":
        data = given("voc", "./voc") if score == "VOC C4" else given("coco", "./coco")
        out += f"_{repeat}"
        flags = ["--data", data, "--seed", str(DETECTION_RUNS * seed + repeat)]
    elif script == "visualize.py":
        out += ".png"
        flags = ["--seed", str(seed)]
        if score == "photos":
            flags += ["--images", given("photos", "./photos")]
        else:
            name, size = args.data.partition(":")[0], recipe_of(args.data)["image_size"]
            flags += ["--images", name, "--image-size", str(size)]
            if name not in ("clutter", "shapes"):
                lacks.append("--data clutter or shapes")
    else:
        flags = ["--data", args.data, "--seed", str(seed)]
        if script == "semi_eval.py" and not args.miniature:
            percent = SCORERS[score][2]
            flags += ["--subset", given(f"subset_{percent}", f"{percent}percent.txt"), *GRID]
    pretrained = [f"{job.out}/encoder.pth" for job in before] or ["random"]
    if variant == "supervised" and not args.miniature:
        pretrained = [given("supervised", "resnet50.pth")]
    if pretrained == ["random"]:
        flags += ["--arch", arch]
    words = [*SCORERS[score], "--pretrained", *pretrained, *flags, "--out", out]
    settings = settings_of(words)
    for job in before:
        settings |= job.settings
    return Job(encoder, score, seed, repeat, words, out, tuple(job.key for job in before),
               " and ".join(lacks), settings)


def cell_jobs(args, row, score, seed, repeat):
    """The jobs of a cell: pretrainings, if it has any, and its score."""
    _, variant, encoder, arch, epochs, _ = row
    if args.miniature:
        arch = train.parse_args(["--data", args.data, *shlex.split(args.train_flags)]).arch
    needed = ["byol", variant] if score == "photos" else [variant]
    before = []
    for one in needed if variant in VARIANTS else ():
        flags = VARIANTS[one]
        if not args.miniature:
            flags = [*flags, "--arch", arch, "--epochs", str(epochs)]
        name = one if args.miniature else f"{one}_{arch}_epochs{epochs}"
        before.append(pretraining(args, name, seed, flags))
    return [*before, scoring(args, encoder, score, seed, repeat, before, variant, arch)]


def table_cells(args, only, wanted, seeds):
    """The cells of tables, seed after seed: [(table's title, row's label, its jobs)]."""
    cells = []
    for name in only:
        table = table_of(args, name)
        for seed in seeds:
            for row in rows_of(args, name):
                label, variant, encoder = row[:3]
                if wanted and not {variant, encoder} & set(wanted):
                    continue
                scores = [score_of(args, variant, column) for column in table["columns"]]
                for score in dict.fromkeys(score for score in scores if score):
                    runs = DETECTION_RUNS if SCORERS[score][0] == "detect_eval.py" else 1
                    for repeat in range(runs):
                        jobs = cell_jobs(args, row, score, seed, repeat)
                        cells.append((table["title"], f"{label}, seed {seed}", jobs))
    return cells


def trial_cells(args, wanted=None):
    """The trials, as cells: each configuration and method, stopped early and scored by kNN."""
    cells = []
    for seed in TRIAL_SEEDS:
        for number, configuration in enumerate(CONFIGURATIONS, 1):
            for method in TUNED:
                if wanted and method not in wanted:
                    continue
                flags = [*VARIANTS[method], *flags_of(configuration), "--max-steps",
                         str(TRIAL_STEPS)]
                encoder = f"{method}_trial{number}"
                first = pretraining(args, encoder, seed, flags)
                second = scoring(args, encoder, "kNN", seed, 0, [first])
                cells.append(("Trials", f"configuration {number}, {method}, seed {seed}",
                              [first, second]))
    return cells


def best_trial(results, method):
    """The index of the configuration with the best mean kNN over the seeds; the first of equals."""
    means = []
    for number in range(1, len(CONFIGURATIONS) + 1):
        values = [results[f"{method}_trial{number}", "kNN", seed, 0]["result"]["top1"]
                  for seed in TRIAL_SEEDS]
        means.append(statistics.mean(values))
    return means.index(max(means))


def jobs_of(cells):
    """The jobs of cells by key, each once, pretrainings before what needs them."""
    return {job.key: job for _, _, jobs in cells for job in jobs}


# ------------------------------------------------------------------------------------------ results
def read_results(path):
    """Finished scores by the key of their job. Exit code 2 if a line is not one."""
    results = {}
    if not Path(path).exists():
        return results
    for number, text in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            key = line["encoder"], line["score"], line["seed"], line.get("repeat", 0)
        except (ValueError, TypeError, KeyError, AttributeError):
            fail(f"{path}, line {number}: not a finished score; remove the line, or give another "
                 "--results")
        results[key] = line
    return results


def defaults_of(script):
    """A script's arguments without flags: what an argument was before it existed."""
    required = [] if script == "train.py" else ["--pretrained", "random"]
    if script == "semi_eval.py":
        required += ["--percent", "1"]
    return vars(SCRIPTS[script].parse_args(required))


def check_settings(jobs, results, path):
    """One line and exit code 2 if a finished score had other settings than its job has now."""
    for key, job in jobs.items():
        if key not in results or job.lacks:
            continue
        encoder, score, seed, _ = key
        for script, settings in job.settings.items():
            had = results[key]["settings"].get(script, {})
            for name in sorted({*settings, *had}):
                usual = defaults_of(script).get(name) if name not in had else None
                if name == "protocol_version":  # of before it was numbered
                    usual = 1
                was, now = had.get(name, usual), settings.get(name)
                if name == "data_digest" and was is None:  # of before there were digests
                    was = re.sub(r"\d+$", "1", now)
                if was != now:
                    fail(f"{path}: {encoder}, seed {seed}, {score}: {name} of {script} was "
                         f"{was!r}, is {now!r}; give the same, or another --results")


def checked_results(args):
    """The finished scores; exit code 2 if one had other settings than its job has now."""
    results = read_results(args.results)
    if args.trials:
        known = trial_cells(args)
    else:
        known = table_cells(args, TABLES, None, sorted({seed for _, _, seed, _ in results}))
    check_settings(jobs_of(known), results, args.results)
    return results


# ------------------------------------------------------------------------------------------ running
def command_of(args, words, python="python"):
    """A job's command as typed in the current directory: the launcher or python, script, flags."""
    launcher = shlex.split(args.launcher) if words[0] != "visualize.py" else []
    return [*(launcher or [python]), os.path.relpath(HERE / words[0]), *words[1:]]


CHILDREN = []  # processes that run now


def start(args, words):
    """Run a script of ours -> the lines on its stdout; RuntimeError with its stderr if it fails."""
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // args.jobs))
    command = command_of(args, words, sys.executable)
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True,
                             stderr=subprocess.PIPE, start_new_session=True)  # no Ctrl-C of ours
    CHILDREN.append(child)
    out, err = child.communicate()
    CHILDREN.remove(child)
    if child.returncode:
        raise RuntimeError(err.strip() or f"exit code {child.returncode}")
    return out.splitlines()


def run_job(args, job, before):
    """Run a job; before: its pretrainings -> the line of a score, None of a pretraining.

    RuntimeError if it fails, or ends early, as it does on a signal, with exit code 0.
    """
    began = time.monotonic()
    lines = start(args, job.words)
    seconds = round(time.monotonic() - began)
    if job.score == "pretraining":
        ended = any(": encoder in " in line or ": as --max-steps says" in line for line in lines)
    elif job.score == "photos":
        ended = True  # visualize.py does not stop early
    else:
        ended = "".join(lines[-1:]).startswith("{")
    if not ended:
        last = lines[-1] if lines else "it printed nothing"
        raise RuntimeError(f"did not reach its end: {last}")
    if job.score == "pretraining":
        return None
    result = {"figure": job.out} if job.score == "photos" else json.loads(lines[-1])
    line = {"encoder": job.encoder, "seed": job.seed, "score": job.score, "result": result,
            "seconds": seconds, "pretraining_seconds": sum(logged_seconds(one) for one in before),
            "commands": [shlex.join(command_of(args, one.words)) for one in (*before, job)],
            "settings": job.settings, "machine": machine(args.jobs)}
    if SCORERS[job.score][0] == "detect_eval.py":
        line["repeat"] = job.repeat
    return line


def logged_seconds(job):
    """What a pretraining's steps and kNN took by its log, over all the times it was started."""
    path, seconds, step = Path(job.out) / "log.jsonl", 0.0, 0
    for line in read_lines(path) if path.exists() else ():
        if "images/s" in line:
            batch = job.settings["train.py"]["batch_size"]
            seconds += (line["step"] - step) * batch / max(line["images/s"], 0.01)
            step = line["step"]
    return round(seconds)


def machine(jobs):
    """On what a job ran."""
    if torch.cuda.is_available():
        name = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    else:
        cpu = platform.processor() or platform.machine()
        if Path("/proc/cpuinfo").exists():
            found = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
            cpu = found[1] if found else cpu
        name = f"{os.cpu_count()} cores ({cpu})"
    return f"{name}, {jobs} jobs, torch {torch.__version__}"


def run_all(args, jobs, results):
    """Run what is missing, --jobs at a time, each after its needs -> what failed: why, by key."""
    wanted = set()
    for key, job in jobs.items():
        if job.score != "pretraining" and key not in results and not job.lacks:
            wanted |= {key, *job.needs}
    waiting = [job for key, job in jobs.items() if key in wanted]
    ended, failed, running = set(), {}, {}
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            while waiting or running:
                for job in list(waiting):
                    if any(key in failed for key in job.needs):
                        failed[job.key] = "not run: what it needs failed"
                        waiting.remove(job)
                    elif len(running) < args.jobs and ended.issuperset(job.needs):
                        before = [jobs[key] for key in job.needs]
                        running[pool.submit(run_job, args, job, before)] = job
                        waiting.remove(job)
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    job = running.pop(future)
                    what = f"{job.encoder}, seed {job.seed}, {job.score}"
                    try:
                        line = future.result()
                    except (RuntimeError, OSError) as error:  # OSError: no such launcher
                        failed[job.key] = str(error)
                        print(f"{what}: failed", flush=True)
                        continue
                    ended.add(job.key)
                    if line:
                        with user_errors(1), open(args.results, "a") as file:
                            file.write(json.dumps(line) + "\n")
                        print(f"{what}: {line['seconds']} s", flush=True)
        except BaseException:
            for child in list(CHILDREN):
                child.terminate()  # train.py and the others save and stop
            raise
    return failed


# --------------------------------------------------------------------------------------------- list
def is_running(out):
    """Whether a live process holds the lock of a run directory; False where locks tell nothing."""
    try:
        with open(Path(out) / "lock", "r+") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def has_ended(job):
    """Whether a job's command has come to its end, by what it left."""
    if job.out.endswith(".png"):
        return Path(job.out).exists()
    path = Path(job.out) / "log.jsonl"
    lines = read_lines(path) if path.exists() else []
    if job.score != "pretraining":
        return any("sha256" in line for line in lines)  # the last line of a score
    steps = [line["steps"] for line in lines if "steps" in line]
    stop = job.settings["train.py"]["max_steps"] or math.inf
    return bool(steps) and max(line.get("step", 0) for line in lines) >= min(stop, *steps)


def print_list(args, cells, results):
    """Every command as shell, in the order of the cells; each is printed once."""
    jobs = jobs_of(cells)
    open_needs = {key for job in jobs.values() if job.key not in results for key in job.needs}
    title, label, printed = None, None, set()
    for its_title, its_label, its_jobs in cells:
        if its_title != title:
            print(f"\n# {its_title}")
        if (its_title, its_label) != (title, label):
            print(f"# {its_label}")
        title, label = its_title, its_label
        for job in its_jobs:
            command = shlex.join(command_of(args, job.words))
            if job.key in printed:
                if job.score != "pretraining":
                    print(f"# {job.score}: the command above with --out {job.out}")
                continue
            printed.add(job.key)
            if job.lacks:
                print(f"# needs {job.lacks}: {command}")
                continue
            state = "missing"
            if is_running(job.out):
                state = "running"
            elif job.key in results or has_ended(job) or (
                    job.score == "pretraining" and job.key not in open_needs):
                state = "finished"
            print(f"{command}  # {state}")


# --------------------------------------------------------------------------------------- statistics
def two_sided_p(t, df):
    """Probability that Student's t with df degrees of freedom is at least t away from 0.

    With t = sqrt(df) tan(a), the density of the angle a is proportional to cos(a)^(df - 1).
    """
    angles, gap = np.linspace(0, math.atan(t / math.sqrt(df)), 2001, retstep=True)
    heights = np.cos(angles) ** (df - 1)
    area = gap * (heights[1:] + heights[:-1]).sum() / 2
    return 1 - 2 * area * math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.pi ** 0.5


def t_quantile(df, p=0.05):
    """The t beyond which, to both sides, lies the probability p."""
    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided_p(middle, df) > p else (low, middle)
    return middle


def welch(a, b):
    """Welch's t: numbers a, b -> difference of means, half its 95 % interval's width, p.

    None where there is no telling: fewer than two of one, or all of each the same.
    """
    if min(len(a), len(b)) < 2:
        return None
    part_a, part_b = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    if part_a + part_b == 0:
        return None
    error = (part_a + part_b) ** 0.5
    df = (part_a + part_b) ** 2 / (part_a ** 2 / (len(a) - 1) + part_b ** 2 / (len(b) - 1))
    difference = statistics.mean(a) - statistics.mean(b)
    return difference, t_quantile(df) * error, two_sided_p(abs(difference) / error, df)


# --------------------------------------------------------------------------------------------- page
MINIATURE = """# The paper's tables in miniature

Made by `{command}`: {arch} at {size} px on `{data}`{what}, {epochs} epochs in batches of
{batch_size}. Top-1 in percent on the validation images. *linear* and *kNN* have {labels} labels and
the encoder frozen, except where a row says more. Cells are mean ± standard deviation over n seeds;
an empty cell has not been run. *paper* holds the paper's own numbers, of ResNet-50 on ImageNet:
only the signs of differences compare.

Every difference has its 95 % interval by Welch's t, and is called significant only if the interval
leaves out 0. The {comparisons} comparisons are not corrected for their number: where nothing
differs, one in twenty is significant by chance.

{tuning}"""
WHAT = {"clutter": " (ten classes, two objects of one class that cover 5 to 20 % of the image "
                   "among scraps that mean nothing)",
        "shapes": " (ten classes, one large object)"}
PROTOCOL = """**The comparison of BYOL and CARE.** This paragraph was written before its first run
and is not changed after it. Tuning: BYOL and CARE get the same {count} configurations, drawn once
at random from {tried}; seeds {seeds}; {steps} of 1,000 steps; each method keeps the configuration
of the best mean kNN. Lambda 0 and sequential run at CARE's choice, and at BYOL's too. Test: seeds
0 to 9, 1,000 steps, each method at its own choice: random, BYOL, CARE, lambda 0, sequential,
scored by the linear probe, kNN, 1 %, 10 % and Figure 4. The answer is the difference CARE less
BYOL with its 95 % interval, whatever its sign. Everything is pretrained in bf16. The trials'
seeds are no test seeds.

`python tables.py --trials --train-flags '--precision bf16'` makes the trials, `docs/trials.json`.
Both methods chose the same configuration, which has since been the recipe of `clutter`; so the rows
of seeds 0 to 9 are the test."""
TUNING = {
    "clutter": """The recipe of `clutter` is what BYOL and CARE both chose among the same {count}
configurations, with seeds {seeds}, stopped after {steps} steps ([the
trials](measured.md#the-trials-of-equal-tuning)).

""" + PROTOCOL,
    "shapes": """BYOL and CARE have the same recipe. It was searched with CARE: blocks, tau, rate
and crops on seeds 0 and 1, [the predictors' rate](measured.md#how-its-recipe-was-found) on 10 and
11."""}
PAPER = """# The paper's tables

Made by `{command}`, with the paper's encoders, epochs and settings. Scores in percent: mean ±
standard deviation over n pretraining seeds; of one seed, over its detection runs. An empty cell
has not been run. *paper* holds the paper's own numbers.

Every difference has its 95 % interval by Welch's t over pretraining seeds, where there are two or
more of each, and is called significant only if the interval leaves out 0."""


def values_of(results, encoder, score, key):
    """A cell's numbers by seed: {seed: one for each detection run}."""
    found = {}
    for (its_encoder, its_score, seed, _), line in sorted(results.items()):
        if (its_encoder, its_score) == (encoder, score):
            found.setdefault(seed, []).append(line["result"][key])
    return found


def means_of(args, results, row, column):
    """A row's numbers in a column: one a pretraining seed, the mean of its detection runs."""
    score = score_of(args, row[1], column)
    found = values_of(results, row[2], score, COLUMNS[column][1])
    return [statistics.mean(values) for values in found.values()]


def cell(args, results, row, column):
    """A cell's text: mean, standard deviation and n; empty where nothing has run."""
    score, key = score_of(args, row[1], column), COLUMNS[column][1]
    found = values_of(results, row[2], score, key)
    if not found:
        return ""
    if key == "figure":
        return ", ".join(path for paths in found.values() for path in paths)
    values, count = means_of(args, results, row, column), f"n = {len(found)}"
    repeats = max(map(len, found.values()))
    if repeats > 1:
        count += f", {repeats} runs each"
    if len(found) == 1:
        values = next(iter(found.values()))
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread} ({count})"


def chance(args, results, column):
    """A column's chance level as text: of a guess, or as it was measured; or empty."""
    key = COLUMNS[column][1]
    if key in ("pointing", "energy"):
        return measured(results, column, "pointing_chance" if key == "pointing" else "area")
    if key not in ("top1", "top5"):
        return ""
    classes = 10  # of every named set
    if not args.miniature:
        folder = Path(args.data) / "train"
        classes = sum(one.is_dir() for one in folder.iterdir()) if folder.is_dir() else 0
    if not classes:
        return ""
    guesses = 1 if key == "top1" else min(5, classes)
    return f"{100 * guesses / classes:.1f}"


def measured(results, column, key):
    """Mean of a number beside a column's scores, over all of them, as text; empty without any."""
    values = [line["result"][key] for (_, score, _, _), line in results.items()
              if score == COLUMNS[column][0]]
    return f"{statistics.mean(values):.1f}" if values else ""


def care_row(rows, row):
    """The row of CARE that another is compared with, of the same architecture, or None.

    With as many epochs, else the most: in Table 3a CARE's 400 against BYOL's 800.
    """
    ours = [one for one in rows if one[1] == "care" and one[3] == row[3]]
    same = [one for one in ours if one[4] == row[4]]
    return max(same or ours, key=lambda one: one[4], default=None)


def differences(args, results, name):
    """CARE less every other row of a table: the lines of a table of intervals."""
    rows, lines = rows_of(args, name), []
    for row in rows:
        ours = care_row(rows, row)
        if row[1] == "care" or ours is None:
            continue
        for column in table_of(args, name)["columns"]:
            a, b = means_of(args, results, ours, column), means_of(args, results, row, column)
            found = welch(a, b)
            if found is None:
                continue
            difference, half, p = found
            low, high = difference - half, difference + half
            word = "significant" if low > 0 or high < 0 else "not significant"
            word += " (p < 0.001)" if p < 0.001 else f" (p = {p:.2g})"
            paper = ""
            if column in ours[5] and column in row[5]:
                paper = f"{float(ours[5][column]) - float(row[5][column]):+.1f}"
            lines.append(f"| {ours[0]} less {row[0]} | {column} | {difference:+.1f} | "
                         f"{low:+.1f} to {high:+.1f} | {len(a)}, {len(b)} | {word} | {paper} |")
    return lines


def table_lines(args, results, name):
    """A table of the page, its note, and its differences."""
    table = table_of(args, name)
    columns = table["columns"]
    lines = [f"## {table['title']}", "", f"| encoder | {' | '.join(columns)} | paper |",
             "|---|" + "---|" * (len(columns) + 1)]
    levels = [chance(args, results, column) for column in columns]
    if any(levels):
        lines.append(f"| chance | {' | '.join(levels)} | |")
    fixed = [measured(results, column, "pointing_fixed") if COLUMNS[column][1] == "pointing" else ""
             for column in columns]
    if any(fixed):
        lines.append(f"| same position | {' | '.join(fixed)} | |")
    for row in rows_of(args, name):
        label, _, _, _, epochs, paper = row
        cells = [cell(args, results, row, column) for column in columns]
        numbers = ", ".join(paper[column] for column in columns if column in paper)
        if numbers and epochs and args.miniature:
            numbers += f" ({epochs} epochs)"
        lines.append(f"| {label} | {' | '.join(cells)} | {numbers} |")
    if "note" in table:
        lines += ["", filled(table["note"])]
    found = differences(args, results, name)
    if found:
        lines += ["", "| difference | score | here | 95 % interval | n | | paper |",
                  "|---|---|---|---|---|---|---|", *found]
    return [*lines, ""]


def page_command(args, results):
    """The command that makes a page: the flags on which its rows depend, and the seeds it has."""
    usual = parse_args(["--data", args.data])
    words = ["python", "tables.py"]
    if args.data != "clutter":
        words += ["--data", args.data]
    seeds = sorted({seed for _, _, seed, _ in results})
    if seeds and seeds != usual.seeds:
        words += ["--seeds", *map(str, seeds)]
    if args.train_flags:
        words += ["--train-flags", args.train_flags]
    if args.results != usual.results:
        words += ["--results", args.results]
    return shlex.join(words)


def page(args, results):
    """The page beside --results: introduction, the tables in the paper's order, cost."""
    names = [name for name in TABLES if table_of(args, name)]
    command = page_command(args, results)
    if args.miniature:
        run = train.parse_args(["--data", args.data, *shlex.split(args.train_flags)])
        name = args.data.partition(":")[0]
        tried = "; ".join(f"`--{flag.replace('_', '-')}` {', '.join(map(str, values))}"
                          for flag, values in TRIED.items())
        tuning = TUNING.get(name, "").format(
            count=len(CONFIGURATIONS), tried=tried, steps=TRIAL_STEPS,
            seeds=" and ".join(map(str, TRIAL_SEEDS)))
        text = MINIATURE.format(
            command=command, arch=ARCH_NAMES.get(run.arch, run.arch), size=run.image_size[0],
            data=args.data, what=WHAT.get(name, ""), epochs=run.epochs,
            batch_size=run.batch_size, labels=recipe_of(args.data)["labels"] or "all",
            comparisons=sum(len(differences(args, results, name)) for name in names),
            tuning=tuning)
    else:
        text = PAPER.format(command=command)
    title, *paragraphs = text.strip().split("\n\n")
    lines = [title, ""]
    for paragraph in paragraphs:
        lines += [filled(paragraph), ""]
    left = []
    for name in names:
        if has_run(args, results, name):
            lines += table_lines(args, results, name)
        else:
            left.append(table_of(args, name)["title"])
    if left:
        lines += [filled(f"Not run: {'; '.join(left)}."), ""]
    return "\n".join([*lines, *cost(results)])


def has_run(args, results, name):
    """Whether a table has a cell filled besides CARE's, which stand in most of them."""
    rows = rows_of(args, name)
    others = [row for row in rows if row[1] != "care"] or rows
    return any(cell(args, results, row, column)
               for row in others for column in table_of(args, name)["columns"])


def filled(text):
    """A paragraph in lines of at most 100 characters."""
    return textwrap.fill(" ".join(text.split()), 100, break_on_hyphens=False,
                         break_long_words=False)


def cost(results):
    """What the jobs took, on which machines, and the commands of one cell."""
    if not results:
        return []
    lines = ["## Cost", ""]
    longest = {}  # line by pretraining, which several scores share and which is counted once
    for line in sorted(results.values(), key=lambda line: line["pretraining_seconds"]):
        longest[line["encoder"], line["seed"]] = line
    for name in sorted({line["machine"] for line in results.values()}):
        here = [line for line in results.values() if line["machine"] == name]
        encoders = {(line["encoder"], line["seed"]) for line in here}
        seconds = sum(line["seconds"] for line in here)
        seconds += sum(line["pretraining_seconds"] for line in longest.values()
                       if line["machine"] == name)
        lines.append(f"- {name}: {len(here)} scores of {len(encoders)} encoders, "
                     f"{seconds / 3600:.1f} hours, summed over the jobs.")
    ours = [line for line in results.values() if line["encoder"].startswith("care")]
    example = (ours or list(results.values()))[0]
    return [*lines, "", "The commands of one cell:", "", "```sh", *example["commands"], "```", ""]


def print_trials(results):
    """Every configuration with its scores, and, once all have been run, each method's choice."""
    complete = True
    for number, configuration in enumerate(CONFIGURATIONS, 1):
        print(f"{number}: {' '.join(flags_of(configuration))}")
        for method in TUNED:
            lines = [results.get((f"{method}_trial{number}", "kNN", seed, 0))
                     for seed in TRIAL_SEEDS]
            scores = [line["result"]["top1"] for line in lines if line]
            complete &= len(scores) == len(TRIAL_SEEDS)
            if scores:
                print(f"   {method}: kNN {', '.join(map(str, scores))}, "
                      f"mean {statistics.mean(scores):.1f}")
    for method in TUNED if complete else ():
        print(f"{method} chooses configuration {best_trial(results, method) + 1}")


# --------------------------------------------------------------------------------------------- main
def stop(number, frame):
    """SIGTERM does what Ctrl-C does."""
    raise KeyboardInterrupt


def main(argv=None):
    args = parse_args(argv)
    results = checked_results(args)
    if args.trials:
        cells = trial_cells(args, args.rows)
    else:
        cells = table_cells(args, args.only or TABLES, args.rows, args.seeds)
    jobs = jobs_of(cells)
    if args.list:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # of `| head`
        print_list(args, cells, results)
        return
    for path in (args.runs, Path(args.results).parent):
        Path(path).mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, stop)
    try:
        failed = run_all(args, jobs, results)
    except KeyboardInterrupt:
        fail("stopped; the same command resumes it", code=1)
    results = checked_results(args)  # another tables.py may have written too
    lacking = [job for job in jobs.values() if job.lacks]
    for line in dict.fromkeys(f"{job.encoder}, {job.score}: needs {job.lacks}" for job in lacking):
        print(line)
    if args.trials:
        print_trials(results)
    else:
        path = Path(args.results).with_suffix(".md")
        write_whole(path, page(args, results).encode())
        print(f"{path}: {len(results)} scores")
    for (encoder, score, seed, _), why in failed.items():
        print(f"{encoder}, seed {seed}, {score}: {why}", file=sys.stderr)
    if failed:
        fail(f"{len(failed)} of {len(jobs)} jobs failed", code=1)


if __name__ == "__main__":
    main()
