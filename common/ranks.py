"""Ranks: joining them, their hardware, what they exchange, and errors that end all of them.

Ranks are torchrun's: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. Without them, every
function here also works for a single process.
"""
import atexit
import contextlib
import ctypes
import datetime
import json
import os
import platform
import sys
import time
import uuid
import warnings

import torch
import torch.distributed as dist
from torch import nn

from care import InputError

TIMEOUT = datetime.timedelta(minutes=10)  # that ranks wait for one another before they give up


# ------------------------------------------------------------------------------------------ joining
def join_ranks():
    """Join torchrun's process group -> rank, world, device, and how many cores this rank has.

    NCCL where every rank has a GPU of its own, else gloo. Exit code 2 when the launcher's variables
    are incomplete or make no sense, or the ranks do not meet; torchrun then starts them again.
    """
    wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in wanted if not os.environ.get(name)]
    if missing and (os.environ.get("RANK") or os.environ.get("WORLD_SIZE")):
        fail(f"started as a rank, but without {', '.join(missing)}: use torchrun, or set all of "
             f"{', '.join(wanted)} (and LOCAL_RANK)", everywhere=True)
    rank, world = variable("RANK", 0), variable("WORLD_SIZE", 1)
    local_rank = variable("LOCAL_RANK", 0)
    if rank >= world:
        fail(f"RANK={rank}: must be below WORLD_SIZE={world}", everywhere=True)
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", local_rank % gpus) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    else:
        keep_memory()
    mine = own_hardware(device)
    ranks = enter_group(rank, world, mine, device) if world > 1 else [mine]
    return rank, world, device, share_of_cores(ranks, rank)


def variable(name, default):
    """A launcher's variable, a whole number; `default` where it is not set, or empty."""
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdigit()):
        fail(f"{name}={text}: must be a whole number; is it left over from another launcher?",
             everywhere=True)
    return int(text)


def enter_group(rank, world, mine, device):
    """Enter the process group. mine: this rank's hardware -> every rank's, by rank."""
    if variable("MASTER_PORT", 0) > 65535:
        fail(f"MASTER_PORT={os.environ['MASTER_PORT']}: ports end at 65535", everywhere=True)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
        store = store_of_this_start(store, rank, world)
        store.set(f"care/{rank}", json.dumps(mine))
        ranks = [json.loads(store.get(f"care/{other}")) for other in range(world)]
        backend = choose_backend([other["gpu"] for other in ranks])
        if backend == "gloo" and mine["gpu"] and rank == 0:
            print(f"warning: {world} ranks share GPUs: they speak over gloo, slowly",
                  file=sys.stderr)
        dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank, world_size=world,
                                device_id=None if backend == "gloo" else device)
    except (RuntimeError, TimeoutError) as error:  # of torch, for whatever a network may do
        reason = str(error).splitlines()[0][:120]
        fail(f"rank {rank}: no meeting ({reason}); does another run use MASTER_PORT, or has a rank "
             "not started?", everywhere=True)
    return ranks


def store_of_this_start(store, rank, world):
    """A part of the store that no earlier start has written to.

    torchrun's store outlives the ranks. After a restart it still has the addresses of the dead, and
    a rank that reads one too early waits for nobody. So each rank asks rank 0 a question of its own
    for this start's name. A question of the dead is answered too, to no effect.
    """
    if rank > 0:
        question = uuid.uuid4().hex
        store.set(f"care/question/{rank}", question)
        name = store.get(f"care/answer/{question}").decode()
        store.set(f"care/{name}/{rank}", "has it")
        return dist.PrefixStore(name, store)
    name, deadline = uuid.uuid4().hex, time.monotonic() + TIMEOUT.total_seconds()
    for other in range(1, world):
        while not store.check([f"care/{name}/{other}"]):
            question = store.get(f"care/question/{other}").decode()
            store.set(f"care/answer/{question}", name)
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {other} has not come")
            time.sleep(0.01)
    return dist.PrefixStore(name, store)


def choose_backend(gpus):
    """NCCL, with gloo for the CPU, where each rank's GPU, by its UUID, is its own; else gloo."""
    own = None not in gpus and len(set(gpus)) == len(gpus)
    return "cpu:gloo,cuda:nccl" if own else "gloo"


def own_hardware(device):
    """This process's host, the cores on which it may run, and its GPU, if any, by its UUID."""
    limited = hasattr(os, "sched_getaffinity")  # elsewhere a process may run on every core
    cores = sorted(os.sched_getaffinity(0)) if limited else list(range(os.cpu_count()))
    gpu = torch.cuda.get_device_properties(device).uuid if device.type == "cuda" else None
    return {"host": platform.node(), "cores": cores, "gpu": gpu and str(gpu)}


def share_of_cores(ranks, rank):
    """A rank's cores, divided by the ranks of its host that may use them too.

    torchrun's ranks share all of the node's, Slurm's tasks have their own.
    """
    mine = ranks[rank]
    sharing = [other for other in ranks if other["host"] == mine["host"]
               and not set(other["cores"]).isdisjoint(mine["cores"])]
    return max(1, len(mine["cores"]) // len(sharing))


def keep_memory():
    """Let glibc keep freed memory for the next step: fresh pages take a third of a CPU's step."""
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large tensor
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing goes back to the system


def leave_ranks():
    """Wait for all ranks: none takes the process group away from one that is still in it.

    The group goes at exit. If it went here, the loop's DDP, when freed, would be its last owner: it
    would hold the interpreter's lock while it waits for the group's threads, which may need it.
    """
    if dist.is_initialized():
        dist.barrier()
        atexit.register(dist.destroy_process_group)


# ----------------------------------------------------------------------------------------- exchange
def max_over_ranks(flag):
    """The largest of the ranks' integers; without torchrun, the integer itself."""
    flag = torch.tensor(int(flag))
    if dist.is_initialized():
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return int(flag)


def gather(value):
    """Return all ranks' values in a list; every rank calls this. One process: a list of one."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def is_rank_0():
    """Whether this process prints, reads checkpoints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def average(meters):
    """Scalars on the device, by name -> floats, averaged over the ranks. Waits for the device."""
    values = torch.stack([value.detach() for value in meters.values()]).float()
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return dict(zip(meters, values.tolist()))


def take_buffers_of_rank_0(model):
    """Where batch norms are not synchronised, running statistics are each rank's own."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


# ------------------------------------------------------------------------------------------- errors
def fail(message, code=2, everywhere=False):
    """One line on stderr (from the first rank of each node, unless everywhere) and out."""
    places = [os.environ.get(name) for name in ("RANK", "LOCAL_RANK")]
    if everywhere or any(place in (None, "", "0") for place in places):
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def note(message):
    """One line on stderr, from rank 0."""
    if is_rank_0():
        print(f"note: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def user_errors(code=2, what=""):
    """A mistake in the input, or a refusal of the system, on any rank: one line, and all ranks end.

    Only InputError and OSError: a bug stays a traceback. Ranks exchange nothing else inside.
    """
    message = None
    try:
        yield
    except (InputError, OSError) as error:
        message = f"{what}{error}"
    if max_over_ranks(message is not None):  # one number; texts only where there is one
        messages = [one for one in gather(message) if one is not None]
        fail(messages[0], code)


def same_on_all_ranks(**facts):
    """Exit with code 2, naming both values, if a fact differs between ranks."""
    ranks = gather(facts)
    for name in facts:
        for rank, other in enumerate(ranks):
            if other[name] != ranks[0][name]:
                fail(f"{name}: rank 0 has {ranks[0][name]}, rank {rank} has {other[name]}")


# ----------------------------------------------------------------------------------------- training
class BatchNormOfRanks(torch.autograd.Function):
    """Batch norm by the statistics of all ranks, through torch's kernels for it: GPUs alone.

    As torch's own, whose every layer makes the host wait three times: it drops ranks that have no
    image by a mask on the device. Here each rank must have some.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps):
        x = dense(x)
        own_mean, own_invstd = torch.batch_norm_stats(x, eps)  # (C,), float32 under autocast too
        count = own_mean.new_full((1,), x.numel() // x.shape[1])
        table = own_mean.new_zeros(dist.get_world_size(), 2 * x.shape[1] + 1)
        torch.cat((own_mean, own_invstd, count), out=table[dist.get_rank()])
        dist.all_reduce(table)  # every rank's row; by a sum, which NCCL and gloo have alike
        means, invstds, counts = table.split((x.shape[1], x.shape[1], 1), dim=1)
        mean, invstd = torch.batch_norm_gather_stats_with_counts(
            x, means, invstds, running_mean, running_var, momentum, eps, counts[:, 0])
        ctx.save_for_backward(x, weight, mean, invstd, counts)
        return torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, invstd, counts = ctx.saved_tensors
        grad = dense(grad)
        sum_grad, sum_grad_x, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
            grad, x, mean, invstd, weight, True, True, True)
        sums = torch.stack((sum_grad, sum_grad_x))  # over the rank's images: (2, C)
        dist.all_reduce(sums)
        grad_x = torch.batch_norm_backward_elemt(grad, x, mean, invstd, weight, *sums, counts.int())
        return grad_x, grad_weight, grad_bias, None, None, None, None


def dense(x):
    """x, (B, C) or (B, C, H, W), without gaps; channels last if it has them."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """nn.BatchNorm1d and 2d, in training by the statistics of all ranks. Its count stands still."""

    def forward(self, x):
        if not self.training:
            return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight,
                                            self.bias, eps=self.eps)
        return BatchNormOfRanks.apply(x, self.weight, self.bias, self.running_mean,
                                      self.running_var, self.momentum, self.eps)


def synchronise(module):
    """Make all batch norms in a module synchronised ones, in place; those of torch stay torch's."""
    for layer in module.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            layer.__class__ = SyncBatchNorm


def parallelise(model, device, synchronised=None):
    """What to call in training: the model, or its DDP, with batch norms synchronised on GPUs.

    synchronised: the parts of the model whose batch norms are, by --sync-bn; None: the whole model.
    """
    if synchronised is not None and (device.type == "cpu" or not dist.is_initialized()):
        note("--sync-bn has no effect on a CPU or on one GPU: nothing is synchronised there")
    if not dist.is_initialized():
        return model
    if device.type == "cuda":
        for part in [model] if synchronised is None else synchronised:
            synchronise(part)  # release: without the transformer's, which are per GPU. here: all
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions rename broadcast_buffers
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False,
                                                   gradient_as_bucket_view=True)


def gradient_exchange(parallel, now):
    """A context for a backward pass: in it DDP averages gradients over the ranks only if `now`."""
    if now or not hasattr(parallel, "no_sync"):
        return contextlib.nullcontext()
    return parallel.no_sync()
