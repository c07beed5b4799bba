"""visualize.py: maps and measures against known answers, figures, curves, bad input."""
import ast
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import visualize
from care import CARE, Encoder
from common import data
from common import draw as drawing
from common.draw import (ABOVE, BAR, BELOW, CELL, GAP, LEFT, LINE, PANEL, PANEL_HEIGHT, RIGHT,
                         RUN_COLOURS)
from common.weights import open_encoder, sha256_of
from conftest import check_legible, images, refused

TOP = LINE + 8  # pixels above an image whose title has one line


# ------------------------------------------------------------------------------------------ helpers
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small run's folder: encoder.pth, last.pth, log.jsonl, and a classifier.pth."""
    out = tmp_path_factory.mktemp("figures") / "small"
    out.mkdir()
    torch.manual_seed(3)
    settings = {"arch": "thin", "image_size": [64, 96], "method": "care", "blocks": 2,
                "hidden_dim": 16, "out_dim": 8}
    model = CARE(**settings)
    torch.save(model.online.encoder.state_dict(), out / "encoder.pth")
    torch.save({"model": model.state_dict(), "model_args": settings, "step": 1}, out / "last.pth")
    head = nn.Sequential(nn.Linear(model.online.encoder.dim5, 4), nn.BatchNorm1d(4))
    head[1].running_mean.normal_()
    sha256 = sha256_of(open_encoder(out / "encoder.pth", None, None, seed=0))
    saved = {"head": "linear-bn", "classes": list("abcd"), "sha256": sha256}
    torch.save({**saved, "state": head.state_dict()}, out / "classifier.pth")
    write_log(out, [{"step": 0, "knn": 60.0}, {"step": 0, "rankme": 90.0}, *training_lines(4),
                    {"step": 40, "knn": 70.0}, {"step": 40, "rankme": 120.0}])
    with open(out / "log.jsonl", "a") as log:
        log.write('{"step": 50, "lo')  # as a killed run leaves it
    return out


def write_log(out, lines):
    out.mkdir(exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in [{"args": {}, "steps": 40}, *lines])
    (out / "log.jsonl").write_text(text)


def training_lines(count, noise=0.0):
    """Lines of a log, every ten steps; noise alternates around a falling loss."""
    lines = []
    for i in range(1, count + 1):
        loss = 8.0 / i + noise * (-1) ** i
        lines.append({"step": 10 * i, "epoch": i, "lr": 0.1 / i, "tau": 0.99, "loss": loss,
                      "loss_c": loss / 4, "loss_t": 2.0, "loss_att": 0.01, "std_c": 0.9,
                      "std_t": 0.8})
    return lines


def arguments(*flags):
    args = visualize.parse_args([str(flag) for flag in flags])
    args.device = torch.device("cpu")
    return args


def draw(*flags):
    """The figure of a command line that ends in its --out."""
    visualize.main([str(flag) for flag in flags])
    with Image.open(flags[-1]) as figure:
        figure.load()
    return figure


def small_encoder():
    torch.manual_seed(0)
    return Encoder("thin").double().eval()


def pictures(count=2, size=64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, size, size, dtype=torch.float64, generator=generator)


# -------------------------------------------------------------------------------------- image sizes
def test_the_size_is_the_encoders_own_in_training(trained, tmp_path, capsys):
    """By the log beside it; without one the rendered set's recipe, or 224 for photos."""
    def size(*flags):
        return visualize.usual_size(arguments("--pretrained", *flags))

    encoder = tmp_path / "run" / "encoder.pth"
    encoder.parent.mkdir()
    encoder.touch()
    assert size(encoder) == size("random") == 64
    assert size(encoder, "--images", "shapes") == 32
    assert size(encoder, "--images", tmp_path) == 224
    line = {"args": {"image_size": [64, 96]}}
    (encoder.parent / "log.jsonl").write_text(json.dumps(line) + "\n")
    assert size("random", encoder) == size(encoder, "--images", tmp_path) == 96
    assert size(trained / "encoder.pth") == 64  # a log that does not say so
    other = tmp_path / "other" / "last.pth"
    other.parent.mkdir()
    other.touch()
    (other.parent / "log.jsonl").write_text('{"args": {"image_size": [32, 32]}}\n')
    refused(capsys, "--pretrained", encoder, other, "--out", tmp_path / "a.png",
            match="trained at different sizes", script=visualize)


def test_a_map_of_one_position_is_told(tmp_path, capsys):
    draw("--pretrained", "random", "--arch", "thin", "--image-size", 32, "--limit", 1,
         "--out", tmp_path / "a.png")
    assert "conv5 is a single position" in capsys.readouterr().err
    draw("--pretrained", "random", "--arch", "thin", "--image-size", 32, "--limit", 1,
         "--layer", "conv4", "--out", tmp_path / "a.png")
    assert "single position" not in capsys.readouterr().err
    assert not (tmp_path / "a.jsonl").exists()  # nothing is scored unless asked for


# ----------------------------------------------------------------------------------- maps, measures
@pytest.mark.parametrize("layer", ["conv4", "conv5"])
def test_similarity_map_is_direct_grad_cam(layer):
    encoder, x = small_encoder(), pictures()
    x[1] *= 3
    heat, classes = visualize.gradcam(encoder, x, layer)
    at = ("conv4", "conv5").index(layer)
    for i in range(2):  # one image at a time: a map does not depend on its batch
        with torch.no_grad():
            other = encoder(x[i:i + 1].flip(3))[at].mean((2, 3))[0]
            A = encoder(x[i:i + 1])[at][0]  # (C, H, W)
        A.requires_grad_()
        z = A.mean((1, 2))
        similarity = z @ (other / other.norm()) / z.norm().detach()
        similarity.backward()
        mean = A.grad.mean((1, 2))[:, None, None]  # the paper's weights; ours are H*W times that
        raw = (mean * A).sum(0) * A[0].numel()
        assert torch.allclose(heat[i], raw.relu(), rtol=1e-9, atol=0)
        cosine = F.cosine_similarity(A.mean((1, 2)), other, dim=0)
        assert math.isclose(raw.mean().item(), cosine.item(), rel_tol=1e-9)
        closed = torch.einsum("chw,c->hw", A, other / other.norm()) / z.norm()
        assert torch.allclose(heat[i], closed.relu(), rtol=1e-9, atol=0)
    side = 2 * (2 - at)
    assert classes is None and heat.shape == (2, side, side) and not heat.requires_grad
    assert (heat >= 0).all() and heat.max() > 0


@pytest.mark.parametrize("layer", ["conv4", "conv5"])
def test_class_map_is_direct_grad_cam(layer):
    encoder, x = small_encoder(), pictures()
    torch.manual_seed(2)
    head = nn.Sequential(nn.Linear(encoder.dim5, 5), nn.BatchNorm1d(5)).double().eval()
    head[1].running_var.uniform_(0.5, 2)
    watched = {"conv4": encoder.layer3, "conv5": encoder.layer4}[layer]
    seen = {}

    def watch(module, inputs, output):
        output.retain_grad()
        seen["A"] = output

    for label in (None, 3):
        for i in range(2):
            hook = watched.register_forward_hook(watch)  # through the whole network
            scores = head(encoder(x[i:i + 1])[1].mean((2, 3)))[0]
            hook.remove()
            wanted = scores.argmax().item() if label is None else label
            scores[wanted].backward()
            A = seen["A"]
            raw = (A.grad.mean((2, 3), keepdim=True) * A).sum(1)[0] * A[0, 0].numel()
            if layer == "conv5":  # the mean is the score without its bias
                shift = head[1](head[0].bias[None])[0, wanted]
                score = (scores[wanted] - shift).item()
                assert math.isclose(raw.mean().item(), score, rel_tol=1e-6)
            heat, classes = visualize.gradcam(encoder, x, layer, head, label)
            assert classes[i] == wanted
            assert torch.allclose(heat[i], raw.detach().relu(), rtol=1e-9, atol=1e-15)


def test_a_dead_encoder_gives_zero_maps():
    encoder = small_encoder().requires_grad_(False)
    for value in encoder.state_dict().values():
        value.zero_()
    heat, _ = visualize.gradcam(encoder, pictures(), "conv5")
    assert torch.equal(heat, torch.zeros(2, 2, 2, dtype=torch.float64))


@pytest.mark.parametrize("settings", [
    {}, {"method": "sequential"}, {"tap": "conv5", "position": "sincos"},
])
def test_attention_maps_are_the_transformers(settings):
    torch.manual_seed(0)
    model = CARE(arch="thin", image_size=(64, 96), blocks=2, hidden_dim=16, out_dim=8,
                 **settings)
    model = model.double().eval()
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    y, x_at = 0.7, 0.2
    maps = visualize.attention_maps(model, x, (y, x_at))
    first = (2, 3) if settings else (4, 6)
    assert [tuple(heat.shape) for heat in maps] == [(2, *first), (2, 2, 3)]
    assert not any(block.attention._forward_pre_hooks for block in model.online.transformer)
    with torch.no_grad():
        tapped = model.online.encoder(x)[1 if settings else 0]
        for block, heat in zip(model.online.transformer, maps):
            inside = F.relu(block.norm1(block.mlp1(tapped)))
            H, W = inside.shape[2:]
            q, k, v = block.attention.qkv(inside)
            weights = block.attention.attention(q, k)  # (B, h, N, N)
            out = (weights @ v).transpose(2, 3).flatten(1, 2).unflatten(2, (H, W))
            assert torch.allclose(out, block.attention(inside))  # what the block computes with
            place = math.floor(y * H) * W + math.floor(x_at * W)
            assert torch.allclose(heat.flatten(1), weights[:, :, place].mean(1) * H * W)
            assert torch.allclose(heat.mean((1, 2)), torch.ones(2, dtype=torch.float64))
            tapped = block(tapped)
    # the far edge is a position too
    assert visualize.attention_maps(model, x, (1.0, 1.0))[0].isfinite().all()


def test_measures_on_maps_with_known_answers():
    mask = np.zeros((4, 4), bool)
    mask[:2, :2] = True
    heat = np.zeros((4, 4))
    heat[0, 0], heat[3, 3] = 3.0, 1.0
    assert visualize.measure(heat, mask).tolist() == [1.0, 0.75, 0.25]
    assert visualize.measure(heat.T[::-1, ::-1], mask).tolist() == [0.0, 0.25, 0.25]
    assert visualize.measure(np.ones((4, 4)), mask).tolist() == [0.25, 0.25, 0.25]
    says_nothing = np.zeros((4, 4))
    assert visualize.measure(says_nothing, mask).tolist() == [0.25, 0.25, 0.25]
    heat[3, 3] = 3.0
    assert visualize.measure(heat, mask).tolist() == [0.5, 0.5, 0.25]


def test_where_the_maximum_of_an_enlarged_map_can_be():
    """In a corner a patch of equal pixels, at an edge a row of them, inside the middle pixels."""
    places = visualize.peaks((3, 3), (12, 12)).reshape(3, 3, 12, 12)
    assert np.allclose(places.sum((2, 3)), 1)
    for at, pixels in {(0, 0): {0, 1}, (1, 1): {5, 6}}.items():
        assert [set(axis) for axis in np.nonzero(places[at])] == [pixels, pixels]
    heat = torch.zeros(1, 1, 3, 3)
    heat[0, 0, 0, 1] = 1.0
    heat = F.interpolate(heat, (12, 12), mode="bilinear")[0, 0].numpy()
    rng = np.random.default_rng(0)
    for mask in rng.random((20, 12, 12)) < 0.3:
        assert visualize.measure(heat, mask)[0] == pytest.approx((places[0, 1] * mask).sum())


@pytest.mark.parametrize("name", ["shapes", "clutter"])
def test_scores_average_over_a_rendered_sets_validation_images(name, monkeypatch):
    args = arguments("--pretrained", "random", "--image-size", 64, "--samples", 4,
                     "--images", name, "--arch", "thin")
    source = data.open_images(name, "val", size=64)
    masks = [source.render(i)[3] for i in range(4)]
    heats = []
    for mask in masks:
        heats += [torch.ones(64, 64), torch.tensor(mask).float()]
    answers = iter(heats)
    monkeypatch.setattr(visualize, "gradcam", lambda *_: (next(answers)[None], None))
    one = visualize.load(args, "random", None)
    uniform, perfect = visualize.score(args, source, [one, one])
    area = pytest.approx(100 * np.mean(masks))
    assert (uniform["pointing"], uniform["energy"], uniform["area"]) == (area, area, area)
    assert (perfect["pointing"], perfect["energy"], perfect["area"]) == (100, 100, area)
    # maps have the mask's size here: each pixel is a position
    assert perfect["pointing_chance"] == area
    assert perfect["pointing_fixed"] == pytest.approx(100 * np.mean(masks, axis=0).max())
    protocol = {"data": name, "samples": 4, "image_size": 64, "layer": "conv5", "seed": 0,
                "target": "similarity", "arch": "thin", "stem": "imagenet",
                "precision": "fp32", "encoder": "random"}
    assert protocol.items() <= perfect.items()


# --------------------------------------------------------------------------------- attention figure
def test_photos_are_drawn_as_viewers_show_them(tmp_path):
    """Turned as EXIF asks, 16 bits scaled, on white where transparent; any size."""
    rgb = np.zeros((60, 90, 3), np.uint8)
    rgb[:, :45], rgb[:, 45:] = (200, 0, 0), (0, 0, 200)
    image = Image.fromarray(rgb)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    image.rotate(90, expand=True).save(tmp_path / "a_turned.jpg", quality=95, exif=exif)
    gray = np.asarray(image.convert("L"))
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "b_gray16.png")
    clear = image.convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, 90, 10))
    clear.save(tmp_path / "c_clear.png")
    image.resize((500, 1)).save(tmp_path / "d_line.png")
    image.resize((1, 1)).save(tmp_path / "e_pixel.png")

    args = arguments("--pretrained", "random", "--images", tmp_path)
    found = [image for _, image, _ in visualize.find_images(args, None)]
    turned, gray16, on_white, line, pixel = found
    assert (line.size, pixel.size) == ((500, 1), (1, 1))
    assert turned.size == (90, 60)
    assert turned.getpixel((10, 30)) == pytest.approx((200, 0, 0), abs=12)
    assert turned.getpixel((80, 30)) == pytest.approx((0, 0, 200), abs=12)
    assert np.array_equal(np.asarray(gray16)[..., 0], gray)
    assert on_white.getpixel((10, 5)) == (255, 255, 255)
    assert on_white.getpixel((10, 30)) == (200, 0, 0)

    figure = draw("--pretrained", "random", "--arch", "thin", "--image-size", 32,
                  "--images", tmp_path, "--out", tmp_path / "out" / "all.png")
    heights = [round(CELL * 60 / 90)] * 3 + [40, CELL]  # the line, the pixel
    assert figure.size == (GAP + 2 * (CELL + GAP) + BAR, sum(heights) + 5 * (TOP + GAP))


def test_the_first_of_many_images_are_drawn_and_it_says_so(tmp_path, capsys):
    for number in range(20):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number:02}.png")
    (tmp_path / "16.png").write_bytes(b"never read")
    for limit, count in (([], 16), (["--limit", 3], 3)):
        args = arguments("--pretrained", "random", "--images", tmp_path, *limit)
        titles = [title for title, *_ in visualize.find_images(args, None)]
        assert titles == [f"{number:02}" for number in range(count)]
        error = capsys.readouterr().err
        assert error == f"note: drawn are the first {count} of 20 images (--limit)\n"
    files = [tmp_path / f"{number:02}.png" for number in range(16)]
    args = arguments("--pretrained", "random", "--images", *files)
    assert len(list(visualize.find_images(args, None))) == 16
    assert capsys.readouterr().err == ""
    source = data.open_images("clutter", "val", size=32)
    args = arguments("--pretrained", "random", "--images", "clutter")
    found = list(visualize.find_images(args, source))
    assert [title for title, _, _ in found] == source.classes[:5]
    assert [(image.size, shown.size) for _, image, shown in found] == [((32, 32), (CELL, CELL))] * 5
    for _, image, shown in found:  # the same picture
        coarse = np.asarray(shown.resize((32, 32), Image.BOX), float)
        assert np.abs(coarse - np.asarray(image)).mean() < 12


def test_names_of_any_bytes_are_drawn(tmp_path):
    photo = tmp_path / "caf\udce9\nau\tlait.png"  # a byte of Latin-1, an end of line, a tab
    with open(photo, "wb") as file:
        Image.new("RGB", (8, 8), "red").save(file, "PNG")
    args = arguments("--pretrained", "random", "--images", photo)
    (title, image, _), = visualize.find_images(args, None)
    assert title == "caf??au?lait"
    drawing.draw_row(title, image, [[(title, torch.ones(2, 2))]])


def test_attention_figure_and_scores(trained, tmp_path, capsys, texts):
    figure = draw("--pretrained", "random", trained / "encoder.pth", "--arch", "thin",
                  "--images", "clutter", "--image-size", 64, "--samples", 3,
                  "--out", tmp_path / "a.png")
    assert figure.mode == "RGB"
    assert figure.size == (GAP + 3 * (CELL + GAP) + BAR, 5 * (TOP + CELL + GAP))
    check_legible(texts)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}/a.png: {figure.width} x {figure.height} pixels"
    assert (tmp_path / "a.jsonl").read_text().splitlines() == lines[1:]
    results = [json.loads(line) for line in lines[1:]]
    assert [row["encoder"] for row in results] == ["random", str(trained / "encoder.pth")]
    assert [row["data"] for row in results] == ["clutter", "clutter"]
    for row in results:
        assert all(0 <= row[name] <= 100 for name in ("pointing", "energy", "area"))
        assert 0 <= row["pointing_chance"] < row["pointing_fixed"] <= 100
    assert results[0]["energy"] != results[1]["energy"]


def test_load_takes_every_weight_from_the_files(trained):
    args = arguments("--pretrained", trained / "last.pth", "--t-stream", "--image-size", 64)
    one = visualize.load(args, trained / "last.pth", None)
    saved = torch.load(trained / "last.pth", weights_only=True)["model"]
    for key, value in one.model.state_dict().items():
        assert torch.equal(value, saved[key])
    for key, value in one.encoder.state_dict().items():
        assert torch.equal(value, saved[f"online.encoder.{key}"])
    args.t_stream = False
    one = visualize.load(args, trained / "encoder.pth", trained / "classifier.pth")
    saved = torch.load(trained / "classifier.pth", weights_only=True)["state"]
    for key, value in one.head.state_dict().items():
        assert torch.equal(value, saved[key])
    assert not one.head.training and not one.encoder.training
    assert one.classes == list("abcd") and one.title == "small"
    first = visualize.load(args, "random", None)
    assert first.encoder.arch == "resnet50"
    args.arch = "thin"
    second, third = [visualize.load(args, "random", None) for _ in range(2)]
    assert torch.equal(second.encoder.conv1.weight, third.encoder.conv1.weight)


def test_class_and_t_stream_figures(trained, tmp_path, texts):
    common = ["--image-size", 64, "--limit", 1, "--out", tmp_path / "a.png"]
    draw("--pretrained", trained / "encoder.pth", "--target", "class", "--layer", "conv4",
         "--classifier", trained / "classifier.pth", "--class", 3, *common)
    assert "small: d" in [text for _, _, _, text in texts]
    figure = draw("--pretrained", trained / "last.pth", "--t-stream", "--query", 0.2, 0.9, *common)
    # image, map, bar, two blocks, bar
    assert figure.width == GAP + 4 * (CELL + GAP) + 2 * BAR
    marked = (round(GAP + 0.9 * (CELL - 1)), round(TOP + 0.2 * (CELL - 1)))
    assert figure.getpixel(marked) == (255, 0, 0)
    assert [text for _, _, _, text in texts][-4:-2] == ["small: block 1", "small: block 2"]
    check_legible(texts)
    assert not (tmp_path / "a.jsonl").exists()


# ------------------------------------------------------------------------------------------- curves
def colours_in(figure, panel, run):
    """How many pixels of a panel have exactly the colour of a run, and the faint one."""
    legend = figure.height - PANEL_HEIGHT // 2 * math.ceil(panel[1] / 2)
    width, height = PANEL // 2, PANEL_HEIGHT // 2
    left, top = panel[0] % 2 * width, legend + panel[0] // 2 * height
    pixels = np.asarray(figure)[top:top + height, left:left + width]
    colour = np.array(RUN_COLOURS[run])
    faint = 255 - (255 - colour) * 3 // 10
    return (pixels == colour).all(2).sum(), (pixels == faint).all(2).sum()


def test_curves_of_two_runs(trained, tmp_path, texts):
    """A panel a key, the steps whole numbers; the other run has but loss, loss_c and lr."""
    write_log(tmp_path / "byol", [{"step": 20, "lr": 0.1, "loss": 4.0, "loss_c": 4.0,
                                   "std_c": math.nan}])
    figure = draw("--curves", trained, tmp_path / "byol", "--out", tmp_path / "c.png")
    assert figure.size == (PANEL, 12 + 2 * 20 + 5 * PANEL_HEIGHT // 2)
    for panel, name in enumerate(visualize.CURVES):
        assert colours_in(figure, (panel, 9), 0)[0] > 20
        assert (colours_in(figure, (panel, 9), 1)[0] > 0) == (name in ("loss", "loss_c", "lr"))
    words = [text for _, _, _, text in texts]
    assert words[:2] == [str(trained), str(tmp_path / "byol")]
    titles = [word for word in words if word.split(":")[0] in visualize.CURVES]
    assert titles == list(visualize.CURVES.values())
    for steps in ("step 0", "5", "10", "15", "20", "25", "30", "35", "40"):
        assert words.count(steps) >= 8
    check_legible(texts)


def test_points_of_curves_lie_where_axes_say(tmp_path):
    """Step 10 of 40 at loss 8, the top of the axis, step 40 at loss 2."""
    write_log(tmp_path / "run", [{"step": 10, "loss": 8.0}, {"step": 40, "loss": 2.0}])
    figure = draw("--curves", tmp_path / "run", "--out", tmp_path / "c.png")
    left, right = LEFT / 2, (PANEL - RIGHT) / 2
    top = 12 + 20 + ABOVE / 2
    bottom = 12 + 20 + (PANEL_HEIGHT - BELOW) / 2
    assert figure.getpixel((left + (right - left) * 10 / 40, top)) == RUN_COLOURS[0]
    assert figure.getpixel((right, bottom)) == RUN_COLOURS[0]  # the axis goes from 2 to 8
    assert figure.getpixel((left + (right - left) * 25 / 40, (top + bottom) / 2)) == RUN_COLOURS[0]


def test_noisy_curves_are_running_means_over_faint_lines(tmp_path):
    lines = []
    for line in training_lines(200, noise=1.0):
        lines += [line, {"step": line["step"], "knn": 50 + line["loss"]},
                  {"step": line["step"], "rankme": 99.0}]
    write_log(tmp_path / "run", lines)
    figure = draw("--curves", tmp_path / "run", "--out", tmp_path / "c.png")
    names = list(visualize.CURVES)
    for name in ("loss", "loss_c"):
        mean, faint = colours_in(figure, (names.index(name), 9), 0)
        assert mean > 300 and faint > 1000
    for name in ("knn", "lr"):  # as they are
        mean, faint = colours_in(figure, (names.index(name), 9), 0)
        assert mean > 300 and faint == 0
    # The noise is drawn, faintly, all over the height that the mean leaves free.
    raw, _ = colours_in(figure, (names.index("knn"), 9), 0)
    assert raw > 5 * colours_in(figure, (names.index("loss"), 9), 0)[0]


@pytest.mark.parametrize("last_step", [1, 7, 100000, 1000000])
def test_labels_of_short_and_long_runs_are_legible(last_step, tmp_path, texts):
    write_log(tmp_path / "run", [{"step": 0, "knn": 61.25}, {"step": last_step, "loss": 1.0}])
    draw("--curves", tmp_path / "run", "--out", tmp_path / "c.png")
    check_legible(texts)
    labels = [text for _, _, _, text in texts if text.replace(",", "").isdigit()]
    assert f"{last_step:,}" in labels and "0" not in labels  # 0.2 of a step would read so


def test_knn_alone_is_a_log(tmp_path):
    write_log(tmp_path / "run", [{"step": 0, "epoch": 0, "knn": 63.6, "std_c": math.nan}])
    curves = visualize.read_log(tmp_path / "run")
    assert curves.pop("knn") == [(0, 63.6)] and not any(curves.values())
    figure = draw("--curves", tmp_path / "run", "--out", tmp_path / "c.png")
    assert figure.height == 12 + 20 + PANEL_HEIGHT // 2
    assert colours_in(figure, (0, 1), 0)[0] > 10


# -------------------------------------------------------------------------------- errors, structure
@pytest.mark.parametrize("flags, match", [
    ("", "either --pretrained"), ("--pretrained random --curves runs", "either --pretrained"),
    ("--pretrained random --image-size 50", "multiple of 32"),
    ("--pretrained random --image-size 0", "--image-size: 0: must be"),
    ("--pretrained random --query 0.5 2", "--query: 2: must be"),
    ("--pretrained random --query nan 0", "--query: nan: must be"),
    ("--pretrained random --samples -1", "--samples: -1: must be"),
    ("--pretrained random --samples 1001", "there are 1000"),
    ("--pretrained random --samples 1 --images {run}", "photos have no masks"),
    ("--pretrained random --limit 0", "--limit: 0: must be"),
    ("--pretrained random --seed -1", "--seed: -1: must be"),
    ("--pretrained random --out a.jpg", ".png"),
    ("--pretrained random --out {run}/log.png", "a run's log"),
    ("--pretrained random --out {run}/encoder.pth/a.png", "encoder.pth"),
    ("--pretrained random --target class", "--classifier"),
    ("--pretrained random --class 1", "--class"), ("--pretrained random --layer conv3", "conv3"),
    ("--pretrained random --t-stream", "has no transformer"),
    ("--pretrained {run}/encoder.pth --t-stream", "has no transformer"),
    ("--pretrained {run}/no.pth", "no.pth"),
    ("--pretrained {run}/encoder.pth --arch resnet50", "resnet50"),
    ("--pretrained {run}/log.jsonl", "log.jsonl"),
    ("--pretrained random --target class --classifier {run}/classifier.pth", "not a classifier"),
    ("--pretrained {run}/encoder.pth --target class --classifier {run}/encoder.pth",
     "not a classifier"),
    ("--pretrained {run}/encoder.pth --target class --classifier {run}/classifier.pth --class 4",
     "0 to 3"),
    ("--pretrained {run}/encoder.pth --target class --classifier {run}/classifier.pth --class -1",
     "--class/--label: -1: must be"),
    ("--pretrained {run}/encoder.pth {run}/encoder.pth --target class --classifier "
     "{run}/classifier.pth", "one --cl"),
    ("--pretrained random --images {run}/no.png", "no.png"),
    ("--pretrained random --images {run}/log.jsonl", "image"),
    ("--pretrained random --images {run}", "no images"),
    ("--curves {run}/no", "no"), ("--curves {run}/encoder.pth", "not a log"),
    ("--curves {empty}", "no logged steps"),
])
def test_a_users_mistake_is_one_line(flags, match, trained, tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text('{"args": {}}\n[1, 2]\n{"step": 3, "loss": [1, 2]}\n')
    flags = flags.format(run=trained, empty=tmp_path).split()
    if "resnet50" not in flags:
        flags = ["--arch", "thin", *flags]
    if "--out" not in flags:
        flags += ["--out", str(tmp_path / "a.png")]
    with pytest.raises(SystemExit) as caught:
        visualize.main(flags)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and match in error, error
    assert not (tmp_path / "a.png").exists()


def test_byol_has_no_t_stream(tmp_path, capsys):
    settings = {"arch": "thin", "image_size": 64, "method": "byol", "hidden_dim": 16}
    state = {"model": CARE(**settings).state_dict(), "model_args": settings}
    torch.save(state, tmp_path / "last.pth")
    with pytest.raises(SystemExit):
        visualize.main(["--pretrained", str(tmp_path / "last.pth"), "--t-stream"])
    assert "has no transformer" in capsys.readouterr().err


@pytest.mark.parametrize("module, name", [
    (drawing, "overlay"), (visualize, "draw_row"), (visualize, "draw_panel"),
    (visualize, "measure"),
])
def test_a_slip_in_drawing_is_a_traceback(module, name, trained, tmp_path, monkeypatch):
    def slip(*args, **kwargs):
        np.zeros(2) + np.zeros(3)

    monkeypatch.setattr(module, name, slip)
    flags = ["--curves", trained] if name == "draw_panel" else [
        "--pretrained", "random", "--arch", "thin", "--image-size", 32, "--samples", 1]
    with pytest.raises(ValueError, match="broadcast"):
        draw(*flags, "--limit", 1, "--out", tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()  # nor where only the scores are missing


def test_visualize_imports_nothing_above_it():
    tree = ast.parse(Path(visualize.__file__).read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {name.name for name in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    scripts = {path.stem for path in Path(visualize.__file__).parent.glob("*.py")}
    assert imported & scripts == {"care"}
    assert {name for name in imported if name.startswith("common")} == {
        f"common.{name}" for name in ("data", "draw", "ranks", "run", "views", "weights")}


def test_scores_and_folders_say_of_which_images_they_are(tmp_path, capsys):
    draw("--pretrained", "random", "--arch", "thin", "--image-size", 32, "--samples", 2,
         "--images", "clutter", "--out", tmp_path / "a.png")
    result = json.loads((tmp_path / "a.jsonl").read_text())
    assert result["data_digest"] == "clutter 1"
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    capsys.readouterr()
    draw("--pretrained", "random", "--arch", "thin", "--image-size", 32, "--images", tmp_path,
         "--out", tmp_path / "c.png")
    assert f"note: 2 images in {tmp_path} (passed over: 1 .jsonl)" in capsys.readouterr().err


def test_no_photo_is_replaced_by_its_figure(tmp_path, capsys):
    photos = images(tmp_path / "photos", 2)
    for source in (photos, photos / "000.png"):
        refused(capsys, "--pretrained", "random", "--images", source, "--out", photos / "000.png",
                match="is one of the images that would be drawn", script=visualize)
