"""Linear classification on frozen features (Tables 1 and 2), or kNN.

  torchrun --nproc_per_node 8 linear_eval.py \\
      --pretrained runs/care_resnet50/encoder.pth
  python linear_eval.py --data shapes --pretrained runs/shapes/encoder.pth
  python linear_eval.py --data shapes --pretrained runs/shapes/encoder.pth \\
      --knn --export features.npz

The last line on stdout is one JSON object: the scores, and all that is needed
to repeat them. --evaluate scores the classifier.pth that training leaves in
--out. The same command again resumes.
"""
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch import nn
from torch.utils.data import Subset
from torchvision import transforms

from care import ARCHS, InputError, pool
from common.data import (NAMED_SETS, ImageFiles, Stream, describe, digest_of, labels_of, names_of,
                         open_images, open_labelled, recipe_of, relabel, shown)
from common.knn import TEMPERATURE, count_correct, features_on_rank_0, knn
from common.ranks import (fail, note, parallelise, same_on_all_ranks, take_buffers_of_rank_0,
                          user_errors)
from common.run import (STOPPED, Run, add_data_arguments, add_run_arguments, checked, count,
                        new_parser, not_empty, positive, use_recipe, versions, whole_file)
from common.views import centre_crop, crop_and_flip, to_input
from common.weights import check_state, checkpoint_file, load_checkpoint, open_encoder, sha256_of

# Raised whenever the same arguments compute something else; older runs are then not resumed.
PROTOCOL_VERSION = 4
DEFAULTS = {"protocol_version": 1, "sync_bn": "all"}  # of checkpoints that lack it
# What may differ on resume. An encoder is known by the sha256 of its tensors, not by its path.
FREE = ("data_root", "workers", "out", "log_every", "max_steps", "pretrained", "evaluate", "val",
        "val_digest", "export")


# ---------------------------------------------------------------------------------------- arguments
def add_evaluation_arguments(parser):
    """The flags on encoder, data and running that both classification scripts have."""
    add = parser.add_argument_group("encoder and data").add_argument
    add("--pretrained", required=True, type=checkpoint_file, metavar="FILE|random",
        help="encoder: a file of train.py, the authors, torchvision, MoCo, ...; or random weights")
    add("--arch", choices=ARCHS, metavar="ARCH",
        help=f"encoder: {', '.join(ARCHS)} (default: read off the file; random: by --data)")
    add("--stem", choices=("imagenet", "cifar"),
        help="default: read off the file (random: by --data). A 3x3 stem is taken as padded by 1; "
             "of one trained with padding 2, which no file tells, the features are wrong")
    add_data_arguments(add)
    add("--val", type=not_empty, metavar="DIR",
        help="score this set: a folder a class, by name or, as in ImageNet-V2, by number "
             "(default: val of --data)")
    add = parser.add_argument_group("running").add_argument
    add_run_arguments(add)
    add("--sync-bn", choices=("all", "none"), default="all",
        help="on several GPUs, batch norms that train take their statistics over all of them, or "
             "over each GPU's share of the batch (none: the release's linear head; default all)")


def parse_args(argv=None):
    """The command line as a namespace; a mistake in it is one line on stderr and exit code 2."""
    parser = new_parser(__doc__)
    add_evaluation_arguments(parser)
    protocol = parser.add_argument_group("protocol")
    add = protocol.add_argument
    add("--labels", type=count, metavar="N",
        help="use N of the training images, of every class as many, in every run the same ones "
             "(default: by --data; all of a folder)")
    add("--head", choices=("linear-bn", "linear"),
        help="classifier: linear-bn, a linear layer and a batch norm (release; default for a "
             "folder), or linear, without the norm")
    add("--epochs", type=count,
        help="passes over the images (default: by --data; the paper's 80 for a folder)")
    add("--batch-size", type=count, default=256, help="images a step, over all ranks (default 256)")
    add("--lr", type=positive, default=0.2,
        help="learning rate per 256 images of a batch (default 0.2)")
    array_name = checked(str, "a name that ends in .npz", lambda text: text.endswith(".npz"))
    add("--export", type=array_name, metavar="FILE.npz",
        help="first write the pooled features of both sets, (N, C) float32, their labels and their "
             "names: arrays train_features, train_labels, train_names, val_features, ...")
    add = protocol.add_mutually_exclusive_group().add_argument
    add("--knn", action="store_true", help="weighted kNN, k = 20 and 200, instead of training")
    add("--evaluate", type=not_empty, nargs="?", const=True, metavar="FILE",
        help="score this classifier.pth (default: that in --out) instead of training")
    args = parser.parse_args(argv)
    use_recipe(args, ("labels", "head", "image_size"))
    if args.epochs is None:
        args.epochs = recipe_of(args.data)["linear_epochs"]
    return finish_arguments(args, "knn" if args.knn else "linear")


def finish_arguments(args, kind):
    """Fill in the defaults of both scripts that depend on other arguments."""
    args.protocol_version = PROTOCOL_VERSION
    if args.out is None:
        args.out = default_out(args.pretrained, kind)
    if args.pretrained == "random":
        use_recipe(args, ("arch", "stem"))
    return args


def default_out(pretrained, kind):
    """Beside the encoder's file: `kind` for encoder.pth and last.pth, kind_NAME for NAME.pth."""
    if pretrained == "random":
        return f"runs/random/{kind}"
    name = Path(pretrained).name.partition(".")[0]
    if name not in ("encoder", "last"):
        kind = f"{kind}_{name}"
    return str(Path(pretrained).parent / kind)


# ------------------------------------------------------------------------------------------- set-up
def open_frozen(run, args):
    """The encoder of --pretrained on the device. Fills in args: arch, stem, sha256."""
    with user_errors():
        encoder = open_encoder(args.pretrained, args.arch, args.stem, args.seed)
        if any(side % encoder.stride for side in args.image_size):
            raise InputError(f"--image-size {args.image_size}: this encoder needs multiples of "
                             f"{encoder.stride}")
    if encoder.left_out:
        note(f"{args.pretrained}: left out {', '.join(encoder.left_out)}")
    args.arch, args.stem, args.sha256 = encoder.arch, encoder.stem, sha256_of(encoder)
    return encoder.to(run.device, memory_format=torch.channels_last)


def open_sets(run, args, labels=None):
    """Images to train on and to score -> train, val; prints which.

    Fills in args: images, data_digest, val_digest.
    """
    with user_errors():
        if run.rank == 0 and args.data.partition(":")[0] in NAMED_SETS:  # one rank downloads
            open_images(args.data, "train", args.data_root, download=True)
    with user_errors():
        train, val = open_labelled(args, labels)
        if args.val:
            val = open_val(args.val, list(val.classes))
        args.images = len(train)
        args.data_digest, args.val_digest = digest_of(train), digest_of(val)
    run.same_arguments()
    same_on_all_ranks(val_digest=args.val_digest)
    if run.rank == 0:
        whole = train.dataset if isinstance(train, Subset) else train
        print(f"{len(train)} labels of {describe(whole)}, scored on {describe(val)}")
    return train, val


def open_val(folder, classes):
    """The images of a folder with one folder a class: its name, or its number in `classes`."""
    source = ImageFiles(folder, labelled=True)
    differ = relabel(source, classes)
    numbered = numbered_folders(source.classes, classes) if differ else {}
    if numbered:
        relabel(source, classes, [numbered[name] for name in classes])
        pairs = [f"{numbered[name]} is {shown(name)}"
                 for name in sorted(classes, key=lambda name: int(numbered[name]))]
        note(f"--val {folder}: by number: {', '.join(pairs[:2])}, ..., {pairs[-1]}")
    elif differ:
        raise InputError(f"--val {folder}: its folders differ from the {len(classes)} classes in "
                         f"{len(differ)} names, first {', '.join(map(shown, differ[:3]))}")
    return source


def numbered_folders(folders, classes):
    """The folder of each class, by name, where folders are numbers; {} where they do not fit.

    A class that is a number has the folder of its value or, if not all have one, like any other the
    folder of its place, from 0: in the order of the numbers, of other names in the alphabet's.
    """
    folder_of = {int(name): name for name in folders if name.isdecimal()}
    own = [int(name) for name in classes if name.isdecimal()]
    if len(set(own)) < len(classes):
        own = list(range(len(classes)))
    place = {number: place for place, number in enumerate(sorted(own))}
    for numbers in (own, [place[number] for number in own]):
        if len(folder_of) == len(folders) and set(numbers) == set(folder_of):
            return {name: folder_of[number] for name, number in zip(classes, numbers)}
    return {}


# ------------------------------------------------------------------------------------------ scoring
def export(run, args, encoder, **sources):
    """Write features, labels and names of the sources, by name, to args.export, from rank 0.

    Arrays NAME_features (N, dim5) float32, NAME_labels (N,) int64, NAME_names (N,) unicode. A
    signal ends the script.
    """
    with user_errors():
        if run.rank == 0 and not Path(args.export).parent.is_dir():
            raise InputError(f"--export {args.export}: there is no such folder")
    arrays = {}
    for name, source in sources.items():
        found = features_on_rank_0(run, args, encoder, source, f"{name} features")
        if found is None:
            stop(run)
        arrays |= {f"{name}_features": found.numpy(), f"{name}_labels": labels_of(source).numpy(),
                   f"{name}_names": np.array(names_of(source))}
    with user_errors(1, f"cannot write {args.export}: "):
        if run.rank == 0:
            with whole_file(args.export) as file:
                np.savez(file, **arrays)


@torch.no_grad()
def evaluate(run, args, model, source, what="val"):
    """Top-1 and top-5 in percent of a model's scores; a signal ends the script."""
    model.eval()
    take_buffers_of_rank_0(model)
    correct = torch.zeros(2, dtype=torch.long, device=run.device)
    for crops, labels in run.in_order(source, partial(centre_crop, size=args.image_size), what):
        with run.autocast:
            scores = model(to_input(crops, run.device))  # (B, classes)
        correct += count_correct(scores.float(), labels.to(run.device, non_blocking=True))
    if run.stopping():
        stop(run)
    if run.world > 1:
        dist.all_reduce(correct)
    return tuple((100 * correct.double() / len(source)).tolist())


def stop(run, message=STOPPED):
    """Leave the script after a signal, or after --max-steps."""
    run.finish(message)
    raise SystemExit(0)


def finish(run, args, scores):
    """Print the scores and all that they came from as a JSON line, the log's last line too."""
    names = ("data_digest", "val_digest", "sha256", "arch", "stem", "image_size", "seed",
             "precision", "protocol_version")
    protocol = {name: getattr(args, name) for name in names} | versions(run.world, run.device)
    result = {"encoder": args.pretrained, "data": args.data, "val": args.val} | protocol | scores
    run.log(result | {"args": vars(args)})
    run.finish(json.dumps(result))


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
    """Frozen encoder, in eval mode for good, and a head: (B, 3, H, W) -> scores (B, classes)."""

    def __init__(self, encoder, head):
        super().__init__()
        self.encoder, self.head = encoder.requires_grad_(False), head

    def train(self, mode=True):
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, x):
        with torch.no_grad():
            pooled = pool(self.encoder(x)[1]).float()  # (B, dim5)
        with torch.autocast(x.device.type, enabled=False):
            return self.head(pooled)  # (B, classes)


def fit(run, args, model, optimizer, source):
    """Train a model of scores (B, classes) on `source` for args.epochs.

    Each group's rate goes from its base_lr to 0 by a cosine. Resumes from, logs in and saves to
    run.out; a signal or --max-steps ends the script. Diverged: a loss or a weight is not finite.
    """
    steps_per_epoch = len(source) // args.batch_size
    total_steps = args.epochs * steps_per_epoch
    run.restore({"model": model, "optimizer": optimizer}, total_steps,
                save_every=max(100, steps_per_epoch), defaults=DEFAULTS)
    parallel = parallelise(model, run.device, [] if args.sync_bn == "none" else None)
    crop = transforms.Compose([partial(crop_and_flip, size=args.image_size), TF.pil_to_tensor])
    stream = Stream(source, crop, args.seed, steps_per_epoch * args.batch_size)
    model.train()
    for step, [(crops, labels)] in run.batches(stream, args.batch_size):
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * 0.5 * (1 + math.cos(math.pi * step / total_steps))
        labels = labels.to(run.device, non_blocking=True)
        with run.autocast:
            scores = parallel(to_input(crops, run.device))  # (B, classes)
        loss = F.cross_entropy(scores.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        run.scaler.scale(loss).backward()
        run.scaler.step(optimizer)
        run.scaler.update()
        top1 = 100 * count_correct(scores.float(), labels)[0] / len(labels)
        run.after(step + 1, {"loss": loss, "train_top1": top1},
                  epoch=round((step + 1) / steps_per_epoch, 4),
                  lr=[group["lr"] for group in optimizer.param_groups])
    if run.unfinished():
        stop(run, run.unfinished())


# --------------------------------------------------------------------------------------------- main
def train_classifier(run, args, encoder, train, val):
    """Train the head, score it on val and save it -> the final line's fields."""
    if len(train) < args.batch_size or args.batch_size % run.world:
        fail(f"--batch-size {args.batch_size}: must be a multiple of {run.world} ranks, up to "
             f"{len(train)} images")
    if args.head == "linear-bn" and args.batch_size < 2 * run.world:
        fail(f"--batch-size {args.batch_size}: the batch norm of --head linear-bn needs at least 2 "
             "images on each rank")
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    torch.manual_seed(args.seed)
    head = new_head(args.head, encoder.dim5, len(val.classes))
    model = Probe(encoder, head).to(run.device)
    groups = [{"params": list(head.parameters()), "base_lr": args.lr * args.batch_size / 256}]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    fit(run, args, model, optimizer, train)

    top1, top5 = evaluate(run, args, model, val)
    after = encoder.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    if changed:
        fail(f"the frozen encoder has moved ({len(changed)} tensors, first {changed[0]}): no score",
             code=1)
    trained = {"protocol": "linear", "head": args.head, "lr": args.lr, "epochs": args.epochs,
               "batch_size": args.batch_size, "sync_bn": args.sync_bn, "labels": len(train),
               "seed": args.seed, "image_size": args.image_size,
               "protocol_version": args.protocol_version, "data_digest": args.data_digest}
    run.write("classifier.pth", {"head": args.head, "classes": list(val.classes),
                                 "sha256": args.sha256, "trained": trained,
                                 "state": head.state_dict()})
    return {"top1": top1, "top5": top5, **trained}


def score_classifier(run, args, encoder, val):
    """The classifier of --evaluate, scored on val -> the final line's fields."""
    path = f"{args.out}/classifier.pth" if args.evaluate is True else args.evaluate
    with user_errors():
        saved = load_checkpoint(path)
        if not isinstance(saved, dict) or saved.get("sha256") != args.sha256:
            raise InputError(f"{path}: not a classifier that was trained on {args.pretrained}")
        if relabel(val, saved["classes"]):
            raise InputError(f"{path}: trained for other classes than those of {args.data}")
        size = saved["trained"].get("image_size", args.image_size)  # older ones do not say
        if size != args.image_size:
            raise InputError(f"{path}: trained at --image-size {size}, not {args.image_size}")
        head = new_head(saved["head"], encoder.dim5, len(val.classes))
        check_state(path, saved["state"], head.state_dict())
        head.load_state_dict(saved["state"])
    model = Probe(encoder, head).to(run.device)
    top1, top5 = evaluate(run, args, model, val)
    trained = {"data_digest": None, "protocol_version": None} | saved["trained"]
    return {"top1": top1, "top5": top5, **trained, "classifier": path}


def score_encoder(run, args):
    """The whole protocol that `args` asks for."""
    encoder = open_frozen(run, args)
    train, val = open_sets(run, args, args.labels)
    if args.export:
        export(run, args, encoder, train=train, val=val)
    if args.evaluate is not None:
        scores = score_classifier(run, args, encoder, val)
    elif args.knn:
        scores = knn(run, args, encoder, train, val)
        if scores is None:
            stop(run)
        scores |= {"protocol": "knn", "k": 20, "temperature": TEMPERATURE, "labels": args.images}
    else:
        scores = train_classifier(run, args, encoder, train, val)
    if args.export:
        scores |= {"export": args.export}
    finish(run, args, scores)


def main(argv=None):
    args = parse_args(argv)
    with Run(args, FREE) as run:
        score_encoder(run, args)


if __name__ == "__main__":
    main()
