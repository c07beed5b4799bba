"""Linear classification on frozen features, and kNN: the numbers of the paper's Tables 1 and 2.

  torchrun --nproc_per_node 8 linear_eval.py --pretrained runs/care_resnet50/encoder.pth     on ./imagenet
  python linear_eval.py --pretrained runs/demo/encoder.pth --data shapes --epochs 10
  python linear_eval.py --pretrained runs/demo/encoder.pth --data shapes --knn

The last line on stdout is one JSON object with the scores and the protocol. The same command again resumes.
"""
import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch import nn
from torch.utils.data import Subset
from torchvision import transforms
from tqdm import tqdm

from care import ARCHS, InputError, pool
from data import Stream, crop_and_flip, normalize, open_images, stream_batches
from train import (Unreadable, add_data_arguments, add_run_arguments, agree, average, catch_signals,
                   fail, load_batches, memory_gib, new_parser, on_rank_0, open_encoder,
                   open_log, open_run, parallelise, positive, restore, save_run, set_precision,
                   set_size_and_stem, setup_ranks, user_errors, versions, write_line, write_whole)

FREE = ("data_root", "workers", "out", "log_every", "max_steps", "pretrained")  # pretrained: by its sha256


# ---------------------------------------------------------------------------------------- arguments
def add_evaluation_arguments(parser, epochs, batch_size, lr):
    """The flags that both classification scripts have, with these defaults; a list takes several values."""
    add = parser.add_argument_group("encoder and data").add_argument
    add("--pretrained", required=True, metavar="FILE|random",
        help="encoder.pth or last.pth of train.py, the authors' file, a torchvision or MoCo one, or random")
    add("--arch", choices=ARCHS, help="default: read off the file (random: resnet50)")
    add("--stem", choices=("imagenet", "cifar"), help="default: read off the file (random: by --data)")
    add_data_arguments(add)
    add = parser.add_argument_group("optimisation").add_argument
    several = {"nargs": "+"} if isinstance(epochs, list) else {}
    add("--epochs", type=int, default=epochs, help="passes over the images (default %(default)s)", **several)
    add("--batch-size", type=int, default=batch_size, help="over all ranks (default %(default)s)")
    add("--lr", type=float, nargs="+", default=lr, help="learning rate (linear_eval: per 256 images of "
        "a batch); several are compared on held-out training images (default %(default)s)")
    add_run_arguments(parser.add_argument_group("running").add_argument)


def parse_args(argv=None):
    """The command line as a namespace; a mistake in it is one line on stderr and exit code 2."""
    parser = new_parser(__doc__)
    add_evaluation_arguments(parser, epochs=80, batch_size=256, lr=[0.2])
    add = parser.add_argument_group("protocol").add_argument
    add("--head", choices=("linear-bn", "linear"), default="linear-bn",
        help="linear-bn: linear, then batch norm (the release's, default); linear: the standard protocol")
    add("--knn", action="store_true", help="weighted kNN on the features, k = 20 and 200; no training")
    args = parser.parse_args(argv)
    positive(args, "epochs", "batch_size")
    if min(args.lr) <= 0:
        fail("--lr: every learning rate must be above 0")
    return args


# ------------------------------------------------------------------------------------------- set-up
def setup(args, kind):
    """Ranks, device, precision, encoder and data sets of an evaluation, as one namespace.

    Fills in args: arch, stem, image_size, sha256 (of the encoder file), out (beside that file, in `kind`).
    """
    stopping = catch_signals()
    rank, world, device = setup_ranks(args)
    autocast, _ = set_precision(args, device)
    random, asked, lock = args.pretrained == "random", args.stem, None
    args.out = args.out or str(Path("runs/random" if random else Path(args.pretrained).parent) / kind)
    set_size_and_stem(args)
    with user_errors():
        stem = args.stem if random else asked
        encoder, args.sha256 = open_encoder(args.pretrained, args.arch, stem, args.seed)
        args.arch, args.stem = encoder.arch, encoder.stem
        if any(side % encoder.stride or side < encoder.stride for side in args.image_size):
            raise InputError(f"--image-size {args.image_size}: encoder needs multiples of {encoder.stride}")
        if rank == 0:
            lock = open_run(args.out)
            if args.data in ("cifar10", "stl10"):
                open_images(args.data, "train", args.data_root, download=True)
    with user_errors():
        train, val = (open_images(args.data, split, args.data_root, max(args.image_size))
                      for split in ("train", "val"))
        if train.classes != val.classes:
            differ = sorted(set(train.classes) ^ set(val.classes))
            raise InputError(f"--data {args.data}: train and val differ in classes ({', '.join(differ[:5])})")
    encoder = encoder.to(device, memory_format=torch.channels_last)
    return SimpleNamespace(rank=rank, world=world, device=device, autocast=autocast, stopping=stopping,
                           lock=lock, encoder=encoder, train=train, val=val, classes=len(val.classes))


def finish(run, args, scores=None):
    """Print encoder and scores as a JSON line, add it with the arguments to the log, leave the group."""
    if scores:
        result = {"encoder": args.pretrained, "sha256": args.sha256, "arch": args.arch, "data": args.data}
        result |= scores
        line = result | {"args": vars(args), **versions(run.world, run.device)}
        on_rank_0(write_line, Path(args.out) / "log.jsonl", line)
        if run.rank == 0:
            print(json.dumps(result))
    if run.world > 1:
        dist.destroy_process_group()


def stop(run, args, what):
    """Leave the process group and the script."""
    if run.rank == 0:
        print(f"{what}; the same command goes on")
    finish(run, args)
    raise SystemExit(0)


def labels_of(source):
    """The labels of a data set as a list, without reading images."""
    if isinstance(source, Subset):
        labels = labels_of(source.dataset)
        return [labels[index] for index in source.indices]
    return [int(label) for label in (source.labels if hasattr(source, "labels") else source.targets)]  # STL10


def split_by_class(labels, per_class, seed):
    """Indices drawn from every class: `per_class(n)` of its n. -> (drawn, rest), both sorted."""
    generator = torch.Generator().manual_seed(seed)
    labels, drawn = torch.tensor(labels), []
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=generator)
        drawn += members[order[:per_class(len(members))]].tolist()
    return sorted(drawn), sorted(set(range(len(labels))) - set(drawn))


def centre_crop(image, size):
    """A PIL image -> shorter side 256/224 of the input's longer, centre crop, (3, height, width) uint8."""
    image = TF.resize(image, round(max(size) * 256 / 224), max_size=2 ** 16)  # of very long ones, a part
    return TF.pil_to_tensor(TF.center_crop(image, size))


# ---------------------------------------------------------------------------------------- evaluation
def batches_in_order(run, args, source, what):
    """Centre crops of a rank's share of a data set: yields (images, labels). Exit code 2 on a bad image.

    A signal ends the script: what was trained is saved.
    """
    crop = partial(centre_crop, size=args.image_size)
    stream = Stream(source, crop, args.seed, len(source), shuffle=False)
    share, size = range(run.rank, len(source), run.world), max(1, args.batch_size // run.world)
    batches = [share[i:i + size] for i in range(0, len(share), size)]
    loader = load_batches(stream, batches, args.workers, run.device)
    unreadable = Unreadable(stream)
    together = len(source) // run.world // size  # batches that every rank has
    for number, batch in enumerate(tqdm(loader, desc=what, leave=False, disable=run.rank > 0 or None)):
        if number < together and agree(bool(run.stopping)):
            stop(run, args, "stopped while scoring")
        crops, labels, _ = unreadable.note(batch)
        x = normalize(crops.to(run.device, non_blocking=True))
        yield x.contiguous(memory_format=torch.channels_last), labels.to(run.device, non_blocking=True)
    if unreadable.count():
        fail(f"{what} cannot be scored without the images named above")


def count_correct(scores, labels):
    """Scores (B, classes), labels (B,) -> how many labels are first, and in the first five: tensor (2,)."""
    top = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    return torch.stack((top[:, 0].sum(), top.sum()))


@torch.no_grad()
def evaluate(run, args, model, source, what="val"):
    """Top-1 and top-5 in percent of each of the model's heads on a whole data set: [(top1, top5), ...]."""
    model.eval()
    for buffer in model.buffers() if run.world > 1 else ():  # rank 0's, where they are not synchronised
        dist.broadcast(buffer, 0)
    total = torch.zeros(len(model.heads), 2, dtype=torch.long, device=run.device)
    for x, labels in batches_in_order(run, args, source, what):
        with run.autocast:
            total += torch.stack([count_correct(scores.float(), labels) for scores in model(x)])
    if run.world > 1:
        dist.all_reduce(total)
    return [tuple(row) for row in (100 * total.double() / len(source)).tolist()]


@torch.no_grad()
def features(run, args, encoder, source, what):
    """Pooled conv5 features of a data set, l2-normalised, and labels: (N, dim5), (N,), on every rank."""
    encoder.eval()
    bank, start = torch.zeros(len(source), encoder.dim5, device=run.device), run.rank
    for x, _ in batches_in_order(run, args, source, what):
        rows = slice(start, start + len(x) * run.world, run.world)
        with run.autocast:
            bank[rows] = F.normalize(pool(encoder(x)[1]).float(), dim=1)
        start = rows.stop
    if run.world > 1:
        dist.all_reduce(bank)  # 0 where another rank has the row
    return bank, torch.tensor(labels_of(source), device=run.device)


def knn_scores(queries, bank, labels, k, classes, temperature=0.07):
    """Weighted kNN votes (B, classes): each of the k nearest adds exp(cosine / temperature) to its class.

    queries (B, D) and bank (N, D) l2-normalised; labels (N,); k is clamped to N.
    """
    cosine, nearest = (queries @ bank.T).topk(min(k, len(bank)), dim=1)  # (B, k)
    votes = torch.zeros(len(queries), classes, device=queries.device)
    return votes.scatter_add_(1, labels[nearest], (cosine / temperature).exp())


def knn(run, args):
    """Top-1 and top-5 in percent on val: top1 and top5 with k = 20, top1_k200 and top5_k200 with k = 200."""
    bank, labels = features(run, args, run.encoder, run.train, "train features")
    queries, truth = features(run, args, run.encoder, run.val, "val features")
    scores = {}
    for k, suffix in ((20, ""), (200, "_k200")):
        correct = sum(count_correct(knn_scores(q, bank, labels, k, run.classes), y)
                      for q, y in zip(queries.split(256), truth.split(256)))
        scores["top1" + suffix], scores["top5" + suffix] = (100 * correct.double() / len(truth)).tolist()
    return scores


# ------------------------------------------------------------------------------------------ training
def new_head(kind, dim, classes):
    """(B, dim) -> (B, classes): weights N(0, 0.01), bias 0; `linear-bn` ends in a batch norm (release)."""
    linear = nn.Linear(dim, classes)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(linear, nn.BatchNorm1d(classes)) if kind == "linear-bn" else nn.Sequential(linear)


class Probe(nn.Module):
    """Frozen encoder and one head per learning rate: (B, 3, height, width) -> list of scores (B, classes)."""

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


def fit(run, args, out, model, optimizer, source, epochs):
    """Train `model`, which gives a list of scores, by a cosine per step from each group's `base_lr`. -> model

    Resumes from, logs in and saves to `out`: every epoch (of at least 100 steps), at the end, on a signal.
    """
    rank, world, device = run.rank, run.world, run.device
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    steps_per_epoch = len(source) // args.batch_size
    total_steps = epochs * steps_per_epoch
    parts, args.images = {"model": model, "optimizer": optimizer, "scaler": scaler}, len(source)
    start, known = restore(out, args, parts, FREE)
    model, parallel = parallelise(model, world, device)
    crop = transforms.Compose([partial(crop_and_flip, size=args.image_size), TF.pil_to_tensor])
    dataset = Stream(source, crop, args.seed, steps_per_epoch * args.batch_size)
    unreadable = Unreadable(dataset, known)
    last = min(total_steps, args.max_steps or total_steps)
    sampler = stream_batches(start, last, args.batch_size, rank, world)
    log = open_log(out, args, start, total_steps, world, device)
    bar = tqdm(total=last, initial=start, unit="step", desc=Path(out).name, disable=rank > 0 or None)

    model.train()
    done, stopped = start, False
    for crops, labels, _ in map(unreadable.note, load_batches(dataset, sampler, args.workers, device)):
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * 0.5 * (1 + math.cos(math.pi * done / total_steps))
        x = normalize(crops.to(device, non_blocking=True)).contiguous(memory_format=torch.channels_last)
        labels = labels.to(device, non_blocking=True)
        with run.autocast:
            scores = parallel(x)
        losses = [F.cross_entropy(s.float(), labels) for s in scores]
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(sum(losses)).backward()
        scaler.step(optimizer)
        scaler.update()
        bar.update()

        done += 1
        stopped = bool(agree(bool(run.stopping)))
        logging = done % args.log_every == 0 or done == total_steps
        saving = done % max(100, steps_per_epoch) == 0 or done == last or stopped
        if not (logging or saving):
            continue
        values = average({f"loss_{i}": loss for i, loss in enumerate(losses)}, model, done, world)
        count = unreadable.count()
        if logging:
            line = {"step": done, "epoch": round(done / steps_per_epoch, 4),
                    "lr": [group["lr"] for group in optimizer.param_groups], "loss": list(values.values()),
                    "memory_gib": round(memory_gib(device), 2), "unreadable": count}
            on_rank_0(write_line, log, line)
            bar.set_postfix(loss=f"{values['loss_0']:.3f}", refresh=False)
        if saving:
            save_run(Path(out) / "last.pth", args, done, parts, unreadable)
        if stopped:
            break
    bar.close()
    if done < total_steps:
        stop(run, args, f"{out}: stopped after step {done} of {total_steps}")
    return model


# ---------------------------------------------------------------------------------------------- main
def main(argv=None):
    args = parse_args(argv)
    run = setup(args, "knn" if args.knn else "linear")
    if args.knn:
        result = knn(run, args) | {"protocol": "knn", "k": 20, "temperature": 0.07}
        return finish(run, args, result)

    before = {name: value.clone() for name, value in run.encoder.state_dict().items()}
    source, held_out = run.train, None
    if len(args.lr) > 1:  # the choice is made on a tenth of the training images
        drawn, rest = split_by_class(labels_of(run.train), lambda n: n // 10, args.seed)
        source, held_out = Subset(run.train, rest), Subset(run.train, drawn)
        if not drawn:
            fail("fewer than 10 images in every class: too few to choose between several --lr; give one")
    if len(source) < args.batch_size or args.batch_size % run.world:
        fail(f"--batch-size {args.batch_size}: must be a multiple of {run.world} ranks, up to {len(source)}")
    torch.manual_seed(args.seed)
    heads = [new_head(args.head, run.encoder.dim5, run.classes) for _ in args.lr]
    model = Probe(run.encoder, heads).to(run.device)
    groups = [{"params": list(head.parameters()), "base_lr": lr * args.batch_size / 256}
              for head, lr in zip(heads, args.lr)]
    model = fit(run, args, args.out, model, torch.optim.SGD(groups, lr=0, momentum=0.9), source, args.epochs)

    best, choice = 0, {}
    if held_out:
        scores = [top1 for top1, _ in evaluate(run, args, model, held_out, "held-out part of train")]
        best, choice = scores.index(max(scores)), {"choice": dict(zip(map(str, args.lr), scores))}
    top1, top5 = evaluate(run, args, model, run.val)[best]
    after = model.encoder.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    if changed:
        fail(f"the frozen encoder has moved ({len(changed)} tensors, first {changed[0]}): no score", code=1)
    classifier = {"head": args.head, "classes": run.train.classes, "sha256": args.sha256,
                  "state": model.heads[best].state_dict()}
    on_rank_0(write_whole, f"{args.out}/classifier.pth", partial(torch.save, classifier))
    result = {"top1": top1, "top5": top5, "protocol": "linear", "head": args.head, "lr": args.lr[best],
              "epochs": args.epochs, "batch_size": args.batch_size, "percent": 90 if held_out else 100}
    finish(run, args, result | choice)


if __name__ == "__main__":
    main()
