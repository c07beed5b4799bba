"""What annotations say, from VOC's XML and COCO's JSON: checked, and kept in flat arrays.

An object is a dict: box (x0, y0, x1, y1) in pixels; label 1, 2, ...; crowd: whether it is neither
right nor wrong to find; mask: its polygons, or COCO's compressed run lengths as bytes.
A mistake is an InputError that names the file and the annotation. What is used in part, or left
out, is counted and told in one line.
"""
import json
import math
from array import array
from collections import Counter
from collections.abc import Sequence
from xml.etree import ElementTree

import numpy as np

from care import InputError
from common.ranks import note

VOC_CLASSES = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor"]
FARTHEST = 100_000  # pixels: beyond it pycocotools runs out of memory when it draws a polygon


# ---------------------------------------------------------------------------------------- objects
class Objects(Sequence):
    """The objects of each image: [i] -> a list of dicts.

    Kept in flat arrays: COCO's take 0.3 GB, as Python objects 3.5 GB, of which every loading
    process would make copies by counting references. Points of polygons are float32, rounded to
    0.001 when read: what has three decimals and lies within 8,192 pixels is kept exactly.
    `append` objects in any order of images, then `close`.
    """

    def __init__(self):
        self.images, self.labels, self.crowds = array("i"), array("i"), array("b")
        self.boxes = array("d")  # four numbers an object
        self.points, self.part_ends, self.first_parts = array("f"), array("q", [0]), array("q", [0])
        self.codes, self.code_ends = bytearray(), array("q", [0])

    def append(self, image, box, label, crowd, mask=()):
        """image: its number; mask: polygons, lists x, y, x, y, ..., or compressed run lengths."""
        self.images.append(image)
        self.boxes.extend(box)
        self.labels.append(label)
        self.crowds.append(crowd)
        if isinstance(mask, bytes):
            self.codes += mask
        else:
            for part in mask:
                self.points.extend(part)
                self.part_ends.append(len(self.points))
        self.first_parts.append(len(self.part_ends) - 1)
        self.code_ends.append(len(self.codes))

    def close(self, images, drop_empty):
        """Sort the objects by image -> which of `images` images are kept, as an index.

        drop_empty: leave out images without objects.
        """
        for name in ("images", "labels", "crowds", "boxes", "points", "part_ends", "first_parts",
                     "code_ends"):
            values = getattr(self, name)
            setattr(self, name, np.frombuffer(values, values.typecode))
        self.boxes, self.codes = self.boxes.reshape(-1, 4), bytes(self.codes)
        self.order = np.argsort(self.images, kind="stable")
        counts = np.bincount(self.images, minlength=images)
        kept = np.flatnonzero(counts) if drop_empty else np.arange(images)
        self.starts = np.cumsum([0, *counts[kept]])
        return kept

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, index):
        if index < 0 or index >= len(self):
            raise IndexError(index)
        rows = self.order[self.starts[index]:self.starts[index + 1]]
        return [{"box": tuple(self.boxes[row].tolist()), "label": int(self.labels[row]),
                 "crowd": bool(self.crowds[row]), "mask": self.mask(row)} for row in rows]

    def mask(self, row):
        """Of object number `row`: bytes, or a list of arrays, empty where it has none."""
        code = self.codes[self.code_ends[row]:self.code_ends[row + 1]]
        if code:
            return code
        ends = self.part_ends[self.first_parts[row]:self.first_parts[row + 1] + 1]
        return [self.points[first:last].astype(np.float64).round(3)
                for first, last in zip(ends[:-1], ends[1:])]


def has_area(box, size, notes):
    """Whether a box has an area inside an image of (width, height), 0 where unknown.

    notes: a Counter of what is not as it is annotated.
    """
    width, height = (side or math.inf for side in size)
    x0, y0, x1, y1 = box
    if min(x1, width) <= max(x0, 0) or min(y1, height) <= max(y0, 0):
        notes["whose box has no area in its image left out"] += 1
        return False
    if x0 < -1 or y0 < -1 or x1 > width + 1 or y1 > height + 1:
        notes["cut off at the border of their image"] += 1
    return True


def tell(notes, where):
    """A Counter of `has_area`'s in one line."""
    if notes:
        counts = ", ".join(f"{number} {what}" for what, number in notes.items())
        note(f"{where}: objects: {counts}")


# -------------------------------------------------------------------------------------------- VOC
def read_voc(path):
    """An annotation of VOC's -> (width, height), 0 where it does not say; [(box, label, hard)]."""
    try:
        root = ElementTree.parse(path)
    except ElementTree.ParseError as error:
        raise InputError(f"{path}: no annotation of VOC's ({error})") from None
    texts = [root.findtext(f"size/{side}", "").strip() or "0" for side in ("width", "height")]
    sides = [as_float(text) for text in texts]
    if not all(side >= 0 and side.is_integer() for side in sides):
        raise InputError(f"{path}: its size must be two whole numbers, not {texts}")
    things = []
    for thing in root.findall("object"):
        name = thing.findtext("name", "").strip()
        if name not in VOC_CLASSES:
            raise InputError(f"{path}: {name!r} is none of VOC's twenty classes; others need the "
                             "layout of COCO and --protocol coco-c4")
        texts = [thing.findtext(f"bndbox/{side}", "") for side in ("xmin", "ymin", "xmax", "ymax")]
        x0, y0, x1, y1 = map(as_float, texts)
        if not math.isfinite(x0 + y0 + x1 + y1):
            raise InputError(f"{path}: a {name} has no box of numbers, but {texts}")
        difficult = thing.findtext("difficult", "").strip() or "0"
        if difficult not in ("0", "1"):
            raise InputError(f"{path}: difficult of a {name} must be 0 or 1, not {difficult!r}")
        box = (x0 - 1, y0 - 1, x1, y1)  # VOC counts from 1, and includes the last pixel
        things.append((box, VOC_CLASSES.index(name) + 1, difficult == "1"))
    return tuple(map(int, sides)), things


def as_float(text):
    """The number that a text is; NaN where it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def check_once(names, before, after):
    """InputError, `before` NAME `after` more than once, unless each name is there once."""
    known = set()
    for name in names:
        if name in known:
            raise InputError(f"{before} {name!r} {after} more than once")
        known.add(name)


# ------------------------------------------------------------------------------------------- COCO
class JsonReader:
    """Reads a JSON object from a text file, one value at a time: COCO's is 450 MB of text."""

    CHUNK = 2 ** 20  # characters
    decoder = json.JSONDecoder(parse_constant=lambda name: None)  # NaN is no number

    def __init__(self, file):
        self.file, self.text, self.at, self.before = file, "", 0, 0

    def entries(self):
        """-> pairs of a name and its value; of a list each entry, one after the other."""
        self.take("{")
        for _ in self.until("}"):
            name = self.value()
            self.take(":")
            if self.taken("["):
                for _ in self.until("]"):
                    yield name, self.value()
            else:
                yield name, self.value()

    def until(self, end):
        """Stops before each of the values that commas separate and `end` ends."""
        if self.taken(end):
            return
        yield
        while not self.taken(end):
            self.take(",")
            yield

    def read_on(self):
        """Take in more of the file -> whether there was more."""
        more = self.file.read(max(self.CHUNK, len(self.text) - self.at))
        if more:
            self.before += self.at
            self.text, self.at = self.text[self.at:] + more, 0
        return bool(more)

    def next_character(self):
        """The next that is no white space, left where it is; "" at the end."""
        while True:
            while self.text[self.at:self.at + 1] in (" ", "\t", "\r", "\n"):
                self.at += 1
            if self.at < len(self.text) or not self.read_on():
                return self.text[self.at:self.at + 1]

    def taken(self, character):
        """Whether the next character is this one, which is then read."""
        found = self.next_character() == character
        self.at += found
        return found

    def take(self, character):
        if not self.taken(character):
            raise InputError(f"{character!r} is missing at character {self.before + self.at}")

    def value(self):
        """The next value, whole: the text is read on until something else follows."""
        self.next_character()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except (ValueError, RecursionError) as error:  # also of numbers of 5,000 digits
                place = self.before + getattr(error, "pos", self.at)
                if not self.read_on():
                    reason = getattr(error, "msg", error)
                    raise InputError(f"{reason} at character {place}") from None
                continue
            if self.text[end:end + 1] in (*" \t\r\n,:]}",) or not self.read_on():
                self.at = end
                return value


def read_json(path):
    """-> what `JsonReader.entries` finds in a file."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from JsonReader(file).entries()
    except (InputError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"cannot read {path} as annotations of COCO's ({error})") from None


def read_coco(path, train, classes=None):
    """-> classes, kept images [(file name, width, height)] in order of id, and their Objects.

    train: leave out crowds, and images without other objects. classes: names that another file
    gives to labels; without them, this one's in order of id.
    """
    images = read_images(path)
    places = {number: place for place, number in enumerate(sorted(images))}
    categories, used = {}, {}  # by id: name; label for the time being, and where it is first used
    objects, notes = Objects(), Counter()
    for kind, one in read_json(path):
        if kind == "categories":
            check_fields(one, "categories", ("name",), categories, path)
            categories[one["id"]] = one["name"]
        elif kind == "annotations":
            number, where = where_it_is(one, images, path)
            crowd, size = crowd_of(one, where), images[number][1:]
            if crowd and train:
                continue
            category, box, mask = read_object(one, size, where)
            label, _ = used.setdefault(category, (len(used), where))
            if not mask:
                notes["whose outline encloses nothing left out"] += 1
            elif has_area(box, size, notes):
                objects.append(places[number], box, label, crowd, mask)
    tell(notes, path)
    classes, labels = match_classes(categories, used, classes, path)
    kept = objects.close(len(images), drop_empty=train)
    objects.labels = np.array(labels, np.int32)[objects.labels]
    rows = [images[number] for number in sorted(images)]
    return classes, [rows[place] for place in kept], objects


def match_classes(categories, used, classes, path):
    """-> classes, and the label of each used category: those of equal names.

    categories: names by id; used: where each is first used, by id; classes: as in `read_coco`.
    """
    check_once(categories.values(), f"{path}: category", "is there")
    classes = classes or [name for _, name in sorted(categories.items())]
    for name in categories.values():
        if name not in classes:
            raise InputError(f"{path}: category {name!r} is none of the training set's: "
                             f"{', '.join(classes)[:300]}")
    for category, (_, where) in used.items():
        if category not in categories:
            raise InputError(f"{where}: its category is none of the file's")
    return classes, [classes.index(categories[category]) + 1 for category in used]


def read_images(path):
    """COCO's images: {id: (file name, width, height)}."""
    images = {}
    for kind, one in read_json(path):
        if kind != "images":
            if images:
                break  # in COCO's own files annotations follow: they are read once
            continue
        check_fields(one, "images", ("file_name", "width", "height"), images, path)
        name, *size = one["file_name"], one["width"], one["height"]
        if not all(is_number(side) and side > 0 and side == int(side) for side in size):
            raise InputError(f"{path}: image {name!r}: its width and height must be numbers of "
                             f"pixels, not {size}")
        images[one["id"]] = (name, *size)
    check_once((name for name, _, _ in images.values()), f"{path}: image", "is there")
    return images


def check_fields(one, kind, names, known, path):
    """InputError unless an entry of a list of COCO's has these fields, and an id that is new."""
    if not isinstance(one, dict) or not {"id", *names} <= one.keys():
        raise InputError(f"cannot read {path} as annotations of COCO's (one of its {kind} must "
                         f"have id, {', '.join(names)}, not {str(one)[:80]})")
    if not is_number(one["id"]):
        raise InputError(f"{path}: an id of its {kind} must be a number, not {one['id']!r}")
    if one["id"] in known:
        raise InputError(f"{path}: {one['id']} is the id of more than one of its {kind}, the last "
                         f"of which is {one[names[0]]!r}")
    if not isinstance(one[names[0]], str):
        raise InputError(f"{path}: a {names[0]} of its {kind} must be a text, not {one[names[0]]}")


def where_it_is(annotation, images, path):
    """The id of the image that an annotation of COCO's belongs to, and its place for messages."""
    if not isinstance(annotation, dict):
        raise InputError(f"{path}: an annotation is no object, but {str(annotation)[:80]}")
    number = annotation.get("image_id")
    if not is_number(number) or number not in images:
        raise InputError(f"{path}: annotation {annotation.get('id')}: image {number!r} is none of "
                         "the file's")
    return number, f"{path}: image {number}, annotation {annotation.get('id')}"


def crowd_of(annotation, where):
    """0 or 1: whether an annotation is of a crowd."""
    crowd = annotation.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise InputError(f"{where}: its iscrowd must be 0 or 1, not {crowd!r}")
    return crowd


def read_object(annotation, size, where):
    """An annotation of COCO's -> category, box and mask, as `Objects.append` takes them.

    size: (width, height) of its image. The mask is empty if nothing is inside.
    """
    category, box = annotation.get("category_id"), annotation.get("bbox")
    if not is_number(category):
        raise InputError(f"{where}: its category is none of the file's")
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        raise InputError(f"{where}: its bbox must be four numbers, not {box}")
    outline = annotation.get("segmentation")
    if isinstance(outline, dict):
        mask = read_run_lengths(outline, size, where)
    elif isinstance(outline, list) and outline:
        mask = read_polygons(outline, where)
    else:
        raise InputError(f"{where}: no segmentation (polygons or run lengths), which masks need")
    x, y, width, height = box
    return category, (x, y, x + width, y + height), mask


def is_number(value):
    """Whether something read from JSON is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


def read_polygons(parts, where):
    """COCO's polygons, without those of fewer than three points, as Detectron2 reads them."""
    for part in parts:
        if not isinstance(part, list) or not {*map(type, part)} <= {int, float} or len(part) % 2:
            raise InputError(f"{where}: its segmentation must be lists of numbers, x, y, x, y, ...")
        if part and max(max(part), -min(part)) > FARTHEST:
            raise InputError(f"{where}: a point of its segmentation is farther than {FARTHEST} "
                             "pixels from the image")
    return [part for part in parts if len(part) >= 6]


def read_run_lengths(outline, size, where):
    """COCO's run lengths, as a list or compressed -> compressed, as bytes; b"" if all are outside.

    InputError unless they add up to the image's pixels: pycocotools would leave memory as it is.
    """
    from pycocotools.mask import frPyObjects
    width, height = size
    runs = outline.get("counts")
    if isinstance(runs, str):
        runs = decompress(runs)
    sound = isinstance(runs, list) and all(type(run) is int and run >= 0 for run in runs)
    if not sound or outline.get("size") != [height, width] or sum(runs) != width * height:
        raise InputError(f"{where}: its run lengths are not of the image's {width} x {height} "
                         "pixels")
    if not any(runs[1::2]):
        return b""
    return frPyObjects({"size": [height, width], "counts": runs}, height, width)["counts"]


def decompress(code):
    """The run lengths in COCO's compressed text; None where it is cut short or foreign.

    A number is a series of digits to base 32, the lowest first, with 32 added to each but the last,
    whose bit 16 is the sign; a character is a digit plus 48. From the fourth number on, it is the
    difference to the run two before.
    """
    runs, number, shift = [], 0, 0
    for character in code:
        digit = ord(character) - 48
        if not 0 <= digit < 64:
            return None
        number += (digit & 31) << shift
        shift += 5
        if digit < 32:
            if digit & 16:
                number -= 1 << shift
            runs.append(number + (runs[-2] if len(runs) > 2 else 0))
            number, shift = 0, 0
    return None if shift else runs
