"""Figures: what encoders attend to (the paper's Figure 4), and the curves of training runs.

  python visualize.py --pretrained byol.pth care.pth --images photos/ --out attention.png
  python visualize.py --pretrained random runs/demo/encoder.pth --arch resnet18 --images shapes   with scores
  python visualize.py --pretrained runs/demo/last.pth --t-stream --query 0.5 0.5 --images photo.jpg
  python visualize.py --curves runs/demo runs/demo_byol --out curves.png

Grad-CAM of a score s at a feature map A (Selvaraju et al., ICCV 2017, https://arxiv.org/abs/1610.02391):
  weight(c) = sum over y, x of ds / dA(c, y, x)      map(y, x) = relu(sum over c of weight(c) A(c, y, x))
paper: the gradient's mean. here: its sum, so a score w.z, z = pool(A), is the map's mean before the relu.
--target similarity: s = z.z' / |z| with |z| and z', the normalised z of the mirrored image, held fixed, so
  map(y, x) = relu(A(y, x).z' / |z|). Its mean before the relu is the cosine of the two, so that maps of
  different encoders compare. (The gradient of the cosine itself would give maps that sum to zero.)
--target class: s = score of the predicted class, or of --class N, by a classifier of linear_eval.py.
T-stream: the softmax of CARE's Eq. (2) at a query, averaged over heads, times the number of positions, so
  that 1 is uniform attention.
"""
import json
import math
from itertools import cycle, repeat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from tqdm import tqdm

from care import ARCHS, CARE, InputError, check_state, load_checkpoint, pool
from data import normalize, open_images
from train import fail, new_parser, open_encoder, user_errors, write_whole

CELL, GAP, BAR, TOP = 160, 8, 60, 22  # pixels: longer side of an image, between images, colour bar, titles
ANCHORS = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # black to yellow
CHANNELS = [np.interp(np.linspace(0, 4, 256), range(5), channel) for channel in zip(*ANCHORS)]
COLOURS = np.stack(CHANNELS, axis=1).astype(np.uint8)  # (256, 3), ever lighter
RUN_COLOURS = ((31, 105, 180), (230, 110, 0), (30, 140, 60), (190, 40, 50), (120, 80, 170))
CURVES = ("loss", "loss_c", "loss_t", "loss_att", "std_c", "std_t", "lr")


def parse_args(argv=None):
    """The command line as a namespace; a mistake in it is one line on stderr and exit code 2."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--pretrained", nargs="+", metavar="FILE|random", help="encoder files of any known layout, or random")
    add("--arch", choices=ARCHS, help="read off the file unless given (random: default resnet50)")
    add("--stem", choices=("imagenet", "cifar"), help="read off the file unless given (random: imagenet)")
    add("--seed", type=int, default=0, help="initial weights of random (default 0)")
    add("--images", nargs="+", default=["shapes"], metavar="DIR|FILE|shapes", help="default: five shapes")
    add("--image-size", type=int, default=224, metavar="PX", help="side of the square to which images are "
        "squeezed for the encoder, and at which shapes are rendered (default 224)")
    add("--layer", choices=("conv4", "conv5"), default="conv5", help="feature map A (default conv5)")
    add("--target", choices=("similarity", "class"), default="similarity", help="score (default similarity)")
    add("--classifier", nargs="+", default=[], metavar="FILE", help="of linear_eval.py, one per encoder")
    add("--class", type=int, dest="label", metavar="N", help="index of the class (default: the predicted)")
    add("--t-stream", action="store_true", help="add the transformer's attention per block (needs last.pth)")
    add("--query", type=float, nargs=2, default=(0.5, 0.5), metavar=("Y", "X"), help="whose attention is "
        "drawn, as parts of height and width, 0 to 1 (default the centre)")
    add("--samples", type=int, default=500, help="validation images scored on shapes; 0: none (default 500)")
    add("--curves", nargs="+", metavar="RUN", help="instead: draw log.jsonl of these run directories")
    add("--out", metavar="PNG", help="default attention.png or curves.png; scores beside it, as .jsonl")
    args = parser.parse_args(argv)
    args.out = Path(args.out or ("curves.png" if args.curves else "attention.png"))
    if bool(args.curves) == bool(args.pretrained):
        fail("give either --pretrained, encoders to look at, or --curves, runs to draw")
    if args.out.suffix.lower() != ".png" or args.out.stem == "log":
        fail(f"--out {args.out}: must end in .png, but not be log.png, whose scores would take a run's log")
    if not 0 <= args.samples <= 1000 or not all(0 <= part <= 1 for part in args.query):
        fail("--samples must lie between 0 and 1000, both numbers of --query between 0 and 1")
    classifiers = len(args.pretrained or ()) if args.target == "class" else 0
    if len(args.classifier) != classifiers or (args.label is not None and not classifiers):
        fail("--target class needs one --classifier per encoder; no other takes --classifier or --class")
    return args


# ----------------------------------------------------------------------------------------- reading
def load(args, path, classifier):
    """An encoder with its title and sha256, its head and classes (--target class), its model (--t-stream)."""
    name = Path(path).parent.name if Path(path).stem in ("encoder", "last") else Path(path).stem
    one = SimpleNamespace(path=path, title=name or path, head=None, model=None)
    one.encoder, one.sha256 = open_encoder(path, args.arch, args.stem, args.seed)
    if args.image_size < 1 or args.image_size % one.encoder.stride:
        raise InputError(f"--image-size {args.image_size}: {path} needs a multiple of {one.encoder.stride}")
    if classifier:
        saved = load_checkpoint(classifier)
        if not isinstance(saved, dict) or not one.sha256 or saved.get("sha256") != one.sha256:
            raise InputError(f"{classifier}: not a classifier that linear_eval.py trained on this {path}")
        one.classes, count = saved["classes"], len(saved["classes"])
        norm = [nn.BatchNorm1d(count)] if saved["head"] == "linear-bn" else []
        one.head = nn.Sequential(nn.Linear(one.encoder.dim5, count), *norm)
        check_state(classifier, saved["state"], one.head.state_dict())
        one.head.load_state_dict(saved["state"])
        if not 0 <= (args.label or 0) < count:
            raise InputError(f"--class {args.label}: {classifier} knows the classes 0 to {count - 1}")
    if args.t_stream:
        saved = {} if path == "random" else load_checkpoint(path)
        settings = saved.get("model_args", {"method": "byol"})
        if settings["method"] == "byol":
            raise InputError(f"--t-stream: {path} has no transformer; give last.pth of a run with a T-stream")
        one.model, one.model_size = CARE(**settings), settings["image_size"]
        check_state(path, saved["model"], one.model.state_dict())
        one.model.load_state_dict(saved["model"])
    for module in filter(None, (one.encoder, one.head, one.model)):
        module.eval().requires_grad_(False).to(args.device)
    return one


def read_image(path):
    """An image file of any mode as viewers show it, RGB: EXIF turned, on white where clear. Or ValueError."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits, which PIL would cut off at 255
            image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # a decoder may raise anything on broken bytes
        raise InputError(f"{path}: cannot be read as an image ({error})") from None


def find_images(args):
    """The images to draw, one after the other."""
    if args.images == ["shapes"]:
        source = open_images("shapes", "val", size=args.image_size)
        yield from (source[i][0] for i in range(5))
        return
    for path in args.images:
        samples = open_images(path, "pretrain").samples if Path(path).is_dir() else [(path, -1)]
        yield from (read_image(file) for file, _ in samples)


def read_log(run):
    """The logged steps of a run directory or log.jsonl, dicts; ValueError if there are none."""
    path = Path(run) / "log.jsonl" if Path(run).is_dir() else Path(run)
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        steps = [line for line in lines if isinstance(line.get("loss"), float) and "step" in line]
    except ValueError as error:
        raise InputError(f"{path}: not a log of train.py ({error})") from None
    if not steps:
        raise InputError(f"{path}: no logged steps of train.py in it")
    return steps


# -------------------------------------------------------------------------------------------- maps
def to_input(image, size, device):
    """A PIL image squeezed to `size`, an int or (height, width) -> normalised (1, 3, height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    return normalize(TF.pil_to_tensor(image.resize((width, height), Image.BILINEAR))[None].to(device))


def gradcam(encoder, x, layer, head=None, label=None):
    """Images (B, 3, height, width) -> maps (B, H, W), 0 or more, and the classes explained, (B,) or None.

    Without `head`: of the similarity to the mirrored image; else of class `label`, None: the predicted one.
    """
    at, classes = ("conv4", "conv5").index(layer), None
    A = encoder(x)[at].detach().requires_grad_()
    z = pool(A)  # (B, C)
    if head is None:
        mirrored = F.normalize(pool(encoder(x.flip(3))[at]), dim=1).detach()  # z' (B, C)
        score = (z * mirrored).sum(1) / z.detach().norm(dim=1).clamp_min(1e-12)  # (B,)
    else:
        scores = head(z if layer == "conv5" else pool(encoder.layer4(A)))  # (B, classes)
        classes = scores.argmax(1) if label is None else torch.full_like(scores.argmax(1), label)
        score = scores.gather(1, classes[:, None])  # (B, 1)
    weights = torch.autograd.grad(score.sum(), A)[0].sum((2, 3), keepdim=True)  # (B, C, 1, 1)
    return F.relu((weights * A.detach()).sum(1)), classes  # (B, H, W), (B,)


def attention_maps(model, x, query):
    """Attention of the position `query` (y, x, 0 to 1) in each block: list of (B, H, W), each with mean 1."""
    maps = []

    def keep(module, inputs):
        q, k, _ = module.qkv(inputs[0])
        H, W = inputs[0].shape[2:]
        token = min(int(query[0] * H), H - 1) * W + min(int(query[1] * W), W - 1)
        maps.append(module.attention(q, k).mean(1)[:, token].unflatten(1, (H, W)) * (H * W))

    hooks = [block.attention.register_forward_pre_hook(keep) for block in model.online.transformer]
    model.online(x)
    for hook in hooks:
        hook.remove()
    return maps


def measure(heat, mask):
    """A map (H, W) against an object's mask (H, W), bool -> pointing, energy, area, each 0 to 1.

    pointing: the maximum is inside (of several equal ones, the share that is); energy: share of the map's sum
    inside; area: the object's share of the image, the chance level. A map of zeros counts as uniform.
    """
    heat = heat if heat.any() else np.ones_like(heat)
    return mask[heat == heat.max()].mean(), heat[mask].sum() / heat.sum(), mask.mean()


def score(args, encoders):
    """`measure` in percent, averaged over the first --samples validation shapes: one dict per encoder."""
    source, sums = open_images("shapes", "val", size=args.image_size), np.zeros((len(encoders), 3))
    for i in tqdm(range(args.samples), desc="scores", leave=False, disable=None):
        image, _, _, mask = source.render(i)
        x = to_input(Image.fromarray(image), args.image_size, args.device)
        for row, one in zip(sums, encoders):
            heat, _ = gradcam(one.encoder, x, args.layer, one.head, args.label)
            heat = F.interpolate(heat[None], mask.shape, mode="bilinear")[0, 0]  # (height, width)
            row += measure(heat.double().cpu().numpy(), mask)
    return [{"encoder": one.path, "sha256": one.sha256, "arch": one.encoder.arch, "data": "shapes",
             **{name: getattr(args, name) for name in ("image_size", "layer", "target", "samples")},
             **dict(zip(("pointing", "energy", "area"), (100 * row / args.samples).tolist()))}
            for one, row in zip(encoders, sums)]


# ----------------------------------------------------------------------------------------- drawing
def overlay(image, heat, top):
    """A map (H, W), bilinearly over all of an RGB image, in colours from 0 to `top` -> RGB image."""
    heat = F.interpolate(heat[None, None], image.size[::-1], mode="bilinear")[0, 0].cpu()  # (height, width)
    level = (255 * heat / max(top, 1e-12)).round().clamp(0, 255).long()
    return Image.blend(image.convert("L").convert("RGB"), Image.fromarray(COLOURS[level.numpy()]), 0.6)


def draw_row(image, groups, query=None):
    """An image, then groups of (title, map (H, W)); a group's maps share one scale, whose bar ends it."""
    size = [max(1, round(CELL * side / max(image.size))) for side in image.size]
    image, panels = image.resize(size, Image.BICUBIC), 1 + sum(map(len, groups))
    width, height = GAP + panels * (CELL + GAP) + len(groups) * BAR, TOP + max(size[1], 40) + GAP
    row = Image.new("RGB", (width, height), "white")
    draw, font, x = ImageDraw.Draw(row), ImageFont.load_default(size=14), CELL + 2 * GAP
    row.paste(image, (GAP, TOP))
    draw.text((GAP, 2), "image", "black", font)
    if query:
        draw.circle((GAP + query[1] * (size[0] - 1), TOP + query[0] * (size[1] - 1)), 5, "red", "white", 2)
    for group in groups:
        top = max(float(heat.max()) for _, heat in group)
        for title, heat in group:
            row.paste(overlay(image, heat, top), (x, TOP))
            draw.text((x, 2), title[:22], "black", font)
            x += CELL + GAP
        row.paste(Image.fromarray(COLOURS[::-1, None]).resize((12, height - TOP - GAP)), (x, TOP))
        draw.text((x + 16, TOP), f"{top:.3g}", "black", font)
        draw.text((x + 16, height - GAP), "0", "black", font, anchor="ls")
        x += BAR
    return row


def draw_attention(args, encoders):
    """A row per image: the image, each encoder's Grad-CAM, and with --t-stream each block's attention."""
    rows = []
    for image in find_images(args):
        x, maps, attention = to_input(image, args.image_size, args.device), [], []
        for one in encoders:
            heat, label = gradcam(one.encoder, x, args.layer, one.head, args.label)
            maps.append((one.title if label is None else f"{one.title}: {one.classes[label]}", heat[0]))
            if one.model:
                blocks = attention_maps(one.model, to_input(image, one.model_size, args.device), args.query)
                attention += [(f"{one.title}: block {n}", heat[0]) for n, heat in enumerate(blocks, 1)]
        rows.append(draw_row(image, [maps, attention] if attention else [maps], attention and args.query))
    return Image.fromarray(np.concatenate([np.asarray(row) for row in rows]))


def draw_curves(runs):
    """A legend, then a panel of 720 x 180 pixels for each of CURVES that any of these runs logged."""
    logs = [read_log(run) for run in runs]
    names = [name for name in CURVES if any(name in log[0] for log in logs)]
    last, top = max(log[-1]["step"] for log in logs), 18 * len(runs) + 4
    figure, font = Image.new("RGB", (720, top + 180 * len(names)), "white"), ImageFont.load_default(size=13)
    draw = ImageDraw.Draw(figure)
    for i, (run, colour) in enumerate(zip(runs, cycle(RUN_COLOURS))):
        draw.rectangle((80, 18 * i + 9, 104, 18 * i + 13), colour)
        draw.text((112, 18 * i + 3), run, "black", font)
    for name, axis in zip(names, range(top + 150, figure.height, 180)):
        curves = [[(line["step"], line[name]) for line in log if math.isfinite(line.get(name, math.nan))]
                  for log in logs]
        values = [value for curve in curves for _, value in curve] + [0.0] * name.startswith(("std", "lr"))
        low, high = min(values), max(values)
        scale = 120 / max(high - low, 1e-12)
        place = lambda step, value: (80 + step / last * 620, axis - (value - low) * scale)
        for step, value in zip(np.linspace(0, last, 5), np.linspace(low, high, 5)):
            x, y = place(step, value)
            draw.line((80, y, 700, y), "lightgray")
            draw.text((74, y), f"{value:.3g}", "black", font, anchor="rm")
            draw.text((x, axis + 4), f"{step:g}" if step else "step 0", "black", font, anchor="ma")
        draw.line((80, axis - 120, 80, axis, 700, axis), "black")
        draw.text((80, axis - 144), name, "black", font)
        for colour, curve in zip(cycle(RUN_COLOURS), curves):
            for point in curve[:1] + curve[-1:]:
                draw.circle(place(*point), 2, colour)
            draw.line([place(*point) for point in curve], colour, 2)
    return figure


def main(argv=None):
    args = parse_args(argv)
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with user_errors():
        args.out.parent.mkdir(parents=True, exist_ok=True)
        encoders = [load(args, *pair) for pair in zip(args.pretrained or (), args.classifier or repeat(None))]
        figure = draw_curves(args.curves) if args.curves else draw_attention(args, encoders)
        write_whole(args.out, lambda file: figure.save(file, "PNG", optimize=True))
        print(f"{args.out}: {figure.width} x {figure.height} pixels")
        if args.images == ["shapes"] and args.samples and not args.curves:
            text = "".join(json.dumps(row) + "\n" for row in score(args, encoders))
            write_whole(args.out.with_suffix(".jsonl"), lambda file: file.write(text.encode()))
            print(text, end="")


if __name__ == "__main__":
    main()
