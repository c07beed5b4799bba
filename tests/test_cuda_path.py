"""What runs on GPUs alone, tested without one: the kernels of pretended_gpu.py do nothing.

A tensor on the wrong device, a wrong type, a wait of the host and what is wrong between processes
are found so; wrong values are not. The synchronised batch norm is tested by its values, on a CPU.
"""
import contextlib
import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.modules._functions import SyncBatchNorm as TorchsOwn

import pretended_gpu
import train
from care import CARE
from common import run as run_module
from common.ranks import SyncBatchNorm, parallelise, synchronise
from common.run import set_precision
from conftest import CPU, HERE, ROOT, class_folders, free_port, header, refused, torchrun
from cuda_jobs import JOBS

CASES = {  # input, dtype, mean / std, memory format, tolerance
    "2d": ((8, 5, 3, 2), torch.float64, 0, torch.channels_last, 1e-12),
    "2d, contiguous": ((8, 5, 3, 2), torch.float64, 0, torch.contiguous_format, 1e-12),
    "1d": ((8, 5), torch.float64, 0, torch.contiguous_format, 1e-12),
    "far from 0": ((64, 5, 4, 4), torch.float32, 100, torch.channels_last, 2e-5),
    "autocast": ((8, 5, 3, 2), torch.bfloat16, 0, torch.channels_last, 2e-2),
}


# ------------------------------------------------------------------------ synchronised batch norm
def over(x):
    """The dimensions over which batch norm takes means, and a channel's shape beside x."""
    return [d for d in range(x.dim()) if d != 1], [1, -1] + [1] * (x.dim() - 2)


def wide(x):
    """As torch's kernels compute: half precision in float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def batch_norm_stats(x, eps):
    var, mean = torch.var_mean(wide(x), over(x)[0], correction=0)
    return mean, (var + eps).rsqrt()


def batch_norm_gather_stats_with_counts(x, mean, invstd, running_mean, running_var, momentum, eps,
                                        counts):
    share = (counts / counts.sum())[:, None]  # (W, 1), of means and deviations (W, C)
    joined = (share * mean).sum(0)
    var = (share * (invstd ** -2 - eps + (mean - joined) ** 2)).sum(0)
    running_mean.lerp_(joined, momentum)
    running_var.lerp_(var * counts.sum() / (counts.sum() - 1), momentum)
    return joined, (var + eps).rsqrt()


def batch_norm_elemt(x, weight, bias, mean, invstd, eps):
    weight, bias, mean, invstd = (v.view(over(x)[1]) for v in (weight, bias, mean, invstd))
    return ((wide(x) - mean) * invstd * weight + bias).to(x.dtype)


def batch_norm_backward_reduce(grad, x, mean, invstd, weight, x_too, weight_too, bias_too):
    dims, shape = over(x)
    sum_dy = wide(grad).sum(dims)
    sum_dy_xmu = (wide(grad) * (wide(x) - mean.view(shape))).sum(dims)
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy.clone()


def batch_norm_backward_elemt(grad, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count):
    mean, invstd, weight, mean_dy, mean_dy_xmu = (
        v.view(over(x)[1])
        for v in (mean, invstd, weight, sum_dy / count.sum(), sum_dy_xmu / count.sum()))
    centred = wide(grad) - mean_dy - (wide(x) - mean) * invstd ** 2 * mean_dy_xmu
    return (centred * invstd * weight).to(x.dtype)


def add_kernels():
    """What torch has for GPUs alone, by the formulas, for a CPU. -> keep it: it ends with this."""
    library = torch.library.Library("aten", "IMPL")
    for kernel in (batch_norm_stats, batch_norm_gather_stats_with_counts, batch_norm_elemt,
                   batch_norm_backward_reduce, batch_norm_backward_elemt):
        library.impl(kernel.__name__, kernel, "CPU")
    return library


def torchs_own(layer, x):
    """torch's own synchronised layer, which refuses CPU tensors only in its outermost part."""
    return TorchsOwn.apply(x, layer.weight, layer.bias, layer.running_mean, layer.running_var,
                           layer.eps, layer.momentum, dist.group.WORLD, dist.get_world_size())


def two_steps(layer, call, shape, dtype, ratio, memory_format, rows):
    """Two forward and backward passes on these rows of a fixed batch -> all that came of them."""
    generator = torch.Generator().manual_seed(0)
    values, gradients = [], []
    for _ in range(2):
        x, grad = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        x = (1.5 * (x + ratio)).to(dtype)[rows].contiguous(memory_format=memory_format)
        y = call(x.requires_grad_())
        y.backward(grad.to(dtype)[rows])
        values.append(y.detach())
        gradients.append(x.grad)
    return {"y": torch.stack(values, 1), "grad_x": torch.stack(gradients, 1),
            "grad_weight": layer.weight.grad, "grad_bias": layer.bias.grad,
            "running_mean": layer.running_mean, "running_var": layer.running_var}


def new_layer(shape, dtype):
    """A layer with weights and biases that differ, in float64 or float32."""
    layer = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(shape[1])
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 1.5, shape[1]))
        layer.bias.copy_(torch.linspace(-1, 1, shape[1]))
    return layer.double() if dtype == torch.float64 else layer


def batch_norm_rank(out):
    """One of two ranks, with three eighths of the images or the rest: all cases, to OUT.RANK."""
    dist.init_process_group("gloo")
    library, results = add_kernels(), {}
    for name, (shape, dtype, ratio, memory_format, _) in CASES.items():
        first = 3 * shape[0] // 8
        rows = slice(0, first) if dist.get_rank() == 0 else slice(first, None)
        given = shape, dtype, ratio, memory_format, rows
        ours, own = new_layer(shape, dtype), new_layer(shape, dtype)
        synchronise(ours)
        results[name] = (two_steps(ours, ours, *given),
                         two_steps(own, partial(torchs_own, own), *given))
    torch.save(results, f"{out}.{dist.get_rank()}")
    dist.barrier()
    dist.destroy_process_group()
    del library


def test_batch_norm_of_two_ranks_is_that_of_the_joined_batch(tmp_path):
    """Values, gradients, running statistics; torch's own layer finds the same by these kernels."""
    result = torchrun(2, batch_norm_rank, tmp_path / "found")
    assert result.codes == [0, 0], result.stderr
    ranks = [torch.load(f"{tmp_path}/found.{rank}") for rank in (0, 1)]
    for name, (shape, dtype, ratio, memory_format, tolerance) in CASES.items():
        layer = new_layer(shape, torch.float64)
        wanted = two_steps(layer, lambda x, layer=layer: layer(x.double()), shape, dtype, ratio,
                           memory_format, slice(None))
        statistics = torch.float64 if dtype == torch.float64 else torch.float32
        for first, second in zip(ranks[0][name], ranks[1][name]):  # ours, then torch's own
            assert torch.equal(first["running_mean"], second["running_mean"])
            assert torch.equal(first["running_var"], second["running_var"])
            assert first["running_var"].dtype == statistics and first["y"].dtype == dtype
            found = {"y": torch.cat((first["y"], second["y"])),
                     "grad_x": torch.cat((first["grad_x"], second["grad_x"])),
                     "grad_weight": first["grad_weight"] + second["grad_weight"],
                     "grad_bias": first["grad_bias"] + second["grad_bias"],
                     "running_mean": first["running_mean"], "running_var": first["running_var"]}
            for key, value in found.items():
                error = (value.double() - wanted[key].double()).abs().max()
                assert error <= tolerance * max(1, wanted[key].abs().max()), (name, key, error)


def test_synchronise_works_in_place_and_leaves_evaluation_alone():
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.SyncBatchNorm(4))
    plain[:2](torch.randn(8, 3, 2, 2))  # statistics that are not 0 and 1
    model = copy.deepcopy(plain)
    state, parameters = model.state_dict(), list(model.parameters())
    synchronise(model)
    assert model.state_dict().keys() == state.keys()
    assert all(a is b for a, b in zip(parameters, model.parameters()))
    assert [type(layer) for layer in model[1:]] == [SyncBatchNorm, nn.SyncBatchNorm]
    x = torch.randn(8, 3, 2, 2)
    assert torch.equal(model[:2].eval()(x), plain[:2].eval()(x))


# ---------------------------------------------------------------------------- precision, refusals
def test_fp32_is_float32_and_tf32_a_choice(monkeypatch, capsys):
    """torch's default is TF32 in convolutions; it needs a GPU of compute capability 8.0."""
    def switches(precision, device):
        args = Namespace(precision=precision)
        set_precision(args, torch.device(device))
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert switches("tf32", "cuda") == (True, True)
    assert switches("fp32", "cuda") == switches("fp32", "cpu") == (False, False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    for device, message in (("cuda", "Tesla V100 lacks it"), ("cpu", "tf32 needs a GPU")):
        with pytest.raises(SystemExit) as caught:
            switches("tf32", device)
        line = capsys.readouterr().err
        assert caught.value.code == 2 and message in line and line.count("\n") == 1


def test_compile_is_for_one_process(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(run_module, "join_ranks", lambda: (0, 2, CPU, 1))
    refused(capsys, "--data", "shapes:32", "--compile", "--out", tmp_path,
            match="--compile is for one process, not for 2 ranks")


# ---------------------------------------------------------------------- scripts on a pretended GPU
# One process that has imported torch; each job is a fork of it, in a folder of its own.
FORK = """
import json, os, sys
import numpy, PIL.Image, pycocotools.cocoeval, torch, torchvision, tqdm
children = []
for folder, variables, code in json.loads(sys.argv[1]):
    children.append(os.fork())
    if not children[-1]:
        os.chdir(folder)
        os.environ.update(variables)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        exec(code)
        sys.exit()
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if reason := pretended_gpu.missing():
        pytest.skip(reason)
    return pretended_gpu.build(tmp_path_factory.mktemp("pretended"))


def on_gpus(library, jobs, caching=False):
    """Run jobs (folder, call in cuda_jobs, variables, root of the code), all at the same time.

    caching: of memory, as on a GPU. Without, what a kernel would have written is 0.
    -> exit code, stdout and stderr of each; those of one folder write to the same.
    """
    listed = []
    for folder, call, variables, root in jobs:
        for split, count in (("train", 8), ("val", 2)):
            class_folders(folder / "data" / split, ("cat", "dog"), count)
        paths = [str(root), str(HERE)]
        code = f"sys.path[:0] = {paths}\nimport cuda_jobs\ncuda_jobs.{call}"
        listed.append((str(folder), variables, code))
    environment = pretended_gpu.environment(library, gpus=8)
    environment |= {
        "CC": "/no/compiler", "TRITON_CACHE_DIR": str(jobs[0][0]),  # nothing is compiled on the way
        "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    if not caching:
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    process = subprocess.Popen([sys.executable, "-c", FORK, json.dumps(listed)], env=environment,
                               stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        codes = json.loads(process.communicate(timeout=200)[0])
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    texts = [[(folder / name).read_text() for name in ("out", "err")] for folder, *_ in jobs]
    return [(code, *both) for code, both in zip(codes, texts)]


def test_every_script_on_one_gpu(library, tmp_path):
    """Its real main, on mixed precision, float32 and TF32; a run that is resumed."""
    jobs = [(tmp_path / name, f"run_script({name!r})", {}, ROOT) for name in JOBS]
    for name, (code, out, err) in zip(JOBS, on_gpus(library, jobs)):
        assert code == 0, (name, err)
        assert name == "visualize" or "Pretended GPU" in out + "".join(
            path.read_text() for path in (tmp_path / name).glob("*/log.jsonl")), (name, out)


def test_three_scripts_on_two_ranks(library, tmp_path):
    """With NCCL's wiring: a GPU for each rank."""
    jobs = []
    for name, line in (("train", 0), ("train", 2), ("linear_eval", 0), ("semi_eval", 0)):
        port = str(free_port())
        for rank in ("0", "1"):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2",
                         "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            folder = tmp_path / f"{name} {line}"
            jobs.append((folder, f"run_script({name!r}, {line})", variables, ROOT))
    for (folder, *_), (code, _, err) in zip(jobs, on_gpus(library, jobs)):
        assert code == 0 and "share GPUs" not in err, (folder, err)
    assert header(tmp_path / "train 0" / "run")["world_size"] == 2


def test_the_host_waits_for_no_gpu_in_a_step(library, tmp_path):
    """On one GPU, and as rank 0 of 8, where batch norms are synchronised."""
    jobs = [(tmp_path / str(world), f"count_in_a_step({world})", {}, ROOT) for world in (1, 8)]
    counts = []
    for code, out, err in on_gpus(library, jobs):
        assert code == 0, err
        counts.append(json.loads(out.splitlines()[-1]))
    (launches, waits), (launches_of_8, waits_of_8) = counts
    assert waits == waits_of_8 == 0 < launches < launches_of_8 < 1.3 * launches, counts


def test_memory_of_a_gpu(library, tmp_path):
    """By bench.py: more for more pairs, less by accumulation, more in float32."""
    job = tmp_path, "memory_of_a_small_encoder()", {}, ROOT
    [(code, out, err)] = on_gpus(library, [job], caching=True)
    assert code == 0, err
    rows = [[text.strip() for text in line.strip("|").split("|")] for line in out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["resnet18", name] for name in ("bf16", "fp16", "fp32")]
    gib = [[float(text) for text in row[2:5]] for row in rows]
    assert all(halves < one < two for one, halves, two in gib)
    assert gib[0] == pytest.approx(gib[1], abs=0.11) and gib[0][0] < gib[2][0]


FAULTS = [  # a file, a line of it, what stands there instead: a tensor is left on the CPU
    ("train", "train.py", "crops.to(device, non_blocking=True).unbind(1)", "crops.unbind(1)"),
    ("train", "train.py", "model = model.to(device, memory", "model = model.to('cpu', memory"),
    ("train", "common/views.py", ".view(3, 1, 1).to(device, non_blocking=True)", ".view(3, 1, 1)"),
    ("train", "common/views.py", "view(-1, 1, 1, 1).to(x.device, non_blocking=True)",
     "view(-1, 1, 1, 1)"),
    ("linear_eval", "linear_eval.py", "labels = labels.to(run.device, non_blocking=True)",
     "labels = labels"),
    ("linear_eval", "linear_eval.py", "dtype=torch.long, device=run.device)", "dtype=torch.long)"),
    ("linear_eval", "common/knn.py", "encoder.dim5, device=run.device)", "encoder.dim5)"),
    ("semi_eval", "semi_eval.py", ".to(run.device)", ""),
    ("detect_eval", "detect_eval.py", "images = to_device(images, run.device)", "images = images"),
    ("detect_eval", "detect_eval.py", "targets = [to_device(target, run.device) for",
     "targets = [target for"),
    ("detect_eval", "detect_eval.py", "detections = model(to_device(images, run.device))",
     "detections = model(images)"),
    ("visualize", "visualize.py", "imagenet_normalize(pixels[None].to(device))",
     "imagenet_normalize(pixels[None])"),
    ("bench", "bench.py", "labels = torch.randint(0, 1000, (B,), device=device)",
     "labels = torch.randint(0, 1000, (B,))"),
]


def test_what_is_left_on_the_cpu_is_found(library, tmp_path):
    """Faults planted in copies of the code, in every script."""
    jobs = []
    for number, (script, file, line, instead) in enumerate(FAULTS):
        root = tmp_path / f"code {number}"
        for path in (*ROOT.glob("*.py"), *ROOT.glob("common/*.py")):
            copied = root / path.relative_to(ROOT)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copied)
        text = (root / file).read_text()
        assert line in text, (file, line)
        (root / file).write_text(text.replace(line, instead))
        jobs.append((tmp_path / f"run {number}", f"run_script({script!r})", {}, root))
    for fault, (code, _, err) in zip(FAULTS, on_gpus(library, jobs)):
        assert code == 1 and re.search("same device|should be the same", err), (fault, err)


# --------------------------------------------------------------------------------------- --sync-bn
OWN = {"all": (), "cnn": (".transformer.",), "none": ("",)}  # in names of norms of each rank alone


def sync_bn_model():
    torch.manual_seed(0)
    model = CARE("thin", image_size=64, blocks=2, hidden_dim=32, out_dim=16).double()
    return model, *torch.randn(2, 8, 3, 64, 64, dtype=torch.float64)


def sync_bn_rank(out):
    """One of two ranks: a loss of its half of a batch by each --sync-bn -> to OUT.RANK."""
    dist.init_process_group("gloo")
    library, rank, results = add_kernels(), dist.get_rank(), {}
    for sync_bn in OWN:
        model, x, y = sync_bn_model()
        parts = train.synchronised(model, sync_bn)
        parallel = parallelise(model, torch.device("cuda"), parts)
        loss = parallel(*(view[4 * rank:4 * rank + 4] for view in (x, y)))["loss"]
        loss.backward()
        norms = {name: layer.running_mean for name, layer in model.named_modules()
                 if hasattr(layer, "running_mean")}
        results[sync_bn] = loss.detach(), model.online.encoder.conv1.weight.grad, norms
    torch.save(results, f"{out}.{rank}")
    dist.barrier()
    dist.destroy_process_group()
    del library


def in_halves(layer, x):
    """A batch norm of two ranks, each with its half of the batch."""
    halves = [F.batch_norm(half, None, None, layer.weight, layer.bias, True) for half in x.chunk(2)]
    return torch.cat(halves)


def test_sync_bn_all_cnn_none(tmp_path):
    """Of all norms, all but the transformers', none: loss and gradient of two ranks are those of
    one process whose other norms take halves of the batch; statistics are alike where joined."""
    result = torchrun(2, sync_bn_rank, tmp_path / "found")
    assert result.codes == [0, 0], result.stderr
    first, second = (torch.load(f"{tmp_path}/found.{rank}") for rank in (0, 1))
    losses = set()
    for sync_bn, own in OWN.items():
        model, x, y = sync_bn_model()
        for name, layer in model.named_modules():
            if hasattr(layer, "running_mean"):
                alone = any(part in name for part in own)
                same = torch.equal(first[sync_bn][2][name], second[sync_bn][2][name])
                assert same != alone, (sync_bn, name)
                if alone:
                    layer.forward = partial(in_halves, layer)
        loss = model(x, y)["loss"]
        loss.backward()
        found = (first[sync_bn][0] + second[sync_bn][0]) / 2
        torch.testing.assert_close(found, loss.detach(), rtol=1e-9, atol=0)
        torch.testing.assert_close(first[sync_bn][1], model.online.encoder.conv1.weight.grad,
                                   rtol=1e-7, atol=1e-12)
        losses.add(round(loss.item(), 6))
    assert len(losses) == 3
