"""The class `Run`, which every training or evaluation script makes first, and its arguments.

A run's directory holds last.pth (what resuming needs, written whole or not at all), log.jsonl (a
line of arguments and versions, then one per logged step) and lock (held by a live process). The
same command again resumes from last.pth. Run knows no model, no views and no protocol.
"""
import argparse
import atexit
import contextlib
import copy
import errno
import io
import json
import math
import multiprocessing.connection
import multiprocessing.queues
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
import torchvision
from torch.utils.data import DataLoader
from tqdm import tqdm

try:
    import fcntl
    import resource
except ModuleNotFoundError:  # Windows
    fcntl = resource = None

from care import InputError
from common.data import (NAMED_SETS, Failed, Stream, collate, file_of, recipe_of, stream_batches)
from common.ranks import (max_over_ranks, average, fail, gather, join_ranks, leave_ranks, note,
                          same_on_all_ranks, user_errors)
from common.weights import check_state, load_checkpoint

STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
                if hasattr(signal, name)]  # Windows has two of them
MOST_WORKERS = 16  # loading processes per rank unless --workers asks for more
SCORING_BATCH = 256  # images that are scored at a time, over all ranks
STOPPED = "stopped while scoring; the same command resumes it"


# ---------------------------------------------------------------------------------------- arguments
def new_parser(doc):
    """An argument parser with a script's docstring as its description. Makes printing safe."""
    keep_printing()
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=form, allow_abbrev=False)
    parser.error = fail
    return parser


def checked(kind, wanted, fits):
    """A type= of argparse: kind(text) if that fits, else an error that says what is wanted."""
    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if fits(value):
                return value
        raise argparse.ArgumentTypeError(f"{text}: must be {wanted}")

    return parse


def not_empty(text):
    """A type= of argparse: any text except an empty one."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: is a variable not set?")
    return text


count = checked(int, "a whole number of at least 1", lambda value: value >= 1)
natural = checked(int, "a whole number of at least 0", lambda value: value >= 0)
positive = checked(float, "a number above 0", lambda value: 0 < value < math.inf)
not_negative = checked(float, "a number of at least 0", lambda value: 0 <= value < math.inf)
fraction = checked(float, "a number from 0 to 1", lambda value: 0 <= value <= 1)


def add_data_arguments(add):
    """--data, --data-root, --image-size: for every script that reads images."""
    add("--data", type=not_empty, default="imagenet", metavar="PATH|NAME",
        help="folder with train/ and val/ (to pretrain: any folder of images), or one of "
             f"{', '.join(NAMED_SETS)}; shapes:N, clutter:N: of N images (default ./imagenet)")
    add("--data-root", type=not_empty, default="data", metavar="DIR",
        help="where cifar10, stl10 and imagenette are downloaded to (default ./data)")
    add("--image-size", type=count, nargs="+", metavar="PX",
        help="one side, or height and width, in pixels: multiples of 32, of 8 with a cifar stem "
             "(default: by --data)")


def add_run_arguments(add):
    """--precision, --workers, --seed, --log-every, --max-steps, --out: for all that train."""
    add("--precision", choices=("auto", "bf16", "fp16", "tf32", "fp32"), default="auto",
        help="auto (default): bf16; fp16 with a loss scaler on GPUs that lack it; fp32 on a CPU. "
             "fp32: float32 throughout; tf32: with TensorFloat-32 products (GPUs from 2020 on)")
    add("--workers", type=natural,
        help=f"loading processes a rank (default: its share of the cores, up to {MOST_WORKERS}; on "
             "a CPU 0)")
    add("--seed", type=natural, default=0,
        help="seed of weights, order and augmentation (default 0)")
    add("--log-every", type=count, default=10, metavar="STEPS",
        help="steps between log lines (default 10)")
    add("--max-steps", type=count, metavar="N",
        help="stop with a checkpoint after step N; schedules stay those of the whole run")
    add("--out", type=not_empty,
        help="run directory (default: under runs/); a run in it is resumed")


def use_recipe(args, names):
    """Fill in, by --data's recipe, which of `names` were not given; image_size: [height, width]."""
    recipe = recipe_of(args.data)
    for name in names:
        if getattr(args, name) is None:
            setattr(args, name, recipe[name])
    sides = args.image_size if isinstance(args.image_size, list) else [args.image_size]
    if len(sides) > 2:
        fail(f"--image-size takes one or two numbers, not {len(sides)}")
    args.image_size = [sides[0], sides[-1]]


# ----------------------------------------------------------------------------------------- printing
class Output(io.FileIO):
    """stdout or stderr. What nobody reads any more (`| head -1`, a closed terminal) is dropped.

    A full disk behind stdout is one line and exit code 1.
    """

    failed = False

    def write(self, content):
        try:
            return super().write(content)
        except OSError as error:
            unread = error.errno in (errno.EPIPE, errno.EIO)
            if self.fileno() == 1 and not unread and not self.failed:
                self.failed = True
                fail(f"cannot write to stdout: {error.strerror}", code=1)
            return len(content)


def keep_printing():
    """Printing ends no run: no stream that is closed, no reader that left, no name of odd bytes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  open until the end
        elif stream is getattr(sys, f"__{name}__"):
            stream.flush()
            file = io.BufferedWriter(Output(stream.fileno(), "w", closefd=False))
            errors = "backslashreplace" if stream.errors == "strict" else stream.errors
            setattr(sys, name, io.TextIOWrapper(
                file, stream.encoding, errors, line_buffering=stream.line_buffering,
                write_through=stream.write_through))


# ---------------------------------------------------------------------------------------------- Run
class Diverged(SystemExit):
    """A loss or a weight is not finite: unless caught, one line on stderr and exit code 1."""


class Run:
    """Ranks, device, precision, run directory, log and checkpoints of a script, as one object.

    `with Run(args, FREE) as run:` around all that a script does: should memory run out in it, what
    is done is saved, and the error is one line.
    rank, world: of torchrun. device, autocast, scaler: by the hardware and --precision. out: the
    directory. step: optimiser steps done, of `total`; training ends at `stop`. lines: what the log
    had before this start, on rank 0.
    """

    def __init__(self, args, free):
        """Join the ranks, pick device and precision, catch signals, open and lock args.out.

        free: names of arguments that may differ when a run is resumed. Fills in args.workers and
        args.precision. Exit code 2 for what does not work on this machine.
        """
        self.args, self.free, self.out = args, free, args.out
        self.step, self.saved, self.bar = 0, 0, None
        self.rank, self.world, self.device, cores = join_ranks()
        self.signals = catch_signals()
        if args.workers is None:
            args.workers = min(MOST_WORKERS, cores) if self.device.type == "cuda" else 0
        self.autocast, self.scaler = set_precision(args, self.device)
        with user_errors():
            if self.rank == 0 and self.out is not None:
                self.lock = open_directory(self.out)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """Out of memory: rank 0 saves the last whole step; one line and exit code 1.

        Ranks exchange nothing: the others may wait in the step that this one cannot make.
        """
        if error is None or not out_of_memory(error):
            return
        traceback.clear_frames(trace)  # and what the step had allocated
        if self.bar is not None:
            self.bar.close()
        smaller = "a smaller --batch-size"
        if hasattr(self.args, "accum_steps"):
            smaller += " or more --accum-steps"
        size = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
        text = f"out of memory{f' ({size[0].lower()})' if size else ''}: {smaller} needs less"
        if self.step:
            text += f", in another --out; {self.keep_last_step()}"
        rank = f"rank {self.rank}: " if self.world > 1 else ""
        fail(f"{self.out or 'bench'}: {rank}{text}", code=1, everywhere=True)

    def keep_last_step(self):
        """Save what is done, on rank 0, in the midst of a step that failed -> what is kept."""
        if self.rank == 0 and self.step > self.saved:
            model = self.parts["model"]
            model.zero_grad(set_to_none=True)
            try:
                for buffers, before in self.buffers if self.in_step else ():
                    torch._foreach_copy_(buffers, before)
                if is_finite(model) and all(map(torch.isfinite, self.meters.values())):
                    self.write_checkpoint("last")
                    self.saved = self.step
            except Exception as error:
                if not isinstance(error, OSError) and not out_of_memory(error):
                    raise
        return f"saved is step {self.saved} of {self.total}"

    def within(self, args):
        """A Run of the same ranks and device with other arguments, in args.out, a folder below."""
        other = copy.copy(self)
        other.args, other.out = args, args.out
        other.autocast, other.scaler = set_precision(args, self.device)
        with user_errors():
            if self.rank == 0:
                Path(args.out).mkdir(parents=True, exist_ok=True)
        return other

    def same_arguments(self):
        """Exit code 2 unless all ranks have the same arguments, except the free ones."""
        arguments = vars(self.args).items()
        same_on_all_ranks(**{name: value for name, value in arguments if name not in self.free})

    # ------------------------------------------------------------------------------- training
    def restore(self, parts, total, save_every, exports=None, defaults=None, **more):
        """Load `parts`, by name, from last.pth and begin the log -> steps done, 0 without a file.

        total: steps of the whole run. exports: modules whose weights are also written to files of
        their own, by file name. defaults: an argument's value in runs from before it existed.
        more: plain values for the checkpoint. Rank 0 reads for all, so that all resume from the
        same step. A checkpoint from before data_digest gets that of the images that are there.
        Exit code 2 when the file is damaged, or of a run in which another argument differs.
        """
        self.same_arguments()
        self.parts, self.exports, self.more = parts | {"scaler": self.scaler}, exports or {}, more
        path, checkpoint = Path(self.out) / "last.pth", None
        with user_errors():
            if self.rank == 0 and path.exists():
                checkpoint = load_last(path)
                check_same_run(path, checkpoint, vars(self.args), self.parts, self.free,
                               defaults or {})
                if "data_digest" not in checkpoint["args"]:
                    checkpoint["args"]["data_digest"] = self.args.data_digest
                    write_whole(path, as_bytes(torch.save, checkpoint))
                    note(f"{path}: did not say of which images it is, only of how many; now it is "
                         f"of those in {self.args.data}")
            elif self.rank == 0:
                check_nothing_lost(self.out, vars(self.args), self.free)
        if self.world > 1:
            handed_on = [checkpoint]
            dist.broadcast_object_list(handed_on, 0, device=torch.device("cpu"))
            checkpoint = handed_on[0]
        self.step, self.known = 0, ()
        if checkpoint is not None:
            for name, part in self.parts.items():
                part.load_state_dict(checkpoint[name])
            self.step, self.known = checkpoint["step"], checkpoint["unreadable"]
            with self.writing():
                if self.rank == 0:
                    self.write_exports()  # they may be gone, or of a later step
        self.total, self.save_every, self.saved = total, save_every, self.step
        self.stop = min(total, self.args.max_steps or total)
        self.lines = self.begin_log()
        self.bar = tqdm(total=self.stop, initial=self.step, unit="step",
                        disable=self.rank > 0 or None)
        self.shown = {}
        return self.step

    def batches(self, stream, batch_size, accum_steps=1, collate=collate, numbers=stream_batches):
        """Yields each step's number and its batches, one per accumulation step, from `step` on.

        All ranks end together: at `stop`, on a signal, or when data cannot be read on any of them.
        Then the last step is saved, and an error is reported in one line with exit code 2.
        """
        self.batch_size, self.unreadable = batch_size, Unreadable(stream, self.known)
        buffers = list(self.parts["model"].buffers())  # statistics, counts; and before each step
        by_type = [[buffer for buffer in buffers if buffer.dtype == dtype]
                   for dtype in {buffer.dtype for buffer in buffers}]
        self.buffers = [(some, [buffer.clone() for buffer in some]) for some in by_type]
        self.in_step = False
        self.logged, self.logged_at = self.step, time.perf_counter()
        sampler = numbers(self.step, self.stop, batch_size, self.rank, self.world, accum_steps)
        loaded = load_batches(stream, sampler, self.args.workers, self.device, collate)
        failure = None
        for step in range(self.step, self.stop):
            batches = []
            try:
                for _ in range(accum_steps):
                    batches.append(next(loaded))
            except (InputError, OSError) as error:
                failure = error
            if max_over_ranks(bool(self.signals) or failure is not None):
                break
            for *_, bad in batches:
                self.unreadable.note(bad)
            # as they are before a step: one that fails has moved them already
            for buffers, before in self.buffers:
                torch._foreach_copy_(before, buffers)  # one launch for all of a type
            self.in_step = True
            yield step, [batch[:-1] for batch in batches]
        self.bar.close()
        self.save()
        with user_errors():
            if failure is not None:
                raise failure

    def after(self, done, meters, keep=None, **fields):
        """Log and save after step `done`, when due. Every rank calls this.

        meters: scalars on the device, by name, averaged over the ranks for the log; fields: what
        else the log's line holds; keep: name of a checkpoint of this step that stays. Diverged when
        meters, weights or statistics are not finite, checked before each line and checkpoint.
        """
        self.step, self.meters, self.in_step = done, meters, False
        self.bar.update()
        if done % self.args.log_every == 0 or done == self.total:
            values, unreadable = self.check()
            now, images = time.perf_counter(), (done - self.logged) * self.batch_size
            seconds, self.logged, self.logged_at = now - self.logged_at, done, now
            rate = round(images / seconds, 2) if seconds > 0 else None  # a clock that stands still
            memory = memory_gib(self.device)
            speed = {"images/s": rate, "memory_gib": memory and round(memory, 2)}
            self.log({"step": done, **fields, **values, **speed, "unreadable": unreadable})
            self.show(**{name: f"{value:.3f}" for name, value in values.items()})
        if keep:
            self.save(keep)
        if done % self.save_every == 0 or done == self.stop:
            self.save()

    def check(self):
        """-> the last step's meters as floats, averaged, and how many images are unreadable.

        Diverged unless meters, parameters and floating-point buffers are finite.
        """
        values = average(self.meters)
        finite = is_finite(self.parts["model"]) and all(map(math.isfinite, values.values()))
        if max_over_ranks(not finite):
            text = ", ".join(f"{name} {value:g}" for name, value in values.items())
            message = (f"error: {self.out}: step {self.step}: loss or weights not finite ({text}); "
                       "the last good checkpoint stays; try a smaller learning rate")
            raise Diverged(message if self.rank == 0 else 1)
        return values, self.unreadable.count()

    def save(self, name="last"):
        """Write exports and checkpoint, from rank 0; exit code 1 if the disk fails."""
        if name == "last" and self.step == self.saved:
            return
        self.check()
        with self.writing():
            if self.rank == 0:
                self.write_checkpoint(name)
        if name == "last":
            self.saved = self.step

    def write_checkpoint(self, name):
        """Write the exports, then NAME.pth: a step in last.pth has all files. Rank 0 alone."""
        self.write_exports()
        state = {part: self.parts[part].state_dict() for part in self.parts}
        state |= {"step": self.step, "args": vars(self.args),
                  "unreadable": sorted(self.unreadable.known)}
        write_whole(f"{self.out}/{name}.pth", as_bytes(torch.save, state | self.more))

    def write_exports(self):
        """Write the weights that have files of their own. Rank 0 alone."""
        for file, module in self.exports.items():
            weights = {key: value.cpu() for key, value in module.state_dict().items()}
            write_whole(f"{self.out}/{file}", as_bytes(torch.save, weights))

    def unfinished(self):
        """Why training ended before its last step, and what to type next; "" at its end."""
        most, where = self.args.max_steps, f"{self.out}: step {self.step} of {self.total}"
        if most and self.step > most:
            return f"{where}: already beyond --max-steps {most}"
        if self.step == self.total:
            return ""
        if self.step == most:
            return (f"{where}: as --max-steps says; with a larger one, or without it, the same "
                    "command resumes it")
        return f"{where}: stopped, the same command resumes it"

    # -------------------------------------------------------------------------------- scoring
    def in_order(self, source, transform, what, batch_size=SCORING_BATCH, collate=collate,
                 replace=False):
        """This rank's share of a data set, once, in order: yields collate's batches, less `bad`.

        A signal ends it early, after the same number of batches on all ranks: ask `stopping`. Exit
        code 2 if an image cannot be read; with `replace` the next one takes the place of an image
        that cannot be decoded, as in training, which names it.
        """
        stream = Stream(source, transform, self.args.seed, len(source), shuffle=False)
        unreadable = Unreadable(stream)
        share, size = range(self.rank, len(source), self.world), max(1, batch_size // self.world)
        numbers = [share[i:i + size] for i in range(0, len(share), size)]
        loaded = load_batches(stream, numbers, self.args.workers, self.device, collate)
        most = max_over_ranks(len(numbers))  # other ranks may have one more
        for _ in tqdm(range(most), desc=what, leave=False, disable=self.rank > 0 or None):
            with user_errors():
                batch = next(loaded, None)
            if self.stopping():
                return
            if batch is not None:
                if not replace:
                    unreadable.note(batch[-1])
                yield batch[:-1]
        if unreadable.count():
            fail(f"{what} cannot be scored without the images named above")

    def stopping(self):
        """Whether a signal has asked any rank to stop. Every rank calls this."""
        return bool(max_over_ranks(bool(self.signals)))

    # ----------------------------------------------------------------------- output, and the end
    def write(self, name, state):
        """Write a file of the directory by torch.save, from rank 0; exit code 1 if the disk fails.

        Whole or not at all, serialised in memory before the file is touched.
        """
        with self.writing():
            if self.rank == 0:
                write_whole(f"{self.out}/{name}", as_bytes(torch.save, state))

    def writing(self):
        """Where files are written: a disk that refuses is one line and exit code 1 on all ranks."""
        return user_errors(1, f"cannot write to {self.out} (what was there before stays): ")

    def begin_log(self):
        """Begin log.jsonl, or cut it after `step`, and add a header -> lines kept, on rank 0."""
        path, kept = Path(self.out) / "log.jsonl", []
        with user_errors():
            if self.rank == 0:
                if path.exists():
                    lines = read_lines(path)
                    kept = [line for line in lines if "sha256" in line or
                            self.step and line.get("step", 0) <= self.step]  # scores stay
                    if len(lines) < path.read_bytes().count(b"\n"):
                        write_whole(f"{path}.damaged", path.read_bytes())
                        note(f"{path}: lines that cannot be read are left out; {path}.damaged is "
                             "as it was")
                header = {"args": vars(self.args), "steps": self.total, "resumed_at": self.step,
                          **versions(self.world, self.device)}
                text = "".join(json.dumps(line) + "\n" for line in [*kept, header])
                write_whole(path, text.encode())
        return kept

    def log(self, fields):
        """Append a line to log.jsonl, from rank 0; exit code 1 if the disk refuses."""
        path = Path(self.out) / "log.jsonl"
        with user_errors(1, f"cannot write {path} (what was there before stays): "):
            if self.rank == 0:
                with open(path, "a+b") as file:
                    end = file.seek(0, os.SEEK_END)
                    file.seek(max(0, end - 1))
                    if file.read() not in (b"", b"\n"):  # a disk was full within a line
                        file.write(b"\n")
                    file.write(json.dumps(fields).encode() + b"\n")

    def show(self, **texts):
        """Add texts to those beside the progress bar."""
        self.shown |= texts
        self.bar.set_postfix(self.shown, refresh=False)

    def finish(self, message):
        """Print the last lines, on rank 0, and leave the ranks."""
        if self.rank == 0:
            print(message)
        leave_ranks()


# --------------------------------------------------------------------- compiler, precision, signals
def check_compiler(device):
    """InputError unless torch.compile works on this machine, tried on a sine: nothing of ours."""
    try:
        torch.compile(torch.sin)(torch.ones(8, device=device))
    except Exception as error:  # compilers, headers, Triton, caches: whatever a machine may lack
        reason = [line for line in str(error).splitlines() if line.strip()]
        raise InputError(f"--compile: torch.compile does not work here ({reason[0][:200]}); it "
                         "needs a C++ compiler, on a GPU Triton too; leave --compile out") from None


def set_precision(args, device):
    """Resolve --precision auto -> autocast context and gradient scaler, idle where not needed."""
    if args.precision in ("fp16", "tf32") and device.type == "cpu":
        fail(f"--precision {args.precision} needs a GPU: use bf16 or fp32 on a CPU")
    if args.precision == "tf32" and torch.cuda.get_device_capability(device) < (8, 0):
        fail(f"--precision tf32: {torch.cuda.get_device_name(device)} lacks it, use fp16 or fp32")
    if args.precision == "auto" and device.type == "cpu":
        args.precision = "fp32"
    elif args.precision == "auto":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        args.precision = "bf16" if bf16 else "fp16"
    # torch's own default is TF32 in convolutions alone
    torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = args.precision == "tf32"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.precision)
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
    return autocast, torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")


def catch_signals():
    """-> a list, empty until one of STOP_SIGNALS asks to save and stop; a second ends at once.

    SIGHUP, of a terminal that closes, stays ignored where nohup has had it ignored.
    """
    received = []

    def handler(number, frame):
        received.append(number)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    for number in STOP_SIGNALS:
        if signal.Signals(number).name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)
    return received


# ------------------------------------------------------------------------------------------- memory
def out_of_memory(error):
    """Whether memory has run out: Python's, a GPU's, or a CPU's, of which only the text tells."""
    signs = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")
    text = isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    return text or isinstance(error, MemoryError)


def is_finite(module):
    """Whether a module's parameters and floating-point buffers are finite: waits once for all."""
    floats = [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]
    return bool(torch.stack(torch._foreach_norm(floats)).isfinite().all())


# ------------------------------------------------------------------------------------ the directory
OWN_FILES = ("last.pth", "encoder.pth", "epoch[0-9][0-9][0-9][0-9].pth", "classifier.pth",
             "log.jsonl", "subset.txt")


def load_last(path):
    """A run's checkpoint; what to do about a damaged one is part of its InputError."""
    try:
        return load_checkpoint(path)
    except InputError as error:
        raise InputError(f"{error}; a kept epochNNNN.pth can take its place, or another --out "
                         "begins anew") from None


def open_directory(out):
    """Create and lock the run directory, remove half-written files. -> the lock, to be kept."""
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; a run needs a directory")
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / "lock", "ab")  # noqa: SIM115  open as long as the run
    try:
        lock_file(lock)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise InputError(f"--out {out}: another process is running in this directory") from None
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        print(f"warning: {lock.name}: no locks here ({error.strerror}): no other run may use this "
              "directory", file=sys.stderr)
    for name in OWN_FILES:
        for leftover in out.glob(f"{name}.tmp"):
            if leftover.is_file():
                leftover.unlink()
    return lock


def lock_file(file):
    """Lock an open file for this process, or an OSError."""
    if fcntl is None:
        raise OSError(errno.ENOSYS, "not on this system")
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # POSIX: surviving workers hold nothing


def check_nothing_lost(out, now, free):
    """InputError when a run would begin over files that are not its own.

    now: its arguments, a dict; free: names of those that may differ. What a run with the same
    arguments has left before its first checkpoint is its own.
    """
    log = Path(out) / "log.jsonl"
    replaced = [file for name in OWN_FILES for file in Path(out).glob(name)]
    if log.exists() and log.stat().st_size:
        headers = [line["args"] for line in read_lines(log) if "args" in line]
        if not headers:
            raise InputError(f"{log}: not a run's log; choose another --out, or move it")
        then, now = headers[-1], json.loads(json.dumps(now))
        if all(then[name] == now[name] for name in {*then} & {*now} - {*free}):
            return
        replaced.remove(log)  # of a run that came to nothing, unless there is more
    if replaced:
        raise InputError(f"{replaced[0]}: not of a run that could go on, and would be replaced; "
                         "choose another --out, or move it")


def check_same_run(path, checkpoint, now, parts, free, defaults):
    """InputError unless this checkpoint belongs to a run with the arguments `now`, a dict."""
    keys = checkpoint if isinstance(checkpoint, dict) else ()
    missing = {"args", "step", "unreadable", *parts}.difference(keys)
    if missing:
        raise InputError(f"{path}: not a checkpoint of this script, without "
                         f"{', '.join(sorted(missing))}")
    then = defaults | checkpoint["args"]
    if now.get("init") and now["init_sha256"] is None:  # the file has gone
        now["init_sha256"] = then["init_sha256"] or "unknown"
    names = {name for name in {*then, *now} if then.get(name) != now.get(name)}
    digest = then.get("data_digest")
    if digest is None:  # of before there was one
        names.discard("data_digest")
    if None in (then.get("val_digest"), now.get("val_digest")):  # kNN may come and go
        names.discard("val_digest")
        now["val_digest"] = now.get("val_digest") or then.get("val_digest")  # on the same images
    places = [then["data"], now["data"]]
    folders = not any(place.partition(":")[0] in NAMED_SETS for place in places)
    moved = folders and len(set(map(os.path.realpath, places))) == 2
    if folders and (not moved or digest is not None and "data_digest" not in names):
        names.discard("data")
    changed = [f"{name} was {then.get(name)}, is {now.get(name)}"
               for name in sorted(names.difference(free))]
    if changed:
        raise InputError(f"{path}: of another run ({'; '.join(changed)}); repeat its arguments or "
                         "choose another --out")
    if moved:
        print(f"note: the data has moved from {then['data']} to {now['data']}", file=sys.stderr)
    check_state(path, checkpoint["model"], parts["model"].state_dict())


def as_bytes(save, *what):
    """What save(*what, file) writes, as bytes: serialised in memory before a file is touched."""
    buffer = io.BytesIO()
    save(*what, buffer)
    return buffer.getbuffer()


@contextlib.contextmanager
def whole_file(path):
    """A binary file to write to, whole or not at all: a temporary file, fsync, rename."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # of an attempt that failed


def write_whole(path, content):
    """Write bytes to a file, whole or not at all."""
    with whole_file(path) as file:
        file.write(content)


def read_lines(path):
    """The lines of a log, as dicts; others are left out, and one that was cut short."""
    lines = []
    for text in Path(path).read_text(encoding="utf-8-sig", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step", 0), int):
                lines.append(line)
    return lines


def versions(world, device):
    """What a log's first line says about the machine."""
    threads = f"CPU, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    return {"torch": torch.__version__, "torchvision": torchvision.__version__,
            "numpy": numpy.__version__, "world_size": world, "device": name}


def memory_gib(device):
    """Peak memory of this process so far, in GiB: of the GPU, else resident; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    if resource is None:
        return None
    unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20  # bytes on macOS, elsewhere KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# ------------------------------------------------------------------------------------------ loading
def load_batches(dataset, sampler, workers, device, collate_fn=collate):
    """Batches of a Stream; an InputError or OSError of whichever process reads is raised here.

    OSError too when a loading process dies, or cannot hand over what it has read.
    """
    if workers:
        check_sockets()
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=collate_fn,
                        pin_memory=device.type == "cuda", worker_init_fn=begin_loading)
    batches = iter(loader)
    processes = multiprocessing.active_children()
    atexit.register(kill_workers)
    default_signal_of_children()  # torch's handler raises in the midst of a step
    while True:
        try:
            batch = next(batches, None)
        except RuntimeError as error:
            raise as_loading_error(error, processes) from None
        if batch is None:
            return
        if isinstance(batch, Failed):
            raise batch.error
        yield batch


def check_sockets():
    """InputError unless batches can be handed over: by a socket in the folder for temporary files.

    A name that is too long for a socket would only be found out in a loading process, whose batch
    would then be waited for without end.
    """
    try:
        multiprocessing.connection.Listener().close()
    except OSError as error:
        raise InputError(f"TMPDIR {tempfile.gettempdir()}: loading processes need a socket there "
                         f"({error}); set a shorter one, or give --workers 0") from None


def begin_loading(worker):
    """In a loading process: the main process decides when to stop. A batch that is lost ends it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end_loading)


def end_loading(error, batch):
    """What cannot be handed over, Python drops, and the main process would wait for it."""
    print(f"warning: a loading process cannot hand over a batch: {error}", file=sys.stderr,
          flush=True)
    os._exit(1)


def as_loading_error(error, processes):
    """A RuntimeError of the loader as the OSError that it means, or itself."""
    ends = [process.exitcode for process in processes if process.exitcode is not None]
    advice = "fewer --workers need less; in a container, give it more (--shm-size, --ipc=host)"
    if "shared memory" in str(error):
        reason = str(error).strip().splitlines()[-1].removeprefix("RuntimeError: ")
        return OSError(f"{reason}: {advice}")
    if ends:
        cause = f"by {signal.Signals(-ends[0]).name}" if ends[0] < 0 else f"with code {ends[0]}"
        return ChildProcessError(f"a loading process was ended {cause}: is memory short, or shared "
                                 f"memory (/dev/shm)? {advice}")
    return error


def default_signal_of_children():
    """The end of a child process interrupts nothing."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def kill_workers():
    """At exit after a slip: workers ignore the SIGTERM after which Python waits for them."""
    default_signal_of_children()  # torch would complain
    for worker in multiprocessing.active_children():
        worker.kill()


class Unreadable:
    """Images that could not be decoded, each named once with the reason; too many end the run."""

    def __init__(self, dataset, known=()):
        self.dataset, self.known = dataset, set(known)

    def note(self, bad):
        """Take in a batch's pairs of an image's index and why it cannot be decoded."""
        for index, reason in bad:
            if index not in self.known:
                self.known.add(index)
                print(f"warning: cannot read {file_of(self.dataset.source, index)} ({reason}), "
                      "taking the next image", file=sys.stderr)

    def count(self):
        """Return how many, over all ranks; every rank calls this. Exit code 2 above 1 % and one."""
        self.known = set().union(*gather(self.known))
        images = len(self.dataset.source)
        if len(self.known) > max(1, images / 100):
            fail(f"{len(self.known)} of {images} images cannot be read: mend those named above")
        return len(self.known)
