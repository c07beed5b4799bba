"""common/shapes.py: the embedded images."""
import math

import numpy as np

from common import shapes
from common.shapes import Shapes


# ------------------------------------------------------------------------------------------- shapes
SHAPES_LEVELS = [  # green of the first ten training images at 64 px, on a 3x3 grid of pixels
    [83, 140, 137, 86, 103, 150, 122, 83, 150], [99, 193, 134, 96, 166, 136, 193, 136, 138],
    [111, 118, 119, 109, 71, 71, 148, 71, 149], [138, 98, 139, 109, 98, 110, 140, 168, 98],
    [81, 89, 120, 169, 159, 128, 81, 93, 125], [128, 130, 132, 108, 130, 160, 126, 171, 140],
    [74, 74, 130, 181, 109, 129, 128, 122, 123], [180, 98, 142, 143, 191, 143, 136, 141, 145],
    [129, 131, 131, 131, 131, 131, 131, 131, 131], [144, 144, 145, 132, 163, 163, 130, 131, 140]]


def test_shapes_are_functions_of_split_and_index():
    images, again = Shapes("train", 50, 64), Shapes("train", 9, 64)
    for index in (0, 8, 3):
        image, label, box, mask = images.render(index)
        assert np.array_equal(image, again.render(index)[0]) and label == index % 10
        assert not np.array_equal(image, Shapes("val", 50, 64).render(index)[0])
        assert image.dtype == np.uint8 and image.shape == (64, 64, 3) and mask.shape == (64, 64)
        assert np.array_equal(box, shapes.mask_box(mask)) and 0.1 < mask.mean() < 0.75
    for index, levels in enumerate(SHAPES_LEVELS):  # the same on every machine, to one gray level
        found = Shapes("train", 10, 64).render(index)[0][16::16, 16::16, 1].ravel().astype(int)
        assert abs(found - levels).max() <= 1
    for index in range(10):  # the same image at any size: coarse averages agree
        both = (Shapes("train", 10, size).render(index)[0] for size in (64, 256))
        small_image, large = (image.astype(float) for image in both)
        large = large.reshape(64, 4, 64, 4, 3).mean((1, 3))
        assert np.abs(small_image - large).mean() < 4


def test_rendered_images_are_kept_up_to_a_limit(monkeypatch):
    """A second look renders nothing, and what was done to the first does not show."""
    source, rendered = Shapes("train", 5, 32), []

    def render(split, index, size):
        rendered.append(index)
        return shapes.render_shape(split, index, size)

    source.renderer = render
    monkeypatch.setattr(Shapes, "KEPT", 3 * 32 * 32 * 3)
    for _ in range(2):
        for index in range(5):
            image, label = source[index]
            expected = shapes.render_shape("train", index, 32)
            assert np.array_equal(image, expected[0]) and label == expected[1]
            image.paste((0, 0, 0), (0, 0, 32, 32))
    assert rendered == [0, 1, 2, 3, 4, 3, 4]


# ------------------------------------------------------------------------------------------ clutter
CLUTTER_LEVELS = [  # green of the first images of clutter at 64 px, on a 3x3 grid of pixels
    [167, 98, 92, 120, 98, 118, 121, 123, 120],
    [133, 133, 134, 108, 122, 133, 121, 121, 101],
    [114, 116, 119, 109, 115, 133, 113, 86, 61],
    [153, 134, 139, 119, 123, 138, 140, 140, 95]]


def test_clutter_is_a_function_of_split_and_index():
    """To one gray level on every machine; no image of val is one of train."""
    for index, levels in enumerate(CLUTTER_LEVELS):
        image, label, box, mask = shapes.render_clutter("train", index, 64)
        found = image[16::16, 16::16, 1].ravel().astype(int)
        assert abs(found - levels).max() <= 1 and label == index % 10
        assert image.dtype == np.uint8 and image.shape == (64, 64, 3)
        assert np.array_equal(box, shapes.mask_box(mask))
        assert not np.array_equal(image, shapes.render_clutter("val", index, 64)[0])


def test_clutter_is_small_and_anywhere():
    """Objects cover 5 to 20 % of an image; those of all images, all of it but the corners."""
    masks = [shapes.render_clutter("val", index, 64)[3] for index in range(200)]
    areas = np.array([mask.mean() for mask in masks])
    assert areas.min() >= 0.05 and areas.max() <= 0.2
    assert 0.1 < areas.mean() < 0.14  # chance of the pointing game
    assert np.mean(masks, 0)[8:-8, 8:-8].min() > 0


def test_clutter_shows_two_objects_of_a_class(monkeypatch):
    """Apart from each other, so that the place of neither is the image's."""
    painted, paint = [], shapes.paint

    def watch(image, rng, label, centre, radius, level):
        painted.append((label, *centre, radius))
        return paint(image, rng, label, centre, radius, level=level)

    monkeypatch.setattr(shapes, "paint", watch)
    for index in range(100):
        mask = shapes.render_clutter("train", index, 64)[3]
        (label, y, x, radius), (other, v, u, size) = painted[-2:]
        assert label == other == index % 10 and len(painted) == 2 * (index + 1)
        assert math.hypot(y - v, x - u) > radius + size
        seen = [mask[int(64 * row), int(64 * column)] for row, column in ((y, x), (v, u))]
        assert all(seen) or label == shapes.SHAPES.index(shapes.ring)


def test_clutters_ground_does_not_tell_the_class(monkeypatch):
    """Whatever is painted, what lies behind it stays."""
    image, _, _, mask = shapes.render_clutter("train", 3, 64)
    order = shapes.SHAPES[1:] + shapes.SHAPES[:1]
    monkeypatch.setattr(shapes, "SHAPES", order)
    other, _, _, other_mask = shapes.render_clutter("train", 3, 64)
    outside = ~shapes_near(mask | other_mask)
    assert np.array_equal(image[outside], other[outside]) and not np.array_equal(mask, other_mask)
    ground, _ = shapes.soft_ground(shapes.generator("train", 3), 64)
    changed = np.abs(image - ground).max(2) > 8
    assert 0.25 < changed[outside].mean() < 0.75  # the scraps


def shapes_near(mask):
    """A mask with one more pixel on each side, where outlines are soft."""
    near = mask.copy()
    for axis in (0, 1):
        near |= np.roll(near, 1, axis) | np.roll(near, -1, axis)
    return near


# ------------------------------------------------------------------------------------------- scenes
def test_scenes_hide_what_is_behind():
    """Labels 0 to 9; masks do not overlap, and each has its box."""
    counts = []
    for index in range(20):
        image, boxes, labels, masks = shapes.render_scene("train", index, 96)
        assert image.shape == (96, 96, 3) and image.dtype == np.uint8
        assert np.sum(masks, 0).max() == 1
        assert all(np.array_equal(box, shapes.mask_box(mask)) for box, mask in zip(boxes, masks))
        counts += labels
    assert min(counts) == 0 and max(counts) == 9


def test_versions_of_the_embedded_sets():
    """Raise a set's number when its images change: the levels above are of these versions."""
    assert list(shapes.DIGESTS.values()) == ["shapes 1", "clutter 1", "scenes 1"]
