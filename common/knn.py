"""kNN on frozen features: what linear_eval.py --knn prints and what train.py watches."""
import copy
import math
from functools import partial

import torch
import torch.distributed as dist

from care import l2_normalize, pool
from common.data import labels_of
from common.ranks import take_buffers_of_rank_0
from common.views import centre_crop, to_input

TEMPERATURE = 0.07  # a neighbour's vote is exp(cosine / temperature)


def count_correct(scores, labels):
    """Scores (B, classes), labels (B,) -> (2,): how many labels come first, how many in five."""
    top = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    return torch.stack((top[:, 0].sum(), top.sum()))


def features(run, args, encoder, source, what):
    """This rank's share of a data set: yields l2-normalised features (B, dim5) and labels (B,)."""
    crop = partial(centre_crop, size=args.image_size)
    for crops, labels in run.in_order(source, crop, what):
        with run.autocast:
            pooled = pool(encoder(to_input(crops, run.device))[1])  # (B, dim5)
        yield l2_normalize(pooled.float()), labels.to(run.device, non_blocking=True)


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
    take_buffers_of_rank_0(encoder)
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
