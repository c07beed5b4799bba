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

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ----------------------------------------------------------------------------------------------- shapes
def polygon(u, v, corners, apothem):
    """Inside distance to a regular polygon with one corner straight up; v points down."""
    angle = np.arctan2(u, -v) % (2 * np.pi / corners) - np.pi / corners
    return apothem - np.hypot(u, v) * np.cos(angle)


SHAPES = {  # inside distance, positive inside, in units of the object's radius, at object coordinates (u, v)
    "disk": lambda u, v: 0.9 - np.hypot(u, v),
    "square": lambda u, v: 0.8 - np.maximum(abs(u), abs(v)),
    "triangle": lambda u, v: polygon(u, v - 0.15, 3, 0.6),
    "diamond": lambda u, v: 0.75 - (abs(u) + abs(v)) / 2 ** 0.5,
    "hexagon": lambda u, v: polygon(u, v, 6, 0.85),
    "cross": lambda u, v: np.minimum(0.95 - np.maximum(abs(u), abs(v)), 0.42 - np.minimum(abs(u), abs(v))),
    "ring": lambda u, v: 0.31 - abs(np.hypot(u, v) - 0.64),
    "star": lambda u, v: 0.75 - np.hypot(u, v) * (1 - 0.25 * np.cos(5 * np.arctan2(u, -v))),
    "ellipse": lambda u, v: 0.65 - np.hypot(0.68 * u, v),
    "half": lambda u, v: np.minimum(1.0 - np.hypot(u, v + 0.4), v + 0.4),
}
PATTERNS = {  # between -1 and 1 at pattern coordinates (u, v), whose unit is about one period
    "stripes": lambda u, v, noise: np.sin(6.28 * v),
    "checks": lambda u, v, noise: 1.5 * np.sin(6 * u) * np.sin(6 * v),
    "rings": lambda u, v, noise: np.sin(6.28 * np.hypot(u, v)),
    "dots": lambda u, v, noise: np.cos(4.4 * u) + np.cos(4.4 * v) - 0.6,
    "bars": lambda u, v, noise: np.sin(6.28 * u),
    "grain": lambda u, v, noise: 1.6 * value_noise(4.5 * u, 4.5 * v, noise),
    "rays": lambda u, v, noise: np.sin(6 * np.arctan2(v, u)),
    "zigzag": lambda u, v, noise: np.sin(6.28 * (v + abs((1.2 * u) % 1 - 0.5))),
    "plain": lambda u, v, noise: 0 * u,
    "spiral": lambda u, v, noise: np.sin(6.28 * np.hypot(u, v) + 2 * np.arctan2(v, u)),
}


def value_noise(x, y, grid):
    """Bilinear interpolation of a periodic square grid of random numbers at (x, y), in units of its cells."""
    n = len(grid)
    i, j = np.floor(y).astype(int), np.floor(x).astype(int)
    t, s = y - i, x - j
    top = grid[i % n, j % n] * (1 - s) + grid[i % n, (j + 1) % n] * s
    return top * (1 - t) + (grid[(i + 1) % n, j % n] * (1 - s) + grid[(i + 1) % n, (j + 1) % n] * s) * t


class Shapes(Dataset):
    """Embedded data set: one large shape of ten, filled with its class's pattern, on a soft random ground.

    Class i % 10; muted colours, place, size, period, phase, sign, turn (within 0.5 rad) are random. An image
    depends on (split, index) alone: equal on every machine, to one gray level. `size`: of the square, pixels.
    """

    classes = [f"{shape}-{pattern}" for shape, pattern in zip(SHAPES, PATTERNS)]

    def __init__(self, split="train", length=4000, size=64):
        self.split, self.size, self.targets = split, size, [index % 10 for index in range(length)]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        image, label, _, _ = self.render(index)
        return Image.fromarray(image), label

    def render(self, index):
        """-> image (size, size, 3) uint8, label, box (x0, y0, x1, y1) in pixels, mask (size, size) bool."""
        rng = np.random.RandomState((index * 2 + (self.split == "val")) % 2 ** 32)  # frozen by numpy
        label = index % 10
        image, level = self.ground(rng)
        radius = rng.uniform(0.32, 0.48)
        mask = self.paint(image, rng, label, rng.uniform(radius, 1 - radius, 2), radius, level)
        return np.rint(image).astype(np.uint8), label, mask_box(mask), mask

    def ground(self, rng):
        """A soft random ground, (size, size, 3) in gray levels, and the image's brightness."""
        y, x = np.mgrid[:self.size, :self.size] * (3.0 / self.size)
        soft = value_noise(x, y, rng.uniform(-1, 1, (4, 4)))[..., None]
        level = rng.uniform(112, 144)
        return level + rng.uniform(-6, 6) + rng.uniform(-2, 2, 3) + 12 * soft, level

    def paint(self, image, rng, label, centre, radius, level):
        """Paint a `label` object into `image`; centre (y, x), radius: parts of the size. -> its mask."""
        turn, period, phase = rng.uniform(-0.5, 0.5), rng.uniform(0.36, 0.72), rng.uniform(-0.5, 0.5, 2)
        pixels = np.ogrid[:self.size, :self.size]  # rows (size, 1), columns (1, size)
        y, x = (((pixel + 0.5) / self.size - c) / radius for pixel, c in zip(pixels, centre))
        u, v = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
        inside = SHAPES[list(SHAPES)[label]](u, v) * radius * self.size + 0.5  # in pixels: soft edges
        centred = Shapes.classes[label].endswith(("rings", "rays", "spiral"))
        pu, pv = 0.3 * phase if centred else phase
        wave = PATTERNS[list(PATTERNS)[label]](u / period + pu, v / period + pv, rng.uniform(-1, 1, (8, 8)))
        wave = np.clip(1.5 * wave, -1, 1)[..., None] * rng.uniform(30, 55) * rng.choice((-1, 1))
        fill = level + rng.uniform(-6, 6) + rng.uniform(-2, 2, 3) + wave
        image += np.clip(inside, 0, 1)[..., None] * (fill - image)
        return inside > 0.5


def mask_box(mask):
    """Smallest box (x0, y0, x1, y1) around a mask (H, W), in pixels; x1, y1 are one past the last pixel."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))


# -------------------------------------------------------------------------------------------- sources
class ImageFiles(datasets.ImageFolder):
    """Every image below a folder, in sorted order, without labels (label -1)."""

    def find_classes(self, directory):
        return [""], {"": -1}


def open_images(data, split, data_root="data", size=64, download=False):
    """Folder, shapes[:N] (`size` pixels), cifar10, stl10; split: pretrain, train, val. ValueError if none."""
    name, _, count = data.partition(":")
    if name == "shapes":
        if count and not (count.isdigit() and int(count)):
            raise InputError(f"--data {data}: N of shapes:N is the number of training images")
        return Shapes("val", 1000, size) if split == "val" else Shapes("train", int(count or 4000), size)
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


# ---------------------------------------------------------------------------------------------- views
# A view's row of numbers: jitter, gray, solarize 0/1; four factors; order in ORDERS; sigma in pixels, 0 none.
PARAMETERS = ("jitter", "brightness", "contrast", "saturation", "hue", "order", "gray", "sigma", "solarize")
ORDERS = list(permutations(range(4)))
JITTER = transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)


def blur_sigmas(size):
    """Least and largest blur sigma in pixels: the paper's 0.1, 2 at 224, scaled to `size` (height, width)."""
    return 0.1 * min(size) / 224, 2.0 * min(size) / 224


def draw(size, blur, solarize):
    """One view's parameters, drawn by torchvision; `blur` and `solarize` are probabilities."""
    order, *factors = JITTER.get_params(JITTER.brightness, JITTER.contrast, JITTER.saturation, JITTER.hue)
    jitter, gray, blurred, solarized = (torch.rand(4) < torch.tensor((0.8, 0.2, blur, solarize))).tolist()
    sigma = transforms.GaussianBlur.get_params(*blur_sigmas(size))
    return (jitter, *factors, ORDERS.index(tuple(order.tolist())), gray, sigma * blurred, solarized)


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
            name = ("brightness", "contrast", "saturation", "hue")[step]
            image = getattr(TF, f"adjust_{name}")(image, p[name])
    if p["sigma"]:
        image = image.filter(ImageFilter.GaussianBlur(p["sigma"]))
    if p["gray"]:
        image = TF.to_grayscale(image, 3)
    if p["solarize"]:
        image = TF.solarize(image, 128)
    return TF.normalize(TF.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD)


class TwoViews:
    """Image -> views (2, 3, height, width), parameters (2, 9). "device": uint8 crops, "worker": all done."""

    def __init__(self, size, augment="device", crop_min=0.08):
        self.size, self.augment, self.crop_min = size, augment, crop_min

    def __call__(self, image):
        crops, parameters = [], []
        for blur, solarize in ((1.0, 0.0), (0.1, 0.2)):  # probabilities of the two views in the paper
            crops.append(crop_and_flip(image, self.size, self.crop_min))
            parameters.append(draw(self.size, blur, solarize))
        apply = per_image if self.augment == "worker" else lambda crop, _: TF.pil_to_tensor(crop)
        return torch.stack([apply(*pair) for pair in zip(crops, parameters)]), torch.tensor(parameters)


def beside(x, values):
    """Three numbers, one a channel, as (3, 1, 1) on the device of x, which is not waited for."""
    return torch.tensor(values, dtype=x.dtype).view(3, 1, 1).to(x.device, non_blocking=True)


def normalize(x):
    """(B, 3, H, W), uint8 or float in 0..1 -> float32 with ImageNet's mean 0 and standard deviation 1."""
    x = x if x.is_floating_point() else x.float() / 255
    return (x - beside(x, IMAGENET_MEAN)) / beside(x, IMAGENET_STD)


def to_gray(x):
    """Luma of (B, 3, H, W) -> (B, 1, H, W); ITU-R 601, as PIL and torchvision."""
    return (x * beside(x, (0.299, 0.587, 0.114))).sum(1, keepdim=True)


def shift_hue(x, shift):
    """Turn the hue of (B, 3, H, W) in 0..1 by `shift` (B, 1, 1, 1), in turns."""
    r, g, b = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    c = torch.where(chroma > 0, chroma, 1)  # no division by zero
    hue = torch.where(value == r, (g - b) / c, torch.where(value == g, 2 + (b - r) / c, 4 + (r - g) / c))
    k = (hue[:, None] + 6 * shift + beside(x, (5, 3, 1))) % 6  # in sixths of a turn
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def blur(x, sigma, radius):
    """Gaussian blur of (B, C, H, W), sigma (B,) in pixels, kernels of 2 * radius + 1, reflected borders."""
    B, C, H, W = x.shape
    taps = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.exp(-0.5 * (taps / sigma[:, None]) ** 2)  # (B, K)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(C, 0)  # (B*C, K)
    x = F.pad(x, (radius,) * 4, mode="reflect").reshape(1, B * C, H + 2 * radius, W + 2 * radius)
    x = F.conv2d(x, kernel[:, None, None, :], groups=B * C)  # (1, B*C, H + 2 radius, W)
    return F.conv2d(x, kernel[:, None, :, None], groups=B * C).reshape(B, C, H, W)


def augment(x, parameters):
    """Batched `per_image`: crops (B, 3, H, W) uint8, parameters (B, 9) on the CPU -> normalised float32."""
    p = dict(zip(PARAMETERS, parameters.unbind(1)))
    x = x.float() / 255
    pick = lambda rows: rows.nonzero()[:, 0]  # on the CPU: the device is not waited for
    device = lambda values: values.to(x.device, non_blocking=True)
    orders = torch.tensor(ORDERS)[p["order"].long()]  # (B, 4)
    for position in range(4):
        for step, name in enumerate(("brightness", "contrast", "saturation", "hue")):
            rows = pick((p["jitter"] > 0) & (orders[:, position] == step))
            factor, rows = device(p[name][rows].view(-1, 1, 1, 1)), device(rows)
            part = x[rows]
            if name == "hue":
                x[rows] = shift_hue(part, factor)
                continue
            gray = to_gray(part)
            towards = {"brightness": 0, "contrast": gray.mean((2, 3), keepdim=True), "saturation": gray}
            x[rows] = (factor * part + (1 - factor) * towards[name]).clamp(0, 1)
    rows = pick(p["sigma"] > 0)
    if len(rows):
        sigma, rows = device(p["sigma"][rows]), device(rows)
        x[rows] = blur(x[rows], sigma, radius=math.ceil(3 * blur_sigmas(x.shape[2:])[1]))
    rows = device(pick(p["gray"] > 0))
    x[rows] = to_gray(x[rows]).expand(-1, 3, -1, -1)
    rows = device(pick(p["solarize"] > 0))
    x[rows] = TF.solarize(x[rows], 128 / 255)
    return normalize(x)


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
