"""Data sets and the settings they run with, image files, labels, and the sample stream.

Images: source[i] -> (RGB PIL image, label), from a folder, a downloaded set or shapes.py.
The stream: sample n, its image and every draw of its views, is fixed by (seed, n) alone. So a run
does not depend on the number of workers or ranks, and one that resumes at step s is exact.
"""
import errno
import hashlib
import io
import os
import stat
import sys
import time
import unicodedata
from array import array
from collections import Counter
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset, Subset
from torchvision import datasets

from care import InputError
from common.shapes import Shapes, render_clutter, render_shape

# The settings of each data set unless a flag says otherwise; the flags' help explains them. The
# last three are linear_eval's. None: all labels, and a warm-up of min(10, epochs / 10) epochs.
PAPER = {
    "arch": "resnet50", "stem": "imagenet", "image_size": 224, "blocks": 5, "hidden_dim": 4096,
    "batch_size": 1024, "base_lr": 0.05, "predictor_lr": 1, "epochs": 100, "warmup_epochs": None,
    "tau_base": 0.99, "crop_min": 0.08, "knn_every": 0, "knn_images": 50000, "rank_every": 1,
    "labels": None, "head": "linear-bn", "linear_epochs": 80}
MINUTES = PAPER | {  # what the embedded sets share: some hundred steps, small images, few labels
    "arch": "resnet18", "hidden_dim": 512, "batch_size": 32, "base_lr": 0.2, "tau_base": 0.8,
    "knn_images": 1000, "rank_every": 0, "labels": 1000, "head": "linear"}
SMALL = PAPER | {  # small crops of small images show next to nothing
    "arch": "resnet18", "hidden_dim": 2048, "batch_size": 256, "epochs": 200, "crop_min": 0.2,
    "knn_every": 10, "knn_images": 5000, "rank_every": 0}
RECIPES = {
    "folder": PAPER,
    "shapes": MINUTES | {"image_size": 32, "blocks": 2, "predictor_lr": 10, "epochs": 6,
                         "crop_min": 0.3, "knn_every": 1, "linear_epochs": 40},  # 750 steps
    "clutter": MINUTES | {"image_size": 64, "base_lr": 0.1, "predictor_lr": 10, "epochs": 8,
                          "crop_min": 0.3, "knn_every": 8, "linear_epochs": 30},  # 1,000 steps
    "cifar10": SMALL | {"stem": "cifar", "image_size": 32},
    "stl10": SMALL | {"image_size": 96, "epochs": 100, "knn_every": 5},
    "imagenette": SMALL | {"image_size": 160, "batch_size": 128, "base_lr": 0.1, "tau_base": 0.98},
}
NAMED_SETS = tuple(name for name in RECIPES if name != "folder")
RENDERERS = {"shapes": render_shape, "clutter": render_clutter}
IMAGENETTE = {"train": 9469, "val": 3925}  # images


def recipe_of(data):
    """Return the settings of a --data: those of a named set, or those of a folder."""
    return RECIPES.get(data.partition(":")[0], RECIPES["folder"])


# ------------------------------------------------------------------------------------- image files
OUTAGES = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)  # of a network disk that is away
PAUSES = (1, 2, 4, 8, 16, 30)  # seconds between attempts, about a minute in all


class UnreadableImage(InputError):
    """A file whose content cannot be shown as an image; `reason` says why."""

    def __init__(self, path, reason=""):
        super().__init__(f"{path}: cannot be read as an image ({reason})")
        self.reason = reason


def read_bytes(path):
    """The content of a file. An outage of its disk is waited for, about a minute; then OSError.

    UnreadableImage: a pipe, a socket or a device, which might be read without end.
    """
    for pause in (*PAUSES, None):
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise UnreadableImage(path, "no regular file")
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            error.filename = path  # a failed read does not name its file
            if error.errno not in OUTAGES or pause is None:
                raise
            print(f"warning: {error}; trying again in {pause} s", file=sys.stderr)
        time.sleep(pause)


def read_image(path, upright=False):
    """An image file of any mode and depth as viewers show it: RGB, 8 bits, on white where clear.

    Deep gray is scaled from its full range, and refused where nothing tells that range (floats, 32
    bits). Images of 8 bits without transparency are torchvision's loader's, bit for bit: not turned
    as EXIF asks, like all that was ever trained on ImageNet; upright=True turns them, to look at.
    UnreadableImage: its content is at fault. OSError: the system refuses to read it.
    """
    content = read_bytes(path)
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
        shown = ImageOps.exif_transpose(image) if upright else image
    except (ImportError, MemoryError):  # no fault of the file's
        raise
    except Exception as error:  # a decoder may raise anything on foreign bytes
        reason = str(error).partition(" <_io")[0] or type(error).__name__
        raise UnreadableImage(path, reason) from error
    if image.mode[0] == "P" and image.palette is None:
        raise UnreadableImage(path, "its palette is missing")
    if image.mode[0] in "IF":
        return scale_to_8_bits(path, image, np.asarray(shown)).convert("RGB")
    if not image.has_transparency_data:
        return shown.convert("RGB")
    colour = shown.info.get("transparency")
    if isinstance(colour, tuple) and max(colour) > 255:  # of 16 bits, where PIL kept 8 of the image
        shown.info["transparency"] = tuple(value >> 8 for value in colour)
    shown = shown.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")


def scale_to_8_bits(path, image, values):
    """Deep gray values (height, width) of an opened image -> an image of mode L."""
    if not (image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")):
        raise UnreadableImage(path, f"mode {image.mode} has no known range: convert it to 16 bits")
    tags = getattr(image, "tag_v2", {})  # TIFF's: 258 bits per sample, 262 whether 0 is white
    largest = 2 ** tags.get(258, (16,))[0] - 1
    levels = np.rint(values / largest * 255)
    if tags.get(262) == 0:
        levels = 255 - levels
    if "transparency" in image.info:
        levels[values == image.info["transparency"]] = 255
    return Image.fromarray(levels.astype(np.uint8))


# ----------------------------------------------------------------------------------------- folders
SPLITS = ("train", "val", "valid", "validation", "dev", "test", "testing", "unlabeled")
# What Pillow names but does not draw itself: stubs of scientific data, films, programs.
NOT_DRAWN = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")


def image_endings():
    """Endings of all files that the installed Pillow opens as a picture: {".jpg", ...}."""
    Image.preinit()  # before all others, as Image.open does: formats are tried in this order
    formats = Image.registered_extensions()
    return {ending for ending, kind in formats.items()
            if kind in Image.OPEN and kind not in NOT_DRAWN}


IMAGE_ENDINGS = image_endings()


def ending_of(file):
    """What tells a file's kind: ".jpg", "._*" of a note of macOS, the name if it has no ending."""
    file = os.path.basename(file)
    if file.startswith("._"):
        return "._*"
    _, dot, ending = file.rpartition(".")
    return (dot + ending).lower() if dot else file


def is_image(file):
    """Whether a file's name is an image's."""
    return ending_of(file) in IMAGE_ENDINGS


def image_names(folder, below=""):
    """Names of all images below folder/below, as `file_names` gives them."""
    return filter(is_image, file_names(folder, below))


def file_names(folder, below=""):
    """Names of all files below folder/below, relative to `folder`, in torchvision's order.

    Links to folders are followed, but no folder is entered twice, and none that `folder` lies in.
    OSError when one may not be read.
    """
    def refuse(error):
        raise error

    folder = os.path.realpath(folder)
    top = os.path.join(folder, below)
    above = [*Path(top).parents, *Path(top).resolve().parents]
    entered, found = set(map(str, above)), []
    for path, subfolders, files in os.walk(top, onerror=refuse, followlinks=True):
        real_path = os.path.realpath(path)
        if real_path in entered:
            subfolders.clear()
        else:
            entered.add(real_path)
            subfolders.sort()
            found.append((path, files))
    for path, files in sorted(found):
        relative = os.path.relpath(path, folder)
        for file in sorted(files):
            yield file if relative == "." else f"{relative}/{file}"


class ImageFiles(Dataset):
    """The images below a folder: `labelled`, with a class for each folder in it, or without (-1).

    root: the folder; classes: names, sorted; targets (n,): labels; name(i) and path(i): of a file;
    passed_over: how many other files there are, by ending.
    Names are kept as bytes in one piece: a million Python objects take 200 MiB, and every worker
    makes a copy of its own of them by counting references.
    """

    def __init__(self, root, labelled=False):
        self.root, self.classes, self.passed_over = os.fspath(root), [], Counter()
        if labelled:
            self.find_classes()
        names, ends, targets = bytearray(), array("q", [0]), array("q")
        for label, below in enumerate(self.classes or [""]):
            before = len(targets)
            for name in file_names(self.root, below):
                if not is_image(name):
                    self.passed_over[ending_of(name)] += 1
                    continue
                names += os.fsencode(name)
                ends.append(len(names))
                targets.append(label if labelled else -1)
            if len(targets) == before:
                raise InputError(f"{Path(root) / below}: no images below it{others(self)}")
        self.names, self.ends, self.targets = bytes(names), np.array(ends), np.array(targets)

    def find_classes(self):
        """The folders in `root`. InputError if there are none, or two of one name."""
        with os.scandir(self.root) as entries:
            for entry in entries:
                if entry.is_dir():
                    self.classes.append(entry.name)
                else:
                    self.passed_over[ending_of(entry.name)] += 1
        if not self.classes:
            raise InputError(f"{self.root}: no folders in it, one a class{others(self)}")
        self.classes.sort()
        forms = {}
        for name in self.classes:
            if (other := forms.setdefault(one_form(name), name)) != name:
                raise InputError(f"{self.root}: two folders of one class, whose names look alike: "
                                 f"{shown(other)}, {shown(name)}; merge them")

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return read_image(self.path(index)), int(self.targets[index])

    def name(self, index):
        """A file's path below the root; bytes that are no UTF-8 as os.fsdecode keeps them."""
        return os.fsdecode(self.names[self.ends[index]:self.ends[index + 1]])

    def path(self, index):
        return os.path.join(self.root, self.name(index))

    @cached_property
    def digest(self):
        return digest_of_files(self.root, map(self.name, range(len(self))))


def digest_of_files(root, names):
    """What tells these files from others: their names below root and their sizes in bytes, hashed.

    Files of other names, of another order or size have another one. No file is read.
    """
    digest = hashlib.sha256()
    for name in names:
        size = os.stat(os.path.join(root, name)).st_size
        digest.update(os.fsencode(name) + b"\0%d\n" % size)
    return digest.hexdigest()[:16]


def pretraining_folder(root):
    """The folder to pretrain on: root/train if `train` is a split; root if it is a class or absent.

    `train` is a split if no other entry of root has images, or if only other splits have. It is a
    class if no split has images and `train` itself contains some. InputError in any other case.
    """
    train = os.path.join(root, "train")
    if not os.path.isdir(train):
        return root
    with_images = []
    for name in sorted(set(os.listdir(root)) - {"train"}):
        folder = os.path.isdir(os.path.join(root, name))
        if next(image_names(root, name), None) if folder else is_image(name):
            with_images.append(name)
    not_splits = [name for name in with_images if name.lower() not in SPLITS]
    if not not_splits:
        return train
    if not_splits == with_images and any(is_image(name) for name in os.listdir(train)):
        return root
    raise InputError(f"--data {root}: is its folder train a split, or a class like {not_splits[0]}?"
                     f" Give --data {train} for it alone, or rename it to take all images")


# ----------------------------------------------------------------------------------------- sources
def open_images(data, split, data_root="data", size=64, download=False):
    """The images of a --data; `split`: pretrain (there may be no labels), train or val.

    shapes:N and clutter:N have N training images, of `size` pixels. InputError if there are none.
    """
    name, colon, count = data.partition(":")
    if colon and name in NAMED_SETS:
        if name not in RENDERERS:
            raise InputError(f"--data {data}: only {' and '.join(RENDERERS)} take a number")
        if not (count.isdecimal() and int(count)):
            raise InputError(f"--data {data}: N of {name}:N is the number of training images")
    if name in RENDERERS:
        if split == "val":
            return Shapes("val", 1000, size, RENDERERS[name])
        return Shapes("train", int(count or 4000), size, RENDERERS[name])
    if name in NAMED_SETS:
        try:
            return open_download(name, split, data_root, download)
        except (RuntimeError, OSError) as error:
            raise InputError(f"--data {data}: not in {data_root}, nor to be downloaded "
                             f"({error})") from None
    try:
        if split == "pretrain":
            return ImageFiles(pretraining_folder(data))
        return ImageFiles(os.path.join(data, split), labelled=True)
    except (FileNotFoundError, NotADirectoryError):
        missing = f"no folder {split} with images by class in it"
        if not os.path.isdir(data):
            missing = f"no such folder (nor one of {', '.join(NAMED_SETS)})"
        raise InputError(f"--data {data}: {missing}") from None


def open_download(name, split, data_root, download):
    """A data set of torchvision's; RuntimeError or OSError where it is not there."""
    part = "val" if split == "val" else "train"
    if name == "cifar10":
        return datasets.CIFAR10(data_root, train=part == "train", download=download)
    if name == "stl10":
        part = {"pretrain": "unlabeled", "train": "train", "val": "test"}[split]
        source = datasets.STL10(data_root, split=part, download=download)
        source.targets = source.labels
        return source
    folder = Path(data_root) / "imagenette2-160"
    if not folder.is_dir():
        datasets.Imagenette(data_root, part, size="160px", download=download)
    there = (folder / part).is_dir()
    found = sum(1 for _ in image_names(folder, part)) if there else 0
    if found != IMAGENETTE[part]:  # torchvision checks the archive alone
        raise InputError(f"{folder / part}: {found} images, not {IMAGENETTE[part]}, as a broken "
                         f"download leaves them; remove {folder}, and the same command downloads "
                         "it again")
    return ImageFiles(folder / part, labelled=True)


def file_of(source, index):
    """The file of an image of a source, or of a Subset of one; None where it has none."""
    if isinstance(source, Subset):
        return file_of(source.dataset, source.indices[index])
    return source.path(index) if hasattr(source, "path") else None


def digest_of(source):
    """What tells a source's images from others: a text. None is read.

    Of files `digest_of_files`, of the embedded sets name and version; torchvision has checked its
    own sets against sums of their bytes.
    """
    if isinstance(source, Subset):
        return digest_of(source.dataset)
    return getattr(source, "digest", type(source).__name__)


def describe(source):
    """Which images a run uses, and how many, in one line, with how many other files are there."""
    return f"{len(source)} images in {source.root}{others(source)}"


def others(source):
    """What a source has passed over, as " (passed over: 12 .heic, 1 .txt)"; or ""."""
    passed_over = getattr(source, "passed_over", None)
    if not passed_over:
        return ""
    kinds = ", ".join(f"{count} {shown(kind)}" for kind, count in passed_over.most_common(5))
    more = f", ... {passed_over.total()} files in all" if len(passed_over) > 5 else ""
    return f" (passed over: {kinds}{more})"


def shown(name):
    """A name for a message, with escapes of what may mislead the eye or is no UTF-8."""
    text = name.encode("utf-8", "backslashreplace").decode()
    plain = text.isascii() and text.isprintable() and text == text.strip()
    return text if plain else f"{text} ({ascii(name)})"


def one_form(name):
    """A name in the one of Unicode's forms in which letters and their accents are composed."""
    return unicodedata.normalize("NFC", name)


# ------------------------------------------------------------------------------------------- labels
def open_labelled(args, count=None):
    """Training and validation images of --data -> train, val.

    count: use only that many training images, equally many of each class, the same in every run.
    InputError for images without classes, other classes in val, or a count below that of classes.
    """
    where = {"data_root": args.data_root, "size": max(args.image_size)}
    train = open_images(args.data, "train", **where)
    val = open_images(args.data, "val", **where)
    classes = len(train.classes)
    if differ := relabel(val, train.classes):
        raise InputError(f"--data {args.data}: train and val differ in classes "
                         f"({', '.join(map(shown, differ[:5]))})")
    if count is None or count >= len(train):
        return train, val
    if count < classes:
        raise InputError(f"{count} labels are fewer than the {classes} classes of {args.data}")
    drawn, _ = split_by_class(labels_of(train), lambda n: count // classes, seed=0)
    return Subset(train, drawn), val


def relabel(source, classes, folders=None):
    """Number a source's labels as in `classes`, by name, whatever the order of its own.

    folders: what the classes are called in the source, where not the same. The forms that Unicode
    has of a name are one name. -> the names of one side alone; if any, nothing is changed.
    """
    numbers = {one_form(name): number for number, name in enumerate(folders or classes)}
    names = [one_form(name) for name in source.classes]
    differ = sorted(numbers.keys() ^ set(names))
    if not differ:
        source.targets = np.array([numbers[name] for name in names])[source.targets]
        source.classes = list(classes)
    return differ


def labels_of(source):
    """The labels of a data set, (N,); no image is read."""
    if isinstance(source, Subset):
        return labels_of(source.dataset)[source.indices]
    return torch.as_tensor(source.targets).long()


def names_of(source):
    """class/file of every image; below the class, the path to a file, or the number of an image."""
    if isinstance(source, Subset):
        names = names_of(source.dataset)
        return [names[index] for index in source.indices]
    if hasattr(source, "name"):
        return [source.name(index) for index in range(len(source))]
    labels = labels_of(source).tolist()
    return [f"{source.classes[label]}/{index}" for index, label in enumerate(labels)]


def split_by_class(labels, per_class, seed):
    """Indices drawn from every class, `per_class(n)` of its n, and the rest: two sorted arrays."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=generator)
        drawn[members[order[:per_class(len(members))]]] = True
    return np.flatnonzero(drawn), np.flatnonzero(~drawn)


# ------------------------------------------------------------------------------------------ stream
class Failed:
    """An error in place of a sample: returned as data, since it must cross a process boundary."""

    def __init__(self, error):
        self.error = error


class Stream(Dataset):
    """Endless, seeded stream of a source's images: item n -> transform(image), label, bad.

    bad: (index, reason) of each image that cannot be decoded; the next one takes its place. A file
    that the system refuses to read, or another mistake in what a user gave, is an item `Failed`.
    """

    def __init__(self, source, transform, seed, per_epoch, shuffle=True):
        self.source, self.transform, self.seed = source, transform, seed
        self.per_epoch, self.shuffle = per_epoch, shuffle
        self.epoch, self.order = None, None

    def index(self, n):
        """Which image sample n is; every `per_epoch` samples a new permutation begins."""
        epoch, offset = divmod(n, self.per_epoch)
        if not self.shuffle:
            return offset
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng((self.seed, epoch)).permutation(len(self.source))
        return int(self.order[offset])

    def read(self, index):
        """Image `index`, or the next that can be decoded -> image, label, bad."""
        bad, count = [], len(self.source)
        while len(bad) <= max(1, count / 100):  # more than these end a run in any case
            try:
                image, label = self.source[index]
                return image, label, bad
            except UnreadableImage as error:
                last = error
                bad.append((index, error.reason))
                index = (index + 1) % count
        raise InputError(f"{len(bad)} of {count} images cannot be read, one after another: {last}")

    def __getitem__(self, n):
        try:
            image, label, bad = self.read(self.index(n))
        except (InputError, OSError) as error:
            return Failed(error)
        with torch.random.fork_rng(devices=[]):
            seed = int(np.random.SeedSequence((self.seed, n)).generate_state(1)[0])
            torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 0.1 ms and more
            return self.transform(image), label, bad


def stream_batches(start, stop, batch_size, rank=0, world=1, accum_steps=1):
    """Sample numbers for a rank: step s is [s*B, (s+1)*B), sliced by rank, then by accumulation."""
    micro = batch_size // (world * accum_steps)
    for step in range(start, stop):
        for part in range(accum_steps):
            first = step * batch_size + (rank * accum_steps + part) * micro
            yield range(first, first + micro)


def collate(samples):
    """Stream items -> transformed images and labels, batched, all `bad`; or the first `Failed`."""
    for sample in samples:
        if isinstance(sample, Failed):
            return sample
    images, labels, bad = zip(*samples)
    return torch.utils.data.default_collate(images), torch.tensor(labels), sum(bad, [])
