"""Time a pretraining step, by part, against a supervised step; or the loading.

  python bench.py --arch resnet50 --batch-size 128
                                              a step, on synthetic crops
  python bench.py --data ./imagenet --workers 4
                                              the input pipeline alone

Takes train.py's flags (those on saving, logging, --init, kNN and RankMe have
no effect; without --data nothing is read) and prints one line of JSON.
Efficiency is the step's FLOP/s over those of a supervised step of the same
encoder in the same process.
"""
import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from care import pool
from common.data import Stream, open_images, stream_batches
from common.ranks import fail, user_errors
from common.run import Run, load_batches, memory_gib, new_parser, versions
from common.views import TwoViews, draw
from train import add_arguments, fill_in, make_views, new_model, pretrain_step

ROUNDS = 5  # of which the median counts


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


def bench_step(run, args):
    """The speed of a step on synthetic crops, by part, and of a supervised step, as a dict."""
    device = run.device
    synchronize = torch.get_device_module(device).synchronize  # on a CPU, nothing to wait for
    with user_errors():
        model, optimizer = new_model(args, device)
    B, size = args.batch_size, tuple(args.image_size)
    crops = torch.randint(0, 256, (B, 2, 3, *size), dtype=torch.uint8, device=device)
    drawn = torch.tensor([[draw(size, 1.0, 0.0), draw(size, 0.1, 0.2)] for _ in range(B)])
    batch = ((crops, drawn), None, None)  # as collate gives it, without labels
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
    args = fill_in(parser.parse_args(argv))
    args.out = None  # no directory
    loading = any(flag.partition("=")[0] == "--data" for flag in argv)
    with Run(args, ()) as run:
        if run.world > 1:
            fail("bench.py measures one process: run it without torchrun")
        print(json.dumps(bench_data(run, args) if loading else bench_step(run, args)))


if __name__ == "__main__":
    main()
