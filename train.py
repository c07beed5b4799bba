"""Pretrain an encoder with CARE.

  torchrun --nproc_per_node 8 train.py --arch resnet50        the paper's 100-epoch run on ./imagenet
  python train.py --data shapes --arch resnet18 --image-size 32 --batch-size 64 --epochs 8   on a CPU

The same command again resumes. Several nodes: torchrun's own flags. A run leaves in --out: last.pth (what
resuming needs), encoder.pth (plain torchvision keys, what evaluation needs) and log.jsonl.
"""
import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import io
import json
import math
import os
import resource
import signal
import statistics
import sys
import time
import warnings
from functools import partial
from itertools import islice
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from care import (ARCHS, CARE, METHODS, POSITIONS, TAPS, Encoder, InputError, check_state,
                  load_checkpoint, load_encoder, pool, save_encoder, tau_at)
from data import Stream, TwoViews, augment, collate, draw, file_of, open_images, stream_batches

# What may differ when a run is resumed: speed, place and output, never the mathematics.
FREE = ("data_root", "workers", "compile", "out", "save_every", "keep_epochs", "log_every", "max_steps")
MODEL_ARGS = "arch image_size method blocks heads position tap detach_trunk lambda_att stem".split()
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SIZES = {"cifar10": (32, "cifar"), "stl10": (96, "imagenet"), "shapes": (64, "imagenet")}  # pixels, stem


# ------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    """The command line as a namespace; a mistake in it is one line on stderr and exit code 2."""
    parser = new_parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add_data_arguments(add)
    add("--augment", choices=("device", "worker"), default="device", help="batched, or per image (reference)")
    add("--crop-min", type=float, default=0.08, help="smallest crop, share of the image (default 0.08)")
    add = parser.add_argument_group("method").add_argument
    add("--arch", choices=ARCHS, default="resnet50", help="encoder (Tables 1-3)")
    add("--stem", choices=("imagenet", "cifar"), help="cifar: 3x3, no max-pooling; default by --data")
    add("--method", choices=METHODS, default="care", help="two streams, one (Sec. 4.3), C alone (Fig. 4)")
    add("--lambda-att", type=float, default=100.0, help="lambda of Eq. (5), Table 6 (default 100)")
    add("--blocks", type=int, default=5, help="attention blocks n, Table 7 (default 5)")
    add("--heads", type=int, default=4, help="attention heads (default 4, the release's)")
    add("--position", choices=POSITIONS, default="relative", help="encoding, Table 8 (default relative)")
    add("--tap", choices=TAPS, help="map the T-stream reads: conv4 (release, default) or conv5 (Fig. 2)")
    add("--detach-trunk", action="store_true", help="no T-stream gradients into the encoder (Sec. 3.3)")
    add("--tau-base", type=float, default=0.99, help="momentum coefficient at the start (default 0.99)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=100, help="the paper's: 100, 200, 400 or 800 (default 100)")
    add("--warmup-epochs", type=float, help="linear warm-up from 1e-6; default min(10, epochs / 10)")
    add("--batch-size", type=int, default=1024, help="over all ranks and accumulation steps (default 1024)")
    add("--accum-steps", type=int, default=1, help="passes each rank's batch is cut into, to save memory")
    add("--base-lr", type=float, default=0.05, help="learning rate per 256 images of a batch (default 0.05)")
    add("--momentum", type=float, default=0.9, help="of SGD (default 0.9)")
    add("--weight-decay", type=float, default=1e-4, help="on all parameters (default 1e-4)")
    add = parser.add_argument_group("running").add_argument
    add_run_arguments(add)
    add("--compile", action="store_true", help="torch.compile both branches (for one GPU or a CPU)")
    add("--bench", nargs="?", const="step", choices=("step", "data"), help="time a step or data loading")
    add("--save-every", type=int, default=1000, metavar="STEPS", help="between checkpoints (default 1000)")
    add("--keep-epochs", type=int, default=0, metavar="N", help="keep each N-th epoch's checkpoint; 0: none")
    args = parser.parse_args(argv)
    args.tap = args.tap or ("conv5" if args.method == "sequential" else "conv4")
    set_size_and_stem(args)
    args.warmup_epochs = min(10, args.epochs / 10) if args.warmup_epochs is None else args.warmup_epochs
    args.out = args.out or f"runs/{args.method}_{args.arch}"
    positive(args, "epochs", "batch_size", "accum_steps", "save_every", "blocks", "heads")
    if args.method == "sequential" and (args.tap == "conv4" or args.detach_trunk):
        fail("--method sequential always reads conv5: leave out --tap conv4 and --detach-trunk")
    if not 0 < args.crop_min <= 1:
        fail(f"--crop-min {args.crop_min:g}: must lie between 0 and 1")
    if not 0 <= args.warmup_epochs < args.epochs:
        fail(f"--warmup-epochs {args.warmup_epochs:g}: must lie between 0 and --epochs {args.epochs}")
    return args


def new_parser(doc):
    """An argument parser with a script's docstring as its description."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    return parser


def add_data_arguments(add):
    """--data, --data-root, --image-size: for every script."""
    add("--data", default="imagenet", metavar="PATH|shapes|cifar10|stl10", help="folder with train/ and val/ "
        "(to pretrain: any folder of images) or a named set; shapes:N has N training images")
    add("--data-root", default="data", help="where cifar10 and stl10 are downloaded to (default data)")
    add("--image-size", type=int, nargs="+", metavar="PX", help="one or two (height, width) multiples of 32, "
        "of 8 with --stem cifar; default 224, cifar10 32, stl10 96, shapes 64")


def add_run_arguments(add):
    """--precision, --workers, --seed, --log-every, --max-steps, --out: for every script."""
    add("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto",
        help="auto: bf16 on a GPU that has it, fp16 with a gradient scaler on others, fp32 on a CPU")
    add("--workers", type=int, help="loading processes per rank (default: share of cores, at most 8; CPU 0)")
    add("--seed", type=int, default=0, help="fixes initial weights, order of samples and views (default 0)")
    add("--log-every", type=int, default=10, metavar="STEPS", help="between lines of log.jsonl (default 10)")
    add("--max-steps", type=int, metavar="N", help="stop with a checkpoint after step N; schedules unchanged")
    add("--out", help="run directory (default runs/...); a run in it is resumed")


def set_size_and_stem(args):
    """Fill in the defaults that depend on --data; image_size becomes (height, width)."""
    size, stem = SIZES.get(args.data.partition(":")[0], (224, "imagenet"))
    args.stem = args.stem or stem
    given = args.image_size or [size]
    if len(given) > 2:
        fail(f"--image-size takes one or two numbers, not {len(given)}")
    args.image_size = [given[0], given[-1]]


def positive(args, *names):
    """Exit code 2 unless these arguments, and those of all scripts, are large enough (or not given)."""
    bounds = dict.fromkeys((*names, "log_every", "max_steps"), 1) | {"seed": 0, "workers": 0}
    for name, least in bounds.items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")


def fail(message, code=2):
    """One line on stderr (from the first rank of each node) and out."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


# ----------------------------------------------------------------------------------------------- ranks
def setup_ranks(args):
    """Join torchrun's process group (NCCL if each local rank has a GPU, else gloo) -> rank, world, device.

    Fills in --workers: a share of the cores; none on a CPU, from whose training they would take them.
    """
    rank, world, local = (int(os.getenv(*x)) for x in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    gpus, local_world = torch.cuda.device_count(), int(os.getenv("LOCAL_WORLD_SIZE", world))
    device = torch.device(f"cuda:{local % gpus}" if gpus else "cpu")
    if gpus:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    else:
        keep_memory()
    if args.workers is None:
        args.workers = min(8, max(1, len(os.sched_getaffinity(0)) // local_world)) if gpus else 0
    if 0 < gpus < local_world and rank == 0:
        print(f"warning: {local_world} ranks see {gpus} GPUs: they speak over gloo, slowly", file=sys.stderr)
    if world > 1:  # gloo beside NCCL, for agree: on the CPU, no GPU wait
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus >= local_world else "gloo")
    return rank, world, device


def keep_memory():
    """Let glibc keep freed memory for the next step: on a CPU, fresh pages take a third of a step."""
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


@contextlib.contextmanager
def user_errors(code=2, what=""):
    """A ValueError or OSError on any rank is one line, the first such rank's, and all are out.

    Every rank enters and leaves this together.
    """
    error = None
    try:
        yield
    except (ValueError, OSError) as caught:
        error = caught
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    first = world - agree(world - rank if error else 0)  # `world` where there is none
    if rank == first:
        print(f"error: {what}{error}", file=sys.stderr, flush=True)
    if first < world:
        raise SystemExit(code)


def on_rank_0(write, file, what):
    """Rank 0 runs write(file, what); every rank calls this. Where the disk refuses, all exit with 1."""
    with user_errors(1, f"cannot write {file} (what was there before stays): "):
        if not dist.is_initialized() or dist.get_rank() == 0:
            write(file, what)


def parallelise(model, world, device):
    """-> the model, its batch norms synchronised on GPUs, and what to call: itself, or DDP around it."""
    if world == 1:
        return model, model
    if device.type == "cuda":  # release: the transformer's batch norms are per GPU. here: all synchronised
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions of torch rename broadcast_buffers
        return model, DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def set_precision(args, device):
    """Resolve --precision auto in place -> autocast context, gradient scaler (idle unless fp16)."""
    if args.precision == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        args.precision = "fp32" if device.type == "cpu" else "bf16" if bf16 else "fp16"
    if args.precision == "fp16" and device.type == "cpu":
        fail("--precision fp16 needs a GPU: use bf16 or fp32 on a CPU")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[args.precision]
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
    return autocast, torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")


def catch_signals():
    """-> a list, empty until SIGTERM, SIGINT or SIGUSR1 asks to save and stop; a second one ends at once."""
    received = []

    def handler(number, frame):
        received.append(number)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    for number in STOP_SIGNALS:
        signal.signal(number, handler)
    return received


# --------------------------------------------------------------------------------------- run directory
def open_run(out):
    """Create and lock the run directory, remove what an interrupted write left. -> the lock; keep it."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / "lock", "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # POSIX: workers that outlive us do not hold it
    except BlockingIOError:
        raise InputError(f"--out {out}: another process is running in this directory") from None
    for leftover in out.glob("*.tmp"):
        leftover.unlink()
    return lock


def restore(out, args, parts, free=FREE):
    """Load `parts`, by name, from the run's last.pth -> its step, 0 without one, and unreadable images.

    Exit code 2 when the file is damaged or of a run in which an argument that is not `free` differs.
    """
    path, now = Path(out) / "last.pth", vars(args)
    with user_errors():
        if not path.exists():
            return 0, ()
        checkpoint = load_checkpoint(path)
        keys = checkpoint if isinstance(checkpoint, dict) else ()
        missing = {"args", "step", "unreadable", *parts}.difference(keys)
        if missing:
            raise InputError(f"{path}: not a checkpoint of this script, without {', '.join(sorted(missing))}")
        then = checkpoint["args"]
        changed = [f"{name} was {then.get(name)}, is {now.get(name)}"
                   for name in sorted({*then, *now} - {*free}) if then.get(name) != now.get(name)]
        if changed:
            raise InputError(f"{path}: of another run ({'; '.join(changed)}); repeat its arguments or choose "
                             "another --out")
        check_state(path, checkpoint["model"], parts["model"].state_dict())
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        return checkpoint["step"], checkpoint["unreadable"]


def open_encoder(pretrained, arch, stem, seed):
    """The encoder of --pretrained and its file's sha256 (random: None). ValueError as of load_encoder."""
    if pretrained == "random":
        torch.manual_seed(seed)
        return Encoder(arch or "resnet50", stem or "imagenet"), None
    return load_encoder(pretrained, arch, stem), hashlib.sha256(Path(pretrained).read_bytes()).hexdigest()


def write_whole(path, save):
    """Write a file whole or not at all: save(buffer) in memory, then a temporary file, fsync, rename."""
    buffer = io.BytesIO()
    save(buffer)
    temporary = Path(f"{path}.tmp")
    with open(temporary, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_run(path, args, step, parts, unreadable, **more):
    """Write a checkpoint, whole or not at all: the state of `parts`, what resuming needs, and `more`."""
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"step": step, "args": vars(args), "unreadable": sorted(unreadable.known), **more}
    on_rank_0(write_whole, path, partial(torch.save, state))


def open_log(out, args, step, total_steps, world, device):
    """Begin log.jsonl or, after step 0, cut later and broken lines off it; add a header. -> its path"""
    path, lines = Path(out) / "log.jsonl", []
    header = {"args": vars(args), "steps": total_steps, **versions(world, device)}
    with user_errors():
        for line in path.read_text().splitlines() if step and path.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):
                if json.loads(line).get("step", 0) <= step:
                    lines.append(line)
        lines.append(json.dumps(header | ({"resumed_at": step} if step else {})))
        if not dist.is_initialized() or dist.get_rank() == 0:
            write_whole(path, lambda buffer: buffer.write(("\n".join(lines) + "\n").encode()))
    return path


def write_line(path, fields):
    """Append one JSON line."""
    with open(path, "a") as log:
        log.write(json.dumps(fields) + "\n")


def versions(world, device):
    """What a log's first line says about the machine."""
    cpu = f"CPU, {torch.get_num_threads()} threads"
    return dict(torch=torch.__version__, torchvision=torchvision.__version__, numpy=numpy.__version__,
                world_size=world, device=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu)


def memory_gib(device):
    """Peak memory of this process so far, in GiB: of the GPU, else resident (in Linux's unit)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


# --------------------------------------------------------------------------------------------- loading
def load_batches(dataset, sampler, workers, device):
    """A DataLoader over a Stream, whose workers live as long as the run."""
    return DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=collate,
                      pin_memory=device.type == "cuda", worker_init_fn=ignore_signals)


def ignore_signals(worker):
    """In a worker process: the main process decides when to stop."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Unreadable:
    """Images that could not be decoded, each named once on stderr; too many end the run."""

    def __init__(self, dataset, known=()):
        self.dataset, self.known = dataset, set(known)

    def note(self, batch):
        """Take in the third entry of a collated batch -> the batch."""
        for index in batch[2]:
            if index not in self.known:
                self.known.add(index)
                file = file_of(self.dataset.source, index)
                print(f"warning: cannot read {file}, taking the next image", file=sys.stderr)
        return batch

    def count(self):
        """How many over all ranks, each of which must call this. Exit code 2 beyond 1 %, and beyond one."""
        if dist.is_initialized():
            known = [None] * dist.get_world_size()
            dist.all_gather_object(known, self.known)
            self.known = set().union(*known)
        images = len(self.dataset.source)
        if len(self.known) > max(1, images / 100):
            fail(f"{len(self.known)} of {images} images cannot be read: mend those named above")
        return len(self.known)


# ----------------------------------------------------------------------------------------------- steps
def new_model(model_args, args, device):
    """-> CARE(**model_args), channels last on the device and compiled if asked for, and its optimiser."""
    model = CARE(**model_args).to(device, memory_format=torch.channels_last)
    if args.compile:
        model.online.compile()
        model.momentum.compile()
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.SGD(trained, lr=0.0, momentum=args.momentum, weight_decay=args.weight_decay)


def lr_at(step, total_steps, warmup_steps, peak):
    """Learning rate of step 0, 1, ...: linear from 1e-6 to `peak`, then a cosine to 0 (Sec. 4.1)."""
    if step < warmup_steps:
        return 1e-6 + (peak - 1e-6) * step / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))


def make_views(batch, device, mode):
    """A collated batch of TwoViews -> the two views, (B, 3, height, width), normalised, channels last."""
    crops, parameters = batch[0]
    views = crops.to(device, non_blocking=True).unbind(1)
    if mode == "device":
        views = [augment(view, p) for view, p in zip(views, parameters.unbind(1))]
    return [view.contiguous(memory_format=torch.channels_last) for view in views]


def pretrain_step(model, optimizer, scaler, autocast, pairs, accum_steps, lr, tau):
    """One optimiser and momentum step on pairs of views -> losses, summed over both orders, and mean stds."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    meters = {}
    for i, (x1, x2) in enumerate(pairs):
        for x, y in ((x1, x2), (x2, x1)):  # one order at a time: only its activations are alive
            last = i == accum_steps - 1 and x is x2  # ranks exchange gradients once, in the last backward
            with contextlib.nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():
                with autocast:
                    out = model(x, y)
                scaler.scale(out["loss"] / accum_steps).backward()
            for name, value in out.items():
                share = accum_steps * (2 if name.startswith("std") else 1)
                meters[name] = meters.get(name, 0) + value.detach() / share
    scaler.step(optimizer)
    scaler.update()
    getattr(model, "module", model).update_momentum(tau)
    return meters


def average(meters, model, step, world):
    """Meters on the device -> floats, averaged over the ranks. Waits for the device.

    Exit code 1 unless they and the model's weights are finite.
    """
    values = torch.stack([value.detach() for value in meters.values()]).float()
    if world > 1:
        dist.all_reduce(values)
    values = dict(zip(meters, (values / world).tolist()))
    norms = torch.stack(torch._foreach_norm(list(model.parameters())))
    if not all(map(math.isfinite, values.values())) or not norms.isfinite().all():
        parts = ", ".join(f"{name} {value:g}" for name, value in values.items())
        fail(f"step {step}: loss or weights not finite ({parts}); the last good checkpoint stays", code=1)
    return values


# ----------------------------------------------------------------------------------------------- bench
def bench_step(args, autocast, scaler, device):
    """One line of JSON: the speed of a step on synthetic crops, by part, beside a supervised step."""
    with user_errors():
        model, optimizer = new_model({name: getattr(args, name) for name in MODEL_ARGS}, args, device)
    size = tuple(args.image_size)
    crops = torch.randint(0, 256, (args.batch_size, 2, 3, *size), dtype=torch.uint8, device=device)
    parameters = torch.tensor([[draw(size, 1.0, 0.0), draw(size, 0.1, 0.2)] for _ in range(args.batch_size)])
    x1, _ = make_views([(crops, parameters)], device, "device")
    labels = torch.randint(0, 1000, (args.batch_size,), device=device)
    encoder = model.online.encoder
    if args.compile:
        encoder.compile()
    classifier = nn.Linear(encoder.dim5, 1000).to(device)
    weights = [*encoder.parameters(), *classifier.parameters()]
    supervised = torch.optim.SGD(weights, lr=1e-4, momentum=0.9)
    synchronize = torch.get_device_module(device).synchronize  # on a CPU there is nothing to wait for
    marks = []

    def mark(following):
        synchronize()
        marks.append((following, time.perf_counter()))

    def care_step():
        mark("views")
        pairs = [make_views([(crops, parameters)], device, "device")]
        pretrain_step(model, optimizer, scaler, autocast, pairs, 1, lr=1e-4, tau=0.99)
        mark("between steps")

    def supervised_step():
        supervised.zero_grad(set_to_none=True)
        with autocast:
            loss = F.cross_entropy(classifier(pool(encoder(x1)[1])).float(), labels)
        scaler.scale(loss).backward()
        scaler.step(supervised)
        scaler.update()

    def timed(step):
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        return time.perf_counter() - start

    with FlopCounterMode(display=False) as counter:
        care_step()
    care_step()  # now the optimiser has its momentum, and kernels are chosen
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    care_step()
    memory = memory_gib(device)
    with FlopCounterMode(display=False) as reference_counter:
        supervised_step()
    flops, reference_flops = counter.get_total_flops(), reference_counter.get_total_flops()
    times = [(timed(care_step), timed(supervised_step)) for _ in range(5)]  # in turns
    seconds, reference_seconds = map(statistics.median, zip(*times))
    model.register_forward_pre_hook(lambda *_: mark("online forward"))
    model.momentum.register_forward_pre_hook(lambda *_: mark("momentum forward"))
    model.momentum.register_forward_hook(lambda *_: mark("online forward"))
    model.register_forward_hook(lambda *_: mark("backward"))
    optimizer.register_step_pre_hook(lambda *_: mark("optimiser"))
    optimizer.register_step_post_hook(lambda *_: mark("EMA"))
    marks.clear()
    for _ in range(5):
        care_step()
    parts = {}
    for (name, start), (_, end) in zip(marks, marks[1:]):
        parts[name] = parts.get(name, 0) + 1000 * (end - start) / 5
    parts.pop("between steps")
    print(json.dumps({
        "arch": args.arch, "batch_size": args.batch_size, "image_size": size, "precision": args.precision,
        **versions(1, device), "pairs/s": args.batch_size / seconds, "memory_gib": memory, "ms": parts,
        "tflop": flops / 1e12, "supervised images/s": args.batch_size / reference_seconds,
        "supervised tflop": reference_flops / 1e12,
        "efficiency": (flops / seconds) / (reference_flops / reference_seconds)}))


def bench_data(args, device):
    """One line of JSON: pairs per second and worker that the input pipeline delivers, by --augment."""
    with user_errors():
        source = open_images(args.data, "pretrain", args.data_root, max(args.image_size))
    workers, rates = max(1, args.workers), {}
    for mode in ("worker", "device"):
        dataset = Stream(source, TwoViews(args.image_size, mode, args.crop_min), args.seed, len(source))
        batches = iter(load_batches(dataset, stream_batches(0, 20 * workers, 16), workers, device))
        for _ in range(4 * workers):
            next(batches)
        start, count = time.perf_counter(), 0
        for batch in batches:
            count += len(batch[1])
        rates[mode] = count / (time.perf_counter() - start) / workers
    print(json.dumps({"data": args.data, "workers": workers, "pairs/s per worker": rates}))


# ------------------------------------------------------------------------------------------------ main
def main(argv=None):
    args = parse_args(argv)
    rank, world, device = setup_ranks(args)
    autocast, scaler = set_precision(args, device)
    if args.bench:
        if world > 1:
            fail("--bench measures one process: run it without torchrun")
        bench_data(args, device) if args.bench == "data" else bench_step(args, autocast, scaler, device)
        return
    stopping = catch_signals()
    if args.batch_size % (world * args.accum_steps) or args.batch_size < 2 * world * args.accum_steps:
        fail(f"--batch-size {args.batch_size}: must be a multiple of {world} ranks x {args.accum_steps} "
             "accumulation steps, with at least 2 images for each")

    # data, model, and where an earlier run of the same command got to
    source = None
    with user_errors():
        if rank == 0:  # one rank downloads
            lock = open_run(args.out)  # held until the process ends
            source = open_images(args.data, "pretrain", args.data_root, max(args.image_size), download=True)
    with user_errors():
        source = source or open_images(args.data, "pretrain", args.data_root, max(args.image_size))
        args.images = len(source)
        if args.images < args.batch_size:
            raise InputError(f"{args.data}: {args.images} images, fewer than --batch-size {args.batch_size}")
        torch.manual_seed(args.seed)
        model_args = {name: getattr(args, name) for name in MODEL_ARGS}
        model, optimizer = new_model(model_args, args, device)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    start, known = restore(args.out, args, parts)
    steps_per_epoch = len(source) // args.batch_size
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = round(args.warmup_epochs * steps_per_epoch)
    stop = min(total_steps, args.max_steps or total_steps)
    views = TwoViews(args.image_size, args.augment, args.crop_min)
    dataset = Stream(source, views, args.seed, steps_per_epoch * args.batch_size)
    sampler = stream_batches(start, stop, args.batch_size, rank, world, args.accum_steps)
    unreadable = Unreadable(dataset, known)

    model, parallel = parallelise(model, world, device)
    log = open_log(args.out, args, start, total_steps, world, device)
    bar = tqdm(total=stop, initial=start, unit="step", disable=rank > 0 or None)

    # the loop: views, two half steps, optimiser, momentum update, log, save
    batches = map(unreadable.note, load_batches(dataset, sampler, args.workers, device))
    logged_at, logged_step, done = time.time(), start, start
    for step in range(start, stop):
        lr = lr_at(step, total_steps, warmup_steps, args.base_lr * args.batch_size / 256)
        tau = tau_at(step + 1, total_steps, args.tau_base)
        pairs = (make_views(batch, device, args.augment) for batch in islice(batches, args.accum_steps))
        meters = pretrain_step(parallel, optimizer, scaler, autocast, pairs, args.accum_steps, lr, tau)
        bar.update()

        done = step + 1
        stopped = bool(agree(bool(stopping)))
        logging = done % args.log_every == 0 or done == total_steps
        saving = done % args.save_every == 0 or done == stop or stopped
        keeping = args.keep_epochs > 0 and done % (args.keep_epochs * steps_per_epoch) == 0
        if not (logging or saving or keeping):
            continue
        values, count = average(meters, model, done, world), unreadable.count()
        if logging:
            rate = (done - logged_step) * args.batch_size / (time.time() - logged_at)
            line = {"step": done, "epoch": round(done / steps_per_epoch, 4), "lr": lr, "tau": tau, **values,
                    "images/s": round(rate, 2), "memory_gib": round(memory_gib(device), 2),
                    "unreadable": count}
            on_rank_0(write_line, log, line)
            logged_at, logged_step = time.time(), done
            bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()}, refresh=False)
        if saving or keeping:  # last.pth comes last: a step that it holds has all its files
            on_rank_0(write_whole, f"{args.out}/encoder.pth", partial(save_encoder, model.online.encoder))
            for name in [f"epoch{done // steps_per_epoch:04d}"] * keeping + ["last"]:
                save_run(f"{args.out}/{name}.pth", args, done, parts, unreadable, model_args=model_args)
        if stopped:
            break
    bar.close()

    if rank == 0:
        ending = "stopped, the same command goes on" if done < stop else f"encoder in {args.out}/encoder.pth"
        print(f"step {done} of {total_steps}: {ending}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
