"""The life of a run: flags, ranks, errors, precision, signals, checkpoints, log, loading.

It knows no model, no views and no protocol. A run's directory holds last.pth (what resuming needs,
written whole or not at all), log.jsonl (a line of arguments and versions, then one per logged step)
and lock (held by a live process). The same command again goes on where last.pth stands.
"""
import argparse
import atexit
import contextlib
import ctypes
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import resource
import signal
import sys
import warnings
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.utils.data import DataLoader

from care import Encoder, InputError, check_state, load_checkpoint, load_encoder
from data import NAMED_SETS, Failed, collate, file_of, recipe_of

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
MOST_WORKERS = 16  # loading processes per rank unless --workers asks for more
RANGES = {  # of every script's numeric flags; "(" and ")": the end itself is not allowed
    "(0, inf)": ("lr", "base_lr", "head_lr"),
    "(0, 1]": ("crop_min",),
    "[0, 1)": ("momentum",),
    "[0, 1]": ("tau_base", "query"),
    "[0, inf)": ("weight_decay", "lambda_att", "warmup_epochs", "seed", "workers", "keep_epochs",
                 "knn_every", "label", "samples", "seeds"),
    "[1, inf)": ("epochs", "iterations", "batch_size", "accum_steps", "image_size", "min_size",
                 "rois", "blocks", "heads", "hidden_dim", "save_every", "log_every", "max_steps",
                 "knn_images", "labels", "limit", "jobs"),
}


# -------------------------------------------------------------------------------------------- flags
def new_parser(doc):
    """An argument parser with a script's docstring as its description."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=form, allow_abbrev=False)
    parser.error = fail
    return parser


def add_data_arguments(add):
    """--data, --data-root, --image-size: for every script that reads images."""
    add("--data", default="imagenet", metavar="PATH|NAME",
        help="folder with train/ and val/ (to pretrain: any folder of images), or one of "
             f"{', '.join(NAMED_SETS)}; shapes:N, clutter:N: of N images (default ./imagenet)")
    add("--data-root", default="data", metavar="DIR",
        help="where cifar10, stl10 and imagenette are downloaded to (default ./data)")
    add("--image-size", type=int, nargs="+", metavar="PX",
        help="height, width: multiples of 32, of 8 with a cifar stem (default: by --data)")


def add_run_arguments(add):
    """--precision, --workers, --seed, --log-every, --max-steps, --out: for all that train."""
    add("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto",
        help="auto: bf16, fp16 with a scaler on GPUs that lack it, fp32 on a CPU")
    add("--workers", type=int,
        help=f"loading processes a rank; default: its share of the cores, up to {MOST_WORKERS}; "
             "0 on a CPU, whose training they would slow down")
    add("--seed", type=int, default=0, help="of weights, order and views (default 0)")
    add("--log-every", type=int, default=10, metavar="STEPS", help="between log lines (default 10)")
    add("--max-steps", type=int, metavar="N",
        help="stop with a checkpoint after step N; schedules stay those of the whole run")
    add("--out", help="run directory (default: under runs/); a run in it is resumed")


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


def check_ranges(args):
    """Exit code 2 unless every numeric argument that was given lies in its range."""
    for interval, names in RANGES.items():
        low, high = map(float, interval[1:-1].split(","))
        for name in names:
            given = getattr(args, name, None)
            for value in given if isinstance(given, (list, tuple)) else [given]:
                if value is None:
                    continue
                above = value > low or (value == low and interval.startswith("["))
                below = value < high or (value == high and interval.endswith("]"))
                if not (above and below):
                    fail(f"--{name.replace('_', '-')} {value}: must lie in {interval}")


def fail(message, code=2):
    """One line on stderr (from the first rank of each node) and out."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


# -------------------------------------------------------------------------------------------- ranks
def setup_ranks(args):
    """Join torchrun's process group -> rank, world, device. Fills in args.workers.

    NCCL where every rank has a GPU of its own, else gloo. Exit code 2 when the launcher's variables
    are incomplete or its port is taken.
    """
    wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in wanted if name not in os.environ]
    if missing and ("RANK" in os.environ or "WORLD_SIZE" in os.environ):
        fail(f"started as a rank, but without {', '.join(missing)}: use torchrun, or set all of "
             f"{', '.join(wanted)} (and LOCAL_RANK)")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", local_rank % gpus) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    else:
        keep_memory()
    mine = own_hardware(device)
    ranks = join(rank, world, mine) if world > 1 else [mine]
    if args.workers is None:
        args.workers = min(MOST_WORKERS, share_of_cores(ranks, rank)) if gpus else 0
    return rank, world, device


def join(rank, world, mine):
    """Enter the process group. mine: this rank's hardware -> every rank's, by rank."""
    try:
        store, _, _ = next(dist.rendezvous("env://"))
    except dist.DistNetworkError as error:
        reason = str(error).splitlines()[0][:120]
        fail(f"rank {rank}: no meeting ({reason}); does another run use MASTER_PORT?")
    store.set(f"care/{rank}", json.dumps(mine))
    ranks = [json.loads(store.get(f"care/{other}")) for other in range(world)]
    backend = choose_backend([other["gpu"] for other in ranks])
    if backend == "gloo" and mine["gpu"] and rank == 0:
        print(f"warning: {world} ranks share GPUs: they speak over gloo, slowly", file=sys.stderr)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return ranks


def choose_backend(gpus):
    """NCCL, with gloo for the CPU, where each rank's GPU, by its UUID, is its own; else gloo."""
    own = None not in gpus and len(set(gpus)) == len(gpus)
    return "cpu:gloo,cuda:nccl" if own else "gloo"


def own_hardware(device):
    """This process's host, the cores on which it may run, and its GPU, if any, by its UUID."""
    limited = hasattr(os, "sched_getaffinity")  # elsewhere a process may run on every core
    cores = sorted(os.sched_getaffinity(0)) if limited else list(range(os.cpu_count()))
    gpu = torch.cuda.get_device_properties(device).uuid if device.type == "cuda" else None
    return {"host": os.uname().nodename, "cores": cores, "gpu": gpu and str(gpu)}


def share_of_cores(ranks, rank):
    """A rank's cores, divided by the ranks of its host that may use them too.

    torchrun's ranks share all of the node's, Slurm's tasks have their own.
    """
    mine = ranks[rank]
    sharing = [other for other in ranks if other["host"] == mine["host"]
               and not set(other["cores"]).isdisjoint(mine["cores"])]
    return max(1, len(mine["cores"]) // len(sharing))


def keep_memory():
    """Let glibc keep freed memory for the next step: fresh pages take a third of a CPU's step."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large tensor
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing goes back to the system


def agree(flag):
    """The largest of the ranks' integers; without torchrun, the integer itself."""
    flag = torch.tensor(int(flag))
    if dist.is_initialized():
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return int(flag)


def gather(value):
    """Every rank's value, by rank; each must call this. Without torchrun, a list of the one."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def is_rank_0():
    """Whether this process prints, reads checkpoints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


@contextlib.contextmanager
def user_errors(code=2, what=""):
    """A mistake in the input, or a refusal of the system, on any rank: one line, and all ranks end.

    Only InputError and OSError: a slip is a traceback. Inside, ranks exchange nothing else.
    """
    message = None
    try:
        yield
    except (InputError, OSError) as error:
        message = f"{what}{error}"
    if agree(message is not None):  # one number a batch; texts are exchanged only if there is one
        messages = [one for one in gather(message) if one is not None]
        fail(messages[0], code)


def same_on_all_ranks(**facts):
    """Exit code 2, naming both values, unless all ranks have the same ones."""
    ranks = gather(facts)
    for name in facts:
        for rank, other in enumerate(ranks):
            if other[name] != ranks[0][name]:
                fail(f"{name}: rank 0 has {ranks[0][name]}, rank {rank} has {other[name]}")


def parallelise(model, world, device):
    """-> the model, its batch norms synchronised on GPUs, and what to call: itself, or its DDP."""
    if world == 1:
        return model, model
    if device.type == "cuda":
        # release: the transformer's batch norms are per GPU. here: all are synchronised
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions rename broadcast_buffers
        ddp = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False,
                                                  gradient_as_bucket_view=True)
    return model, ddp


# ------------------------------------------------------------------------------- precision, signals
def set_precision(args, device):
    """Resolve --precision auto -> autocast context and gradient scaler, idle where not needed."""
    if args.precision == "fp16" and device.type == "cpu":
        fail("--precision fp16 needs a GPU: use bf16 or fp32 on a CPU")
    if args.precision == "auto" and device.type == "cpu":
        args.precision = "fp32"
    elif args.precision == "auto":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        args.precision = "bf16" if bf16 else "fp16"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[args.precision]
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
    return autocast, torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")


def catch_signals():
    """-> a list, empty until one of STOP_SIGNALS asks to save and stop; a second ends at once."""
    received = []

    def handler(number, frame):
        received.append(number)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    for number in STOP_SIGNALS:
        signal.signal(number, handler)
    return received


def ignore_signals(worker):
    """In a worker process: the main process decides when to stop."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


# ------------------------------------------------------------------------------------ run directory
def open_run(out):
    """Create and lock the run directory, remove half-written files. -> the lock, to be kept."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / "lock", "w")  # noqa: SIM115  open as long as the run
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # POSIX: surviving workers hold nothing
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise InputError(f"--out {out}: another process is running in this directory") from None
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        print(f"warning: {lock.name}: no locks here ({error.strerror}): no other run may use this "
              "directory", file=sys.stderr)
    for leftover in out.glob("*.tmp"):
        leftover.unlink()
    return lock


def restore(out, args, parts, free, defaults):
    """Load `parts`, by name, from last.pth -> its step, 0 without one, and unreadable images.

    free: arguments that may differ. defaults: what an argument was before it existed. Rank 0 reads
    for all, so that no rank goes on from another step. Exit code 2 when the file is damaged, or of
    a run in which another argument differs.
    """
    path, checkpoint = Path(out) / "last.pth", None
    with user_errors():
        if is_rank_0() and path.exists():
            checkpoint = load_checkpoint(path)
            check_same_run(path, checkpoint, vars(args), parts, free, defaults)
    if dist.is_initialized():
        handed_on = [checkpoint]
        dist.broadcast_object_list(handed_on, 0, device=torch.device("cpu"))
        checkpoint = handed_on[0]
    if checkpoint is None:
        return 0, ()
    for name, part in parts.items():
        part.load_state_dict(checkpoint[name])
    return checkpoint["step"], checkpoint["unreadable"]


def check_same_run(path, checkpoint, now, parts, free, defaults):
    """InputError unless this checkpoint belongs to a run with the arguments `now`, a dict."""
    keys = checkpoint if isinstance(checkpoint, dict) else ()
    missing = {"args", "step", "unreadable", *parts}.difference(keys)
    if missing:
        raise InputError(f"{path}: not a checkpoint of this script, without "
                         f"{', '.join(sorted(missing))}")
    then = defaults | checkpoint["args"]
    names = {name for name in {*then, *now} if then.get(name) != now.get(name)}
    moved = names & {"data", "images"} == {"data"} and Path(now["data"]).is_dir()
    if moved and then["data"].partition(":")[0] not in NAMED_SETS:
        names.remove("data")
    changed = [f"{name} was {then.get(name)}, is {now.get(name)}"
               for name in sorted(names.difference(free))]
    if changed:
        raise InputError(f"{path}: of another run ({'; '.join(changed)}); repeat its arguments or "
                         "choose another --out")
    if moved and os.path.realpath(then["data"]) != os.path.realpath(now["data"]):
        print(f"note: the data has moved from {then['data']} to {now['data']}", file=sys.stderr)
    check_state(path, checkpoint["model"], parts["model"].state_dict())


def as_bytes(save, *what):
    """What save(*what, file) writes, as bytes: serialised in memory before a file is touched."""
    buffer = io.BytesIO()
    save(*what, buffer)
    return buffer.getbuffer()


def write_whole(path, content):
    """Write bytes to a file, whole or not at all: a temporary file, fsync, rename."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def checkpoint_of(args, step, parts, unreadable, **more):
    """A checkpoint's bytes: the state of `parts`, by name, what resuming needs, and `more`."""
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"step": step, "args": vars(args), "unreadable": sorted(unreadable.known), **more}
    return as_bytes(torch.save, state)


def open_encoder(pretrained, arch, stem, seed):
    """The encoder of --pretrained, and the sha256 of its tensors, whatever file they lie in."""
    if pretrained == "random":
        torch.manual_seed(seed)
        encoder = Encoder(arch or "resnet50", stem or "imagenet")
    else:
        encoder = load_encoder(pretrained, arch, stem)
    if getattr(encoder, "left_out", None) and is_rank_0():
        print(f"note: {pretrained}: left out {', '.join(encoder.left_out)}", file=sys.stderr)
    digest = hashlib.sha256()
    for name, tensor in encoder.state_dict().items():
        if not name.endswith("num_batches_tracked"):  # no feature depends on it; some files lack it
            digest.update(name.encode() + tensor.numpy().tobytes())
    return encoder, digest.hexdigest()


# ---------------------------------------------------------------------------------------------- log
def open_log(out, args, step, total_steps, world, device):
    """Begin log.jsonl, or cut it after `step`; add a header. -> path; on rank 0, lines kept."""
    path, kept = Path(out) / "log.jsonl", []
    with user_errors():
        if is_rank_0():
            if step and path.exists():
                kept = [line for line in read_lines(path) if line.get("step", 0) <= step]
            header = {"args": vars(args), "steps": total_steps, "resumed_at": step,
                      **versions(world, device)}
            text = "".join(json.dumps(line) + "\n" for line in [*kept, header])
            write_whole(path, text.encode())
    return path, kept


def read_lines(path):
    """The lines of a log, as dicts; one that was cut short is left out."""
    lines = []
    for text in Path(path).read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def write_line(path, fields):
    """Append one JSON line, on rank 0; every rank calls this. Exit code 1 if the disk refuses."""
    with user_errors(1, f"cannot write {path} (what was there before stays): "):
        if is_rank_0():
            with open(path, "a") as log:
                log.write(json.dumps(fields) + "\n")


def versions(world, device):
    """What a log's first line says about the machine."""
    threads = f"CPU, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    return {"torch": torch.__version__, "torchvision": torchvision.__version__,
            "numpy": numpy.__version__, "world_size": world, "device": name}


def memory_gib(device):
    """Peak memory of this process so far, in GiB: of the GPU, else resident (in Linux's unit)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def average(meters, world):
    """Scalars on the device, by name -> floats, averaged over the ranks. Waits for the device."""
    values = torch.stack([value.detach() for value in meters.values()]).float()
    if world > 1:
        dist.all_reduce(values)
    return dict(zip(meters, (values / world).tolist()))


def check_finite(values, model, step):
    """Exit code 1 unless averaged meters, parameters and floating-point buffers are finite."""
    floats = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    norms = torch.stack(torch._foreach_norm(floats))
    finite = bool(norms.isfinite().all()) and all(map(math.isfinite, values.values()))
    if agree(not finite):
        text = ", ".join(f"{name} {value:g}" for name, value in values.items())
        fail(f"step {step}: loss or weights not finite ({text}); the last good checkpoint stays",
             code=1)


# ------------------------------------------------------------------------------------------ loading
def load_batches(dataset, sampler, workers, device, collate_fn=collate):
    """Batches of a Stream; an InputError or OSError of whichever process reads is raised here."""
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=collate_fn,
                        pin_memory=device.type == "cuda", worker_init_fn=ignore_signals)
    atexit.register(kill_workers)
    for batch in loader:
        if isinstance(batch, Failed):
            raise batch.error
        yield batch


def kill_workers():
    """At exit after a slip: workers ignore the SIGTERM after which Python waits for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would complain
    for worker in torch.multiprocessing.active_children():
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
        """How many, over all ranks, each of which calls this. Exit code 2 beyond 1 % (and one)."""
        self.known = set().union(*gather(self.known))
        images = len(self.dataset.source)
        if len(self.known) > max(1, images / 100):
            fail(f"{len(self.known)} of {images} images cannot be read: mend those named above")
        return len(self.known)
