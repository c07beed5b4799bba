"""Images, views and the sample stream.

Images: a folder, cifar10, stl10, or the embedded `shapes` (rendered, no download). Every source is indexed as
torchvision's data sets are: source[i] -> (PIL image in RGB, label).

Views (paper Sec. 4.1, release): random resized crop, colour jitter, blur, grayscale, flip, solarize, normalisation.
torchvision draws the parameters of every view; `per_image` applies them with torchvision and PIL in a worker (the
reference), `augment` applies the same parameters to a whole batch on the device.

The stream: sample number n of a run is fixed by (seed, n) alone: which image it is, and every random draw of its views.
So a run does not depend on the number of workers or ranks, and one that resumes at step s goes on exactly.
"""
import math
import os
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter
from torch.utils.data import Dataset
from torchvision import datasets, transforms

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
    "checks": lambda u, v, noise: 1.5 * np.sin(4.4 * u) * np.sin(4.4 * v),
    "rings": lambda u, v, noise: np.sin(6.28 * np.hypot(u, v)),
    "dots": lambda u, v, noise: np.cos(6.28 * u) + np.cos(6.28 * v) - 0.6,
    "bars": lambda u, v, noise: np.sin(6.28 * u),
    "grain": lambda u, v, noise: 1.6 * value_noise(1.9 * u, 1.9 * v, noise),
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
    """Embedded data set: one large shape of ten, filled with its class's own pattern, on a soft random ground.

    Class i % 10. Colours are muted (the pattern carries the image); colours, place, size, period, phase, sign and a
    slight turn (within 0.5 rad) are random. Each image is a function of (split, index) alone, equal on every machine
    up to one gray level. `size`: pixels of the square image, any.
    """

    classes = [f"{shape}-{pattern}" for shape, pattern in zip(SHAPES, PATTERNS)]

    def __init__(self, split="train", length=4000, size=64):
        self.split, self.length, self.size = split, length, size

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        image, label, _, _ = self.render(index)
        return Image.fromarray(image), label

    def render(self, index):
        """-> image (size, size, 3) uint8, label, box (x0, y0, x1, y1) in pixels, mask (size, size) bool."""
        rng = np.random.RandomState((index * 2 + (self.split == "val")) % 2 ** 32)  # its stream is frozen by numpy
        label = index % 10
        image = self.ground(rng)
        radius = rng.uniform(0.34, 0.46)
        centre = rng.uniform(radius, 1 - radius, 2)
        mask = self.paint(image, rng, label, centre, radius)
        return np.rint(image).astype(np.uint8), label, mask_box(mask), mask

    def ground(self, rng):
        """A soft random ground, (size, size, 3) in gray levels."""
        y, x = np.mgrid[:self.size, :self.size] * (3.0 / self.size)
        soft = value_noise(x, y, rng.uniform(-1, 1, (4, 4)))[..., None]
        return np.clip(self.colour(rng, rng.uniform(70, 185)) + 35 * soft, 0, 255)

    def colour(self, rng, level):
        """A near-gray colour of about this gray level, (3,)."""
        return level + rng.uniform(-14, 14, 3)

    def paint(self, image, rng, label, centre, radius):
        """Paint one object of class `label` into `image`; centre (y, x) and radius in parts of the size. -> its mask."""
        turn = rng.uniform(-0.5, 0.5)
        period, phase = rng.uniform(0.42, 0.62), rng.uniform(-0.5, 0.5, 2)
        y, x = ((np.arange(self.size) + 0.5) / self.size - c for c in centre)
        y, x = y[:, None] / radius, x[None, :] / radius
        u, v = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
        inside = SHAPES[list(SHAPES)[label]](u, v) * radius * self.size + 0.5  # in pixels: soft edges
        centred = Shapes.classes[label].endswith(("rings", "rays", "spiral"))
        pu, pv = (0.3 * phase[0], 0.3 * phase[1]) if centred else phase
        wave = PATTERNS[list(PATTERNS)[label]](u / period + pu, v / period + pv, rng.uniform(-1, 1, (8, 8)))
        wave = np.clip(1.5 * wave, -1, 1)[..., None] * rng.uniform(35, 65) * rng.choice((-1, 1))
        fill = np.clip(self.colour(rng, rng.uniform(90, 165)) + wave, 0, 255)
        cover = np.clip(inside, 0, 1)[..., None]
        image += cover * (fill - image)
        return inside > 0.5


def mask_box(mask):
    """Smallest box (x0, y0, x1, y1), in pixels, around a mask (H, W); x1 and y1 are one past the last pixel."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
