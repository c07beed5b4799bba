"""Tables 1, 3, 6, 7, 8, Sec. 3.3 and 4.3 and Figure 4 in miniature, with seeds and spreads.

  python tables.py                             everything, one job at a time
  python tables.py --only table1 --jobs 2   one table, two jobs side by side

Starts the scripts as a user does: pretraining on the embedded `clutter` by its recipe, then each
score. A finished job is a line of docs/tables.json; docs/tables.md is made from these lines.
The same command again goes on where it stopped; jobs of other settings are never mixed in.

What is tuned is the same in all rows: images, rate, crops and steps on BYOL, tau and the heads'
width so that CARE's features do not stay collapsed; lambda, n and position encoding are the
paper's.
"""
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from common.data import recipe_of
from common.ranks import fail
from common.run import count, natural, new_parser, write_whole

HERE = Path(__file__).resolve().parent
PRETRAINED = {  # encoder -> its flags of train.py beside the recipe; each seed is a run of its own
    "byol": ["--method", "byol"],
    "care": [],
    "sequential": ["--method", "sequential"],
    "lambda0": ["--lambda-att", "0"],
    "lambda1": ["--lambda-att", "1"],
    "lambda10": ["--lambda-att", "10"],
    "lambda250": ["--lambda-att", "250"],
    "n2": ["--blocks", "2"],
    "n3": ["--blocks", "3"],
    "n4": ["--blocks", "4"],
    "n6": ["--blocks", "6"],
    "none": ["--position", "none"],
    "sincos": ["--position", "sincos"],
    "absolute": ["--position", "absolute"],
    "detached": ["--detach-trunk"],
    "conv5": ["--tap", "conv5"],
}
SCORERS = {  # score -> the command that prints it, less encoder, data, seed and --out
    "linear": ["linear_eval.py"],
    "kNN": ["linear_eval.py", "--knn"],
    "1 %": ["semi_eval.py", "--percent", "1"],
    "10 %": ["semi_eval.py", "--percent", "10"],
    "100 %": ["semi_eval.py", "--percent", "100", "--epochs", "10", "--batch-size", "64"],
    "figure": ["visualize.py", "--layer", "conv4"],
}
# What scoring reads of a recipe; the rest is of pretraining, which random and supervised have not.
SCORING = ("arch", "stem", "image_size", "labels", "head", "linear_epochs")
COLUMNS = {  # column of a table -> score, and its key in the last line of the scorer's output
    "linear": ("linear", "top1"),
    "kNN": ("kNN", "top1"),
    "1 %": ("1 %", "top1"),
    "10 %": ("10 %", "top1"),
    "maximum inside": ("figure", "pointing"),
    "map inside": ("figure", "energy"),
}
# A table: title, columns, rows (name, encoder, the paper's numbers), and the paper's claims: this
# encoder has more than that one, in this column.
TABLES = {
    "table1": {
        "title": "Table 1: linear classification and kNN",
        "columns": ["linear", "kNN"],
        "rows": [
            ("random", "random", "-"),
            ("supervised, all layers trained", "supervised", "-"),
            ("BYOL", "byol", "66.5 (100 epochs)"),
            ("CARE", "care", "72.0 (100 epochs)"),
        ],
        "claims": [("care", "byol", "linear"), ("care", "byol", "kNN"),
                   ("care", "random", "linear")],
    },
    "table3": {
        "title": "Table 3: fine-tuning on 1 % and 10 % of the labels",
        "columns": ["1 %", "10 %"],
        "rows": [
            ("random", "random", "25.4, 56.4 (supervised)"),
            ("BYOL", "byol", "53.2, 68.8 (800 epochs)"),
            ("CARE", "care", "60.0, 69.6 (400 epochs)"),
        ],
        "claims": [("care", "byol", "1 %"), ("care", "byol", "10 %"),
                   ("care", "random", "1 %"), ("care", "random", "10 %")],
    },
    "table6": {
        "title": "Table 6: weight of the attention supervision",
        "columns": ["linear", "kNN"],
        "rows": [
            ("lambda 0", "lambda0", "70.52"),
            ("lambda 1", "lambda1", "70.88"),
            ("lambda 10", "lambda10", "70.96"),
            ("lambda 100", "care", "72.06"),
            ("lambda 250", "lambda250", "72.00"),
        ],
        "claims": [("care", "lambda0", "linear"), ("care", "lambda0", "kNN"),
                   ("care", "lambda10", "linear")],
    },
    "table7": {
        "title": "Table 7: attention blocks",
        "columns": ["linear", "kNN"],
        "rows": [
            ("n = 2", "n2", "71.08"),
            ("n = 3", "n3", "71.60"),
            ("n = 4", "n4", "71.79"),
            ("n = 5", "care", "72.06"),
            ("n = 6", "n6", "69.37"),
        ],
        "claims": [("care", "n2", "linear"), ("care", "n6", "linear")],
    },
    "table8": {
        "title": "Table 8: position encoding",
        "columns": ["linear", "kNN"],
        "rows": [
            ("none", "none", "69.49"),
            ("sincos", "sincos", "66.68"),
            ("learnable absolute", "absolute", "72.01"),
            ("learnable relative", "care", "72.06"),
        ],
        "claims": [("care", "none", "linear"), ("none", "sincos", "linear")],
    },
    "sequential": {
        "title": "Sec. 4.3: parallel and sequential streams",
        "columns": ["linear", "kNN"],
        "rows": [("sequential", "sequential", "69.32"), ("parallel", "care", "72.02")],
        "claims": [("care", "sequential", "linear"), ("care", "sequential", "kNN")],
    },
    "readings": {
        "title": "Sec. 3.3 and Fig. 2, read literally, against the release",
        "columns": ["linear", "kNN"],
        "rows": [
            ("as the release", "care", "-"),
            ("T-stream gradients stay out of the encoder (Sec. 3.3)", "detached", "-"),
            ("T-stream reads conv5 (Fig. 2)", "conv5", "-"),
        ],
        "claims": [],
    },
    "figure4": {
        "title": "Figure 4: does Grad-CAM, at conv4, point at the object?",
        "columns": ["maximum inside", "map inside"],
        "rows": [
            ("random", "random", "-"),
            ("BYOL", "byol", "a figure"),
            ("CARE", "care", "a figure"),
        ],
        "claims": [("care", "byol", "maximum inside"), ("care", "byol", "map inside")],
    },
}


def parse_args(argv=None):
    """The command line as a namespace; a mistake in it is one line on stderr and exit code 2."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--only", choices=TABLES, nargs="+", help="these tables (default: all)")
    add("--encoders", choices=[*PRETRAINED, "random", "supervised"], nargs="+",
        help="these rows of them (default: all)")
    add("--seeds", type=natural, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    add("--jobs", type=count, default=1, help="jobs side by side; on a CPU they share its cores")
    add("--data", default="clutter", help="clutter, or clutter:N for a quick try")
    add("--runs", default="runs/miniature", help="where the runs are (default runs/miniature)")
    add("--results", default="docs/tables.json",
        help="a line per finished job; the page is made beside it, as .md")
    add("--train-flags", default="", metavar="'FLAGS'",
        help="beside the recipe, for all pretrainings; a quick try needs its own --results")
    args = parser.parse_args(argv)
    for path in (args.runs, Path(args.results).parent):
        Path(path).mkdir(parents=True, exist_ok=True)
    return args


# ------------------------------------------------------------------------------------------- jobs
def scorer_of(encoder, column):
    """The score behind a table's cell; the supervised row's is always that of all labels."""
    return "100 %" if encoder == "supervised" else COLUMNS[column][0]


def wanted_jobs(tables, seeds):
    """Scores to compute, (encoder, score, seed), in the order of the tables, each once."""
    jobs = {}
    for table in tables:
        for seed in seeds:
            for _, encoder, _ in TABLES[table]["rows"]:
                for column in TABLES[table]["columns"]:
                    jobs[encoder, scorer_of(encoder, column), seed] = None
    return list(jobs)


def commands(args, encoder, score, seed):
    """The commands of a job, as a user types them: pretraining, where there is one, and scoring."""
    folder = f"{args.runs}/{encoder}_{seed}"
    before, pretrained = [], "random"
    if encoder in PRETRAINED:
        flags = PRETRAINED[encoder] + args.train_flags.split()
        before = [["train.py", "--data", args.data, "--seed", str(seed), *flags, "--out", folder]]
        pretrained = f"{folder}/encoder.pth"
    scoring = [*SCORERS[score], "--pretrained", pretrained, "--seed", str(seed)]
    name = score.replace(" %", "percent")
    if score == "figure":
        scoring += ["--images", "clutter", "--image-size", "64", "--out", f"{folder}/{name}.png"]
    else:
        scoring += ["--data", args.data, "--out", f"{folder}/{name}"]
    if pretrained == "random":
        scoring += ["--arch", "resnet18"]
    return before, scoring


def settings_of(args, encoder, score):
    """What a finished job is only comparable with if it is the same; all but encoder and seed."""
    recipe = recipe_of(args.data)
    settings = {"data": args.data, "scorer": SCORERS[score]}
    if encoder in PRETRAINED:
        return recipe | settings | {"train_flags": args.train_flags}
    return {name: recipe[name] for name in SCORING} | settings


def check_settings(args, results):
    """One line and exit code 2 if a finished job had other settings than this command has."""
    for (encoder, score, seed), line in results.items():
        had = line.get("settings", {})
        for name, value in settings_of(args, encoder, score).items():
            if had.get(name) != value:
                fail(f"{args.results}: {encoder}, seed {seed}, {score}: {name} was "
                     f"{had.get(name)!r}, is {value!r}; give the same, or another --results")


def start(command, threads):
    """Run a script of ours -> the lines on its stdout. Its error ends this one, with its text."""
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    result = subprocess.run([sys.executable, *command], cwd=HERE, env=environment,
                            capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    return result.stdout.splitlines()


def check_finished(lines, sign, command):
    """RuntimeError unless a line says that a script came to its end: a signal stops one early."""
    if not any(sign in line for line in lines):
        raise RuntimeError(f"{' '.join(command)}\nstopped before its end; the same command goes on")


def run_jobs(args, encoder, seed, scores):
    """One encoder of one seed, pretrained once, and its scores, each a line of the results."""
    threads = None if torch.cuda.is_available() else max(1, os.cpu_count() // args.jobs)
    before, _ = commands(args, encoder, scores[0], seed)
    began = time.monotonic()
    for command in before:
        check_finished(start(command, threads), ": encoder in ", command)
    pretraining = time.monotonic() - began
    for score in scores:
        began = time.monotonic()
        _, command = commands(args, encoder, score, seed)
        lines = start(command, threads)
        check_finished(lines[-1:], '{"', command)
        line = {"encoder": encoder, "seed": seed, "score": score, "result": json.loads(lines[-1]),
                "seconds": round(time.monotonic() - began),
                "pretraining_seconds": round(pretraining),
                "commands": ["python " + " ".join(one) for one in [*before, command]],
                "settings": settings_of(args, encoder, score), "machine": machine(args.jobs)}
        with open(args.results, "a") as file:  # one write: lines of several threads do not mix
            file.write(json.dumps(line) + "\n")
        print(f"{encoder}, seed {seed}, {score}: {line['seconds']} s", flush=True)


def machine(jobs):
    """On what a job ran."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {jobs} jobs, torch {torch.__version__}"
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        cpu = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    return f"{os.cpu_count()} cores ({cpu}), {jobs} jobs, torch {torch.__version__}"


def read_results(path):
    """Finished jobs by (encoder, score, seed)."""
    if not Path(path).exists():
        return {}
    lines = [json.loads(line) for line in Path(path).read_text().splitlines() if line.endswith("}")]
    return {(line["encoder"], line["score"], line["seed"]): line for line in lines}


# ------------------------------------------------------------------------------------------- page
INTRODUCTION = """# The paper's tables in miniature

Made by `{command}`.
ResNet-18 at 64 px on the embedded `clutter` ({images} images, ten classes, two objects of one class
that cover 5 to 20 % of the image among scraps that mean nothing), by its recipe (`common/data.py`):
{epochs} epochs in batches of {batch_size}. Top-1 in percent on 1,000 images, from 1,000 labels
where all layers but the classifier are frozen; mean ± standard deviation over the seeds {seeds}.
What is tuned is the same in all rows: images, rate, crops and steps were tuned on BYOL; tau and the
heads' width so that CARE's features do not stay collapsed, after [another
regime](measured.md#the-miniatures-regime) in which CARE stood behind BYOL. The column *paper* holds
the paper's own numbers, of ResNet-50 on ImageNet: only the signs of differences compare. *Cannot be
told*: the difference is smaller than its standard error. An empty cell has not been run.
"""


def values_of(results, encoder, column):
    """A cell's numbers in percent, by seed."""
    score, key = scorer_of(encoder, column), COLUMNS[column][1]
    found = {}
    for (its_encoder, its_score, seed), line in sorted(results.items()):
        if its_encoder == encoder and its_score == score:
            found[seed] = line["result"][key]
    return found


def mean_and_spread(values):
    """Mean and standard deviation of some numbers; 0 for one."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def cell(results, encoder, column):
    """A cell's text: mean and standard deviation over the seeds; empty where nothing has run."""
    values = list(values_of(results, encoder, column).values())
    if not values:
        return ""
    mean, spread = mean_and_spread(values)
    seeds = "" if len(values) == 3 else f" ({len(values)} seed{'s' if len(values) > 1 else ''})"
    return f"{mean:.1f} ± {spread:.1f}{seeds}"


def verdict(results, better, worse, column):
    """Whether the paper's claim, `better` above `worse`, holds here: one sentence, or None."""
    a, b = (list(values_of(results, encoder, column).values()) for encoder in (better, worse))
    if len(a) < 2 or len(b) < 2:
        return None
    (mean_a, spread_a), (mean_b, spread_b) = mean_and_spread(a), mean_and_spread(b)
    error = (spread_a ** 2 / len(a) + spread_b ** 2 / len(b)) ** 0.5
    difference = mean_a - mean_b
    word = "cannot be told"
    if abs(difference) > error:
        word = "agrees" if difference > 0 else "disagrees"
    return (f"{better} above {worse}, {column}: {word} ({difference:+.1f}, standard error "
            f"{error:.1f}).")


def page(args, results):
    """docs/tables.md: the tables in the paper's order."""
    command = "python tables.py"
    if args.train_flags:
        command += f" --train-flags '{args.train_flags}'"
    images = args.data.partition(":")[2] or "4,000"
    seeds = ", ".join(str(seed) for seed in sorted({seed for _, _, seed in results}))
    lines = [INTRODUCTION.format(
        command=command, images=images, seeds=seeds, **recipe_of(args.data))]
    for table in TABLES.values():
        lines += [f"## {table['title']}", "",
                  f"| encoder | {' | '.join(table['columns'])} | paper |",
                  "|---|" + "---|" * (len(table["columns"]) + 1)]
        for name, encoder, paper in table["rows"]:
            cells = [cell(results, encoder, column) for column in table["columns"]]
            if encoder == "supervised":
                cells[1:] = [""] * (len(cells) - 1)
            lines.append(f"| {name} | {' | '.join(cells)} | {paper} |")
        lines.append("")
        verdicts = [verdict(results, *claim) for claim in table["claims"]]
        lines += [f"- {text}" for text in verdicts if text] + [""]
    lines += cost(results)
    return "\n".join(lines).replace("\n\n\n", "\n\n")


def cost(results):
    """What the jobs took, on which machines, and the commands of one cell."""
    if not results:
        return []
    lines = ["## Cost", ""]
    for name in sorted({line["machine"] for line in results.values()}):
        here = [line for line in results.values() if line["machine"] == name]
        runs = {(line["encoder"], line["seed"]): line["pretraining_seconds"] for line in here}
        hours = (sum(runs.values()) + sum(line["seconds"] for line in here)) / 3600
        lines.append(f"- {name}: {len(here)} scores of {len(runs)} encoders, {hours:.1f} hours, "
                     "summed over the jobs.")
    ours = [line for line in results.values() if line["encoder"] == "care"]
    example = (ours or list(results.values()))[0]
    return [*lines, "", "The commands of one cell:", "", "```sh", *example["commands"], "```", ""]


def main(argv=None):
    args = parse_args(argv)
    results = read_results(args.results)
    check_settings(args, results)
    groups = {}  # the scores of one encoder and seed are one job: pretraining is shared
    for encoder, score, seed in wanted_jobs(args.only or TABLES, args.seeds):
        if args.encoders and encoder not in args.encoders:
            continue
        if (encoder, score, seed) not in results:
            groups.setdefault((encoder, seed), []).append(score)
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(run_jobs, args, encoder, seed, scores)
                for (encoder, seed), scores in groups.items()]
        try:
            for job in jobs:
                job.result()
        except (RuntimeError, KeyboardInterrupt) as error:
            pool.shutdown(wait=False, cancel_futures=True)
            fail(f"a job failed: {error}", code=1)
    path = Path(args.results).with_suffix(".md")
    write_whole(path, page(args, read_results(args.results)).encode())
    print(f"{path}: {len(read_results(args.results))} scores")


if __name__ == "__main__":
    main()
