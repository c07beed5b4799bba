"""Semi-supervised classification: fine-tune encoder and classifier on 1 % or 10 % of the labels (Table 3).

  torchrun --nproc_per_node 8 semi_eval.py --pretrained runs/care_resnet50/encoder.pth --percent 1 \\
      --subset 1percent.txt --lr 0.01 0.02 0.05 0.1 0.005 --epochs 30 50       BYOL's grid on SimCLR's list
  python semi_eval.py --pretrained runs/demo/encoder.pth --data shapes --percent 10

Several --lr or --epochs are compared on a held-out fifth of the subset; the best then runs once on all of it.
The last line on stdout is one JSON object with the scores and the protocol. The same command again resumes.
"""
import argparse
import copy
from itertools import product
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Subset

from care import InputError, pool
from linear_eval import (add_evaluation_arguments, evaluate, finish, fit, labels_of, new_head, setup,
                         split_by_class)
from train import fail, new_parser, positive, user_errors, write_whole


# ---------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    """The command line as a namespace; a mistake in it is one line on stderr and exit code 2."""
    parser = new_parser(__doc__)
    add_evaluation_arguments(parser, epochs=[50], batch_size=1024, lr=[0.05])
    add = parser.add_argument_group("protocol").add_argument
    add("--percent", type=int, choices=(1, 10), required=True, help="share of the training labels")
    add("--subset", metavar="FILE", help="list of file names, as SimCLR's (default: drawn per class, seeded)")
    add("--head-lr", type=float, help="learning rate of the classifier (default: that of the encoder)")
    args = parser.parse_args(argv)
    positive(args, "batch_size")
    if min(args.epochs) < 1 or min(args.lr) <= 0 or (args.head_lr is not None and args.head_lr <= 0):
        fail("--epochs, --lr and --head-lr must be above 0")
    return args


# ------------------------------------------------------------------------------------------- subset
def names_of(source):
    """The name of every image as lists have it: the bare file name, which begins with the class and `_`.

    The class is put before a name that lacks it; images without a file are numbered.
    """
    files = map(str, range(len(source)))
    if hasattr(source, "samples"):
        files = [Path(path).name for path, _ in source.samples]
    classes = [source.classes[label] for label in labels_of(source)]
    return [name if name.startswith(f"{kind}_") else f"{kind}_{name}" for kind, name in zip(classes, files)]


def read_subset(path, source):
    """Indices of the images that a list names, one a line. ValueError if one is unknown, a class empty."""
    index = {name: i for i, name in enumerate(names_of(source))}
    wanted = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    missing = [name for name in wanted if name not in index]
    if missing:
        raise InputError(f"{path}: {len(missing)} of {len(wanted)} names are not in the training images, "
                         f"first {', '.join(missing[:3])}")
    return check_classes(sorted({index[name] for name in wanted}), source, path)


def draw_subset(source, percent, seed):
    """Indices of `percent` of every class, rounded, drawn by the seed. ValueError when a class gets none."""
    indices, _ = split_by_class(labels_of(source), lambda n: round(n * percent / 100), seed)
    return check_classes(indices, source, f"--percent {percent}")


def check_classes(indices, source, what):
    """The indices; ValueError unless they hold every class."""
    labels = labels_of(source)
    empty = set(range(len(source.classes))) - {labels[i] for i in indices}
    if empty:
        raise InputError(f"{what}: no image for {len(empty)} classes, first {source.classes[min(empty)]}")
    return indices


# ------------------------------------------------------------------------------------------ training
class FineTune(nn.Module):
    """Encoder and classifier, all trained: (B, 3, height, width) -> [scores (B, classes)]."""

    def __init__(self, encoder, classes):
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        self.heads = nn.ModuleList([new_head("linear", encoder.dim5, classes)])

    def forward(self, x):
        return [self.heads[0](pool(self.encoder(x)[1]))]


def fine_tune(run, args, out, source, lr, epochs):
    """A fresh model, fine-tuned on `source` (SGD, Nesterov 0.9, cosine) -> the model, its batch size."""
    Path(out).mkdir(parents=True, exist_ok=True)
    args = argparse.Namespace(**vars(args))
    args.batch_size = min(args.batch_size, len(source)) // run.world * run.world  # small subsets: one batch
    if args.batch_size < 2 * run.world:
        fail(f"{len(source)} images are too few for {run.world} ranks")
    torch.manual_seed(args.seed)
    model = FineTune(run.encoder, run.classes).to(run.device)
    groups = [{"params": list(model.encoder.parameters()), "base_lr": lr},
              {"params": list(model.heads.parameters()), "base_lr": args.head_lr or lr}]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True)
    return fit(run, args, out, model, optimizer, source, epochs), args.batch_size


# ---------------------------------------------------------------------------------------------- main
def main(argv=None):
    args = parse_args(argv)
    run = setup(args, f"semi{args.percent}")
    with user_errors():
        if args.subset:
            indices = read_subset(args.subset, run.train)
        else:
            indices = draw_subset(run.train, args.percent, args.seed)
        if run.rank == 0:
            names = names_of(run.train)
            text = "".join(f"{names[i]}\n" for i in indices).encode()
            write_whole(Path(args.out) / "subset.txt", lambda buffer: buffer.write(text))
    subset = Subset(run.train, indices)

    grid, choice = list(product(args.lr, args.epochs)), {}
    if len(grid) > 1:
        drawn, rest = split_by_class(labels_of(subset), lambda n: round(n / 5), args.seed)
        if not drawn:
            fail(f"{len(subset)} images: too few a class to hold a fifth out; give one --lr and one --epochs")
        for lr, epochs in grid:
            out = Path(args.out) / f"lr{lr:g}_epochs{epochs}"
            model, _ = fine_tune(run, args, out, Subset(subset, rest), lr, epochs)
            scores = evaluate(run, args, model, Subset(subset, drawn), "held-out fifth of the subset")
            choice[lr, epochs] = scores[0][0]
        grid = [max(grid, key=choice.get)]
    (lr, epochs), = grid
    model, batch_size = fine_tune(run, args, args.out, subset, lr, epochs)
    top1, top5 = evaluate(run, args, model, run.val)[0]
    result = {"top1": top1, "top5": top5, "protocol": "semi", "percent": args.percent, "head": "linear",
              "lr": lr, "head_lr": args.head_lr or lr, "epochs": epochs,
              "batch_size": batch_size, "images": len(subset)}
    if choice:
        result["choice"] = {f"lr {lr:g}, {epochs} epochs": round(score, 3)
                            for (lr, epochs), score in choice.items()}
    finish(run, args, result)


if __name__ == "__main__":
    main()
