"""Panels, axes and text on a PIL image: rows of maps over images, and curves of runs."""
import math
import textwrap

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

# The attention figure, in pixels.
CELL = 160  # longer side of an image
GAP = 8  # between images
BAR = 60  # width of a colour bar and its numbers
LINE = 17  # height of a line of a title
# (256, 3) uint8: black over red to yellow, ever lighter, so that it reads in gray too.
AT = np.linspace(0, 4, 256)
RED = np.interp(AT, range(5), (0, 87, 188, 249, 252))
GREEN = np.interp(AT, range(5), (0, 16, 55, 142, 255))
BLUE = np.interp(AT, range(5), (4, 110, 84, 9, 164))
COLOURS = np.stack((RED, GREEN, BLUE), axis=1).astype(np.uint8)

# The figure of curves, in pixels; drawn twice as large and halved, so that lines have no steps.
PANEL, PANEL_HEIGHT = 960, 420
LEFT, RIGHT, ABOVE, BELOW = 132, 68, 68, 60  # around the axes of a panel
LEGEND = 40  # height of a run's line
RUN_COLOURS = ((31, 105, 180), (230, 110, 0), (30, 140, 60), (190, 40, 50),
               (120, 80, 170), (130, 90, 70), (215, 100, 180), (20, 160, 170))


def printable(name):
    """A file's name as text that can be drawn on one line; other characters become ?."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)


# --------------------------------------------------------------------------------- maps over images
def overlay(image, heat, top):
    """A map (H, W), bilinearly over all of an RGB image, coloured from 0 to `top` -> RGB image."""
    heat = F.interpolate(heat[None, None], image.size[::-1], mode="bilinear")[0, 0].cpu()
    level = (255 * heat / max(top, 1e-12)).round().clamp(0, 255).long()  # (height, width)
    gray = image.convert("L").convert("RGB")
    return Image.blend(gray, Image.fromarray(COLOURS[level.numpy()]), 0.6)


def wrap(text, font, width):
    """Text as lines of at most `width` pixels."""
    lines, letters = [text], len(text)
    while max(map(font.getlength, lines), default=0) > width:
        letters -= 1
        lines = textwrap.wrap(text, letters)
    return lines


def titled(title, picture):
    """A picture below its title, as wide as a cell and the gap after it."""
    font = ImageFont.load_default(size=14)
    lines = wrap(title, font, CELL)
    top = LINE * len(lines) + 8
    panel = Image.new("RGB", (CELL + GAP, top + max(picture.height, 40) + GAP), "white")
    ImageDraw.Draw(panel).text((0, 3), "\n".join(lines), "black", font, spacing=3)
    panel.paste(picture, (0, top))
    return panel


def colour_bar(highest, height):
    """The colours from `highest`, on top, to 0, with these two numbers beside."""
    font = ImageFont.load_default(size=14)
    bar = Image.new("RGB", (BAR, height + GAP), "white")
    bar.paste(Image.fromarray(COLOURS[::-1, None]).resize((12, height)), (0, 0))
    draw = ImageDraw.Draw(bar)
    draw.text((16, 0), f"{highest:.3g}", "black", font)
    draw.text((16, height), "0", "black", font, anchor="ls")
    return bar


def draw_row(title, image, groups, query=None):
    """An image, `query` (y, x) marked in it, then groups of (title, map (H, W)) with a bar each."""
    scale = CELL / max(image.size)
    width, height = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    image = image.resize((width, height), Image.BICUBIC)
    marked = image.copy()
    if query:
        centre = (query[1] * (width - 1), query[0] * (height - 1))
        ImageDraw.Draw(marked).circle(centre, 5, fill="red", outline="white", width=2)
    panels = [titled(title, marked)]
    for group in groups:
        highest = max(float(heat.max()) for _, heat in group)
        for map_title, heat in group:
            panels.append(titled(map_title, overlay(image, heat, highest)))
        panels.append(colour_bar(highest, max(height, 40)))

    bottom, x = max(panel.height for panel in panels), GAP
    row = Image.new("RGB", (GAP + sum(panel.width for panel in panels), bottom), "white")
    for panel in panels:
        row.paste(panel, (x, bottom - panel.height))
        x += panel.width
    return row


# ------------------------------------------------------------------------------------------- curves
def ticks(low, high, most):
    """Numbers 1, 2 or 5 times a power of ten apart over low to high, with `most` gaps or fewer."""
    if high <= low:
        high = low + (abs(low) / 10 or 1.0)
    least = (high - low) / most
    power = 10.0 ** math.floor(math.log10(least))
    distance = min(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
    first, last = math.floor(low / distance + 1e-9), math.ceil(high / distance - 1e-9)
    return [number * distance for number in range(first, last + 1)]


def running_mean(values):
    """Each value's mean with its neighbours, 5 % of all to either side; fewer at the ends."""
    sums = np.cumsum([0.0, *values])  # sums[i]: of the first i values
    at = np.arange(len(values))
    before = np.minimum(at, len(values) // 20)  # as many as after: a steep start stays in place
    after = np.minimum(at + before + 1, len(values))
    return ((sums[after] - sums[at - before]) / (after - at + before)).tolist()


def draw_panel(draw, corner, name, title, curves, last_step):
    """Axes and the runs' curves of one key, in the panel whose upper left corner is (x, y)."""
    font = ImageFont.load_default(size=26)
    values = [value for curve in curves for _, value in curve]
    if name.startswith(("std", "lr")):
        values.append(0.0)  # the axis begins at 0
    levels = ticks(min(values), max(values), 4)
    left, right = corner[0] + LEFT, corner[0] + PANEL - RIGHT
    top, bottom = corner[1] + ABOVE, corner[1] + PANEL_HEIGHT - BELOW

    def place(step, value):
        x = left + step / last_step * (right - left)
        return x, bottom - (value - levels[0]) / (levels[-1] - levels[0]) * (bottom - top)

    draw.text((left, top - 16), title, "black", font, anchor="ls")
    for level in levels:
        _, y = place(0, level)
        draw.line((left, y, right, y), "lightgray", 2)
        draw.text((left - 12, y), f"{level:,.6g}", "black", font, anchor="rm")
    for step in ticks(0, max(last_step, 8), 8):  # whole, since at most 8 in 8 steps or more
        x, _ = place(step, levels[0])
        if step <= last_step:
            text = f"{step:,.0f}" if step else "step 0"
            draw.line((x, bottom, x, bottom + 8), "black", 2)
            draw.text((x, bottom + 12), text, "black", font, anchor="ma")
    draw.line((left, top, left, bottom, right, bottom), "black", 2)

    lines = []
    for number, curve in enumerate(curves):
        colour = RUN_COLOURS[number % len(RUN_COLOURS)]
        points = [place(step, value) for step, value in curve]
        if name.startswith(("loss", "std")) and len(curve) >= 20:
            faint = tuple(255 - (255 - channel) * 3 // 10 for channel in colour)
            draw.line(points, faint, 2)
            means = running_mean([y for _, y in points])
            points = [(x, mean) for (x, _), mean in zip(points, means)]
        lines.append((colour, points))
    for colour, points in lines:  # over every run's faint line
        draw.line(points, colour, 4, joint="curve")
        if len(points) < 20:
            for point in points:
                draw.circle(point, 6, colour)
