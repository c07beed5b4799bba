"""Pretrain an encoder with CARE.

  torchrun --nproc_per_node 8 train.py --arch resnet50    the paper's 100-epoch run on ./imagenet
  python train.py --data shapes                           minutes on a CPU, no download

The same command again resumes. Several nodes: torchrun's own flags. A run leaves in --out
encoder.pth (plain torchvision keys, what evaluation needs), last.pth (what resuming needs) and
log.jsonl.
"""
import contextlib
import math
import time
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
from tqdm import tqdm

from care import ARCHS, CARE, METHODS, POSITIONS, TAPS, InputError, save_encoder, tau_at
from data import (NAMED_SETS, RECIPES, Stream, TwoViews, augment, describe, open_images,
                  stream_batches)
from knn import knn, open_labelled
from run import (Unreadable, add_data_arguments, add_run_arguments, agree, as_bytes, average,
                 catch_signals, check_finite, check_ranges, checkpoint_of, fail, load_batches,
                 memory_gib, new_parser, open_log, open_run, parallelise, restore,
                 same_on_all_ranks, set_precision, setup_ranks, use_recipe, user_errors,
                 write_line, write_whole)

# What may differ when a run is resumed: speed, place and output, never the mathematics.
FREE = ("data_root", "workers", "compile", "out", "save_every", "keep_epochs", "log_every",
        "max_steps", "knn_every", "knn_images")
MODEL_ARGS = ("arch", "image_size", "method", "blocks", "heads", "position", "tap", "detach_trunk",
              "lambda_att", "hidden_dim", "stem")
RECIPE_ARGS = ("arch", "stem", "image_size", "blocks", "hidden_dim", "tau_base", "epochs",
               "warmup_epochs", "batch_size", "base_lr", "crop_min", "knn_every", "knn_images")


# ---------------------------------------------------------------------------------------- arguments
def add_arguments(parser):
    """The flags of pretraining; --data, --image-size and those on running stand in run.py.

    Without a default here, the recipe of --data decides: RECIPES in data.py.
    """
    paper = RECIPES["folder"]

    def by_data(name):
        return f"(default: by --data; the paper's {paper[name]} for a folder)"

    add = parser.add_argument_group("data").add_argument
    add_data_arguments(add)
    add("--augment", choices=("device", "worker"), default="device",
        help="make the views batched on the device, or one by one in a worker (the reference)")
    add("--crop-min", type=float,
        help=f"smallest crop, a share of the image; small images want more {by_data('crop_min')}")

    add = parser.add_argument_group("method").add_argument
    add("--arch", choices=ARCHS, help=f"encoder, Tables 1-3 {by_data('arch')}")
    add("--stem", choices=("imagenet", "cifar"),
        help="cifar: 3x3 convolution, no max-pooling, for small images (default: by --data)")
    add("--method", choices=METHODS, default="care",
        help="care: two streams; sequential: one (Sec. 4.3); byol: the C-stream alone (Fig. 4)")
    add("--lambda-att", type=float, default=100.0, help="lambda of Eq. (5), Table 6 (default 100)")
    add("--blocks", type=int, help=f"attention blocks n, Table 7 {by_data('blocks')}")
    add("--heads", type=int, default=4, help="attention heads (default 4, the release's)")
    add("--position", choices=POSITIONS, default="relative",
        help="position encoding, Table 8 (default relative)")
    add("--tap", choices=TAPS,
        help="map that the T-stream reads: conv4 (release, default) or conv5 (Fig. 2)")
    add("--detach-trunk", action="store_true",
        help="keep the T-stream's gradients out of the encoder (Sec. 3.3 read literally)")
    add("--hidden-dim", type=int,
        help=f"width of projectors and predictors {by_data('hidden_dim')}")
    add("--tau-base", type=float,
        help="momentum coefficient at the start, Sec. 4.1. The paper's 0.99 is made for 125,000 "
             "steps; a run of some hundred learns earlier with 0.9 to 0.6: tried on shapes, "
             "(1 - tau) x steps of 150 and 300 did alike, 75 worse, 10 far worse "
             f"{by_data('tau_base')}")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int,
        help=f"passes over the images; the paper's are 100, 200, 400, 800 {by_data('epochs')}")
    add("--warmup-epochs", type=float,
        help="linear warm-up from 1e-6 (default: the paper's 10, of short runs a tenth)")
    add("--batch-size", type=int,
        help=f"pairs a step, over all ranks and accumulation steps {by_data('batch_size')}")
    add("--accum-steps", type=int, default=1,
        help="parts, one after the other, of each rank's batch, to save memory (default 1)")
    add("--base-lr", type=float,
        help=f"peak learning rate per 256 images of a batch {by_data('base_lr')}")
    add("--momentum", type=float, default=0.9, help="of SGD (default 0.9)")
    add("--weight-decay", type=float, default=1e-4, help="on all parameters (default 1e-4)")

    add = parser.add_argument_group("running").add_argument
    add_run_arguments(add)
    add("--compile", action="store_true",
        help="torch.compile both branches (for one GPU or a CPU)")
    add("--save-every", type=int, default=1000, metavar="STEPS",
        help="between checkpoints (default 1000)")
    add("--keep-epochs", type=int, default=0, metavar="N",
        help="keep each N-th epoch's checkpoint (default 0: none)")
    add("--knn-every", type=int, metavar="EPOCHS",
        help="between top-1 scores of kNN (k = 20) on val, the first before the first step; needs "
             "labels; 0: never (default: by --data; 0 for a folder)")
    add("--knn-images", type=int, metavar="N",
        help="labelled training images that kNN compares with (default: by --data; 50,000 for a "
             "folder: on ImageNet, every 10 epochs, val and these are 100,000 images beside 12.8 "
             "million pairs of views, 0.8 %% of what is read and less of what is computed)")


def parse_args(argv=None):
    """The command line as a namespace; a mistake in it is one line on stderr and exit code 2."""
    parser = new_parser(__doc__)
    add_arguments(parser)
    return fill_in(parser.parse_args(argv))


def fill_in(args):
    """Fill in the defaults that depend on other arguments, and check that all fit together."""
    use_recipe(args, RECIPE_ARGS)
    if args.warmup_epochs is None:
        args.warmup_epochs = min(10, args.epochs / 10)
    if args.tap is None:
        args.tap = "conv5" if args.method == "sequential" else "conv4"
    if args.out is None:
        args.out = default_out(args)
    check_ranges(args)
    if args.method == "sequential" and (args.tap == "conv4" or args.detach_trunk):
        fail("--method sequential always reads conv5: leave out --tap conv4 and --detach-trunk")
    if args.warmup_epochs >= args.epochs:
        fail(f"--warmup-epochs {args.warmup_epochs:g}: must be below --epochs {args.epochs}")
    return args


def default_out(args):
    """runs/shapes, runs/shapes_byol, ..., or of a folder runs/care_resnet50, ..."""
    name = args.data.partition(":")[0]
    if name not in NAMED_SETS:
        return f"runs/{args.method}_{args.arch}"
    return f"runs/{name}" if args.method == "care" else f"runs/{name}_{args.method}"


def recipe_flags(args):
    """The recipe that runs, as flags that one could type."""
    flags = [f"--data {args.data}"]
    for name in RECIPE_ARGS:
        value = getattr(args, name)
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        flags.append(f"--{name.replace('_', '-')} {text}")
    return " ".join(flags)


def ending(args, done, total_steps, scores):
    """The last lines of a run: where it stands, its kNN scores by step, what to type next."""
    step = f"step {done} of {total_steps}"
    if done < total_steps:
        if args.max_steps and done > args.max_steps:
            return f"{step}: already beyond --max-steps {args.max_steps}"
        if done == args.max_steps:
            return (f"{step}: as --max-steps says; with a larger one, or without it, the same "
                    "command goes on")
        return f"{step}: stopped, the same command goes on"
    lines = [f"{step}: encoder in {args.out}/encoder.pth"]
    if scores:  # where there are labels
        first, last = min(scores), max(scores)
        before = "random encoder" if first == 0 else f"after step {first}"
        lines.append(f"kNN top-1 on val: {scores[first]:.1f} {before}, {scores[last]:.1f} after "
                     f"step {last}")
        lines.append(f"next: python linear_eval.py --data {args.data} --pretrained "
                     f"{args.out}/encoder.pth")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------- schedule
def lr_at(step, total_steps, warmup_steps, peak):
    """Learning rate of step 0, 1, ...: linear from 1e-6 to peak, then a cosine to 0 (Sec. 4.1)."""
    if step < warmup_steps:
        return 1e-6 + (peak - 1e-6) * step / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


# ---------------------------------------------------------------------------------- model, the step
def new_model(args, device):
    """-> CARE, channels last on the device and compiled if asked for, and its optimiser."""
    model = CARE(**{name: getattr(args, name) for name in MODEL_ARGS})
    model = model.to(device, memory_format=torch.channels_last)
    if args.compile:
        model.online.compile()
        model.momentum.compile()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0, momentum=args.momentum,
                                weight_decay=args.weight_decay)
    return model, optimizer


def make_views(batch, device, mode):
    """A batch of TwoViews -> the two views, (B, 3, H, W) each, normalised, channels last."""
    crops, parameters = batch[0]  # (B, 2, 3, H, W), (B, 2, 9)
    views = []
    for view, drawn in zip(crops.to(device, non_blocking=True).unbind(1), parameters.unbind(1)):
        if mode == "device":
            view = augment(view, drawn)
        views.append(view.contiguous(memory_format=torch.channels_last))
    return views


def pretrain_step(model, optimizer, scaler, autocast, batches, views_of, lr, tau):
    """One optimiser and momentum step; views_of(batch) gives a batch's x1, x2, (B, 3, H, W) each.

    -> losses, summed over both view orders, and mean stds: scalars on the device, by name.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    meters = {}
    for number, batch in enumerate(batches, 1):
        x1, x2 = views_of(batch)
        for x, y in ((x1, x2), (x2, x1)):  # one order at a time: only its activations are alive
            last = number == len(batches) and x is x2
            wait = not last and hasattr(model, "no_sync")  # ranks exchange gradients once a step
            with model.no_sync() if wait else contextlib.nullcontext():
                with autocast:
                    out = model(x, y)
                scaler.scale(out["loss"] / len(batches)).backward()
            for name, value in out.items():
                terms = 2 * len(batches) if name.startswith("std") else len(batches)
                meters[name] = meters.get(name, 0) + value.detach() / terms
    scaler.step(optimizer)
    scaler.update()
    getattr(model, "module", model).update_momentum(tau)
    return meters


def save(args, rank, done, parts, unreadable, name="last"):
    """Write encoder.pth, then the checkpoint NAME.pth: a step that last.pth holds has all files."""
    with user_errors(1, f"cannot write to {args.out} (what was there before stays): "):
        if rank == 0:
            encoder = parts["model"].online.encoder
            write_whole(f"{args.out}/encoder.pth", as_bytes(save_encoder, encoder))
            model_args = {name: getattr(args, name) for name in MODEL_ARGS}
            content = checkpoint_of(args, done, parts, unreadable, model_args=model_args)
            write_whole(f"{args.out}/{name}.pth", content)


# --------------------------------------------------------------------------------------------- main
def main(argv=None):
    args = parse_args(argv)
    signals = catch_signals()
    rank, world, device = setup_ranks(args)
    autocast, scaler = set_precision(args, device)

    # data
    where = {"data_root": args.data_root, "size": max(args.image_size)}
    source, bank, val = None, None, None
    with user_errors():
        if rank == 0:  # one rank downloads
            lock = open_run(args.out)  # noqa: F841  held until the process ends
            source = open_images(args.data, "pretrain", download=True, **where)
    with user_errors():
        if rank > 0:
            source = open_images(args.data, "pretrain", **where)
        args.images = len(source)
        least = world * args.accum_steps
        if args.batch_size % least or args.batch_size < 2 * least:
            raise InputError(f"--batch-size {args.batch_size}: must be a multiple of {world} ranks "
                             f"x {args.accum_steps} accumulation steps, with at least 2 images for "
                             "each")
        if args.images < args.batch_size:
            raise InputError(f"{args.data}: {args.images} images, fewer than --batch-size "
                             f"{args.batch_size}")
        if args.knn_every:
            bank, val = open_labelled(args, args.knn_images)
    same_on_all_ranks(**{name: value for name, value in vars(args).items() if name not in FREE})
    if rank == 0:
        print(f"recipe: {recipe_flags(args)}\n{describe(source)}", flush=True)

    # model, and where an earlier run of the same command got to
    with user_errors():
        torch.manual_seed(args.seed)
        model, optimizer = new_model(args, device)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    start, known = restore(args.out, args, parts, FREE, defaults=vars(parse_args([])))
    steps_per_epoch = args.images // args.batch_size
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = round(args.warmup_epochs * steps_per_epoch)
    stop = min(total_steps, args.max_steps or total_steps)
    peak_lr = args.base_lr * args.batch_size / 256
    knn_steps = args.knn_every * steps_per_epoch

    two_views = TwoViews(args.image_size, args.augment, args.crop_min)
    stream = Stream(source, two_views, args.seed, steps_per_epoch * args.batch_size)
    sampler = stream_batches(start, stop, args.batch_size, rank, world, args.accum_steps)
    batches = load_batches(stream, sampler, args.workers, device)
    views_of = partial(make_views, device=device, mode=args.augment)
    unreadable = Unreadable(stream, known)

    model, parallel = parallelise(model, world, device)
    encoder = model.online.encoder
    log, lines = open_log(args.out, args, start, total_steps, world, device)
    scores = {line["step"]: line["knn"] for line in lines if "knn" in line}
    bar = tqdm(total=stop, initial=start, unit="step", disable=rank > 0 or None)
    run = SimpleNamespace(rank=rank, world=world, device=device, autocast=autocast,
                          stopping=signals)

    # the loop: kNN; lr, views, two half steps, optimiser, momentum update; log, save. The model
    # stays in train mode; kNN scores a copy.
    done, saved, meters, failure = start, start, {}, None
    logged_at, logged_step = time.time(), start
    for step in range(start, stop + 1):  # one turn more than steps: the last one only scores
        if knn_steps and step % knn_steps == 0 and not agree(step in scores):
            found = knn(run, args, encoder, bank, val, ks=(20,))
            if found is None:  # a signal
                break
            scores[step] = found["top1"]
            write_line(log, {"step": step, "epoch": step // steps_per_epoch, "knn": scores[step]})
        if step == stop:
            break

        micro_batches = []
        try:
            for _ in range(args.accum_steps):
                micro_batches.append(next(batches))
        except (InputError, OSError) as error:
            failure = error
        if agree(bool(signals) or failure is not None):
            break
        for _, _, bad in micro_batches:
            unreadable.note(bad)

        lr = lr_at(step, total_steps, warmup_steps, peak_lr)
        tau = tau_at(step + 1, total_steps, args.tau_base)
        meters = pretrain_step(parallel, optimizer, scaler, autocast, micro_batches, views_of,
                               lr=lr, tau=tau)
        done = step + 1
        bar.update()

        logging = done % args.log_every == 0 or done == total_steps
        scoring = knn_steps > 0 and done % knn_steps == 0  # it may be interrupted: save first
        saving = done % args.save_every == 0 or done == stop or scoring
        keeping = args.keep_epochs > 0 and done % (args.keep_epochs * steps_per_epoch) == 0
        if not (logging or saving or keeping):
            continue
        values = average(meters, world)
        check_finite(values, model, done)
        count = unreadable.count()
        if logging:
            seconds = time.time() - logged_at
            rate = (done - logged_step) * args.batch_size / seconds
            line = {"step": done, "epoch": round(done / steps_per_epoch, 4), "lr": lr, "tau": tau}
            speed = {"images/s": round(rate, 2), "memory_gib": round(memory_gib(device), 2)}
            write_line(log, line | values | speed | {"unreadable": count})
            logged_at, logged_step = time.time(), done
            shown = {name: f"{value:.3f}" for name, value in values.items()}
            if scores:
                shown["knn"] = f"{scores[max(scores)]:.1f}"
            bar.set_postfix(shown, refresh=False)
        if keeping:
            save(args, rank, done, parts, unreadable, f"epoch{done // steps_per_epoch:04d}")
        if saving:
            save(args, rank, done, parts, unreadable)
            saved = done
    bar.close()

    if done > saved:  # stopped between two checkpoints
        check_finite(average(meters, world), model, done)
        unreadable.count()
        save(args, rank, done, parts, unreadable)
    with user_errors():
        if failure is not None:
            raise failure
    if rank == 0:
        print(ending(args, done, total_steps, scores))
    if world > 1:
        dist.barrier()  # no rank takes the group away from one that is still in it
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
