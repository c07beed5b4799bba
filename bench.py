"""Time a pretraining step, by part, against a supervised step; or the loading.

  python bench.py --arch resnet50 --batch-size 128
                                              a step, on synthetic crops
  python bench.py --data ./imagenet --workers 4
                                              the input pipeline alone
  python bench.py --memory                    memory of a GPU, by encoder and
                                              precision
  python bench.py --roofline --precision bf16
                                              the least time on an H100

Takes train.py's flags, except --accum-steps and --augment (those on saving,
logging, --init, kNN and RankMe have no effect; without --data nothing is read),
and prints one line of JSON.
Efficiency is the step's FLOP/s over those of a supervised step of the same
encoder in the same process. --memory prints a table: what torch's allocator
holds at most in a step with DDP. It and --roofline also work on a GPU that
does not exist (tests/pretended_gpu.py).
"""
import json
import math
import statistics
import sys
import time
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from care import pool
from common.data import Stream, open_images, stream_batches
from common.ranks import fail, leave_ranks, parallelise, user_errors
from common.run import Run, load_batches, memory_gib, new_parser, set_precision, versions
from common.views import TwoViews, draw
from train import add_arguments, fill_in, make_views, new_model, pretrain_step

ROUNDS = 5  # of which the median counts
PAIRS = 128  # a GPU's, of the paper's 1024 on 8
ENCODERS = ("resnet50", "resnet101", "resnet152", "resnet50w2")  # of --memory
CARDS = (16, 32, 80)  # GiB
READ_TWICE = {  # how many of the first arguments, by two kernels
    "aten::native_batch_norm": 1, "aten::native_batch_norm_backward": 2,
    "aten::convolution_backward": 1}
FLOPS, BANDWIDTH = 400e12, 0.85 * 3.35e12  # of an H100 a second, within reach: an assumption
BESIDE = 1.5  # GiB that CUDA, NCCL and cuDNN take beside the allocator: an assumption


def timed(step, synchronize):
    """Seconds that step() takes, the device's work included."""
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


def flops_of(step):
    """Floating-point operations of step(), counted by torch."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def synthetic(B, size, device):
    """A batch of B pairs of crops as train.py's loop has it, on the device."""
    crops = torch.randint(0, 256, (B, 2, 3, *size), dtype=torch.uint8, device=device)
    drawn = torch.tensor([[draw(size, 1.0, 0.0), draw(size, 0.1, 0.2)] for _ in range(B)])
    return (crops, drawn), None  # as collate gives it, without labels


def bench_step(run, args):
    """The speed of a step on synthetic crops, by part, and of a supervised step, as a dict."""
    device = run.device
    synchronize = torch.get_device_module(device).synchronize  # on a CPU, nothing to wait for
    with user_errors():
        model, optimizer = new_model(args, device)
    B, size = args.batch_size, tuple(args.image_size)
    batch = synthetic(B, size, device)
    marks = []  # (what begins, when)

    def mark(part):
        synchronize()
        marks.append((part, time.perf_counter()))

    def views_of(batch):
        mark("views")
        return make_views(batch, device, "device")

    def care_step():
        pretrain_step(model, optimizer, run, [batch], views_of, lr=1e-4, tau=0.99)
        mark("between steps")

    encoder = model.online.encoder
    if args.compile:
        encoder.compile()
    classifier = nn.Linear(encoder.dim5, 1000).to(device)
    weights = [*encoder.parameters(), *classifier.parameters()]
    supervised_optimizer = torch.optim.SGD(weights, lr=1e-4, momentum=0.9)
    images, _ = make_views(batch, device, "device")  # (B, 3, H, W)
    labels = torch.randint(0, 1000, (B,), device=device)

    def supervised_step():
        supervised_optimizer.zero_grad(set_to_none=True)
        with run.autocast:
            scores = classifier(pool(encoder(images)[1]))  # (B, 1000)
        run.scaler.scale(F.cross_entropy(scores.float(), labels)).backward()
        run.scaler.step(supervised_optimizer)
        run.scaler.update()

    flops = flops_of(care_step)
    care_step()  # now the optimiser has its momentum, and kernels are chosen
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    care_step()
    memory = memory_gib(device)
    supervised_flops = flops_of(supervised_step)
    seconds, supervised_seconds = [], []
    for _ in range(ROUNDS):  # in turns: the machine's speed may drift
        seconds.append(timed(care_step, synchronize))
        supervised_seconds.append(timed(supervised_step, synchronize))
    seconds = statistics.median(seconds)
    supervised_seconds = statistics.median(supervised_seconds)

    model.register_forward_pre_hook(lambda *_: mark("online forward"))
    model.momentum.register_forward_pre_hook(lambda *_: mark("momentum forward"))
    model.momentum.register_forward_hook(lambda *_: mark("online forward"))
    model.register_forward_hook(lambda *_: mark("backward"))
    optimizer.register_step_pre_hook(lambda *_: mark("optimiser"))
    optimizer.register_step_post_hook(lambda *_: mark("EMA"))
    marks.clear()
    for _ in range(ROUNDS):
        care_step()
    ms = {}
    for (part, start), (_, end) in zip(marks, marks[1:]):
        ms[part] = ms.get(part, 0) + 1000 * (end - start) / ROUNDS
    ms.pop("between steps")

    speed, supervised_speed = flops / seconds, supervised_flops / supervised_seconds
    return {
        "arch": args.arch, "batch_size": B, "image_size": size, "precision": args.precision,
        **versions(1, device), "pairs/s": B / seconds, "memory_gib": memory, "ms": ms,
        "tflop": flops / 1e12, "supervised images/s": B / supervised_seconds,
        "supervised tflop": supervised_flops / 1e12, "efficiency": speed / supervised_speed}


def step_memory(run, args, pairs, accum_steps=1, limit=None):
    """GiB that a step of so many pairs takes at most; infinite if it takes more than `limit`."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(run.device).total_memory / 2 ** 30
    torch.cuda.set_per_process_memory_fraction(min(1.0, (limit or total) / total))
    torch.cuda.reset_peak_memory_stats(run.device)
    views_of = partial(make_views, device=run.device, mode="device")
    torch.manual_seed(args.seed)  # the same views each time
    try:
        model, optimizer = new_model(args, run.device)
        parallel = parallelise(model, run.device)
        batches = [synthetic(pairs // accum_steps, tuple(args.image_size), run.device)
                   for _ in range(accum_steps)]
        for _ in range(2):  # the first makes the optimiser's momentum
            pretrain_step(parallel, optimizer, run, batches, views_of, lr=1e-4, tau=0.99)
    except torch.OutOfMemoryError:
        return math.inf
    return memory_gib(run.device)


def largest_batch(run, args, card, guess):
    """How many pairs, a multiple of 8, fit on a card of so many GiB. guess: where to look first."""
    def fits(eights):
        return step_memory(run, args, 8 * eights, limit=card - BESIDE) < math.inf

    eights = max(1, guess // 8)
    while eights and not fits(eights):
        eights -= 1
    while fits(eights + 1):
        eights += 1
    return 8 * eights


def bench_memory(run, args):
    """Print a row of a Markdown table for each encoder and precision."""
    if run.device.type != "cuda":
        fail("--memory needs a GPU, or tests/pretended_gpu.py")
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    columns = ["encoder", "precision", f"{PAIRS} pairs", f"2 x {PAIRS // 2}", f"{2 * PAIRS} pairs",
               *(f"pairs in {card} GiB" for card in CARDS)]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for args.arch in ENCODERS:
        for args.precision in ("bf16", "fp16", "fp32"):
            run.autocast, run.scaler = set_precision(args, run.device)
            one, halves, two = (step_memory(run, args, pairs, accum_steps) for pairs, accum_steps
                                in ((PAIRS, 1), (PAIRS, 2), (2 * PAIRS, 1)))
            a_pair = (two - one) / PAIRS
            most = [largest_batch(run, args, card, int((card - BESIDE - one) / a_pair) + PAIRS)
                    for card in CARDS]
            print(f"| {args.arch} | {args.precision} | {one:.1f} | {halves:.1f} | {two:.1f} | "
                  f"{' | '.join(map(str, most))} |", flush=True)
    leave_ranks()


class Roofline(TorchDispatchMode):
    """Counts, of all operations inside: bytes read and written, FLOP, and seconds on an H100.

    An operation takes as long as its bytes or its FLOP, whichever takes longer.
    """

    def __init__(self):
        super().__init__()
        self.bytes = self.flop = self.seconds = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if function.is_view or "empty" in function.name():
            return result
        again = args[:READ_TWICE.get(function.name(), 0)]
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result, again))
                   if isinstance(leaf, torch.Tensor)]
        moved = sum(min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
                    for tensor in tensors)
        count = flop_registry.get(function._overloadpacket, lambda *_, **__: 0)
        flop = count(*args, **kwargs or {}, out_val=result)
        self.bytes += moved
        self.flop += flop
        self.seconds += max(moved / BANDWIDTH, flop / FLOPS)
        return result


def bench_roofline(run, args):
    """The least time of a step of PAIRS pairs, as a dict."""
    torch.manual_seed(args.seed)
    model, optimizer = new_model(args, run.device)
    batch = synthetic(PAIRS, tuple(args.image_size), run.device)
    views_of = partial(make_views, device=run.device, mode="device")

    def step():
        pretrain_step(model, optimizer, run, [batch], views_of, lr=1e-4, tau=0.99)

    step()  # the optimiser's momentum is made
    with Roofline() as total:
        step()
    return {"arch": args.arch, "precision": args.precision, "batch_size": PAIRS,
            "GB": total.bytes / 1e9, "tflop": total.flop / 1e12, "ms": 1000 * total.seconds,
            "pairs/s": PAIRS / total.seconds}


def bench_data(run, args):
    """Pairs per second and worker that the input pipeline delivers, by --augment, as a dict."""
    with user_errors():
        source = open_images(args.data, "pretrain", args.data_root, max(args.image_size))
    workers, rates = max(1, args.workers or 1), {}
    for mode in ("worker", "device"):
        two_views = TwoViews(args.image_size, mode, args.crop_min)
        stream = Stream(source, two_views, args.seed, len(source))
        numbers = stream_batches(0, 20 * workers, 16)
        batches = load_batches(stream, numbers, workers, run.device)
        with user_errors():
            for _ in range(4 * workers):
                next(batches)
            start, count = time.perf_counter(), 0
            for batch in batches:
                count += len(batch[1])
        rates[mode] = count / (time.perf_counter() - start) / workers
    return {"data": args.data, "workers": workers, "pairs/s per worker": rates}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = new_parser(__doc__)
    add_arguments(parser)
    parser.add_argument("--memory", action="store_true",
        help="print the memory of a step instead, in GiB, for several encoders and precisions")
    parser.add_argument("--roofline", action="store_true",
        help=f"compute instead how long {PAIRS} pairs take an H100 at least")
    args = fill_in(parser.parse_args(argv))
    args.out = None  # no directory
    if args.accum_steps > 1 or args.augment == "worker":
        fail("bench.py times one part of a step, views on the device: leave out --accum-steps and "
             "--augment worker")
    loading = any(flag.partition("=")[0] == "--data" for flag in argv)
    with Run(args, ()) as run:
        if run.world > 1:
            fail("bench.py measures one process: run it without torchrun")
        if args.memory:
            bench_memory(run, args)
            return
        if args.roofline:
            bench = bench_roofline
        else:
            bench = bench_data if loading else bench_step
        print(json.dumps(bench(run, args)))


if __name__ == "__main__":
    main()
