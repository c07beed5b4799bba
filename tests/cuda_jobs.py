"""What test_cuda_path.py runs in processes of their own, which see pretended GPUs."""
import ctypes
import importlib
import json
import os
import sys
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist

import bench
import train
from common import boxes
from common.data import Stream, collate, open_images
from common.ranks import parallelise
from common.run import Run, set_precision
from common.views import TwoViews

SMALL = ["--data", "data", "--image-size", "64", "--workers", "0", "--log-every", "1",
         "--batch-size", "8", "--epochs", "1"]
MODEL = ["--arch", "resnet18", "--blocks", "1", "--hidden-dim", "64"]
EVALUATED = [*SMALL, "--pretrained", "random", "--arch", "resnet18"]
DETECTED = ["--pretrained", "random", "--arch", "resnet18", "--data", "shapes:4", "--workers", "0",
            "--batch-size", "2", "--rois", "8", "--iterations", "1"]
JOBS = {  # script -> the command lines that are run one after the other
    "train": [
        [*SMALL, *MODEL, "--workers", "1", "--knn-every", "1", "--max-steps", "1", "--out", "run"],
        [*SMALL, *MODEL, "--workers", "1", "--knn-every", "1", "--out", "run"],
        [*SMALL, *MODEL, "--accum-steps", "2", "--precision", "fp16", "--sync-bn", "cnn",
         "--out", "fp16"],
        [*SMALL, *MODEL, "--image-size", "32", "--blocks", "2", "--precision", "tf32",
         "--out", "tf32"]],
    "linear_eval": [
        [*EVALUATED, "--sync-bn", "none", "--export", "features.npz", "--out", "linear"],
        [*EVALUATED, "--evaluate", "--out", "linear"],
        [*EVALUATED, "--knn", "--precision", "fp32", "--out", "knn"]],
    "semi_eval": [[*EVALUATED, "--percent", "100", "--out", "semi"]],
    "detect_eval": [[*DETECTED, "--protocol", "voc-c4", "--out", "voc"],
                    [*DETECTED, "--protocol", "coco-fpn", "--out", "coco"]],
    "visualize": [["--pretrained", "random", "--arch", "resnet18", "--images", "data/val/cat",
                   "--limit", "1", "--image-size", "64", "--out", "figure.png"]],
    "bench": [[*MODEL, "--image-size", "64", "--batch-size", "8"], [*SMALL, *MODEL]],
}


def run_script(name, line=None):
    """A script's command lines, or one of them, in a folder with `data`."""
    script = importlib.import_module(name)
    if name == "detect_eval":
        few_scenes_and_no_true_bool()
    for flags in JOBS[name] if line is None else [JOBS[name][line]]:
        script.main(flags)


def few_scenes_and_no_true_bool():
    """Four images to score. No box is degenerate, but still all numbers are finite."""
    gpu, check, scenes = ctypes.CDLL(None), Run.check, boxes.Scenes

    def check_with_true(run):
        gpu.pretended_answer(1)
        values = check(run)
        gpu.pretended_answer(0)
        return values

    Run.check = check_with_true
    boxes.Scenes = lambda split, length: scenes(split, min(length, 4))
    gpu.pretended_answer(0)


def memory_of_a_small_encoder():
    """Print bench.py's table for one encoder, without the largest batches."""
    bench.ENCODERS, bench.PAIRS, bench.CARDS = ("resnet18",), 512, ()
    bench.main([*MODEL, "--image-size", "64", "--memory"])


def count_in_a_step(world, pairs=32, *flags):
    """Print the launches and the waits of a step, after others, on a GPU: of rank 0 of `world`."""
    args = train.parse_args(["--data", f"shapes:{pairs}", "--precision", "bf16", *flags])
    device = torch.device("cuda", 0)
    if world > 1:
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=world,
                                device_id=device)
    autocast, scaler = set_precision(args, device)
    model, optimizer = train.new_model(args, device)
    parallel = parallelise(model, device)
    stream = Stream(open_images(args.data, "pretrain"), TwoViews(args.image_size), args.seed, pairs)
    (crops, parameters), _, _ = collate([stream[n] for n in range(pairs)])
    batches = [((crops.pin_memory(), parameters), None)]
    gpu = ctypes.CDLL(None)
    for _ in range(12):  # DDP itself waits in each of the first ten, then in every hundredth
        before = gpu.pretended_launches(), gpu.pretended_waits()
        train.pretrain_step(
            parallel, optimizer, SimpleNamespace(autocast=autocast, scaler=scaler), batches,
            partial(train.make_views, device=device, mode="device"), lr=0.1, tau=0.99)
    print(json.dumps([gpu.pretended_launches() - before[0], gpu.pretended_waits() - before[1]]))
    sys.stdout.flush()
    os._exit(0)  # the other ranks are missing: there is nobody to take leave of
