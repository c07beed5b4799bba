"""Frozen features: what kNN and RankMe make of them, and what train.py watches."""
import contextlib
import copy
import math
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Subset

from care import l2_normalize, pool
from common.data import labels_of
from common.ranks import fail, take_buffers_of_rank_0
from common.views import centre_crop, to_input

TEMPERATURE = 0.07  # a neighbour's vote is exp(cosine / temperature)
RANK_IMAGES = 2048  # of RankMe, at most: as many as a ResNet-50 has features


def count_correct(scores, labels):
    """Scores (B, classes), labels (B,) -> (2,): how many labels come first, how many in five."""
    top = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    return torch.stack((top[:, 0].sum(), top.sum()))


def frozen(encoder):
    """A copy of an encoder, in eval mode, with the running statistics of rank 0."""
    encoder = copy.deepcopy(encoder).eval()
    take_buffers_of_rank_0(encoder)
    return encoder


@torch.no_grad()
def features(run, args, encoder, source, what, autocast, replace=False):
    """This rank's share of a data set: yields pooled features (B, dim5), float32, and labels (B,).

    Of centre crops, under `autocast`; what, replace: of run.in_order. Exit code 1 if a feature is
    not finite: its neighbours and scores would look like those of an honest failure.
    """
    crop = partial(centre_crop, size=args.image_size)
    for crops, labels in run.in_order(source, crop, what, replace=replace):
        with autocast:
            pooled = pool(encoder(to_input(crops, run.device))[1])  # (B, dim5)
        if not pooled.isfinite().all():
            fail(f"{what}: not finite in {pooled.dtype}; try --precision fp32", code=1)
        yield pooled.float(), labels.to(run.device, non_blocking=True)


def all_features(run, args, encoder, source, what, autocast, replace=False):
    """`features` of a whole data set in order, on every rank: (N, dim5); unfinished on a signal."""
    found = torch.zeros(len(source), encoder.dim5, device=run.device)
    row = run.rank
    for some, _ in features(run, args, encoder, source, what, autocast, replace):
        end = row + len(some) * run.world
        found[row:end:run.world] = some
        row = end
    if run.world > 1:
        dist.all_reduce(found)  # 0 where another rank has the row
    return found


def features_on_rank_0(run, args, encoder, source, what):
    """`features` of a whole data set in order, on the CPU: (N, dim5) on rank 0; None on a signal.

    Other ranks hold their share of the rows and return that. All are those that kNN normalises.
    """
    encoder = frozen(encoder)
    shares = [len(range(rank, len(source), run.world)) for rank in range(run.world)]
    own, row = torch.zeros(shares[run.rank], encoder.dim5), 0
    for some, _ in features(run, args, encoder, source, what, run.autocast):
        own[row:row + len(some)] = some
        row += len(some)
    if run.stopping():
        return None
    if run.rank > 0:
        dist.send(own, 0)
    if run.rank > 0 or run.world == 1:
        return own
    found = torch.zeros(len(source), encoder.dim5)
    found[::run.world] = own
    for rank in range(1, run.world):
        theirs = torch.zeros(shares[rank], encoder.dim5)
        dist.recv(theirs, rank)
        found[rank::run.world] = theirs
    return found


# ---------------------------------------------------------------------------------------------- kNN


def keep_nearest(cosines, kinds, more_cosines, more_kinds):
    """The k nearest so far (Q, k) and n more, their labels in `kinds` -> the k nearest of all."""
    best = torch.cat((cosines, more_cosines), dim=1).topk(cosines.shape[1], dim=1)
    return best.values, torch.cat((kinds, more_kinds), dim=1).gather(1, best.indices)


def knn(run, args, encoder, bank, val, ks=(20, 200)):
    """kNN on `val` with the labelled images `bank` -> scores in percent, by name; None on a signal.

    top1 and top5 are those of the first of ks, top1_k200 and top5_k200 of 200; the last is largest.
    The bank streams past: each rank compares its share of it, batch by batch, with all queries and
    keeps the k nearest; the ranks' are merged at the end. On ImageNet (50,000 queries of 2048
    numbers, k = 200) a rank holds 0.41 GB of queries, 0.12 of neighbours and up to 0.5 in between,
    however large the bank, which would be 10.5 GB.
    A copy of the encoder is scored: mode, weights and statistics stay, as does the random state.
    """
    encoder = frozen(encoder)
    truth = labels_of(val).to(run.device)
    cosines = torch.full((len(val), ks[-1]), -math.inf, device=run.device)  # votes of 0
    kinds = torch.zeros_like(cosines, dtype=torch.long)
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws a number
        queries = all_features(run, args, encoder, val, "val features", run.autocast)
        queries = l2_normalize(queries)  # (Q, dim5)
        for some, labels in features(run, args, encoder, bank, "train features", run.autocast):
            labels = labels.expand(len(val), -1)  # (Q, B)
            products = queries @ l2_normalize(some).T  # (Q, B)
            cosines, kinds = keep_nearest(cosines, kinds, products, labels)
    if run.stopping():
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


# ------------------------------------------------------------------------------------------- RankMe
def rankme(run, args, encoder, source):
    """RankMe of the pooled features of a source's images, no labels -> float; None on a signal.

    exp(entropy of p), p the singular values divided by their sum (Garrido et al., ICML 2023,
    arxiv.org/abs/2210.02885, less the 1e-7 that it adds to p): about how many directions the
    features use, from 1 (collapsed) to the smaller of their number and the images'. In float32
    whatever --precision, of up to 2,048 images at even distances in the source, the same each time;
    one that cannot be decoded is replaced. A copy of the encoder is measured, as in `knn`.
    """
    encoder = frozen(encoder)
    number = min(RANK_IMAGES, len(source))
    chosen = Subset(source, np.arange(number) * len(source) // number)
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws a number
        found = all_features(run, args, encoder, chosen, "features for RankMe",
                             contextlib.nullcontext(), replace=True)  # (number, dim5)
    if run.stopping():
        return None
    return effective_rank(found).item()


def effective_rank(x):
    """exp(entropy of the normalised singular values) of a matrix: (); of zeros 1."""
    values = torch.linalg.svdvals(x.cpu())  # 2 s of one core for 2048 x 2048
    p = values / values.sum().clamp_min(torch.finfo(x.dtype).tiny)
    return torch.special.entr(p).sum().exp()  # ()
