"""common/views.py: crops and augmentation against torchvision, their draws and distributions."""
import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter
from torchvision import transforms

from common import views
from common.data import Stream
from common.shapes import Shapes
from conftest import photo


# -------------------------------------------------------------------------------------------- crops
def test_scoring_crops_are_torchvisions():
    """Resize 256, centre crop 224; a picture that has the input's size is scored whole."""
    standard = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    picture = photo(0, height=300, width=400)
    found = views.centre_crop(picture, [224, 224])
    assert torch.equal(found, TF.pil_to_tensor(standard(picture)))
    whole = photo(1, height=32, width=48)
    assert torch.equal(views.centre_crop(whole, [32, 48]), TF.pil_to_tensor(whole))
    assert views.centre_crop(whole, [48, 32]).shape == (3, 48, 32)


def extent(crop):
    """Width (negative if flipped) and height that a crop spans of an image of channels x and y."""
    width = crop[:, -1, 0].mean() - crop[:, 0, 0].mean()
    height = crop[-1, :, 1].mean() - crop[0, :, 1].mean()
    return width, height


def test_crops_and_flips_have_the_references_distribution():
    x, y = np.meshgrid(np.arange(100), np.arange(80))
    image = Image.fromarray(np.stack((x, y, 0 * x), 2).astype(np.uint8))
    found, expected = [], []
    for n in range(1500):
        torch.manual_seed(n)
        crop = np.asarray(views.crop_and_flip(image, (32, 48))).astype(float)
        width, height = extent(crop)
        found.append((abs(width), height, width > 0))
        torch.manual_seed(n + 10 ** 6)
        crop = np.asarray(transforms.RandomResizedCrop((32, 48))(image)).astype(float)
        expected.append((*extent(crop), 0.5))
    found, expected = np.array(found), np.array(expected)
    for i in (0, 1):
        a, b = np.sort(found[:, i]), np.sort(expected[:, i])
        assert abs(np.searchsorted(a, b) / len(a) - np.arange(len(b)) / len(b)).max() < 0.07
    assert abs(found[:, 2].mean() - 0.5) < 0.055


# ------------------------------------------------------------------------------------------ drawing
def test_drawn_parameters_have_the_references_distribution():
    """4,000 samples against torchvision's ColorJitter and the paper's chances; about 4 sigma."""
    image = Image.new("RGB", (32, 32))
    stream = Stream([(image, 0)], views.TwoViews((32, 32)), seed=3, per_epoch=1)
    drawn = torch.stack([stream[n][0][1] for n in range(4000)])  # (4000, 2, 9)
    for i, probability in ((0, {"jitter": 0.8, "gray": 0.2, "sigma": 1.0, "solarize": 0.0}),
                           (1, {"jitter": 0.8, "gray": 0.2, "sigma": 0.1, "solarize": 0.2})):
        p = dict(zip(views.PARAMETERS, drawn[:, i].unbind(1)))
        for name, expected in probability.items():
            assert abs((p[name] > 0).float().mean() - expected) <= 0.027
        ranges = (("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("saturation", 0.8, 1.2),
                  ("hue", -0.1, 0.1))
        for name, low, high in ranges:
            uniform = torch.linspace(low, high, 4001)[1:] - (high - low) / 8000
            # Kolmogorov-Smirnov
            assert (p[name].sort().values - uniform).abs().max() < 0.035 * (high - low)
        assert (torch.bincount(p["order"].long(), minlength=24) - 4000 / 24).abs().max() < 55
        sigma = p["sigma"][p["sigma"] > 0] * 224 / 32
        assert sigma.min() >= 0.1 and sigma.max() <= 2.0 and abs(sigma.mean() - 1.05) < 0.12
    two = drawn.reshape(4000, -1)[:, [1, 2, 10, 11]].T
    assert torch.corrcoef(two).fill_diagonal_(0).abs().max() < 0.07  # the two views are independent
    neighbours = torch.stack((drawn[1:, 0, 1], drawn[:-1, 0, 1]))
    assert torch.corrcoef(neighbours)[0, 1].abs() < 0.07


# ------------------------------------------------------------------------------------------ batched
CHANNEL_STD = torch.tensor(views.IMAGENET_STD).view(3, 1, 1)


def row(**values):
    """One view's parameters as `draw` gives them, neutral unless said otherwise."""
    neutral = {"jitter": 0, "brightness": 1, "contrast": 1, "saturation": 1, "hue": 0, "order": 0,
               "gray": 0, "sigma": 0, "solarize": 0}
    return [float((neutral | values)[name]) for name in views.PARAMETERS]


def batched(images, rows):
    """`augment` on a batch of PIL images, de-normalised to 0..1."""
    crops = torch.stack([TF.pil_to_tensor(image) for image in images])
    x = views.augment(crops, torch.tensor(rows))
    return x * CHANNEL_STD + torch.tensor(views.IMAGENET_MEAN).view(3, 1, 1)


def test_device_jitter_is_torchvisions():
    """Against torchvision's float operations, in all 24 orders, to 1e-4: its luma has 4 digits."""
    rng = np.random.RandomState(0)
    images = [photo(i) for i in range(24)]
    rows = [row(jitter=1, brightness=rng.uniform(0.6, 1.4), contrast=rng.uniform(0.6, 1.4),
                saturation=rng.uniform(0.8, 1.2), hue=rng.uniform(-0.1, 0.1), order=order)
            for order in range(24)]
    for image, parameters, found in zip(images, rows, batched(images, rows)):
        expected, p = TF.to_tensor(image), dict(zip(views.PARAMETERS, parameters))
        for step in views.ORDERS[int(p["order"])]:
            name = ("brightness", "contrast", "saturation", "hue")[step]
            expected = getattr(TF, f"adjust_{name}")(expected, p[name])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_device_gray_solarize_flip_and_normalisation():
    """To 1.1e-4: torchvision's first luma weight is 0.2989. At solarize's jump, either side."""
    images = [photo(i) for i in range(4)]
    found = batched(images, [row(gray=1), row(solarize=1), row(gray=1, solarize=1), row()])
    gray = TF.rgb_to_grayscale(TF.to_tensor(images[2]), 3)
    solarized = torch.where((gray - 128 / 255).abs() < 2e-4, found[2], TF.solarize(gray, 128 / 255))
    expected = [TF.rgb_to_grayscale(TF.to_tensor(images[0]), 3),
                TF.to_tensor(TF.solarize(images[1], 128)), solarized, TF.to_tensor(images[3])]
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=1.1e-4)
    plain = TF.normalize(TF.to_tensor(images[3]), views.IMAGENET_MEAN, views.IMAGENET_STD)
    crop = TF.pil_to_tensor(images[3])[None]
    assert torch.equal(plain, views.augment(crop, torch.tensor([row()]))[0])


def test_device_blur_is_torchvisions():
    """Against torchvision's to 1e-5; PIL's, repeated box filters, to 6 gray levels, mean 1."""
    images = [photo(i, 224, 224) for i in range(4)]
    sigmas = (0.1, 0.5, 1.2, 2.0)
    found = batched(images, [row(sigma=sigma) for sigma in sigmas])
    for image, sigma, blurred in zip(images, sigmas, found):
        expected = TF.gaussian_blur(TF.to_tensor(image), 13, sigma)
        torch.testing.assert_close(blurred, expected, rtol=0, atol=1e-5)
        by_pil = TF.to_tensor(image.filter(ImageFilter.GaussianBlur(sigma)))
        difference = (blurred - by_pil).abs() * 255
        assert difference.max() < 6 and difference.mean() < 1


def test_device_and_worker_views_are_the_same_views():
    """--augment device against worker: PIL rounds to 8 bits at every step; mean 2 gray levels."""
    for size in ((64, 64), (64, 96)):
        source = Shapes("train", 16, 64)
        streams = {mode: Stream(source, views.TwoViews(size, mode), 0, 16)
                   for mode in ("device", "worker")}
        crops, parameters = zip(*(streams["device"][n][0] for n in range(16)))
        expected = torch.stack([streams["worker"][n][0][0] for n in range(16)])
        for i in (0, 1):
            found = views.augment(torch.stack(crops)[:, i], torch.stack(parameters)[:, i])
            assert found.shape[2:] == size
            difference = (found - expected[:, i]).abs() * CHANNEL_STD * 255
            assert difference.mean() < 2 and difference.flatten(1).mean(1).max() < 6
