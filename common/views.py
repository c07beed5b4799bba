"""Views: from an image to what a network sees (paper Sec. 4.1 and the release).

Random crop, colour jitter, blur, grayscale, flip, solarize: drawn by torchvision, applied by
`per_image` (in a worker: the reference) or by `augment` (batched, on the device). Scores and
features are computed on centre crops.
"""
import functools
import math
from itertools import permutations

import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import ImageFilter
from torchvision import transforms

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# -------------------------------------------------------------------------------------------- crops
def crop_and_flip(image, size, crop_min=0.08):
    """Random crop (crop_min to all of the area) of a PIL image, resized, flipped with p 0.5."""
    box = transforms.RandomResizedCrop.get_params(image, (crop_min, 1.0), (3 / 4, 4 / 3))
    image = TF.resized_crop(image, *box, size)
    return TF.hflip(image) if torch.rand(()) < 0.5 else image


def centre_crop(image, size):
    """PIL image -> (3, height, width) uint8: as it is, if of this size, else resized and cut."""
    if image.size != (size[1], size[0]):
        image = TF.resize(image, round(max(size) * 256 / 224), max_size=2 ** 16)
        image = TF.center_crop(image, size)
    return TF.pil_to_tensor(image)


# ------------------------------------------------------------------------------------------ drawing
# A view's row of numbers. jitter, gray, solarize: 0 or 1; brightness to hue: the jitter's four
# factors; order: of these steps, a row of ORDERS; sigma: of the blur in pixels, 0 for none.
JITTER_STEPS = ("brightness", "contrast", "saturation", "hue")
PARAMETERS = ("jitter", *JITTER_STEPS, "order", "gray", "sigma", "solarize")
ORDERS = list(permutations(range(4)))
JITTER = transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
CHANCES = ((1.0, 0.0), (0.1, 0.2))  # of blur and of solarize, in the two views (release)


def blur_sigmas(size):
    """Least and largest sigma in pixels: the paper's 0.1, 2 at 224, scaled to (height, width)."""
    return 0.1 * min(size) / 224, 2.0 * min(size) / 224


def draw(size, blur, solarize):
    """One view's parameters, drawn by torchvision; `blur` and `solarize` are probabilities."""
    ranges = (JITTER.brightness, JITTER.contrast, JITTER.saturation, JITTER.hue)
    order, *factors = JITTER.get_params(*ranges)
    chances = torch.tensor((0.8, 0.2, blur, solarize))
    jittered, gray, blurred, solarized = (torch.rand(4) < chances).tolist()
    sigma = transforms.GaussianBlur.get_params(*blur_sigmas(size))
    order = ORDERS.index(tuple(order.tolist()))
    return (jittered, *factors, order, gray, sigma * blurred, solarized)


# ------------------------------------------------------------------------- per image: the reference
def per_image(image, parameters):
    """The reference: a view of a PIL image by torchvision and PIL, in the release's order."""
    p = dict(zip(PARAMETERS, parameters))
    if p["jitter"]:
        for step in ORDERS[int(p["order"])]:
            name = JITTER_STEPS[step]
            image = getattr(TF, f"adjust_{name}")(image, p[name])
    if p["sigma"]:
        image = image.filter(ImageFilter.GaussianBlur(p["sigma"]))
    if p["gray"]:
        image = TF.to_grayscale(image, 3)
    if p["solarize"]:
        image = TF.solarize(image, 128)
    return TF.normalize(TF.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD)


class TwoViews:
    """PIL image -> views (2, 3, height, width), parameters (2, 9).

    augment: "device" gives uint8 crops, which `augment` finishes; "worker" does it by `per_image`.
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


# ------------------------------------------------------------------------------------------ batched
def per_channel(x, values):
    """Three numbers, one a channel, as (3, 1, 1), of the type and on the device of x."""
    return uploaded(values, x.dtype, x.device)


@functools.cache
def uploaded(values, dtype, device):
    """Three numbers as (3, 1, 1) on a device: copied there once, without waiting for it."""
    return torch.tensor(values, dtype=dtype).view(3, 1, 1).to(device, non_blocking=True)


def imagenet_normalize(x):
    """(B, 3, H, W), uint8 or float in 0..1 -> float32, by ImageNet's mean and deviation."""
    x = x if x.is_floating_point() else x.float() / 255
    return (x - per_channel(x, IMAGENET_MEAN)) / per_channel(x, IMAGENET_STD)


def to_input(crops, device):
    """Crops (B, 3, H, W), uint8, on the CPU -> on the device, normalised, channels last."""
    x = imagenet_normalize(crops.to(device, non_blocking=True))
    return x.contiguous(memory_format=torch.channels_last)  # (B, 3, H, W)


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
    target = 0 if name == "brightness" else to_gray(x)
    if name == "contrast":
        target = target.mean((2, 3), keepdim=True)
    return (factor * x + (1 - factor) * target).clamp(0, 1)


def blur(x, sigma, radius):
    """Gaussian blur of (B, C, H, W), sigma (B,) in pixels, kernels of 2 * radius + 1."""
    B, C, H, W = x.shape
    taps = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.exp(-0.5 * (taps / sigma[:, None]) ** 2)  # (B, K)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(C, 0)  # (B*C, K)
    x = F.pad(x, (radius,) * 4, mode="reflect")
    x = x.reshape(1, B * C, H + 2 * radius, W + 2 * radius)
    x = F.conv2d(x, kernel[:, None, None, :], groups=B * C)  # (1, B*C, H + 2 radius, W)
    return F.conv2d(x, kernel[:, None, :, None], groups=B * C).reshape(B, C, H, W)


def augment(x, parameters):
    """Batched `per_image`: crops (B, 3, H, W) uint8, parameters (B, 9) on the CPU -> float32."""
    p = dict(zip(PARAMETERS, parameters.unbind(1)))
    x = x.float() / 255
    orders = torch.tensor(ORDERS)[p["order"].long()]  # (B, 4); on the CPU: no device is waited for
    for position in range(4):
        for step, name in enumerate(JITTER_STEPS):
            rows = ((p["jitter"] > 0) & (orders[:, position] == step)).nonzero()[:, 0]
            factor = p[name][rows].view(-1, 1, 1, 1).to(x.device, non_blocking=True)
            rows = rows.to(x.device, non_blocking=True)
            x[rows] = jitter_step(x[rows], name, factor)
    rows = (p["sigma"] > 0).nonzero()[:, 0]
    if len(rows):
        sigma = p["sigma"][rows].to(x.device, non_blocking=True)
        rows = rows.to(x.device, non_blocking=True)
        radius = math.ceil(3 * blur_sigmas(x.shape[2:])[1])
        x[rows] = blur(x[rows], sigma, radius)
    rows = (p["gray"] > 0).nonzero()[:, 0].to(x.device, non_blocking=True)
    x[rows] = to_gray(x[rows]).expand(-1, 3, -1, -1)
    rows = (p["solarize"] > 0).nonzero()[:, 0].to(x.device, non_blocking=True)
    x[rows] = TF.solarize(x[rows], 128 / 255)
    return imagenet_normalize(x)
