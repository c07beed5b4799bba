"""A labelled data set, its images in order, and kNN on frozen features.

`knn` is what linear_eval.py --knn prints and what train.py watches; linear_eval.py and semi_eval.py
draw their labels and score their images by the same functions.
"""
import copy
import math
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torchvision.transforms.functional as TF
from torch.utils.data import Subset
from tqdm import tqdm

from care import InputError, l2_normalize, pool
from data import Stream, imagenet_normalize, open_images
from run import Unreadable, agree, fail, load_batches, user_errors

SCORING_BATCH = 256  # images, over all ranks
TEMPERATURE = 0.07  # a neighbour's vote is exp(cosine / temperature)


# ------------------------------------------------------------------------------------------- labels
def open_labelled(args, count=None):
    """Training and validation images of --data -> train, val.

    count: train becomes that many of its images, of every class as many, in every run the same.
    InputError for images without classes, other classes in val, or a count below that of classes.
    """
    where = {"data_root": args.data_root, "size": max(args.image_size)}
    train = open_images(args.data, "train", **where)
    val = open_images(args.data, "val", **where)
    classes = len(train.classes)
    if list(train.classes) != list(val.classes):
        differ = sorted(set(train.classes) ^ set(val.classes))
        raise InputError(f"--data {args.data}: train and val differ in classes "
                         f"({', '.join(map(str, differ[:5]))})")
    if count is None or count >= len(train):
        return train, val
    if count < classes:
        raise InputError(f"{count} labels are fewer than the {classes} classes of {args.data}")
    drawn, _ = split_by_class(labels_of(train), lambda n: count // classes, seed=0)
    return Subset(train, drawn), val


def labels_of(source):
    """The labels of a data set, (N,); no image is read."""
    if isinstance(source, Subset):
        return labels_of(source.dataset)[source.indices]
    return torch.as_tensor(source.targets).long()


def split_by_class(labels, per_class, seed):
    """Indices drawn from every class, `per_class(n)` of its n, and the rest: two sorted arrays."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=generator)
        drawn[members[order[:per_class(len(members))]]] = True
    return np.flatnonzero(drawn), np.flatnonzero(~drawn)


# ---------------------------------------------------------------------------------- images in order
def centre_crop(image, size):
    """PIL image -> (3, height, width) uint8: as it is, if of this size, else resized and cut."""
    if image.size != (size[1], size[0]):
        image = TF.resize(image, round(max(size) * 256 / 224), max_size=2 ** 16)
        image = TF.center_crop(image, size)
    return TF.pil_to_tensor(image)


def batches_in_order(run, args, source, what):
    """This rank's share of a data set: yields centre crops, normalised, and labels (B,).

    A signal ends it early, after as many batches on all ranks. Exit code 2 on an unreadable image.
    """
    crop = partial(centre_crop, size=args.image_size)
    stream = Stream(source, crop, args.seed, len(source), shuffle=False)
    unreadable = Unreadable(stream)
    share, size = range(run.rank, len(source), run.world), max(1, SCORING_BATCH // run.world)
    batches = [share[i:i + size] for i in range(0, len(share), size)]
    loader = load_batches(stream, batches, args.workers, run.device)
    most = agree(len(batches))
    for _ in tqdm(range(most), desc=what, leave=False, disable=run.rank > 0 or None):
        with user_errors():
            batch = next(loader, None)
        if agree(bool(run.stopping)):
            return
        if batch is None:
            continue
        crops, labels, bad = batch
        unreadable.note(bad)
        x = imagenet_normalize(crops.to(run.device, non_blocking=True))
        labels = labels.to(run.device, non_blocking=True)
        yield x.contiguous(memory_format=torch.channels_last), labels
    if unreadable.count():
        fail(f"{what} cannot be scored without the images named above")


def count_correct(scores, labels):
    """Scores (B, classes), labels (B,) -> (2,): how many labels come first, how many in five."""
    top = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    return torch.stack((top[:, 0].sum(), top.sum()))


def take_buffers_of_rank_0(model, world):
    """On a CPU batch norms are not synchronised: running statistics are each rank's own."""
    if world > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


# ---------------------------------------------------------------------------------------------- kNN
def features(run, args, encoder, source, what):
    """This rank's share of a data set: yields l2-normalised features (B, dim5) and labels (B,)."""
    for x, labels in batches_in_order(run, args, source, what):
        with run.autocast:
            pooled = pool(encoder(x)[1])
        yield l2_normalize(pooled.float()), labels


def keep_nearest(cosines, kinds, more_cosines, more_kinds):
    """The k nearest so far (Q, k) and n more, their labels in `kinds` -> the k nearest of all."""
    best = torch.cat((cosines, more_cosines), dim=1).topk(cosines.shape[1], dim=1)
    return best.values, torch.cat((kinds, more_kinds), dim=1).gather(1, best.indices)


@torch.no_grad()
def knn(run, args, encoder, bank, val, ks=(20, 200)):
    """kNN on `val` with the labelled images `bank` -> scores in percent, by name; None on a signal.

    top1 and top5 are those of the first of ks, top1_k200 and top5_k200 of 200; the last is largest.
    The bank streams past: each rank compares its share of it, batch by batch, with all queries and
    keeps the k nearest; the ranks' are merged at the end. On ImageNet (50,000 queries of 2048
    numbers, k = 200) a rank holds 0.41 GB of queries, 0.12 of neighbours and up to 0.5 in between,
    however large the bank, which would be 10.5 GB.
    A copy of the encoder is scored: mode, weights and statistics stay, as does the random state.
    """
    encoder = copy.deepcopy(encoder).eval()
    take_buffers_of_rank_0(encoder, run.world)
    truth = labels_of(val).to(run.device)
    queries = torch.zeros(len(val), encoder.dim5, device=run.device)
    cosines = torch.full((len(val), ks[-1]), -math.inf, device=run.device)  # votes of 0
    kinds = torch.zeros_like(cosines, dtype=torch.long)
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws a number
        row = run.rank
        for some, _ in features(run, args, encoder, val, "val features"):
            end = row + len(some) * run.world
            queries[row:end:run.world] = some
            row = end
        if run.world > 1:
            dist.all_reduce(queries)  # 0 where another rank has the row
        for some, labels in features(run, args, encoder, bank, "train features"):
            labels = labels.expand(len(val), -1)  # (Q, B)
            cosines, kinds = keep_nearest(cosines, kinds, queries @ some.T, labels)
    if agree(bool(run.stopping)):
        return None

    own = cosines, kinds
    for rank in range(run.world if run.world > 1 else 0):
        theirs = [tensor.clone() for tensor in own]
        for tensor in theirs:
            dist.broadcast(tensor, rank)
        if rank != run.rank:
            cosines, kinds = keep_nearest(cosines, kinds, *theirs)
    scores = {}
    for k in ks:
        weights = (cosines[:, :k] / TEMPERATURE).exp()
        votes = torch.zeros(len(val), len(val.classes), device=run.device)
        votes.scatter_add_(1, kinds[:, :k], weights)
        top1, top5 = (100 * count_correct(votes, truth).double() / len(val)).tolist()
        suffix = "" if k == ks[0] else f"_k{k}"
        scores |= {f"top1{suffix}": top1, f"top5{suffix}": top5}
    return scores
