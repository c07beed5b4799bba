"""Images, views and the sample stream.

Images: a folder, cifar10, stl10, or the embedded `shapes` (rendered); source[i] -> (RGB PIL image, label).
Views (paper Sec. 4.1, release): random resized crop, colour jitter, blur, grayscale, flip, solarize. Drawn by
torchvision, applied by `per_image` (torchvision and PIL, in a worker: the reference) or `augment` (batched).
The stream: sample n, its image and every draw of its views, is fixed by (seed, n) alone. So a run does not
depend on the number of workers or ranks, and one that resumes at step s goes on exactly.
"""
import math
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter
from torch.utils.data import Dataset, Subset
from torchvision import datasets, transforms

from care import InputError
from shapes import CLASSES, mask_box, paint, render_clutter, render_shape, soft_ground  # noqa: F401

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# -------------------------------------------------------------------------------------------- sources
class Shapes(Dataset):
    """Embedded images: number `index` is rendered by one of the functions of shapes.py, at `size` pixels."""

    classes = CLASSES

    def __init__(self, split="train", length=4000, size=64, renderer=render_shape):
        self.split, self.size, self.renderer = split, size, renderer
        self.targets = [index % 10 for index in range(length)]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        image, label, _, _ = self.render(index)
        return Image.fromarray(image), label

    def render(self, index):
        """-> image (size, size, 3) uint8, label, box (x0, y0, x1, y1), mask (size, size) bool."""
        return self.renderer(self.split, index, self.size)

    def ground(self, rng):
        return soft_ground(rng, self.size)

    def paint(self, image, rng, label, centre, radius, level):
        return paint(image, rng, label, centre, radius, level=level)


class ImageFiles(datasets.ImageFolder):
    """Every image below a folder, in sorted order, without labels (label -1)."""

    def find_classes(self, directory):
        return [""], {"": -1}


def open_images(data, split, data_root="data", size=64, download=False):
    """Folder, shapes[:N] (`size` pixels), cifar10, stl10; split: pretrain, train, val. ValueError if none."""
    name, _, count = data.partition(":")
    if name in ("shapes", "clutter"):
        if count and not (count.isdigit() and int(count)):
            raise InputError(f"--data {data}: N of {name}:N is the number of training images")
        renderer = render_shape if name == "shapes" else render_clutter
        if split == "val":
            return Shapes("val", 1000, size, renderer)
        return Shapes("train", int(count or 4000), size, renderer)
    if name in ("cifar10", "stl10"):
        try:
            if name == "cifar10":
                return datasets.CIFAR10(data_root, train=split != "val", download=download)
            part = {"pretrain": "unlabeled", "train": "train", "val": "test"}[split]
            return datasets.STL10(data_root, split=part, download=download)
        except (RuntimeError, OSError) as error:
            raise InputError(f"--data {data}: not in {data_root}, nor to be downloaded ({error})") from None
    root = Path(data)
    if not root.is_dir():
        raise InputError(f"--data {data}: no such folder (nor one of shapes, cifar10, stl10)")
    try:
        if split == "pretrain":
            return ImageFiles(root / "train" if (root / "train").is_dir() else root)
        return datasets.ImageFolder(root / split)
    except (FileNotFoundError, NotADirectoryError) as error:
        wanted = "no images below it" if split == "pretrain" else f"no folder {split} with images by class"
        raise InputError(f"--data {data}: {wanted} ({error})") from None


def file_of(source, index):
    """The file of an image of a data set, or of a Subset of one; None where it has none."""
    if isinstance(source, Subset):
        return file_of(source.dataset, source.indices[index])
    return source.samples[index][0] if hasattr(source, "samples") else None


# ------------------------------------------------------------------------------------------- views
# A view's row of numbers. jitter, gray, solarize: 0 or 1; brightness, contrast, saturation, hue: factors of
# the jitter's four steps; order: of these steps, a row of ORDERS; sigma: of the blur in pixels, 0 for none.
JITTER_STEPS = ("brightness", "contrast", "saturation", "hue")
PARAMETERS = ("jitter", *JITTER_STEPS, "order", "gray", "sigma", "solarize")
ORDERS = list(permutations(range(4)))
JITTER = transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
CHANCES = ((1.0, 0.0), (0.1, 0.2))  # of blur and of solarize, in the two views (release)


def blur_sigmas(size):
    """Least and largest blur sigma in pixels: the paper's 0.1, 2 at 224, scaled to `size` (height, width)."""
    return 0.1 * min(size) / 224, 2.0 * min(size) / 224


def draw(size, blur, solarize):
    """One view's parameters, drawn by torchvision; `blur` and `solarize` are probabilities."""
    jitter = JITTER.get_params(JITTER.brightness, JITTER.contrast, JITTER.saturation, JITTER.hue)
    order, *factors = jitter
    chances = torch.tensor((0.8, 0.2, blur, solarize))
    jittered, gray, blurred, solarized = (torch.rand(4) < chances).tolist()
    sigma = transforms.GaussianBlur.get_params(*blur_sigmas(size))
    row = ORDERS.index(tuple(order.tolist()))
    return (jittered, *factors, row, gray, sigma * blurred, solarized)


def crop_and_flip(image, size, crop_min=0.08):
    """Random resized crop (crop_min to all of the area) of a PIL image to `size`, flipped with p 0.5."""
    box = transforms.RandomResizedCrop.get_params(image, (crop_min, 1.0), (3 / 4, 4 / 3))
    image = TF.resized_crop(image, *box, size)
    return TF.hflip(image) if torch.rand(()) < 0.5 else image


def per_image(image, parameters):
    """The reference: one view's parameters on a PIL image, by torchvision and PIL, in the release's order."""
    p = dict(zip(PARAMETERS, parameters))
    if p["jitter"]:
        for step in ORDERS[int(p["order"])]:
            name = JITTER_STEPS[step]
            adjust = getattr(TF, f"adjust_{name}")
            image = adjust(image, p[name])
    if p["sigma"]:
        image = image.filter(ImageFilter.GaussianBlur(p["sigma"]))
    if p["gray"]:
        image = TF.to_grayscale(image, 3)
    if p["solarize"]:
        image = TF.solarize(image, 128)
    return TF.normalize(TF.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD)


class TwoViews:
    """PIL image -> views (2, 3, height, width), parameters (2, 9).

    augment: "device" gives uint8 crops, for `augment` to finish; "worker" all of it, by `per_image`.
    """

    def __init__(self, size, augment="device", crop_min=0.08):
        self.size, self.augment, self.crop_min = size, augment, crop_min

    def __call__(self, image):
        views, rows = [], []
        for blur, solarize in CHANCES:
            crop = crop_and_flip(image, self.size, self.crop_min)
            row = draw(self.size, blur, solarize)
            view = per_image(crop, row) if self.augment == "worker" else TF.pil_to_tensor(crop)
            views.append(view)
            rows.append(row)
        return torch.stack(views), torch.tensor(rows)


def per_channel(x, values):
    """Three numbers, one a channel, as (3, 1, 1) on the device of x, which is not waited for."""
    return torch.tensor(values, dtype=x.dtype).view(3, 1, 1).to(x.device, non_blocking=True)


def imagenet_normalize(x):
    """(B, 3, H, W), uint8 or float in 0..1 -> float32 with ImageNet's mean 0 and standard deviation 1."""
    x = x if x.is_floating_point() else x.float() / 255
    return (x - per_channel(x, IMAGENET_MEAN)) / per_channel(x, IMAGENET_STD)


normalize = imagenet_normalize


def to_gray(x):
    """Luma of (B, 3, H, W) -> (B, 1, H, W); ITU-R 601, as PIL and torchvision."""
    return (x * per_channel(x, (0.299, 0.587, 0.114))).sum(1, keepdim=True)


def shift_hue(x, shift):
    """Turn the hue of (B, 3, H, W) in 0..1 by `shift` (B, 1, 1, 1), in turns."""
    r, g, b = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    c = torch.where(chroma > 0, chroma, 1)  # no division by zero
    green_or_blue = torch.where(value == g, 2 + (b - r) / c, 4 + (r - g) / c)
    hue = torch.where(value == r, (g - b) / c, green_or_blue)  # in sixths of a turn
    k = (hue[:, None] + 6 * shift + per_channel(x, (5, 3, 1))) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def jitter_step(x, name, factor):
    """One of torchvision's colour jitter steps on (B, 3, H, W) in 0..1; `factor` (B, 1, 1, 1)."""
    if name == "hue":
        return shift_hue(x, factor)
    if name == "brightness":
        target = 0
    elif name == "contrast":
        target = to_gray(x).mean((2, 3), keepdim=True)
    else:
        target = to_gray(x)
    return (factor * x + (1 - factor) * target).clamp(0, 1)


def blur(x, sigma, radius):
    """Gaussian blur of (B, C, H, W), sigma (B,) in pixels, kernels of 2 * radius + 1, reflected borders."""
    B, C, H, W = x.shape
    taps = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.exp(-0.5 * (taps / sigma[:, None]) ** 2)  # (B, K)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(C, 0)  # (B*C, K)
    x = F.pad(x, (radius,) * 4, mode="reflect")
    x = x.reshape(1, B * C, H + 2 * radius, W + 2 * radius)
    x = F.conv2d(x, kernel[:, None, None, :], groups=B * C)  # (1, B*C, H + 2 radius, W)
    x = F.conv2d(x, kernel[:, None, :, None], groups=B * C)  # (1, B*C, H, W)
    return x.reshape(B, C, H, W)


def rows_where(condition):
    """Numbers of the rows for which `condition` (B,), on the CPU, holds: no device is waited for."""
    return condition.nonzero()[:, 0]


def augment(x, parameters):
    """Batched `per_image`: crops (B, 3, H, W) uint8, parameters (B, 9) on the CPU -> normalised float32."""
    p = dict(zip(PARAMETERS, parameters.unbind(1)))
    device = x.device
    x = x.float() / 255
    orders = torch.tensor(ORDERS)[p["order"].long()]  # (B, 4)
    for position in range(4):
        for step, name in enumerate(JITTER_STEPS):
            rows = rows_where((p["jitter"] > 0) & (orders[:, position] == step))
            factor = p[name][rows].view(-1, 1, 1, 1).to(device, non_blocking=True)
            rows = rows.to(device, non_blocking=True)
            x[rows] = jitter_step(x[rows], name, factor)
    rows = rows_where(p["sigma"] > 0)
    if len(rows):
        sigma = p["sigma"][rows].to(device, non_blocking=True)
        rows = rows.to(device, non_blocking=True)
        radius = math.ceil(3 * blur_sigmas(x.shape[2:])[1])
        x[rows] = blur(x[rows], sigma, radius)
    rows = rows_where(p["gray"] > 0).to(device, non_blocking=True)
    x[rows] = to_gray(x[rows]).expand(-1, 3, -1, -1)
    rows = rows_where(p["solarize"] > 0).to(device, non_blocking=True)
    x[rows] = TF.solarize(x[rows], 128 / 255)
    return imagenet_normalize(x)


# --------------------------------------------------------------------------------------------- stream
class Stream(Dataset):
    """Endless, seeded stream: item n -> (transform(image), label, bad: unreadable indices, passed over)."""

    def __init__(self, source, transform, seed, per_epoch, shuffle=True):
        self.source, self.transform, self.seed, self.per_epoch = source, transform, seed, per_epoch
        self.epoch, self.order = None, None if shuffle else range(len(source))

    def index(self, n):
        """Which image of the source sample n is; every `per_epoch` samples a new permutation begins."""
        epoch, offset = divmod(n, self.per_epoch)
        if epoch != self.epoch and not isinstance(self.order, range):
            self.epoch = epoch
            self.order = np.random.default_rng((self.seed, epoch)).permutation(len(self.source))
        return int(self.order[offset])

    def __getitem__(self, n):
        index, bad, image = self.index(n), [], None
        while image is None:
            try:
                image, label = self.source[index]
            except Exception:  # a decoder may raise anything on broken bytes
                if file_of(self.source, index) is None:
                    raise
                bad.append(index)
                index = (index + 1) % len(self.source)
                if len(bad) > max(1, len(self.source) / 100):  # as many as end a run: stop searching
                    image, label = Image.new("RGB", (1, 1)), 0
        with torch.random.fork_rng(devices=[]):
            seed = int(np.random.SeedSequence((self.seed, n)).generate_state(1)[0])
            torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 0.1 ms and more
            return self.transform(image), label, bad


def stream_batches(start, stop, batch_size, rank=0, world=1, accum_steps=1):
    """Sample numbers for a rank: step s is [s*B, (s+1)*B), sliced by rank, each slice by accumulation."""
    micro = batch_size // (world * accum_steps)
    for step in range(start, stop):
        for part in range(accum_steps):
            first = step * batch_size + (rank * accum_steps + part) * micro
            yield range(first, first + micro)


def collate(samples):
    """Stack a list of Stream items: tensors and labels batched, indices of unreadable images concatenated."""
    batch, labels, bad = zip(*samples)
    return torch.utils.data.default_collate(batch), torch.tensor(labels), sum(bad, [])
