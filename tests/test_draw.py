"""common/draw.py: colours, overlays, rows of panels, ticks and running means."""
import time

import numpy as np
import pytest
import torch
from PIL import Image

from common import draw
from common.draw import BAR, CELL, COLOURS, GAP, LINE
from conftest import check_legible

TOP = LINE + 8  # pixels above an image whose title has one line


# --------------------------------------------------------------------------------- maps over images
def test_colours_keep_their_order_in_gray():
    gray = COLOURS @ np.array([0.299, 0.587, 0.114])
    assert COLOURS.shape == (256, 3) and (np.diff(gray) > 0).all()
    assert gray[0] < 5 and gray[-1] > 235


def test_maps_of_a_row_share_one_scale():
    image = Image.new("RGB", (50, 40), "black")
    maps = [torch.full((2, 2), value) for value in (1.0, 2.0, 4.0)]
    group = [(str(number), heat) for number, heat in enumerate(maps)]
    row = draw.draw_row("title", image, [group, [("attention", maps[0])]])
    assert row.size == (GAP + 5 * (CELL + GAP) + 2 * BAR, TOP + round(CELL * 40 / 50) + GAP)
    lefts = [GAP + (CELL + GAP) * (1 + i) for i in range(3)] + [GAP + 4 * (CELL + GAP) + BAR]
    found = [np.array(row.getpixel((left + CELL // 2, TOP + 60))) for left in lefts]
    # of a quarter, a half, all; a group has a scale of its own
    for colour, level in zip(found, (64, 128, 255, 255)):
        assert np.abs(colour - 0.6 * COLOURS[level]).max() <= 1


def test_overlay_lies_bilinearly_over_the_whole_image():
    heat = torch.zeros(2, 2)
    heat[0, 1] = 1.0
    drawn = np.asarray(draw.overlay(Image.new("RGB", (120, 60), "black"), heat, 1.0)).sum(2)
    assert drawn.shape == (60, 120)
    assert drawn[0, -1] == drawn.max() and drawn[-1, 0] == drawn.min()
    middle = drawn[0, 30:90].astype(int)
    assert (np.diff(middle) >= 0).all() and len(set(middle)) > 20  # a ramp, not a step
    white = draw.overlay(Image.new("RGB", (120, 60), "white"), torch.zeros(2, 2), 0.0)
    # zeros: the darkest colour, no division by 0
    assert white.getpixel((5, 5)) == pytest.approx((102, 102, 104), abs=1)


def test_titles_are_wrapped_never_cut_nor_over_others(texts):
    image, heat = Image.new("RGB", (50, 40)), torch.ones(2, 2)
    long = "a_run_whose_name_goes_on_for_longer_than_any_picture_is_wide: golden retriever"
    draw.draw_row("a photo.jpg", image, [[(long, heat), ("W" * 40, heat)], [("", heat)]])
    found = [text.replace("\n", "").replace(" ", "") for _, _, _, text in texts]
    assert long.replace(" ", "") in found and "W" * 40 in found
    assert all(right <= CELL for _, _, (_, _, right, _), _ in texts)
    check_legible(texts)


# ------------------------------------------------------------------------------------------- curves
@pytest.mark.parametrize("low, high, most, found", [
    (0, 1550, 8, list(range(0, 1601, 200))), (0, 125100, 8, list(range(0, 140001, 20000))),
    (0, 8, 8, list(range(9))), (0, 13, 8, [0, 2, 4, 6, 8, 10, 12, 14]),
    (2.13, 6.98, 4, [2, 4, 6, 8]), (0.0218, 0.0288, 4, [0.02, 0.022, 0.024, 0.026, 0.028, 0.03]),
    (0, 1, 4, [0, 0.5, 1]), (63.6, 63.6, 4, [62, 64, 66, 68, 70]), (0, 0, 4, [0, 0.5, 1]),
])
def test_ticks_are_round_and_cover_the_values(low, high, most, found):
    assert draw.ticks(low, high, most) == pytest.approx(found, abs=1e-12)


def test_running_mean_takes_away_noise_but_neither_shifts_nor_delays():
    rng = np.random.RandomState(0)
    noise = rng.normal(size=1000)
    smooth = np.array(draw.running_mean(noise.tolist()))
    inside = slice(50, 950)
    assert smooth[inside].std() < 2 * noise.std() / 101 ** 0.5 and len(smooth) == 1000
    for i in (50, 500, 949):
        assert smooth[i] == pytest.approx(noise[i - 50:i + 51].mean())
    line = [2.0 * i for i in range(1000)]
    assert draw.running_mean(line)[:950] == pytest.approx(line[:950])
    assert draw.running_mean([1.0, 5.0, 2.0]) == [1.0, 5.0, 2.0]


def test_a_running_mean_of_a_long_run():
    """Of the paper's 125,000 steps: within seconds, and each still the plain mean."""
    values = np.random.RandomState(0).uniform(0, 420, 125_000)
    start = time.perf_counter()
    means = draw.running_mean(values.tolist())
    assert time.perf_counter() - start < 5
    for i in (0, 3, 6_250, 60_000, 124_000, 124_999):
        before = min(i, 6_250)
        assert means[i] == pytest.approx(values[i - before:i + before + 1].mean(), rel=1e-9)
