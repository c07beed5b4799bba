"""Pretrain an encoder with CARE.

  torchrun --nproc_per_node 8 train.py --arch resnet50        the paper's 100-epoch run, ImageNet in ./imagenet
  python train.py --data shapes --arch resnet18 --epochs 4    minutes on a CPU, no download

The same command again resumes. Several nodes: torchrun's own flags. A run leaves in --out: last.pth (what
resuming needs), encoder.pth (plain torchvision keys, what evaluation needs) and log.jsonl.
"""
import argparse
import contextlib
import fcntl
import io
import json
import math
import os
import resource
import signal
import sys
import time
from functools import partial
from itertools import islice
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from care import ARCHS, CARE, METHODS, POSITIONS, TAPS, load_checkpoint, save_encoder, tau_at
from data import Stream, StreamSampler, TwoViews, augment, collate, open_images

# What may differ when a run is resumed: speed, place and output, never the mathematics.
FREE = ("data_root", "workers", "compile", "out", "save_every", "keep_epochs", "log_every", "max_steps")
MODEL_ARGS = ("arch", "image_size", "method", "blocks", "heads", "position", "tap", "detach_trunk", "lambda_att",
              "stem")
SIZES = {"cifar10": (32, "cifar"), "stl10": (96, "imagenet"), "shapes": (64, "imagenet")}  # pixels, stem


# ------------------------------------------------------------------------------------------ arguments
def parse_args(argv=None):
    """The command line as a namespace; a mistake in it is one line on stderr and exit code 2."""
    parser = new_parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add_data_arguments(add)
    add("--augment", choices=("device", "worker"), default="device",
        help="device: views batched on the device; worker: per image by torchvision, the reference")
    add("--crop-min", type=float, default=0.08, help="smallest crop, share of the image's area (default 0.08)")
    add = parser.add_argument_group("method").add_argument
    add("--arch", choices=ARCHS, default="resnet50", help="encoder (Tables 1-3)")
    add("--stem", choices=("imagenet", "cifar"), help="cifar: 3x3, no max-pooling; default by --data")
    add("--method", choices=METHODS, default="care", help="care: parallel streams; sequential: one stream, "
        "through the transformer (Sec. 4.3); byol: C-stream only (Fig. 4)")
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
    add("--compile", action="store_true", help="torch.compile both branches")
    add("--save-every", type=int, default=1000, metavar="STEPS", help="between checkpoints (default 1000)")
    add("--keep-epochs", type=int, default=0, metavar="N", help="keep every N-th epoch's checkpoint (default 0)")
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
    add("--data", default="imagenet", metavar="PATH|shapes|cifar10|stl10", help="a folder with train/ and val/ "
        "(to pretrain, any folder of images) or a named set; shapes:N has N training images")
    add("--data-root", default="data", help="where cifar10 and stl10 are downloaded to (default data)")
    add("--image-size", type=int, nargs="+", metavar="PX", help="one or two (height, width) multiples of 32, of "
        "8 with --stem cifar; default 224, cifar10 32, stl10 96, shapes 64")


def add_run_arguments(add):
    """--precision, --workers, --seed, --log-every, --max-steps, --out: for every script."""
    add("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto",
        help="auto: bf16 on a GPU that has it, fp16 with a gradient scaler on others, fp32 on a CPU")
    add("--workers", type=int, help="loading processes per rank (default: its share of cores, 8 at most; CPU 0)")
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
    """Exit code 2 unless these arguments, and two that all scripts have, are at least 1 (or not given)."""
    for name in (*names, "log_every", "max_steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")


def fail(message, code=2):
    """One line on stderr (from the first rank of each node) and out."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


@contextlib.contextmanager
def user_errors():
    """Setting up: a ValueError or OSError on any rank is one line and exit code 2 on all."""
    error = None
    try:
        yield
    except (ValueError, OSError) as caught:
        error = caught
    if agree(error is not None):
        fail(error or "another rank could not start")


# ---------------------------------------------------------------------------------------------- ranks
def setup_ranks():
    """Join the process group that torchrun's environment describes -> rank, world size, device.

    NCCL when every local rank has its own GPU, else gloo with device local rank modulo GPUs, or the CPU. Tensors
    on the CPU always go through gloo, so that agreeing on a flag does not wait for the device.
    """
    rank, world, local = (int(os.environ.get(name, default))
                          for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    gpus = torch.cuda.device_count()
    device = torch.device(f"cuda:{local % gpus}" if gpus else "cpu")
    if gpus:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if world > 1:
        own_gpu = gpus >= int(os.environ.get("LOCAL_WORLD_SIZE", world))
        dist.init_process_group("cpu:gloo,cuda:nccl" if own_gpu else "gloo")
    return rank, world, device


def agree(flag):
    """The largest of the ranks' integers; without torchrun, the integer itself."""
    if not dist.is_initialized():
        return int(flag)
    flag = torch.tensor(int(flag))
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return int(flag)


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


# ---------------------------------------------------------------------------------------- run directory
def open_run(out):
    """Create and lock the run directory, remove what an interrupted write left. -> the lock; keep it.

    A POSIX record lock belongs to this process alone: worker processes that outlive it do not hold it.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / "lock", "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--out {out}: another process is running in this directory") from None
    for leftover in out.glob("*.tmp"):
        leftover.unlink()
    return lock


def load_run(out, args, free=FREE):
    """The checkpoint to go on from, or None. ValueError when an argument that is not `free` differs."""
    path = Path(out) / "last.pth"
    if not path.exists():
        return None
    checkpoint = load_checkpoint(path)
    if not isinstance(checkpoint, dict) or "args" not in checkpoint:
        raise ValueError(f"{path}: not a checkpoint of this script; choose another --out")
    then, now = checkpoint["args"], vars(args)
    names = [name for name in sorted({*then, *now} - {*free}) if then.get(name) != now.get(name)]
    if names:
        changed = "; ".join(f"{name} was {then.get(name)}, is {now.get(name)}" for name in names)
        raise ValueError(f"{path}: of another run ({changed}); repeat its arguments or choose another --out")
    return checkpoint


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


def open_log(path, step, header):
    """Open a JSONL log to go on after `step`: later and broken lines are cut. -> file"""
    kept = []
    if step and Path(path).exists():
        for line in Path(path).read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                if json.loads(line).get("step", 0) <= step:
                    kept.append(line + "\n")
    write_whole(path, lambda buffer: buffer.write("".join(kept).encode()))
    log = open(path, "a")
    write_line(log, header | ({"resumed_at": step} if step else {}))
    return log


def write_line(log, fields):
    """Append one JSON line."""
    log.write(json.dumps(fields) + "\n")
    log.flush()


def versions(world, device):
    """What a log's first line says about the machine."""
    threads = f"CPU, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    return {"torch": torch.__version__, "torchvision": torchvision.__version__, "numpy": numpy.__version__,
            "world_size": world, "device": name}


def catch_signals():
    """SIGTERM, SIGINT and SIGUSR1 ask for a checkpoint and a clean end after the step; a second ends at once.

    -> a list that is empty until a signal came.
    """
    received = []

    def handler(number, frame):
        if received:
            os._exit(128 + number)
        received.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, handler)
    return received


def ignore_signals(worker):
    """In a worker process: the main process decides when to stop."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def load_batches(dataset, sampler, workers, device):
    """A DataLoader over a Stream, whose workers live as long as the run."""
    return DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=collate,
                      pin_memory=device.type == "cuda", worker_init_fn=ignore_signals)


def default_workers(args, device):
    """Fill in --workers: none when training on the CPU, which they would take from it."""
    if args.workers is None:
        share = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        args.workers = 0 if device.type == "cpu" else min(8, max(1, share))
    if args.workers < 0:
        fail(f"--workers {args.workers}: must be at least 0")


class Unreadable:
    """Images that could not be decoded, each named once on stderr; too many end the run."""

    def __init__(self, dataset, known=()):
        self.dataset, self.known = dataset, set(known)

    def note(self, batch):
        """Take in the third entry of a collated batch -> the batch."""
        for index in batch[2]:
            if index not in self.known:
                self.known.add(index)
                print(f"warning: cannot read {self.dataset.name(index)}, taking the next image", file=sys.stderr)
        return batch

    def count(self):
        """How many over all ranks, each of which must call this. Exit code 2 beyond 1 %, and beyond one."""
        if dist.is_initialized():
            known = [None] * dist.get_world_size()
            dist.all_gather_object(known, self.known)
            self.known = set().union(*known)
        images = len(self.dataset.source)
        if len(self.known) > max(1, images / 100):
            fail(f"{len(self.known)} of {images} images cannot be read: mend or remove those named above")
        return len(self.known)


# ----------------------------------------------------------------------------------------------- steps
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
    """One optimiser step and one momentum update over `accum_steps` pairs of views. -> meters, on the device.

    model: CARE, bare or in DistributedDataParallel. Losses are summed over both view orders, stds averaged.
    """
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


def average(meters, world):
    """Meters on the device -> floats, averaged over the ranks. Waits for the device."""
    values = torch.stack(list(meters.values())).float()
    if world > 1:
        dist.all_reduce(values)
    return dict(zip(meters, (values / world).tolist()))


def memory_gib(device):
    """Peak memory of this process so far, in GiB: of the GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def weights_finite(model):
    """Whether every weight is finite. Waits for the device."""
    return bool(torch.stack(torch._foreach_norm(list(model.parameters()))).isfinite().all())


def save_files(out, **writers):
    """Write NAME.pth by `writers[NAME](buffer)` from rank 0, each file whole or not at all.

    When the disk refuses, every rank stops with exit code 1 and the earlier files stay.
    """
    error = None
    try:
        if not dist.is_initialized() or dist.get_rank() == 0:
            for name, save in writers.items():
                write_whole(Path(out) / f"{name}.pth", save)
    except OSError as caught:
        error = caught
    if agree(error is not None):
        fail(f"cannot write to {out} ({error}); the previous checkpoint is still there", code=1)


# ------------------------------------------------------------------------------------------------ main
def main(argv=None):
    args = parse_args(argv)
    stopping = catch_signals()
    rank, world, device = setup_ranks()
    autocast, scaler = set_precision(args, device)
    default_workers(args, device)
    if args.batch_size % (world * args.accum_steps) or args.batch_size < 2 * world * args.accum_steps:
        fail(f"--batch-size {args.batch_size}: must be a multiple of {world} ranks x {args.accum_steps} "
             "accumulation steps, with at least 2 images for each")

    # data, model, and where an earlier run of the same command got to
    with user_errors():
        if rank == 0:
            lock = open_run(args.out)  # held until the process ends
            open_images(args.data, "pretrain", args.data_root, max(args.image_size), download=True)
    with user_errors():
        source = open_images(args.data, "pretrain", args.data_root, max(args.image_size))
        if len(source) < args.batch_size:
            raise ValueError(f"{args.data}: {len(source)} images, fewer than --batch-size {args.batch_size}")
        checkpoint = load_run(args.out, args)
        torch.manual_seed(args.seed)
        model_args = {name: getattr(args, name) for name in MODEL_ARGS}
        model = CARE(**model_args).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0,
                                momentum=args.momentum, weight_decay=args.weight_decay)
    start = 0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        start = checkpoint["step"]
    steps_per_epoch = len(source) // args.batch_size
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = round(args.warmup_epochs * steps_per_epoch)
    stop = min(total_steps, args.max_steps or total_steps)
    views = TwoViews(args.image_size, args.augment, args.crop_min)
    dataset = Stream(source, views, args.seed, steps_per_epoch * args.batch_size)
    sampler = StreamSampler(start, stop, args.batch_size, rank, world, args.accum_steps)
    unreadable = Unreadable(dataset, checkpoint["unreadable"] if checkpoint else ())

    if args.compile:
        model.online.compile()
        model.momentum.compile()
    parallel = model
    if world > 1:
        if device.type == "cuda":  # release: all but the transformer's batch norms are synchronised. here: all
            model = parallel = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        parallel = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    header = {"args": vars(args), "images": len(source), "steps": total_steps, **versions(world, device)}
    log = open_log(Path(args.out) / "log.jsonl", start, header) if rank == 0 else None
    bar = tqdm(total=stop, initial=start, unit="step", disable=None if rank == 0 else True)

    # the loop: views, two half steps, optimiser, momentum update, log, save
    batches = iter(load_batches(dataset, sampler, args.workers, device))
    logged_at, logged_step, done, stopped = time.time(), start, start, False
    for step in range(start, stop):
        lr = lr_at(step, total_steps, warmup_steps, args.base_lr * args.batch_size / 256)
        tau = tau_at(step + 1, total_steps, args.tau_base)
        step_batches = (unreadable.note(batch) for batch in islice(batches, args.accum_steps))
        pairs = (make_views(batch, device, args.augment) for batch in step_batches)
        meters = pretrain_step(parallel, optimizer, scaler, autocast, pairs, args.accum_steps, lr, tau)
        bar.update()

        done = step + 1
        stopped = bool(agree(bool(stopping)))
        logging = done % args.log_every == 0 or done == total_steps
        saving = done % args.save_every == 0 or done == stop or stopped
        keeping = args.keep_epochs > 0 and done % (args.keep_epochs * steps_per_epoch) == 0
        if not (logging or saving or keeping):
            continue
        values = average(meters, world)
        if not all(map(math.isfinite, values.values())) or not weights_finite(model):
            parts = ", ".join(f"{name} {value:g}" for name, value in values.items())
            fail(f"step {done}: loss or weights not finite ({parts}); the last good checkpoint stays", code=1)
        count = unreadable.count()
        if logging and rank == 0:
            rate = (done - logged_step) * args.batch_size / (time.time() - logged_at)
            write_line(log, {"step": done, "epoch": round(done / steps_per_epoch, 4), "lr": lr, "tau": tau,
                             **values, "images/s": round(rate, 1), "memory_gib": round(memory_gib(device), 2),
                             "unreadable": count})
            logged_at, logged_step = time.time(), done
            bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()}, refresh=False)
        if saving or keeping:
            checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done,
                          "scaler": scaler.state_dict(), "args": vars(args), "model_args": model_args,
                          "unreadable": sorted(unreadable.known)}
            kept = {f"epoch{done // steps_per_epoch:04d}": partial(torch.save, checkpoint)} if keeping else {}
            save_files(args.out, last=partial(torch.save, checkpoint),
                       encoder=partial(save_encoder, model.online.encoder), **kept)
        if stopped:
            break
    bar.close()

    if start >= stop:  # all was done before, but perhaps killed before the last file was written
        save_files(args.out, encoder=partial(save_encoder, model.online.encoder))
    if rank == 0:
        ending = "stopped, the same command goes on" if stopped else f"encoder in {args.out}/encoder.pth"
        print(f"step {done} of {total_steps}: {ending}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
