"""Pretrain an encoder with CARE.

  torchrun --nproc_per_node 8 train.py --arch resnet50
                                  the paper's 100-epoch run on ./imagenet
  python train.py --data shapes   minutes on a CPU, no download

The same command again resumes. Several nodes: torchrun's own flags. A run
leaves in --out encoder.pth (plain torchvision keys, what evaluation needs),
last.pth (what resuming needs) and log.jsonl.

Sections, equations, tables and figures are those of arxiv.org/abs/2110.05340;
the release is the authors' code. The C-stream is the CNN's, the T-stream the
transformer's.
"""
import math
import shlex
from functools import partial
from pathlib import Path

import torch

from care import ARCHS, ATT_LOSSES, CARE, METHODS, POSITIONS, TAPS, InputError, tau_at
from common.data import (NAMED_SETS, RECIPES, Stream, describe, digest_of, open_images,
                         open_labelled)
from common.knn import knn, rankme
from common.ranks import max_over_ranks, fail, gradient_exchange, note, parallelise, user_errors
from common.run import (STOPPED, Run, add_data_arguments, add_run_arguments, check_compiler,
                        checked, count, fraction, natural, new_parser, not_empty, not_negative,
                        positive, use_recipe)
from common.views import TwoViews, augment
from common.weights import load_encoder, sha256_of_file, start_from

# What may differ when a run is resumed: speed, place and output, never the mathematics.
FREE = ("data_root", "workers", "compile", "out", "save_every", "keep_epochs", "log_every",
        "max_steps", "knn_every", "knn_images", "rank_every", "init")  # init: by its sha256
MODEL_ARGS = ("arch", "image_size", "method", "blocks", "heads", "position", "tap", "detach_trunk",
              "lambda_att", "att_loss", "hidden_dim", "stem")
RECIPE_ARGS = ("arch", "stem", "image_size", "blocks", "hidden_dim", "tau_base", "epochs",
               "warmup_epochs", "batch_size", "base_lr", "predictor_lr", "crop_min", "knn_every",
               "knn_images", "rank_every")


# ---------------------------------------------------------------------------------------- arguments
def add_arguments(parser):
    """The flags of pretraining; --data, --image-size and those on running: common/run.py.

    Without a default here, the recipe of --data decides: RECIPES in common/data.py.
    """
    paper = RECIPES["folder"]

    def by_data(name):
        return f"(default: by --data; the paper's {paper[name]} for a folder)"

    add = parser.add_argument_group("data").add_argument
    add_data_arguments(add)
    add("--augment", choices=("device", "worker"), default="device",
        help="augment views batched on the device (default), or one by one in a loading process: "
             "the reference")
    add("--crop-min", type=checked(float, "above 0 and up to 1", lambda share: 0 < share <= 1),
        help="smallest area of a random crop, as a share of the image's; small images want more "
             f"{by_data('crop_min')}")

    add = parser.add_argument_group("method").add_argument
    add("--arch", choices=ARCHS, metavar="ARCH",
        help=f"encoder: {', '.join(ARCHS)}; resnet50w2 is the paper's ResNet-50(2x), Tables 1-3 "
             f"{by_data('arch')}")
    add("--stem", choices=("imagenet", "cifar"),
        help="cifar: 3x3 convolution, no max-pooling, for small images (default: by --data)")
    add("--method", choices=METHODS, default="care",
        help="care: C-stream and T-stream side by side (Fig. 2; default); sequential: one stream, "
             "the transformer behind the CNN (Sec. 4.3); byol: the C-stream alone (Table 1)")
    add("--lambda-att", type=not_negative, default=100.0,
        help="weight lambda of the attention loss in Eq. (5), Table 6 (default 100)")
    add("--att-loss", choices=ATT_LOSSES, default="mse",
        help="attention loss, Eq. (4): mse, mean squared differences (release; default), or norm, "
             "lengths of differences, not squared, as printed. At the start norm's gradient at "
             "--lambda-att 1.1 is as large as that of mse at 100")
    add("--blocks", type=count,
        help=f"attention blocks of the transformer, n of Table 7 {by_data('blocks')}")
    add("--heads", type=count, default=4,
        help="attention heads of a block (default 4, the release's)")
    add("--position", choices=POSITIONS, default="relative",
        help="position encoding p of Eq. (2), Table 8 (default relative)")
    add("--tap", choices=TAPS,
        help="feature map that the T-stream reads: conv4 (release; default) or conv5 (Fig. 2, and "
             "--method sequential)")
    add("--detach-trunk", action="store_true",
        help="keep the T-stream's gradients out of the encoder (Sec. 3.3 read literally; the "
             "release does not)")
    add("--hidden-dim", type=count,
        help=f"hidden width of projectors and predictors, Sec. 4.1 {by_data('hidden_dim')}")
    add("--tau-base", type=fraction,
        help="momentum coefficient tau at the start, Sec. 4.1; short runs want a smaller one "
             f"{by_data('tau_base')}")
    add("--init", type=not_empty, metavar="FILE",
        help="start from weights: of a last.pth of train.py all, predictors too; of any other file "
             "the ResNet, as --pretrained of linear_eval.py reads it. --arch and --stem are read "
             "off it unless given")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=count,
        help=f"passes over the images; the paper's are 100, 200, 400, 800 {by_data('epochs')}")
    add("--warmup-epochs", type=not_negative,
        help="epochs of linear warm-up from a rate of 1e-6 (default: a tenth of all, at most the "
             "paper's 10)")
    add("--batch-size", type=count,
        help="pairs of views a step, over all ranks and accumulation steps "
             f"{by_data('batch_size')}")
    add("--accum-steps", type=count, default=1,
        help="parts, one after the other, of each rank's batch, to save memory (default 1)")
    add("--base-lr", type=positive,
        help=f"peak learning rate per 256 images of a batch {by_data('base_lr')}")
    add("--predictor-lr", type=positive, metavar="FACTOR",
        help="learning rate of the predictors, as a multiple of the others' "
             f"{by_data('predictor_lr')}")
    add("--momentum", default=0.9, help="momentum of SGD (default 0.9)",
        type=checked(float, "at least 0 and below 1", lambda share: 0 <= share < 1))
    add("--weight-decay", type=not_negative, default=1e-4,
        help="weight decay of SGD, on all parameters (default 1e-4)")

    add = parser.add_argument_group("running").add_argument
    add_run_arguments(add)
    add("--sync-bn", choices=("all", "cnn", "none"), default="all",
        help="batch norms that several GPUs synchronise: all (default); cnn: all except the "
             "transformer's (release); none")
    add("--compile", action="store_true",
        help="torch.compile both branches (for one GPU or a CPU)")
    add("--save-every", type=count, default=1000, metavar="STEPS",
        help="steps between checkpoints (default 1000)")
    add("--keep-epochs", type=natural, default=0, metavar="N",
        help="keep each N-th epoch's checkpoint (default 0: none)")
    add("--knn-every", type=natural, metavar="EPOCHS",
        help="epochs between top-1 scores of kNN (k = 20) on val, the first before the first step; "
             "needs labels; 0: never (default: by --data; 0 for a folder)")
    add("--knn-images", type=count, metavar="N",
        help="labelled training images that kNN compares with (default: by --data; 50000 for a "
             "folder)")
    add("--rank-every", type=natural, metavar="EPOCHS",
        help="epochs between values of RankMe (arxiv.org/abs/2210.02885), the effective rank of "
             "the features of 2,048 training images, the first before the first step; needs no "
             "labels; 0: never (default: by --data; 1 for a folder)")


def parse_args(argv=None):
    """The command line as a namespace; a mistake in it is one line on stderr and exit code 2."""
    parser = new_parser(__doc__)
    add_arguments(parser)
    return fill_in(parser.parse_args(argv))


def fill_in(args):
    """Fill in the defaults that depend on other arguments, and check that all fit together."""
    args.init_sha256 = None
    if args.init and Path(args.init).is_file():
        with user_errors():
            encoder = load_encoder(args.init, args.arch, args.stem)
            args.init_sha256 = sha256_of_file(args.init)
        args.arch, args.stem = encoder.arch, encoder.stem
    use_recipe(args, RECIPE_ARGS)
    if args.warmup_epochs is None:
        args.warmup_epochs = usual_warmup(args.epochs)
    if args.tap is None:
        args.tap = "conv5" if args.method == "sequential" else "conv4"
    if args.out is None:
        args.out = default_out(args)
    if args.method == "sequential" and (args.tap == "conv4" or args.detach_trunk):
        fail("--method sequential always reads conv5: leave out --tap conv4 and --detach-trunk")
    if args.warmup_epochs >= args.epochs:
        fail(f"--warmup-epochs {args.warmup_epochs:g}: must be below --epochs {args.epochs}")
    return args


def usual_warmup(epochs):
    """Epochs of warm-up without a flag: the paper's 10 from 100 epochs on, else a tenth."""
    return min(10, epochs / 10)


def default_out(args):
    """runs/shapes, runs/shapes_byol, of a folder runs/care_resnet50; then what is not usual.

    --blocks 4 --seed 1: runs/care_resnet50_blocks4_seed1, by name, whatever the order of the flags.
    The place of a folder is no part of it, nor what may differ when a run is resumed.
    """
    name, _, count = args.data.partition(":")
    usual = vars(parse_args(["--data", name, "--method", args.method, "--out", "usual"]))
    usual["warmup_epochs"] = usual_warmup(args.epochs)
    elsewhere = {"data", "method", "init_sha256"}
    if name in NAMED_SETS:
        parts = [f"runs/{name}{count}"]
        if args.method != "care":
            parts.append(args.method)
    else:
        parts = [f"runs/{args.method}_{args.arch}"]
        elsewhere.add("arch")
    for key in sorted(usual.keys() - elsewhere - set(FREE)):
        value = getattr(args, key)
        if value == usual[key]:
            continue
        if value is True:
            parts.append(key)
        elif isinstance(value, str):
            parts.append(f"{key}-{value}")
        elif isinstance(value, list):  # image_size
            parts.append(key + "x".join(map(str, value)))
        else:
            parts.append(f"{key}{value:.12g}")
    if args.init:
        file = Path(args.init)
        ours = file.stem in ("encoder", "last")  # of a run, by its name
        parts.append(f"init-{file.parent.resolve().name if ours else file.stem}")
    return "_".join(parts)


def recipe_flags(args):
    """The recipe that runs, as flags that one could type."""
    words = ["--data", args.data]
    for name in RECIPE_ARGS:
        value = getattr(args, name)
        values = value if isinstance(value, list) else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)


def ending(args, scores):
    """Return the last lines of a finished run: its encoder, its kNN scores, the next command."""
    lines = [f"encoder in {args.out}/encoder.pth"]
    if args.init:
        lines[0] += f", begun from {args.init} (sha256 {args.init_sha256})"
    if scores:  # where there are labels
        first, last = min(scores), max(scores)
        before = f"after step {first}"
        if first == 0:
            before = "at the start" if args.init else "random encoder"
        lines.append(f"kNN top-1 on val: {scores[first]:.1f} {before}, {scores[last]:.1f} after "
                     f"step {last}")
        words = ["python", "linear_eval.py", "--data", args.data]
        if args.data_root != "data":
            words += ["--data-root", args.data_root]
        words += ["--pretrained", f"{args.out}/encoder.pth"]
        lines.append(f"next: {shlex.join(words)}")
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
    """-> CARE, channels last on the device and compiled if asked for, and its optimiser.

    One group of parameters; with --predictor-lr, the predictors are a second one. InputError when
    --compile does not work on this machine.
    """
    model = CARE(**model_args(args))
    model = model.to(device, memory_format=torch.channels_last)
    if args.compile:
        check_compiler(device)
        model.online.compile()
        model.momentum.compile()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [{"params": list(trained.values())}]
    if args.predictor_lr != 1:
        predictors = [name for name in trained if name.startswith("predictor")]
        groups = [{"params": [trained[name] for name in trained if name not in predictors]},
                  {"params": [trained[name] for name in predictors],
                   "lr_factor": args.predictor_lr}]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=args.momentum,
                                weight_decay=args.weight_decay)
    return model, optimizer


def model_args(args):
    """What CARE is made with."""
    return {name: getattr(args, name) for name in MODEL_ARGS}


def load_init(run, args, model):
    """The weights of --init, unless an earlier run is resumed. Exit code 2 if they do not fit."""
    if max_over_ranks(run.rank == 0 and Path(args.out, "last.pth").exists()):
        return
    remarks = []
    with user_errors():
        if args.init_sha256 is None:
            raise InputError(f"--init {args.init}: no such file")
        remarks = start_from(model, args.init, model_args(args))
    for text in remarks:
        note(text)


def synchronised(model, sync_bn):
    """The parts of a CARE whose batch norms are synchronised on GPUs; None: the whole model."""
    if sync_bn == "all":
        return None
    parts = []
    if sync_bn == "cnn":
        parts += [part for name, part in model.named_children() if name.startswith("predictor")]
        for branch in (model.online, model.momentum):
            parts += [part for name, part in branch.named_children() if name != "transformer"]
    return parts


def make_views(batch, device, mode):
    """A batch of TwoViews -> the two views, (B, 3, H, W) each, normalised, channels last."""
    crops, parameters = batch[0]  # (B, 2, 3, H, W), (B, 2, 9)
    views = []
    for view, drawn in zip(crops.to(device, non_blocking=True).unbind(1), parameters.unbind(1)):
        if mode == "device":
            view = augment(view, drawn)
        views.append(view.contiguous(memory_format=torch.channels_last))
    return views


@torch.autocast("cpu", enabled=False)  # outermost: each weight is cast once, for both view orders
def pretrain_step(parallel, optimizer, run, batches, views_of, lr, tau):
    """One optimiser and momentum step; views_of(batch) gives a batch's x1, x2, (B, 3, H, W) each.

    parallel: a CARE, or its DDP. -> losses, summed over both view orders, and stds, averaged over
    them: scalars on the device, by name.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1)
    optimizer.zero_grad(set_to_none=True)
    meters = {}
    for number, batch in enumerate(batches, 1):
        x1, x2 = views_of(batch)
        last = number == len(batches)
        # one view order at a time: only its activations are alive
        for x, y, exchange in ((x1, x2, False), (x2, x1, last)):
            with gradient_exchange(parallel, exchange):  # once a step
                with run.autocast:
                    out = parallel(x, y)
                run.scaler.scale(out["loss"] / len(batches)).backward()
            for name, value in out.items():
                terms = 2 * len(batches) if name.startswith("std") else len(batches)
                meters[name] = meters.get(name, 0) + value.detach() / terms
    run.scaler.step(optimizer)
    run.scaler.update()
    getattr(parallel, "module", parallel).update_momentum(tau)
    return meters


# ----------------------------------------------------------------------- kNN and RankMe on the way
def watched_before(run):
    """kNN's and RankMe's values in the log of an earlier start, on rank 0: by name, by step.

    None of a line that says another number of images for kNN to compare with.
    """
    watched = {"knn": {}, "rankme": {}}
    for line in run.lines:
        for name in watched.keys() & line.keys():
            bank = line.get("knn_images", run.args.knn_images)
            if "step" in line and bank == run.args.knn_images:
                watched[name][line["step"]] = line[name]
    return watched


def watch_when_due(run, args, encoder, images, watched, steps_per_epoch, step):
    """Log kNN's top-1 on val and RankMe after `step`, each if it is due and not yet in `watched`.

    images: those to train on, kNN's bank and val. A copy of the encoder is scored. -> whether a
    signal came before all was scored.
    """
    source, bank, val = images
    for name, every in (("knn", args.knn_every), ("rankme", args.rank_every)):
        due = every and step % (every * steps_per_epoch) == 0
        if not due or max_over_ranks(step in watched[name]):
            continue
        run.save()  # measuring may be interrupted
        if name == "knn":
            scores = knn(run, args, encoder, bank, val, ks=(20,))
            value = scores and scores["top1"]
        else:
            value = rankme(run, args, encoder, source)
        if value is None:
            return True
        watched[name][step] = value
        bank_size = {"knn_images": args.knn_images} if name == "knn" else {}
        run.log({"step": step, "epoch": step // steps_per_epoch, name: value, **bank_size})
        run.show(**{name: f"{value:.1f}"})
    return False


# --------------------------------------------------------------------------------------------- main
def open_data(run, args):
    """The images to train on, and kNN's bank and val, None without kNN.

    Fills in args: images, data_digest, and val_digest, None without kNN.
    """
    where = {"data_root": args.data_root, "size": max(args.image_size)}
    source, bank, val = None, None, None
    with user_errors():
        if run.rank == 0:  # one rank downloads
            source = open_images(args.data, "pretrain", download=True, **where)
    with user_errors():
        if run.rank > 0:
            source = open_images(args.data, "pretrain", **where)
        args.images, args.data_digest, args.val_digest = len(source), digest_of(source), None
        least = run.world * args.accum_steps
        if args.batch_size % least or args.batch_size < 2 * least:
            raise InputError(f"--batch-size {args.batch_size}: must be a multiple of {run.world} "
                             f"ranks x {args.accum_steps} accumulation steps, with at least 2 "
                             "images for each")
        if args.images < args.batch_size:
            raise InputError(f"{args.data}: {args.images} images, fewer than --batch-size "
                             f"{args.batch_size}")
        if args.knn_every:
            bank, val = open_labelled(args, args.knn_images)
            args.val_digest = digest_of(val)
    return source, bank, val


def pretrain(run, args):
    """The whole run: data, model, where an earlier one got to, the loop."""
    if args.compile and run.world > 1:  # DDP breaks the branches into more graphs than torch keeps
        fail(f"--compile is for one process, not for {run.world} ranks: leave it out")
    source, bank, val = open_data(run, args)
    if run.rank == 0:
        print(f"recipe: {recipe_flags(args)}\n{describe(source)}", flush=True)
    steps_per_epoch = args.images // args.batch_size
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = round(args.warmup_epochs * steps_per_epoch)
    peak_lr = args.base_lr * args.batch_size / 256

    # model, optimiser, and where an earlier run of the same command got to
    with user_errors():
        torch.manual_seed(args.seed)
        model, optimizer = new_model(args, run.device)
    if args.init:
        load_init(run, args, model)
    encoder = model.online.encoder
    start = run.restore(
        {"model": model, "optimizer": optimizer}, total_steps, args.save_every,
        exports={"encoder.pth": encoder},
        defaults=vars(parse_args([])),  # before a flag existed, all sets had the paper's value
        model_args=model_args(args))
    if args.init and start:
        note(f"{args.out}/last.pth keeps its own weights; --init {args.init} is not loaded")
    parallel = parallelise(model, run.device, synchronised(model, args.sync_bn))
    watched = watched_before(run)

    # the loop: lr, views, two half steps, optimiser, momentum update; log, save, watch. The model
    # stays in train mode; kNN and RankMe take a copy.
    two_views = TwoViews(args.image_size, args.augment, args.crop_min)
    stream = Stream(source, two_views, args.seed, steps_per_epoch * args.batch_size)
    views_of = partial(make_views, device=run.device, mode=args.augment)
    watch = partial(watch_when_due, run, args, encoder, (source, bank, val), watched,
                    steps_per_epoch)
    stopped = watch(start)
    for step, batches in run.batches(stream, args.batch_size, args.accum_steps):
        lr = lr_at(step, total_steps, warmup_steps, peak_lr)
        tau = tau_at(step + 1, total_steps, args.tau_base)  # of the update after this step
        meters = pretrain_step(parallel, optimizer, run, batches, views_of, lr=lr, tau=tau)
        epoch = (step + 1) / steps_per_epoch
        kept = args.keep_epochs and epoch % args.keep_epochs == 0
        rates = {"lr": lr, "tau": tau}
        if args.predictor_lr != 1:
            rates["lr_predictor"] = lr * args.predictor_lr
        run.after(step + 1, meters, keep=f"epoch{epoch:04.0f}" if kept else None,
                  epoch=round(epoch, 4), **rates)
        stopped = watch(step + 1)
    last_lines = f"step {run.total} of {run.total}: {ending(args, watched['knn'])}"
    if stopped:
        last_lines = f"{args.out}: {STOPPED}"
    run.finish(run.unfinished() or last_lines)


def main(argv=None):
    args = parse_args(argv)
    with Run(args, FREE) as run:
        pretrain(run, args)


if __name__ == "__main__":
    main()
