"""common/data.py: recipes, image files, folders, labels, the sample stream and its failures."""
import builtins
import errno
import os
import re
import struct
import sys
import unicodedata
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader

from care import InputError
from common import data, shapes, views
from common.data import ImageFiles, UnreadableImage, open_images, read_image
from conftest import class_folders, images, photo


# ------------------------------------------------------------------------------------------ recipes
def test_recipes():
    """A folder gets the paper's run; every recipe says all, and fits its encoder."""
    expected = {"arch": "resnet50", "stem": "imagenet", "image_size": 224, "batch_size": 1024,
                "base_lr": 0.05, "crop_min": 0.08, "tau_base": 0.99, "epochs": 100,
                "hidden_dim": 4096}
    assert expected.items() <= data.recipe_of("/a/folder").items()
    assert data.recipe_of("shapes:100") is data.RECIPES["shapes"]
    assert set(data.NAMED_SETS) == {"shapes", "clutter", "cifar10", "stl10", "imagenette"}
    for recipe in data.RECIPES.values():
        assert list(recipe) == list(data.RECIPES["folder"])
        assert recipe["image_size"] % (8 if recipe["stem"] == "cifar" else 32) == 0
        assert 0 < recipe["crop_min"] < 1 and 0.5 < recipe["tau_base"] < 1


def test_open_images_renders():
    assert len(open_images("shapes:77", "train")) == 77
    clutter = open_images("clutter", "pretrain", size=32)
    assert len(clutter) == 4000 and len(open_images("clutter:50", "val")) == 1000
    assert clutter[4][1] == 4 and clutter.classes == open_images("shapes", "train").classes
    assert np.array_equal(clutter[4][0], shapes.render_clutter("train", 4, 32)[0])
    assert not np.array_equal(clutter[4][0], open_images("shapes", "train", size=32)[4][0])
    with pytest.raises(InputError, match="N of clutter:N is the number of training images"):
        open_images("clutter:no", "train")


# -------------------------------------------------------------------------------------- image files
def save_photos(folder, *names):
    """One small file a name below `folder`, which is returned as a string."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(0, 20, 30).save(path, "PNG")
    return str(folder)


def pixels(path, **flags):
    image = read_image(path, **flags)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_images_of_8_bits_are_torchvisions_bit_for_bit(tmp_path):
    """So that runs on ImageNet are unchanged; a turn that EXIF notes is made only if asked for."""
    turned = Image.Exif()
    turned[0x0112] = 6  # turn by 90 degrees to look at it
    image = photo(0, 20, 30)
    image.save(tmp_path / "turned.jpg", exif=turned)
    for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB"):
        image.convert(mode if mode != "LAB" else "RGB").save(tmp_path / f"{mode}.tif")
    Image.new("LAB", (3, 2), (150, 20, 246)).save(tmp_path / "LAB.tif")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    image.save(tmp_path / "rgb.webp")
    image.quantize(7).save(tmp_path / "palette.png")
    Image.new("RGBA", (3, 2), (9, 99, 200, 255)).save(tmp_path / "opaque.png")
    files = sorted(tmp_path.iterdir())
    assert len(files) == 12
    for file in files:
        assert np.array_equal(pixels(file), np.asarray(default_loader(file))), file.name
    upright = pixels(tmp_path / "turned.jpg", upright=True)
    assert np.array_equal(upright, np.rot90(pixels(tmp_path / "turned.jpg"), -1))


def png(width, height, depth, kind, rows, transparent=b""):
    """A PNG of any depth: kind 0 gray, 2 RGB; rows: their bytes; transparent: that of tRNS."""
    def chunk(name, content):
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    filtered = b"".join(b"\0" + row for row in rows)
    parts = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header)]
    if transparent:
        parts.append(chunk(b"tRNS", transparent))
    return b"".join([*parts, chunk(b"IDAT", zlib.compress(filtered)), chunk(b"IEND", b"")])


def tiff(values, bits, photometric=1):
    """A one-row gray TIFF of 12 or 16 bits a sample; photometric 0: zero is white."""
    if bits == 16:
        content = struct.pack(f"<{len(values)}H", *values)
    else:
        digits = "".join(f"{value:012b}" for value in values)
        content = int(digits, 2).to_bytes(len(digits) // 8, "big")
    tags = [(256, 4, len(values)), (257, 4, 1), (258, 3, bits), (259, 3, 1), (262, 3, photometric),
            (273, 4, 8), (277, 3, 1), (278, 4, 1), (279, 4, len(content))]
    entries = [struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags]
    directory = struct.pack("<H", len(tags)) + b"".join(entries) + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8 + len(content)) + content + directory


def test_deep_gray_is_scaled_from_its_full_range(tmp_path):
    """Of whatever bits and byte order: 0 is black, the largest value white; nothing is cut off."""
    wide = (0, 5000, 32896, 60000, 65534, 65535)
    expected = [0, 19, 128, 233, 255, 255]  # value / 257
    Image.fromarray(np.array([wide], np.uint16)).save(tmp_path / "a.png")
    Image.fromarray(np.array([wide], np.uint16)).save(tmp_path / "b.tif")
    Image.fromarray(np.array([wide], ">u2")).save(tmp_path / "c.tif")
    (tmp_path / "d.tif").write_bytes(tiff(wide, 16))
    (tmp_path / "e.pgm").write_bytes(b"P5 6 1 65535\n" + struct.pack(">6H", *wide))
    for file in sorted(tmp_path.iterdir()):
        assert pixels(file)[0, :, 0].tolist() == expected, file.name
    (tmp_path / "white.tif").write_bytes(tiff(wide, 16, photometric=0))
    assert pixels(tmp_path / "white.tif")[0, :, 1].tolist() == [255 - value for value in expected]
    (tmp_path / "12.tif").write_bytes(tiff((0, 2048, 4095, 16), 12))
    assert pixels(tmp_path / "12.tif")[0, :, 2].tolist() == [0, 128, 255, 1]
    (tmp_path / "10.pgm").write_bytes(b"P5 3 1 1023\n" + struct.pack(">3H", 0, 512, 1023))
    assert pixels(tmp_path / "10.pgm")[0, :, 0].tolist() == [0, 128, 255]
    colour = struct.pack(">6H", 65535, 32896, 0, 257, 514, 60000)
    (tmp_path / "rgb.png").write_bytes(png(2, 1, 16, 2, [colour]))
    assert abs(pixels(tmp_path / "rgb.png").astype(int) - [[255, 128, 0], [1, 2, 233]]).max() <= 1


def test_transparency_is_laid_on_white(tmp_path):
    """Clear is white, half clear lies between, opaque keeps its colour; in every such mode."""
    clear, half, full = (200, 0, 0, 0), (200, 0, 0, 128), (200, 0, 0, 255)
    expected = [[255, 255, 255], [227, 127, 127], [200, 0, 0]]
    rgba = Image.new("RGBA", (3, 1))
    for x, colour in enumerate((clear, half, full)):
        rgba.putpixel((x, 0), colour)
    rgba.save(tmp_path / "rgba.png")
    palette = Image.new("P", (3, 1))
    palette.putpalette([200, 0, 0] * 3)
    palette.putdata([0, 1, 2])
    palette.save(tmp_path / "palette.png", transparency=bytes([0, 128, 255]))
    rgba.save(tmp_path / "rgba.webp", lossless=True, exact=True)
    for file in sorted(tmp_path.iterdir()):
        assert abs(pixels(file)[0].astype(int) - expected).max() <= 1, file.name
    gray = Image.new("LA", (3, 1))
    for x, alpha in enumerate((0, 128, 255)):
        gray.putpixel((x, 0), (40, alpha))
    for name in ("la.png", "la.tif"):
        gray.save(tmp_path / name)
        assert abs(pixels(tmp_path / name)[0, :, 0].astype(int) - [255, 147, 40]).max() <= 1
    one = Image.new("1", (2, 1))
    one.putpixel((0, 0), 255)
    one.save(tmp_path / "one.png", transparency=0)
    assert pixels(tmp_path / "one.png").min() == 255
    Image.new("PA", (1, 1)).save(tmp_path / "pa.tif")
    assert pixels(tmp_path / "pa.tif").tolist() == [[[255, 255, 255]]]


def test_transparent_colours_of_16_bits(tmp_path):
    """A PNG names its clear colour in 16 bits; the pixels of another colour stay."""
    gray = struct.pack(">2H", 1000, 32896)
    (tmp_path / "gray.png").write_bytes(png(2, 1, 16, 0, [gray], gray[:2]))
    assert pixels(tmp_path / "gray.png")[0, :, 0].tolist() == [255, 128]
    colours = struct.pack(">6H", 1000, 2000, 3000, 65535, 0, 0)
    (tmp_path / "rgb.png").write_bytes(png(2, 1, 16, 2, [colours], colours[:6]))
    assert pixels(tmp_path / "rgb.png")[0].tolist() == [[255, 255, 255], [255, 0, 0]]


def test_values_without_a_known_range_are_refused(tmp_path):
    """Floats and integers of 32 bits: by file and mode, never cut off, even if they would fit."""
    for dtype, mode in ((np.float32, "F"), (np.int32, "I")):
        for largest in (1, 70000):
            file = tmp_path / f"{mode}{largest}.tif"
            Image.fromarray(np.array([[0, largest]], dtype)).save(file)
            with pytest.raises(UnreadableImage) as caught:
                read_image(file)
            assert isinstance(caught.value, InputError)
            assert str(file) in str(caught.value) and f"mode {mode}" in caught.value.reason


def broken_files(folder):
    """Files that no decoder reads, by name, with a part of the reason."""
    photo(0, 200, 200).save(folder / "whole.jpg")
    photo(0, 200, 200).save(folder / "whole.png")
    jpeg, whole = (folder / "whole.jpg").read_bytes(), (folder / "whole.png").read_bytes()
    contents = {"cut.jpg": jpeg[:-400], "cut.png": whole[:200], "empty.png": b"",
                "text.png": b"hello"}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    photo(0, 300, 300).save(folder / "bomb.png")
    return {"cut.jpg": "truncated", "cut.png": "truncated", "empty.png": "cannot identify",
            "text.png": "cannot identify image file$", "bomb.png": "90000 pixels"}


def test_what_decoding_raises_is_an_unreadable_image_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)  # a bomb has more than twice as many
    for name, reason in broken_files(tmp_path).items():
        with pytest.raises(UnreadableImage) as caught:
            read_image(tmp_path / name)
        assert re.search(reason, caught.value.reason), name
        assert str(tmp_path / name) in str(caught.value)


def test_odd_but_whole_images_give_views(tmp_path):
    """One pixel, very wide, very tall, CMYK, a palette, 16 bits."""
    sizes = {"one.png": (1, 1), "wide.png": (20_000, 3), "tall.png": (3, 20_000)}
    for name, size in sizes.items():
        Image.new("L", size).save(tmp_path / name)
    Image.new("CMYK", (20, 30)).save(tmp_path / "cmyk.jpg")
    Image.new("P", (20, 30)).save(tmp_path / "palette.png")
    Image.new("I;16", (20, 30)).save(tmp_path / "deep.png")
    source = ImageFiles(tmp_path)
    stream = data.Stream(source, views.TwoViews((32, 32)), 0, len(source))
    for n in range(6):
        (crops, parameters), _, bad = stream[n]
        assert crops.shape == (2, 3, 32, 32) and bad == []
        assert torch.isfinite(views.augment(crops, parameters)).all()


def test_what_is_no_fault_of_the_file_is_not_an_unreadable_image(tmp_path, monkeypatch):
    """A file that is not there or may not be read, a module that is missing, a slip in the code."""
    save_photos(tmp_path, "a.png")
    with pytest.raises(FileNotFoundError, match="none.png"):
        read_image(str(tmp_path / "none.png"))
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", raises(ModuleNotFoundError("No module named 'zlib'")))
        with pytest.raises(ModuleNotFoundError):
            read_image(tmp_path / "a.png")
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "has_transparency_data", property(raises(KeyError("slip"))))
        with pytest.raises(KeyError, match="slip"):
            read_image(tmp_path / "a.png")


def raises(error):
    def function(*args, **flags):
        raise error
    return function


# ------------------------------------------------------------------------------------ network disks
def outage(monkeypatch, number, failures):
    """From now on, opening fails `failures` times with an errno. -> list of the pauses made."""
    pauses = []

    def fail_or_open(path, mode):
        if len(failed) < failures:
            failed.append(path)
            raise OSError(number, os.strerror(number))
        return builtins.open(path, mode)

    failed = []
    monkeypatch.setattr(data, "open", fail_or_open, raising=False)
    monkeypatch.setattr(data.time, "sleep", pauses.append)
    return pauses


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_short_outage_is_waited_for(number, tmp_path, monkeypatch, capsys):
    save_photos(tmp_path, "a.png")
    pauses = outage(monkeypatch, number, failures=3)
    assert np.array_equal(pixels(tmp_path / "a.png"), np.asarray(photo(0, 20, 30)))
    assert pauses == [1, 2, 4]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 3 and os.strerror(number) in warnings[0] and "a.png" in warnings[0]


def test_a_long_outage_is_the_systems_own_error(tmp_path, monkeypatch):
    """After about a minute; a permission is not waited for."""
    save_photos(tmp_path, "a.png")
    pauses = outage(monkeypatch, errno.EIO, failures=100)
    with pytest.raises(OSError, match="a.png") as caught:
        read_image(str(tmp_path / "a.png"))
    assert caught.value.errno == errno.EIO and 45 <= sum(pauses) <= 75
    pauses = outage(monkeypatch, errno.EACCES, failures=100)
    with pytest.raises(PermissionError, match="a.png"):
        read_image(str(tmp_path / "a.png"))
    assert pauses == []


# ------------------------------------------------------------------------------------------ folders
NAMES = ("b/2.png", "b/10.PNG", "b/sub/1.png", "b/sub-2/1.png", "B/ü.jpeg", "a b/x.webp",
         "b/sub/deep/1.png", "b/0.tiff")


def test_files_and_labels_are_image_folders_in_its_order(tmp_path):
    """So that streams of existing runs stay; without labels, those of all folders and -1."""
    root = save_photos(tmp_path, *NAMES)
    (tmp_path / "b" / "notes.txt").write_text("no image")
    expected = torchvision.datasets.ImageFolder(root)
    source = ImageFiles(root, labelled=True)
    assert source.classes == expected.classes
    assert [source.path(i) for i in range(8)] == [path for path, _ in expected.samples]
    assert source.targets.tolist() == expected.targets
    assert [label for _, label in source] == expected.targets
    assert np.array_equal(source[3][0], np.asarray(photo(0, 20, 30)))
    (tmp_path / "top.png").write_bytes((tmp_path / "b" / "2.png").read_bytes())
    plain = ImageFiles(root)
    assert len(plain) == 9 and set(plain.targets) == {-1} and plain.classes == []
    names = [plain.name(i) for i in range(9)]
    assert names[0] == "top.png" and sorted(names[1:]) == sorted(NAMES)
    assert data.file_of(Subset(source, [4, 2]), 1) == source.path(2)
    assert data.file_of(open_images("shapes", "val"), 0) is None
    assert data.describe(plain) == f"9 images in {root} (passed over: 1 .txt)"


def test_names_that_are_no_utf8_survive(tmp_path):
    save_photos(tmp_path, "cat/a.png")
    os.rename(os.fsencode(tmp_path / "cat" / "a.png"), os.fsencode(tmp_path) + b"/cat/caf\xe9.png")
    source = ImageFiles(str(tmp_path), labelled=True)
    assert os.fsencode(source.name(0)) == b"cat/caf\xe9.png"
    assert source[0][0].size == (30, 20)


def test_a_million_names_take_little_memory(monkeypatch):
    """30 bytes a name of 30 characters, 16 for where it ends and its label; here of 100,000."""
    names = [f"n01440764/n01440764_{i:05d}.JPEG" for i in range(100_000)]
    monkeypatch.setattr(data, "file_names", lambda folder, below: names)
    source = ImageFiles("/data")
    assert source.path(99_999) == "/data/" + names[-1] and source.name(7) == names[7]
    held = sys.getsizeof(source.names) + source.ends.nbytes + source.targets.nbytes
    assert held < 50 * len(source)


def test_notes_of_macos_are_no_images(tmp_path):
    root = save_photos(tmp_path, "cat/a.png", "cat/._a.png")
    source = ImageFiles(root, labelled=True)
    assert [source.name(i) for i in range(len(source))] == ["cat/a.png"]


def test_links_count_no_image_twice(tmp_path):
    """To a folder above, to one beside, round in a circle; a link to elsewhere is followed."""
    root = save_photos(tmp_path / "set" / "train", "cat/1.png", "cat/deep/2.png", "dog/3.png")
    save_photos(tmp_path / "set", "val/cat/4.png")
    save_photos(tmp_path / "pool", "5.png")
    expected = ["cat/1.png", "cat/deep/2.png", "dog/3.png"]
    for place, target in (("up", ".."), ("cat/up", "../.."), ("cat/deep/self", "."),
                          ("cat/deep/far", str(tmp_path)), ("dog/in", "../cat"),
                          ("cat/in", "../dog")):
        link = Path(root) / place
        link.symlink_to(target)
        for folder in (root, f"{root}/../train"):
            source = ImageFiles(folder)
            found = {os.path.realpath(source.path(i)) for i in range(len(source))}
            assert len(source) == 3 and found == {f"{root}/{name}" for name in expected}, place
        link.unlink()
    (Path(root) / "linked").symlink_to(tmp_path / "pool")
    assert len(ImageFiles(root)) == 4
    assert ImageFiles(root, labelled=True).classes == ["cat", "dog", "linked"]
    (tmp_path / "alias").symlink_to(root)
    assert len(ImageFiles(str(tmp_path / "alias"))) == 4


def test_the_folder_that_the_working_directory_lies_in(tmp_path, monkeypatch):
    root = save_photos(tmp_path, "inner/a.png", "b.png")
    monkeypatch.chdir(Path(root) / "inner")
    assert len(ImageFiles("..")) == 2 and len(ImageFiles(".")) == 1


@pytest.mark.parametrize("labelled", [False, True])
def test_a_folder_that_may_not_be_read_is_an_error(labelled, tmp_path, monkeypatch):
    """Not fewer images."""
    root = save_photos(tmp_path, "cat/1.png", "dog/2.png")
    scandir = os.scandir

    def forbid(path):
        if os.fspath(path).endswith("dog"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbid)
    with pytest.raises(PermissionError, match="dog"):
        ImageFiles(root, labelled)


@pytest.mark.parametrize("names, used", [
    (["train/cat/1.png", "val/cat/2.png"], "train"),
    (["train/cat/1.png", "val/cat/2.png", "test/3.png", "docs/read.txt"], "train"),
    (["train/1.png"], "train"),
    (["train/1.png", "Val/2.png"], "train"),
    (["train/1.png", "car/2.png", "dog/3.png", "cat/4.png"], ""),  # train is a class
    (["train/1.png", "2.png"], ""),
    (["cat/1.png", "2.png"], ""),
    (["train/cat/1.png", "car/2.png"], None),
    (["train/1.png", "val/2.png", "car/3.png"], None),
    (["train/cat/1.png", "2.png"], None),
])
def test_a_folder_named_train_is_a_split_or_a_class(names, used, tmp_path):
    """What lies beside it decides; what could be either is refused with what to do."""
    root = save_photos(tmp_path / "set", *[name for name in names if not name.endswith(".txt")])
    for name in names:
        (tmp_path / "set" / name).parent.mkdir(exist_ok=True)
    if used is None:
        with pytest.raises(InputError, match=f"Give --data {root}/train for it alone, or rename"):
            open_images(root, "pretrain")
        return
    source = open_images(root, "pretrain")
    inside = [name for name in names if name.endswith(".png") and name.startswith(used)]
    assert source.root == (f"{root}/{used}" if used else root)
    assert data.describe(source) == f"{len(inside)} images in {source.root}"


def test_missing_folders_are_named(tmp_path):
    root = save_photos(tmp_path / "set", "train/cat/1.png")
    (tmp_path / "set" / "train" / "dog").mkdir()
    (tmp_path / "empty" / "train").mkdir(parents=True)
    for folder, split, message in (
            (f"{root}/no", "pretrain", "set/no: no such folder"),
            (root, "val", "set: no folder val with images by class in it"),
            (root, "train", "set/train/dog: no images below it"),
            (f"{root}/train/cat", "train", "no folder train with images"),
            (str(tmp_path / "empty"), "pretrain", "empty/train: no images below it"),
            (str(tmp_path / "empty"), "train", "empty/train: no folders in it, one a class")):
        with pytest.raises(InputError, match=message):
            open_images(folder, split)


def test_imagenette(tmp_path, monkeypatch):
    """A generated tree: torchvision's class has neither targets nor readable samples."""
    save_photos(tmp_path / "imagenette2-160", "train/n01440764/n01440764_1.JPEG",
                "train/n02102040/n02102040_7.JPEG", "train/n02102040/n02102040_9.JPEG",
                "val/n01440764/ILSVRC2012_val_1.JPEG", "val/n02102040/ILSVRC2012_val_2.JPEG")
    monkeypatch.setattr(data, "IMAGENETTE", {"train": 3, "val": 2})
    train = open_images("imagenette", "train", str(tmp_path), download=True)
    assert train.targets.tolist() == [0, 1, 1] and train.classes == ["n01440764", "n02102040"]
    assert train.name(1) == "n02102040/n02102040_7.JPEG" and train[1][1] == 1
    assert len(open_images("imagenette", "pretrain", str(tmp_path))) == 3
    assert len(open_images("imagenette", "val", str(tmp_path))) == 2
    with pytest.raises(InputError, match="imagenette: not in .*, nor to be downloaded"):
        open_images("imagenette", "train", str(tmp_path / "no"))
    monkeypatch.delattr(torchvision.datasets, "Imagenette")  # older versions refuse a second time
    open_images("imagenette", "val", str(tmp_path), download=True)


# ------------------------------------------------------------------------------------------- labels
def where(data="shapes:4000", size=32, **more):
    return SimpleNamespace(data=str(data), data_root="data", image_size=[size, size], **more)


def test_labels_are_as_many_of_every_class_and_always_the_same(tmp_path):
    train, val = data.open_labelled(where(seed=0), 100)
    assert data.labels_of(train).bincount().tolist() == [10] * 10
    assert val.split == "val" and val.classes == shapes.Shapes.classes
    other_seed, _ = data.open_labelled(where(seed=1), 100)
    assert list(train.indices) == list(other_seed.indices)
    whole, _ = data.open_labelled(where(data="shapes:50"), 100)
    assert len(whole) == 50
    with pytest.raises(InputError, match="9 labels are fewer than the 10 classes"):
        data.open_labelled(where(), 9)
    for split, names in (("train", "ab"), ("val", "ac")):
        class_folders(tmp_path / "set" / split, names)
    with pytest.raises(InputError, match="differ in classes .b, c"):
        data.open_labelled(where(tmp_path / "set"))
    with pytest.raises(InputError, match="no folder train"):
        data.open_labelled(where(images(tmp_path / "flat", 3)))


# ------------------------------------------------------------------------------------------- stream
def batches_of(source, workers=0):
    """Every batch of four of one epoch, in order; raises what a run would raise."""
    stream = data.Stream(source, TF.pil_to_tensor, 0, len(source),
                         shuffle=False)
    numbers = [range(first, first + 4) for first in range(0, len(source), 4)]
    loader = DataLoader(stream, batch_sampler=numbers, num_workers=workers, collate_fn=data.collate)
    for batch in loader:
        if isinstance(batch, data.Failed):
            raise batch.error
        yield batch


def test_unreadable_images_come_with_their_reason(tmp_path):
    """The next one takes their place."""
    root = save_photos(tmp_path, *[f"{i}.png" for i in range(4)])
    (tmp_path / "1.png").write_bytes(b"no image")
    photo(2, 20, 30).save(tmp_path / "2.png")
    (crops, labels, bad), = batches_of(ImageFiles(root))
    assert bad == [(1, "cannot identify image file")]
    assert torch.equal(crops[1], crops[2]) and not torch.equal(crops[1], crops[0])
    assert labels.tolist() == [-1] * 4


def test_too_many_unreadable_images_in_a_row_end_the_search(tmp_path):
    root = save_photos(tmp_path, *[f"{i}.png" for i in range(4)])
    for i in (1, 2):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"2 of 4 images cannot be read, .* another: .*2\.png"):
        list(batches_of(ImageFiles(root)))


class Troubled:
    """A source whose third image raises an error."""

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 2:
            raise self.error
        return photo(0, 20, 30), 0


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_reach_the_main_process_whole(workers):
    """Out of a loading process too: type, line, errno. Other than a user's mistakes: tracebacks."""
    denied = PermissionError(errno.EACCES, "Permission denied", "/data/2.jpg")
    with pytest.raises(PermissionError) as caught:
        list(batches_of(Troubled(denied), workers))
    assert caught.value.errno == errno.EACCES and str(caught.value) == str(denied)
    with pytest.raises(InputError) as caught:
        list(batches_of(Troubled(InputError("2.xml: class kat is unknown")), workers))
    assert str(caught.value) == "2.xml: class kat is unknown"
    with pytest.raises(KeyError, match="slip"):
        list(batches_of(Troubled(KeyError("slip")), workers))
    with pytest.raises(ModuleNotFoundError):
        list(batches_of(Troubled(ModuleNotFoundError("No module named 'x'")), workers))


def test_stream_visits_every_image_once_an_epoch():
    source = shapes.Shapes("train", 23, 32)
    stream = data.Stream(source, views.TwoViews((32, 32)), seed=5, per_epoch=20)
    epochs = [[stream.index(n) for n in range(epoch * 20, epoch * 20 + 20)] for epoch in range(3)]
    assert all(len(set(epoch)) == 20 for epoch in epochs) and epochs[0] != epochs[1]
    other = data.Stream(stream.source, stream.transform, seed=6, per_epoch=20)
    assert [other.index(n) for n in range(20)] != epochs[0]
    again = data.Stream(stream.source, stream.transform, 5, 20)
    assert all(map(torch.equal, stream[7][0], again[7][0]))
    state = torch.get_rng_state()
    stream[3]
    assert torch.equal(state, torch.get_rng_state())


def test_ranks_and_accumulation_cut_the_same_global_batches():
    whole = list(map(list, data.stream_batches(3, 6, 12)))
    for world, accum_steps in ((2, 1), (1, 2), (3, 2), (2, 3)):
        parts = [list(data.stream_batches(3, 6, 12, rank, world, accum_steps))
                 for rank in range(world)]
        assert all(len(part) == 3 * accum_steps for part in parts)
        for step in range(3):
            now = slice(step * accum_steps, (step + 1) * accum_steps)
            taken = [n for part in parts for micro in part[now] for n in micro]
            assert taken == whole[step] == list(range((step + 3) * 12, (step + 4) * 12))


# ------------------------------------------------------------------- wrong images, without a word
def test_every_picture_that_pillow_opens_counts(tmp_path):
    """In every kind of file; what is no picture is counted in the line that names the folder."""
    kinds = {"gif": "GIF", "jfif": "JPEG", "jpe": "JPEG", "JPG": "JPEG", "tga": "TGA", "jp2":
             "JPEG2000", "avif": "AVIF", "png": "PNG"}
    kinds = {ending: kind for ending, kind in kinds.items() if kind in Image.SAVE}
    folder = tmp_path / "set" / "cat"
    folder.mkdir(parents=True)
    for ending, kind in kinds.items():
        photo(0, 20, 30).save(folder / f"a.{ending}", kind)
    source = ImageFiles(str(tmp_path / "set"), labelled=True)
    assert len(source) == len(kinds) >= 6
    assert all(image.size == (30, 20) for image, _ in source)
    assert data.describe(source) == f"{len(kinds)} images in {tmp_path}/set"
    assert set(IMG_EXTENSIONS) < data.IMAGE_ENDINGS
    assert data.IMAGE_ENDINGS.isdisjoint({".h5", ".mpg", ".pdf", ".eps", ".wmf", ".txt", ""})

    for name in ("b.heic", "c.HEIC", "._a.png", "d.mpg", "README", "jpg", "../beside.png"):
        (folder / name).write_bytes(b"")
    source = ImageFiles(str(tmp_path / "set"), labelled=True)
    expected = {".heic": 2, "._*": 1, ".mpg": 1, "README": 1, "jpg": 1, ".png": 1}
    assert source.passed_over == expected and len(source) == len(kinds)
    line = data.describe(source)
    assert "/set (passed over: 2 .heic, 1 " in line and line.endswith(", ... 7 files in all)")
    (tmp_path / "other" / "cat").mkdir(parents=True)
    (tmp_path / "other" / "cat" / "a.heic").write_bytes(b"")
    with pytest.raises(InputError, match=r"cat: no images below it \(passed over: 1 .heic\)"):
        ImageFiles(str(tmp_path / "other"), labelled=True)


def test_a_palette_that_is_missing(tmp_path):
    """Pillow opens such a file, and fails when it is converted."""
    rows = [bytes(range(8))] * 8
    (tmp_path / "a.png").write_bytes(png(8, 8, 8, 3, rows))
    with pytest.raises(UnreadableImage, match="its palette is missing"):
        read_image(tmp_path / "a.png")


def test_a_digest_is_of_names_and_sizes(tmp_path, monkeypatch):
    """The same for a copy; another one for one more byte, another name, class or number."""
    root = save_photos(tmp_path / "a", "cat/1.png", "dog/2.png")
    content = (tmp_path / "a" / "cat" / "1.png").read_bytes()
    monkeypatch.setattr(data, "open", None, raising=False)  # no file is read

    def digest(folder, files):
        for name, size in files.items():
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content + bytes(size - len(content)))
        return ImageFiles(str(tmp_path / folder), labelled=True).digest

    size = len(content)
    first = ImageFiles(root, labelled=True)
    copied = digest("copy", {"cat/1.png": size, "dog/2.png": size})
    others = [digest("larger", {"cat/1.png": size, "dog/2.png": size + 1}),
              digest("swapped", {"cat/1.png": size + 1, "dog/2.png": size}),
              digest("renamed", {"cat/1.png": size, "dog/3.png": size}),
              digest("moved", {"cat/1.png": size, "cat/2.png": size}),
              digest("fewer", {"cat/1.png": size})]
    assert first.digest == copied == data.digest_of(first) == data.digest_of(Subset(first, [1]))
    assert len({first.digest, *others}) == 6 and re.fullmatch("[0-9a-f]{16}", first.digest)
    (tmp_path / "copy" / "cat" / "1.png").unlink()
    (tmp_path / "copy" / "cat" / "1.png").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match="cat/1.png"):
        data.digest_of(ImageFiles(str(tmp_path / "copy")))


def test_digests_of_named_sets():
    """A number for each: clutter's may change, and shapes' runs still go on."""
    assert data.digest_of(open_images("shapes:20", "pretrain")) == "shapes 1"
    assert data.digest_of(open_images("clutter", "val")) == "clutter 1"


def test_a_named_set_takes_a_number_or_does_not():
    for name, match in (("cifar10:500", "only shapes and clutter take a number"),
                        ("imagenette:", "only shapes and clutter take a number"),
                        ("shapes:", "N of shapes:N"), ("clutter:\u00b2", "N of clutter:N"),
                        ("shapes:0", "N of shapes:N"), ("shapes:-3", "N of shapes:N")):
        with pytest.raises(InputError, match=match):
            open_images(name, "train", "nowhere")


def test_what_a_broken_download_left_is_no_data_set(tmp_path, monkeypatch):
    """Neither a part of the images nor a missing split; what to do is said."""
    monkeypatch.setattr(data, "IMAGENETTE", {"train": 3, "val": 1})
    save_photos(tmp_path / "imagenette2-160", "train/a/1.JPEG", "train/b/2.JPEG")
    for split, found in (("train", "train: 2 images, not 3"), ("val", "val: 0 images, not 1")):
        with pytest.raises(InputError, match=f"{found}.* remove .*imagenette2-160, and the same"):
            open_images("imagenette", split, str(tmp_path), download=True)
    save_photos(tmp_path / "imagenette2-160", "train/b/3.JPEG")
    assert len(open_images("imagenette", "train", str(tmp_path))) == 3


def test_labels_of_stl10(tmp_path, monkeypatch):
    """torchvision calls them labels, where other sets have targets."""
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for part, labels in (("train", [3, 1, 2, 1]), ("test", [2, 1, 3])):
        (folder / f"{part}_X.bin").write_bytes(bytes(len(labels) * 3 * 96 * 96))
        (folder / f"{part}_y.bin").write_bytes(bytes(labels))
    (folder / "class_names.txt").write_text("a\nb\nc")
    args = SimpleNamespace(data="stl10", data_root=str(tmp_path), image_size=[96, 96])
    train, val = data.open_labelled(args)
    assert data.labels_of(train).tolist() == [2, 0, 1, 0] == [label for _, label in train]
    assert data.labels_of(val).tolist() == [1, 0, 2]


def test_classes_are_matched_by_name_in_any_form_of_unicode(tmp_path):
    """A Mac writes letter and accent apart, and such a name sorts elsewhere."""
    for split, form in (("train", "NFC"), ("val", "NFD")):
        names = ("ch\u00e8vre", "chz", "dog")
        class_folders(tmp_path / split, [unicodedata.normalize(form, name) for name in names])
    train, val = data.open_labelled(where(tmp_path))
    assert val.classes == train.classes == ["chz", "ch\u00e8vre", "dog"]
    assert [val.name(i)[:3] for i in range(6)] == ["che", "che", "chz", "chz", "dog", "dog"]
    assert val.targets.tolist() == [1, 1, 0, 0, 2, 2] and val[0][1] == 1


def test_names_that_look_alike_are_told_apart(tmp_path):
    two = ["ch\u00e8vre", "che\u0300vre"]
    class_folders(tmp_path / "both", two)
    with pytest.raises(InputError, match="two folders of one class") as caught:
        ImageFiles(str(tmp_path / "both"), labelled=True)
    assert all(ascii(name) in str(caught.value) for name in two)
    for split, name in (("train", "\u0441at"), ("val", "cat")):  # a Cyrillic letter
        class_folders(tmp_path / "set" / split, [name])
    with pytest.raises(InputError, match=r"differ in classes \(cat, .at \('.u0441at'\)\)"):
        data.open_labelled(where(tmp_path / "set"))
    assert [data.shown(name) for name in ("cat", "cat ", "caf\udce9")] == [
        "cat", "cat  ('cat ')", "caf\\udce9"]


def test_a_pipe_is_no_image(tmp_path):
    """It would be read without end."""
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UnreadableImage, match="pipe.png: .*no regular file"):
        read_image(tmp_path / "pipe.png")
