"""Linear classification on frozen features (Tables 1 and 2), and kNN, which stands in knn.py.

  torchrun --nproc_per_node 8 linear_eval.py --pretrained runs/care_resnet50/encoder.pth
  python linear_eval.py --data shapes --pretrained runs/shapes/encoder.pth
  python linear_eval.py --data shapes --pretrained runs/shapes/encoder.pth --knn

The last line on stdout is one JSON object: the scores, and all that is needed to repeat them.
--evaluate scores the classifier.pth that training leaves in --out. The same command again resumes.
"""
import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch import nn
from torch.utils.data import Subset
from torchvision import transforms
from tqdm import tqdm

from care import ARCHS, InputError, check_state, load_checkpoint, pool
from data import (NAMED_SETS, ImageFiles, Stream, crop_and_flip, describe, imagenet_normalize,
                  open_images, recipe_of, stream_batches)
from knn import (TEMPERATURE, batches_in_order, count_correct, knn, labels_of, open_labelled,
                 split_by_class, take_buffers_of_rank_0)
from run import (Unreadable, add_data_arguments, add_run_arguments, agree, as_bytes, average,
                 catch_signals, check_ranges, checkpoint_of, fail, load_batches, memory_gib,
                 new_parser, open_encoder, open_log, open_run, parallelise, restore,
                 same_on_all_ranks, set_precision, setup_ranks, use_recipe, user_errors, versions,
                 write_line, write_whole)

# Raised whenever the same arguments compute something else: runs of before do not go on then.
PROTOCOL_VERSION = 3
DEFAULTS = {"protocol_version": 1}  # of checkpoints that lack it
# What may differ on resume. An encoder is known by the sha256 of its tensors, not by its path.
FREE = ("data_root", "workers", "out", "log_every", "max_steps", "pretrained", "evaluate", "val")


# ---------------------------------------------------------------------------------------- arguments
def add_evaluation_arguments(parser):
    """The flags on encoder, data and running that both classification scripts have."""
    add = parser.add_argument_group("encoder and data").add_argument
    add("--pretrained", required=True, metavar="FILE|random",
        help="of train.py, the authors, torchvision, MoCo, ...; or random weights")
    add("--arch", choices=ARCHS, help="default: read off the file (random: by --data)")
    add("--stem", choices=("imagenet", "cifar"),
        help="default: read off the file (random: by --data). A 3x3 stem is taken as padded by 1; "
             "of one trained with padding 2, which no file tells, the features are wrong")
    add_data_arguments(add)
    add("--val", metavar="DIR",
        help="score this set: a folder a class, by name or, as in ImageNet-V2, by number "
             "(default: val of --data)")
    add_run_arguments(parser.add_argument_group("running").add_argument)


def parse_args(argv=None):
    """The command line as a namespace; a mistake in it is one line on stderr and exit code 2."""
    parser = new_parser(__doc__)
    add_evaluation_arguments(parser)
    protocol = parser.add_argument_group("protocol")
    add = protocol.add_argument
    add("--labels", type=int, metavar="N",
        help="use N of the training images, of every class as many, in every run the same ones "
             "(default: by --data; all of a folder)")
    add("--head", choices=("linear-bn", "linear"),
        help="linear-bn: batch norm behind it (release; default for a folder); linear: without")
    add("--epochs", type=int, help="default: by --data; the paper's 80 for a folder")
    add("--batch-size", type=int, default=256, help="over all ranks (default 256)")
    add("--lr", type=float, nargs="+", default=[0.2],
        help="learning rate per 256 images of a batch. Several are trained side by side and "
             "compared on up to 10 images a class, held out from training (default 0.2)")
    add = protocol.add_mutually_exclusive_group().add_argument
    add("--knn", action="store_true", help="weighted kNN, k = 20 and 200, instead of training")
    add("--evaluate", nargs="?", const="", metavar="FILE",
        help="score this classifier.pth (default: that in --out) instead of training")
    args = parser.parse_args(argv)
    use_recipe(args, ("labels", "head", "image_size"))
    if args.epochs is None:
        args.epochs = recipe_of(args.data)["linear_epochs"]
    check_ranges(args)
    return args


# ------------------------------------------------------------------------------------------- set-up
def setup(args, kind):
    """Ranks, device, precision, run directory and encoder of an evaluation, as one namespace.

    Fills in args: protocol_version, precision, workers, out, arch, stem, sha256 (of the encoder).
    """
    args.protocol_version = PROTOCOL_VERSION
    stopping = catch_signals()
    rank, world, device = setup_ranks(args)
    autocast, _ = set_precision(args, device)
    if args.out is None:
        args.out = default_out(args.pretrained, kind)
    if args.pretrained == "random":
        use_recipe(args, ("arch", "stem"))
    lock = None
    with user_errors():
        encoder, args.sha256 = open_encoder(args.pretrained, args.arch, args.stem, args.seed)
        args.arch, args.stem = encoder.arch, encoder.stem
        if any(side % encoder.stride for side in args.image_size):
            raise InputError(f"--image-size {args.image_size}: this encoder needs multiples of "
                             f"{encoder.stride}")
        if rank == 0:
            lock = open_run(args.out)
    encoder = encoder.to(device, memory_format=torch.channels_last)
    return SimpleNamespace(rank=rank, world=world, device=device, autocast=autocast,
                           stopping=stopping, lock=lock, encoder=encoder)


def default_out(pretrained, kind):
    """Beside the encoder's file: `kind` for encoder.pth and last.pth, kind_NAME for NAME.pth."""
    if pretrained == "random":
        return f"runs/random/{kind}"
    name = Path(pretrained).name.partition(".")[0]
    if name not in ("encoder", "last"):
        kind = f"{kind}_{name}"
    return str(Path(pretrained).parent / kind)


def open_sets(run, args, labels=None):
    """Fills in run.train, run.val and run.classes; prints which images they are."""
    with user_errors():
        if run.rank == 0 and args.data.partition(":")[0] in NAMED_SETS:  # one rank downloads
            open_images(args.data, "train", args.data_root, download=True)
    with user_errors():
        run.train, run.val = open_labelled(args, labels)
        run.classes = list(run.val.classes)
        if args.val:
            run.val = open_val(args.val, run.classes)
        args.images = len(run.train)
    same_on_all_ranks(**{name: value for name, value in vars(args).items() if name not in FREE})
    if run.rank == 0:
        whole = run.train.dataset if isinstance(run.train, Subset) else run.train
        print(f"{len(run.train)} labels of {describe(whole)}, scored on {describe(run.val)}")


def open_val(folder, classes):
    """The images of a folder with one folder a class: its name, or its number in `classes`."""
    source = ImageFiles(folder, labelled=True)
    number = {name: number for number, name in enumerate(classes)}
    if set(source.classes) != set(classes) and "0" in source.classes:
        number = {str(number): number for number in range(len(classes))}
    differ = sorted(set(source.classes) ^ set(number))
    if differ:
        raise InputError(f"--val {folder}: its folders differ from the {len(classes)} classes in "
                         f"{len(differ)} names, first {', '.join(differ[:3])}")
    source.targets = np.array([number[name] for name in source.classes])[source.targets]
    source.classes = list(classes)
    return source


def finish(run, args, scores):
    """Print the scores and all that they came from as a JSON line, the log's last line too."""
    names = ("sha256", "arch", "stem", "image_size", "seed", "precision", "protocol_version")
    protocol = {name: getattr(args, name) for name in names} | versions(run.world, run.device)
    result = {"encoder": args.pretrained, "data": args.data, "val": args.val} | protocol | scores
    write_line(Path(args.out) / "log.jsonl", result | {"args": vars(args)})
    leave(run, json.dumps(result))


def leave(run, message):
    """Say this on stdout, and leave the process group."""
    if run.rank == 0:
        print(message)
    if run.world > 1:
        dist.barrier()  # no rank takes the group away from one that is still in it
        dist.destroy_process_group()


def stop(run, message="stopped while scoring; the same command goes on"):
    """Leave the script."""
    leave(run, message)
    raise SystemExit(0)


# ------------------------------------------------------------------------------------------ scoring
@torch.no_grad()
def evaluate(run, args, model, source, what="val"):
    """Top-1 and top-5 in percent of each of the model's heads: [(top1, top5), ...]."""
    model.eval()
    take_buffers_of_rank_0(model, run.world)
    correct = torch.zeros(len(model.heads), 2, dtype=torch.long, device=run.device)
    for x, labels in batches_in_order(run, args, source, what):
        with run.autocast:
            outputs = model(x)
        for number, scores in enumerate(outputs):
            correct[number] += count_correct(scores.float(), labels)
    if agree(bool(run.stopping)):
        stop(run)
    if run.world > 1:
        dist.all_reduce(correct)
    return [tuple(row) for row in (100 * correct.double() / len(source)).tolist()]


# ----------------------------------------------------------------------------------------- training
def new_head(kind, dim, classes):
    """(B, dim) -> (B, classes); weights N(0, 0.01), bias 0. linear-bn: a batch norm (release)."""
    linear = nn.Linear(dim, classes)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    if kind == "linear-bn":
        return nn.Sequential(linear, nn.BatchNorm1d(classes))
    return nn.Sequential(linear)


class Probe(nn.Module):
    """Frozen encoder and one head a learning rate: (B, 3, H, W) -> list of scores (B, classes)."""

    def __init__(self, encoder, heads):
        super().__init__()
        self.encoder, self.heads = encoder.requires_grad_(False), nn.ModuleList(heads)

    def train(self, mode=True):
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, x):
        with torch.no_grad():
            pooled = pool(self.encoder(x)[1]).float()
        with torch.autocast(x.device.type, enabled=False):
            return [head(pooled) for head in self.heads]


def is_finite(module):
    """Whether all of a module's numbers are finite."""
    return all(bool(tensor.isfinite().all()) for tensor in module.state_dict().values())


def drop_diverged(model, optimizer, losses):
    """Set heads whose loss or weights are not finite, and their rates, to 0. -> are any left?"""
    lost = not is_finite(model.encoder)
    groups = optimizer.param_groups[-len(model.heads):]
    for head, group, loss in zip(model.heads, groups, losses):
        if agree(lost or not math.isfinite(loss) or not is_finite(head)):
            group["base_lr"] = 0.0
            for parameter in head.parameters():
                optimizer.state.pop(parameter, None)  # its momentum
            for tensor in head.state_dict().values():
                tensor.zero_()
    return any(group["base_lr"] for group in groups)


def fit(run, args, model, optimizer, source):
    """Train a model that gives a list of scores on `source` for args.epochs -> the model.

    Each group's rate goes from its base_lr to 0 by a cosine. None when every head has diverged.
    Resumes from, logs in and saves to args.out: every epoch (of at least 100 steps), at the end, on
    a signal, which ends the script.
    """
    rank, world, device = run.rank, run.world, run.device
    scaled = args.precision == "fp16" and any(p.requires_grad for p in model.encoder.parameters())
    scaler = torch.amp.GradScaler(device.type, enabled=scaled)
    args.images = len(source)
    steps_per_epoch = len(source) // args.batch_size
    total_steps = args.epochs * steps_per_epoch
    last = min(total_steps, args.max_steps or total_steps)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    start, known = restore(args.out, args, parts, FREE, DEFAULTS)
    model, parallel = parallelise(model, world, device)
    crop = transforms.Compose([partial(crop_and_flip, size=args.image_size), TF.pil_to_tensor])
    stream = Stream(source, crop, args.seed, steps_per_epoch * args.batch_size)
    unreadable = Unreadable(stream, known)
    sampler = stream_batches(start, last, args.batch_size, rank, world)
    batches = load_batches(stream, sampler, args.workers, device)
    log, _ = open_log(args.out, args, start, total_steps, world, device)
    bar = tqdm(total=last, initial=start, unit="step", desc=Path(args.out).name,
               disable=rank > 0 or None)

    model.train()
    done, stopped = start, False
    while done < last and not stopped:
        with user_errors():
            crops, labels, bad = next(batches)
        unreadable.note(bad)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * 0.5 * (1 + math.cos(math.pi * done / total_steps))
        x = imagenet_normalize(crops.to(device, non_blocking=True))
        labels = labels.to(device, non_blocking=True)
        with run.autocast:
            outputs = parallel(x.contiguous(memory_format=torch.channels_last))
        losses = [F.cross_entropy(scores.float(), labels) for scores in outputs]
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(sum(losses)).backward()
        scaler.step(optimizer)
        scaler.update()
        done += 1
        bar.update()

        stopped = bool(agree(bool(run.stopping)))
        logging = done % args.log_every == 0 or done == total_steps
        saving = done % max(100, steps_per_epoch) == 0 or done == last or stopped
        if not (logging or saving):
            continue
        correct = [count_correct(scores.float(), labels)[0] / len(labels) for scores in outputs]
        loss = list(average(dict(enumerate(losses)), world).values())
        top1 = [100 * share for share in average(dict(enumerate(correct)), world).values()]
        alive = drop_diverged(model, optimizer, loss)
        count = unreadable.count()
        if logging:
            rates = [group["lr"] for group in optimizer.param_groups]
            write_line(log, {
                "step": done, "epoch": round(done / steps_per_epoch, 4), "lr": rates,
                "loss": [value if math.isfinite(value) else None for value in loss],
                "train_top1": top1, "memory_gib": round(memory_gib(device), 2),
                "unreadable": count})
            bar.set_postfix_str(f"train top-1 {max(top1):.1f}", refresh=False)
        if not alive:
            return None
        if saving:
            with user_errors(1, "cannot write (what was there before stays): "):
                if rank == 0:
                    content = checkpoint_of(args, done, parts, unreadable)
                    write_whole(f"{args.out}/last.pth", content)
    bar.close()
    if done < total_steps:
        advice = "the same command goes on"
        if done == last:
            advice = f"to go on, raise --max-steps {last} or leave it out"
        stop(run, f"{args.out}: stopped after step {done} of {total_steps}; {advice}")
    return model


# --------------------------------------------------------------------------------------------- main
def train_classifier(run, args):
    """Heads at all of args.lr; the best is scored on val and saved -> the final line's fields."""
    source, held_out = run.train, ()
    if len(args.lr) > 1:
        drawn, rest = split_by_class(labels_of(run.train), lambda n: min(10, n // 10), args.seed)
        if not len(drawn):
            fail("fewer than 10 images in every class: too few to choose between several --lr")
        source, held_out = Subset(run.train, rest), Subset(run.train, drawn)
    if len(source) < args.batch_size or args.batch_size % run.world:
        fail(f"--batch-size {args.batch_size}: must be a multiple of {run.world} ranks, up to "
             f"{len(source)} images")
    if args.head == "linear-bn" and args.batch_size < 2 * run.world:
        fail(f"--batch-size {args.batch_size}: the batch norm of --head linear-bn needs at least 2 "
             "images on each rank")

    before = {name: value.clone() for name, value in run.encoder.state_dict().items()}
    torch.manual_seed(args.seed)
    heads = [new_head(args.head, run.encoder.dim5, len(run.classes)) for _ in args.lr]
    model = Probe(run.encoder, heads).to(run.device)
    groups = [{"params": list(head.parameters()), "base_lr": lr * args.batch_size / 256}
              for head, lr in zip(heads, args.lr)]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    model = fit(run, args, model, optimizer, source)
    if model is None:
        fail(f"{args.out}: loss or weights not finite: choose a smaller --lr", code=1)

    best, choice = 0, {}
    if held_out:
        scores = [top1 for top1, _ in evaluate(run, args, model, held_out, "held-out images")]
        rates = [group["base_lr"] for group in optimizer.param_groups]
        scores = [top1 if rate else -1.0 for top1, rate in zip(scores, rates)]
        best = scores.index(max(scores))
        choice = dict(zip(map(str, args.lr), scores))  # -1: diverged
    top1, top5 = evaluate(run, args, model, run.val)[best]
    after = model.encoder.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    if changed:
        fail(f"the frozen encoder has moved ({len(changed)} tensors, first {changed[0]}): no score",
             code=1)
    trained = {"protocol": "linear", "head": args.head, "lr": args.lr[best], "epochs": args.epochs,
               "batch_size": args.batch_size, "labels": len(source), "held_out": len(held_out),
               "seed": args.seed}
    saved = {"head": args.head, "classes": run.classes, "sha256": args.sha256, "trained": trained,
             "state": model.heads[best].state_dict()}
    with user_errors(1, "cannot write: "):
        if run.rank == 0:
            write_whole(f"{args.out}/classifier.pth", as_bytes(torch.save, saved))
    return {"top1": top1, "top5": top5, **trained, "choice": choice}


def score_classifier(run, args):
    """The classifier of --evaluate, scored on val -> the final line's fields."""
    path = args.evaluate or f"{args.out}/classifier.pth"
    with user_errors():
        saved = load_checkpoint(path)
        if not isinstance(saved, dict) or saved.get("sha256") != args.sha256:
            raise InputError(f"{path}: not a classifier that was trained on {args.pretrained}")
        if saved["classes"] != run.classes:
            raise InputError(f"{path}: trained for other classes than those of {args.data}")
        head = new_head(saved["head"], run.encoder.dim5, len(run.classes))
        check_state(path, saved["state"], head.state_dict())
        head.load_state_dict(saved["state"])
    model = Probe(run.encoder, [head]).to(run.device)
    top1, top5 = evaluate(run, args, model, run.val)[0]
    return {"top1": top1, "top5": top5, **saved["trained"], "classifier": path}


def main(argv=None):
    args = parse_args(argv)
    run = setup(args, "knn" if args.knn else "linear")
    open_sets(run, args, args.labels)
    if args.evaluate is not None:
        scores = score_classifier(run, args)
    elif args.knn:
        scores = knn(run, args, run.encoder, run.train, run.val)
        if scores is None:
            stop(run)
        scores |= {"protocol": "knn", "k": 20, "temperature": TEMPERATURE, "labels": args.images}
    else:
        scores = train_classifier(run, args)
    finish(run, args, scores)


if __name__ == "__main__":
    main()
