"""The embedded images, rendered by numpy: `shapes`, `clutter`, and scenes for detection.

An image is a function of (split, index) alone: the same on every machine, to one gray level,
and at every size but for its detail. Class i of ten is the i-th of SHAPES, filled with the i-th of
PATTERNS. Colours are muted; place, size, period, phase, sign, turn (within 0.5 rad) are random.

  render_shape    one large object on a soft ground
  render_clutter  two small objects of one class, on scraps that mean nothing
  render_scene    a few objects, later ones in front: for detection and segmentation
"""
import math

import numpy as np
from PIL import Image

TURN = 6.28  # the patterns' frequencies are made of this, not of 2 pi


def value_noise(x, y, grid):
    """A periodic square grid of numbers, interpolated bilinearly at (x, y), in its cells."""
    n = len(grid)
    i, j = np.floor(y).astype(int), np.floor(x).astype(int)
    t, s = y - i, x - j
    top = grid[i % n, j % n] * (1 - s) + grid[i % n, (j + 1) % n] * s
    bottom = grid[(i + 1) % n, j % n] * (1 - s) + grid[(i + 1) % n, (j + 1) % n] * s
    return top * (1 - t) + bottom * t


# ------------------------------------------------------------------------------------------ shapes
# How far inside its outline an object is, in units of its radius, at its own coordinates (u, v):
# 0 in its centre, v points down.
def polygon(u, v, corners, apothem):
    """A regular polygon, one corner straight up; apothem: from centre to middle of a side."""
    angle = np.arctan2(u, -v) % (2 * np.pi / corners) - np.pi / corners
    return apothem - np.hypot(u, v) * np.cos(angle)


def disk(u, v):
    return 0.9 - np.hypot(u, v)


def square(u, v):
    return 0.8 - np.maximum(abs(u), abs(v))


def triangle(u, v):
    return polygon(u, v - 0.15, 3, 0.6)


def diamond(u, v):
    return 0.75 - (abs(u) + abs(v)) / 2 ** 0.5


def hexagon(u, v):
    return polygon(u, v, 6, 0.85)


def cross(u, v):
    length = 0.95 - np.maximum(abs(u), abs(v))
    width = 0.42 - np.minimum(abs(u), abs(v))
    return np.minimum(length, width)


def ring(u, v):
    return 0.31 - abs(np.hypot(u, v) - 0.64)


def star(u, v):
    return 0.75 - np.hypot(u, v) * (1 - 0.25 * np.cos(5 * np.arctan2(u, -v)))


def ellipse(u, v):
    return 0.65 - np.hypot(0.68 * u, v)


def half(u, v):
    return np.minimum(1.0 - np.hypot(u, v + 0.4), v + 0.4)


# ---------------------------------------------------------------------------------------- patterns
# Brightness (around 0, cut off at -2/3 and 2/3) at the pattern's coordinates (u, v), whose unit is
# about one period. `noise` is a square grid of random numbers, which only `grain` reads.
def stripes(u, v, noise):
    return np.sin(TURN * v)


def checks(u, v, noise):
    return 1.5 * np.sin(6 * u) * np.sin(6 * v)


def rings(u, v, noise):
    return np.sin(TURN * np.hypot(u, v))


def dots(u, v, noise):
    return np.cos(4.4 * u) + np.cos(4.4 * v) - 0.6


def bars(u, v, noise):
    return np.sin(TURN * u)


def grain(u, v, noise):
    return 1.6 * value_noise(4.5 * u, 4.5 * v, noise)


def rays(u, v, noise):
    return np.sin(6 * np.arctan2(v, u))


def zigzag(u, v, noise):
    return np.sin(TURN * (v + abs((1.2 * u) % 1 - 0.5)))


def plain(u, v, noise):
    return 0 * u


def spiral(u, v, noise):
    return np.sin(TURN * np.hypot(u, v) + 2 * np.arctan2(v, u))


SHAPES = (disk, square, triangle, diamond, hexagon, cross, ring, star, ellipse, half)
PATTERNS = (stripes, checks, rings, dots, bars, grain, rays, zigzag, plain, spiral)
CENTRED = (rings, rays, spiral)  # patterns around a point, which stays near the object's centre
CLASSES = [f"{shape.__name__}-{pattern.__name__}" for shape, pattern in zip(SHAPES, PATTERNS)]


# ---------------------------------------------------------------------------------------- painting
# An image in the making: (size, size, 3) float64 in gray levels, 0 to 255.
def generator(split, index):
    """The random numbers of one image; numpy has frozen the algorithms of RandomState."""
    return np.random.RandomState((index * 2 + (split == "val")) % 2 ** 32)


def soft_ground(rng, size):
    """-> a new image, softly varying, and its brightness, in gray levels."""
    y, x = np.mgrid[:size, :size] * (3.0 / size)
    soft = value_noise(x, y, rng.uniform(-1, 1, (4, 4)))[..., None]
    level = rng.uniform(112, 144)
    return level + rng.uniform(-6, 6) + rng.uniform(-2, 2, 3) + 12 * soft, level


def coordinates(size, centre, radius, turn):
    """An object's own coordinates u and v of all pixels, each (size, size), in units of its radius.

    centre (y, x) and radius: parts of the image's side; turn: in rad.
    """
    rows, columns = np.ogrid[:size, :size]
    y = ((rows + 0.5) / size - centre[0]) / radius
    x = ((columns + 0.5) / size - centre[1]) / radius
    return x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)


def cover(image, texture, inside):
    """Lay a texture or a colour over `image` where `inside` (size, size), in pixels, is positive.

    -> mask (size, size) bool.
    """
    inside = inside + 0.5  # the outline runs through pixels, which it covers in part
    image += np.clip(inside, 0, 1)[..., None] * (texture - image)
    return inside > 0.5


def paint(image, rng, label, centre, radius, level):
    """Paint an object of class `label` around the brightness `level` into `image`. -> its mask.

    centre (y, x) and radius are parts of the image's side.
    """
    size, pattern = len(image), PATTERNS[label]
    turn = rng.uniform(-0.5, 0.5)
    period = rng.uniform(0.36, 0.72)
    phase = rng.uniform(-0.5, 0.5, 2)
    if pattern in CENTRED:
        phase = 0.3 * phase
    u, v = coordinates(size, centre, radius, turn)
    wave = pattern(u / period + phase[0], v / period + phase[1], rng.uniform(-1, 1, (8, 8)))
    wave = np.clip(1.5 * wave, -1, 1)[..., None] * rng.uniform(30, 55) * rng.choice((-1, 1))
    texture = level + rng.uniform(-6, 6) + rng.uniform(-2, 2, 3) + wave
    return cover(image, texture, SHAPES[label](u, v) * radius * size)


def finished(image):
    """(size, size, 3) uint8."""
    return np.rint(image).astype(np.uint8)


def mask_box(mask):
    """Smallest box (x0, y0, x1, y1) around a mask (H, W); x1, y1 are one past the last pixel."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))


# ------------------------------------------------------------------------------------------ images
def render_shape(split, index, size):
    """One large object, 10 to 75 % of the image. `split`: train or val.

    -> image (size, size, 3) uint8, label, box (x0, y0, x1, y1) in pixels, mask (size, size) bool.
    """
    rng = generator(split, index)
    label = index % 10
    image, level = soft_ground(rng, size)
    radius = rng.uniform(0.32, 0.48)
    centre = rng.uniform(radius, 1 - radius, 2)
    mask = paint(image, rng, label, centre, radius, level=level)
    return finished(image), label, mask_box(mask), mask


def scatter_scraps(image, rng, level):
    """Paint three plain scraps, whose outlines mean nothing, over `image`."""
    size = len(image)
    for _ in range(3):
        centre, radius = rng.uniform(0, 1, 2), rng.uniform(0.18, 0.28)
        colour = level + draw_lift(rng) + rng.uniform(-2, 2, 3)
        stretch = rng.uniform(0.7, 2.0)  # from strokes that lie to strokes that stand
        u, v = coordinates(size, centre, radius, turn=rng.uniform(-0.5, 0.5))
        noise = rng.uniform(-1, 1, (16, 16))
        inside = value_noise(1.4 * stretch * u, 1.4 / stretch * v, noise) - 0.45
        cover(image, colour, 0.4 * inside * radius * size)


def draw_lift(rng):
    """How much brighter than its ground a thing is, in gray levels: never equally bright."""
    return rng.choice((-1, 1)) * rng.uniform(10, 25)


def draw_places(rng):
    """Two things that do not touch: -> [(centre y, x, radius)], in parts of the image's side."""
    places = []
    while len(places) < 2:
        radius = rng.uniform(0.145, 0.195)
        y, x = rng.uniform(radius, 1 - radius, 2)
        if all(math.hypot(y - v, x - u) > radius + other for v, u, other in places):
            places.append((y, x, radius))
    return places


def render_clutter(split, index, size):
    """Two objects of one class, together 5 to 20 % of the image, anywhere, on scraps.

    Two, because the place of a single one is what both views of an image share: features learned
    from them would tell where it is, not what. -> as `render_shape`; box and mask are of both.
    """
    rng = generator(split, index)
    label = index % 10
    image, level = soft_ground(rng, size)
    scatter_scraps(image, rng, level)
    mask = np.zeros((size, size), bool)
    for y, x, radius in draw_places(rng):
        mask |= paint(image, rng, label, (y, x), radius, level=level + draw_lift(rng))
    return finished(image), label, mask_box(mask), mask


def render_scene(split, index, size):
    """Mostly two to four objects, later ones in front of earlier ones.

    -> image (size, size, 3) uint8, and lists with one entry an object: boxes (x0, y0, x1, y1) in
    pixels, labels 0 to 9, masks (size, size) bool, of what is seen of it.
    """
    rng = generator(split, index)
    image, level = soft_ground(rng, size)
    places, labels, masks = [], [], []
    for _ in range(rng.randint(2, 10)):
        radius = rng.uniform(0.12, 0.22)
        y, x = rng.uniform(radius, 1 - radius, 2)
        if any(math.hypot(y - v, x - u) < 0.8 * (radius + other) for v, u, other in places):
            continue
        places.append((y, x, radius))
        label = rng.randint(10)
        mask = paint(image, rng, label, (y, x), radius, level=level)
        masks = [other & ~mask for other in masks]
        labels.append(label)
        masks.append(mask)
    boxes = [mask_box(mask) for mask in masks]
    return finished(image), boxes, labels, masks


# A set's name and the version of its images, raised when any of them changes: a run goes on, and a
# score is found again, with the same images only.
DIGESTS = {render_shape: "shapes 1", render_clutter: "clutter 1", render_scene: "scenes 1"}


class Shapes:
    """A data set: [index] -> (PIL image, label), rendered at `size` pixels by `renderer`.

    A process keeps what it rendered, up to KEPT bytes: it renders no image in every epoch anew.
    """

    KEPT = 2 ** 26
    classes = CLASSES
    root = "shapes.py, rendered"

    def __init__(self, split="train", length=4000, size=64, renderer=render_shape):
        self.split, self.size, self.renderer = split, size, renderer
        self.targets = np.arange(length) % len(CLASSES)
        self.digest, self.kept = DIGESTS[renderer], {}

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        image = self.kept.get(index)
        if image is None:
            image, _, _, _ = self.render(index)
            if (len(self.kept) + 1) * image.nbytes <= self.KEPT:
                self.kept[index] = image
        return Image.fromarray(image), int(self.targets[index])

    def render(self, index):
        """-> image (size, size, 3) uint8, label, box (x0, y0, x1, y1), mask (size, size) bool."""
        return self.renderer(self.split, index, self.size)
