"""Semi-supervised classification: fine-tune all layers on a few labels (Table 3).

  python semi_eval.py --data shapes --pretrained runs/shapes/encoder.pth \\
      --percent 10
  torchrun --nproc_per_node 8 semi_eval.py --pretrained encoder.pth \\
      --percent 1 --subset 1percent.txt \\
      --lr 0.01 0.02 0.05 0.1 0.005 --epochs 30 50   BYOL's grid on ImageNet
  python semi_eval.py --pretrained random --percent 100
                                                     supervised, from scratch

Several --lr or --epochs are compared on a held-out fifth of the subset; the
best runs once more, on all of it. Each run has its own folder in --out, so a
grid can grow. The last line on stdout is one JSON object: the scores, and all
that is needed to repeat them. The same command again resumes.
"""
import argparse
import copy
import hashlib
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset

from care import InputError, pool
from common.data import labels_of, names_of, one_form, shown, split_by_class
from common.ranks import fail, user_errors
from common.run import (Diverged, Run, count, new_parser, not_empty, positive, use_recipe,
                        write_whole)
from linear_eval import (FREE, add_evaluation_arguments, evaluate, finish, finish_arguments, fit,
                         new_head, open_frozen, open_sets)


# ---------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    """The command line as a namespace; a mistake in it is one line on stderr and exit code 2."""
    parser = new_parser(__doc__)
    add_evaluation_arguments(parser)
    add = parser.add_argument_group("protocol").add_argument
    add("--percent", type=int, choices=(1, 10, 100), required=True,
        help="share of the training labels, Table 3")
    add("--subset", type=not_empty, metavar="FILE",
        help="list of images, a line each: file names, as in SimCLR's lists, or class/file "
             "(default: drawn from every class, by the seed)")
    add("--epochs", type=count, nargs="+", default=[50],
        help="passes over the subset; several are compared (default 50)")
    add("--batch-size", type=count, default=1024,
        help="images a step, over all ranks; of a smaller subset, all of it (default 1024)")
    add("--lr", type=positive, nargs="+", default=[0.05],
        help="learning rate, whatever the batch size; several are compared (default 0.05)")
    add("--head-lr", type=positive, help="learning rate of the classifier (default: the encoder's)")
    args = parser.parse_args(argv)
    use_recipe(args, ("image_size",))
    return finish_arguments(args, f"semi{args.percent}")


# ------------------------------------------------------------------------------------------- subset
def other_names(name, kind):
    """Other names that a list may use for the image class/folders/file of the class `kind`.

    Shorter ones, and its own; in one of Unicode's forms.
    """
    name, kind = one_form(name), one_form(kind)
    below = name.removeprefix(f"{kind}/")
    file = Path(name).name
    return {name, below, file, f"{kind}/{file}", f"{kind}_{file}"}


def read_subset(path, source):
    """Indices of the images in a list, one per line: names as in names_of, or unique shorter ones.

    Bytes that are no UTF-8 are kept, as in names of files; a byte-order mark and the line ends of
    Windows are no part of a name. InputError if a name is unknown or of several images, or a class
    has none.
    """
    text = Path(path).read_bytes().decode("utf-8-sig", "surrogateescape")
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    wanted = [line for line in lines if line]
    exact, others = {}, {}
    for index, (name, label) in enumerate(zip(names_of(source), labels_of(source).tolist())):
        exact[name] = index
        for other in other_names(name, source.classes[label]):
            others.setdefault(other, []).append(index)
    indices, unknown = set(), []
    for name in wanted:
        found = [exact[name]] if name in exact else others.get(one_form(name), [])
        if len(found) > 1:
            raise InputError(f"{path}: {shown(name)} is the name of {len(found)} images; give "
                             "class/file for each")
        if not found:
            unknown.append(shown(name))
        indices.update(found)
    if unknown:
        raise InputError(f"{path}: {len(unknown)} of {len(wanted)} names are not in the training "
                         f"images, first {', '.join(unknown[:3])}")
    return check_classes(np.array(sorted(indices), dtype=np.int64), source, path)


def check_share(indices, source, percent, path):
    """InputError unless a list has about `percent` of the images: within a tenth of it."""
    share = 100 * len(indices) / len(source)
    if abs(share - percent) > percent / 10:
        raise InputError(f"--subset {path}: {share:.3g} % of the training images ({len(indices)} "
                         f"of {len(source)}), where --percent says {percent}")


def draw_subset(source, percent, seed):
    """Indices of `percent` of every class, rounded, drawn by the seed; InputError if of none."""
    indices, _ = split_by_class(labels_of(source), lambda n: round(n * percent / 100), seed)
    return check_classes(indices, source, f"--percent {percent}")


def check_classes(indices, source, what):
    """The indices; InputError unless every class is among them."""
    empty = set(range(len(source.classes))) - set(labels_of(source)[indices].tolist())
    if empty:
        first = shown(source.classes[min(empty)])
        raise InputError(f"{what}: no image for {len(empty)} classes, first {first}")
    return indices


# ----------------------------------------------------------------------------------------- training
class FineTune(nn.Module):
    """Encoder and classifier, all trained: (B, 3, H, W) -> scores (B, classes)."""

    def __init__(self, encoder, classes):
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        self.head = new_head("linear", encoder.dim5, classes)

    def forward(self, x):
        return self.head(pool(self.encoder(x)[1]))  # (B, classes)


def fine_tune(run, args, encoder, name, source, lr, epochs):
    """A fresh model, fine-tuned on `source`, in --out/name -> the model and its arguments.

    SGD with Nesterov's momentum 0.9, cosine, no weight decay. Diverged: loss or weights not finite.
    """
    args = argparse.Namespace(**vars(args))
    args.out, args.lr, args.epochs = f"{args.out}/{name}", lr, epochs
    args.batch_size = min(args.batch_size, len(source)) // run.world * run.world
    args.images = len(source)
    if args.head_lr is None:
        args.head_lr = lr
    if args.batch_size < 2 * run.world:
        fail(f"batches of {args.batch_size}, of {len(source)} images: {run.world} ranks need at "
             "least 2 images each")
    torch.manual_seed(args.seed)
    model = FineTune(encoder, len(source.dataset.classes)).to(run.device)
    groups = [{"params": list(model.encoder.parameters()), "base_lr": lr},
              {"params": list(model.head.parameters()), "base_lr": args.head_lr}]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True)
    with run.within(args) as inner:
        fit(inner, args, model, optimizer, source)
    return model, args


def compare(run, args, encoder, train, indices, grid):
    """Top-1 of each (lr, epochs) on a held-out fifth of the subset; -1 where it diverged."""
    drawn, rest = split_by_class(labels_of(train)[indices], lambda n: round(n / 5), args.seed)
    if not len(drawn):
        fail(f"{len(indices)} images: too few a class to hold a fifth out; give one --lr and one "
             "--epochs")
    kept, held_out = Subset(train, indices[rest]), Subset(train, indices[drawn])
    scores = {}
    for lr, epochs in grid:
        try:
            name = f"lr{lr:g}_epochs{epochs}"
            model, _ = fine_tune(run, args, encoder, name, kept, lr, epochs)
            scores[lr, epochs], _ = evaluate(run, args, model, held_out, "held-out fifth")
        except Diverged:
            scores[lr, epochs] = -1.0
    return scores


# --------------------------------------------------------------------------------------------- main
def score_encoder(run, args):
    """The whole protocol: the subset, what is compared on a fifth of it, the best on all of it."""
    encoder = open_frozen(run, args)
    train, val = open_sets(run, args)
    with user_errors():
        if args.subset:
            indices = read_subset(args.subset, train)
            check_share(indices, train, args.percent, args.subset)
        else:
            indices = draw_subset(train, args.percent, args.seed)
        if run.rank == 0:
            names, path = names_of(train), Path(args.out, "subset.txt")
            lines = "".join(f"{names[index]}\n" for index in indices)
            listed = lines.encode("utf-8", "surrogateescape")
            if path.exists() and path.read_bytes() != listed:
                raise InputError(f"{path}: lists other images than this command's; choose another "
                                 "--out, or move it")
    args.subset_sha256 = hashlib.sha256(indices.tobytes()).hexdigest()

    grid, scores = list(product(args.lr, args.epochs)), {}
    best = grid[0]
    if len(grid) > 1:
        scores = compare(run, args, encoder, train, indices, grid)
        best = max(grid, key=scores.get)
    lr, epochs = best
    subset, name = Subset(train, indices), f"final_lr{lr:g}_epochs{epochs}"
    model, final = fine_tune(run, args, encoder, name, subset, lr, epochs)
    with user_errors():
        if run.rank == 0:
            write_whole(path, listed)
    top1, top5 = evaluate(run, args, model, val)
    choice = {f"lr {lr:g}, {epochs} epochs": score for (lr, epochs), score in scores.items()}
    finish(run, args, {
        "top1": top1, "top5": top5, "protocol": "semi", "percent": args.percent, "head": "linear",
        "lr": final.lr, "head_lr": final.head_lr, "epochs": final.epochs,
        "batch_size": final.batch_size, "sync_bn": args.sync_bn, "labels": len(subset),
        "subset": args.subset_sha256, "choice": choice})


def main(argv=None):
    args = parse_args(argv)
    with Run(args, (*FREE, "subset")) as run:  # known by its sha256
        score_encoder(run, args)


if __name__ == "__main__":
    main()
