"""Figures: what encoders attend to (Figure 4), and the curves of training runs.

  python visualize.py --pretrained byol.pth care.pth --images photos/
  python visualize.py --pretrained random runs/clutter/encoder.pth \\
      --arch resnet18 --layer conv4
  python visualize.py --pretrained runs/clutter/last.pth --t-stream \\
      --query 0.5 0.5 --images a.jpg
  python visualize.py --curves runs/shapes runs/shapes_byol --out curves.png

The objects of the rendered sets, shapes and clutter, have masks: with
--samples N the maps of N images are scored too.

Grad-CAM of a score s at a feature map A (Selvaraju et al., ICCV 2017,
arxiv.org/abs/1610.02391):
  weight(c) = sum over y, x of ds / dA(c, y, x)
  map(y, x) = relu(sum over c of weight(c) A(c, y, x))
paper: the gradient's mean. here: its sum, so that a score w.z, z = pool(A), is
the map's mean before the relu.
--target similarity: s = z.z' / |z| with |z| and z', the normalised z of the
  mirrored image, held fixed, so map(y, x) = relu(A(y, x).z' / |z|). Its mean
  before the relu is the cosine of the two, so that maps of different encoders
  compare. (The gradient of the cosine itself would give maps that sum to zero.)
--target class: s = score of the predicted class, or of --class N, by
  linear_eval.py's classifier.
T-stream: the softmax of CARE's Eq. (2) at a query, averaged over heads, times
  the number of positions, so that 1 is uniform attention.
"""
import json
import math
import sys
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from tqdm import tqdm

from care import ARCHS, CARE, STEMS, TAPS, InputError, pool
from common.data import ImageFiles, describe, open_images, read_image, recipe_of
from common.draw import (CELL, LEFT, LEGEND, PANEL, PANEL_HEIGHT, RUN_COLOURS, draw_panel, draw_row,
                         printable)
from common.ranks import fail, user_errors
from common.run import (as_bytes, count, fraction, natural, new_parser, not_empty, read_lines,
                        write_whole)
from common.views import imagenet_normalize
from common.weights import (check_state, checkpoint_file, load_checkpoint, open_encoder,
                            sha256_of)

PROTOCOL_VERSION = 2  # raised when the same arguments compute other scores, or more of them

CURVES = {  # key in log.jsonl -> title of its panel
    "knn": "knn: top-1 accuracy of kNN on val, %",
    "rankme": "rankme: effective rank of the features",
    "loss": "loss: loss_c + loss_t + lambda loss_att",
    "loss_c": "loss_c: C-stream, Eq. (1), both view orders",
    "loss_t": "loss_t: T-stream, Eq. (3), both view orders",
    "loss_att": "loss_att: attention, Eq. (4), both view orders",
    "std_c": "std_c: C-stream's spread, 0 is collapse",
    "std_t": "std_t: T-stream's spread, 0 is collapse",
    "lr": "lr: learning rate",
}


def parse_args(argv=None):
    """The command line as a namespace; a mistake in it is one line on stderr and exit code 2."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--pretrained", nargs="+", type=checkpoint_file, metavar="FILE|random",
        help="encoders, in any known layout")
    add("--arch", choices=ARCHS, metavar="ARCH",
        help=f"encoder: {', '.join(ARCHS)} (default: read off the file; random: resnet50)")
    add("--stem", choices=STEMS,
        help="first layers, cifar for small images (default: read off the file; random: imagenet)")
    add("--seed", type=natural, default=0, help="initial weights of random (default 0)")
    add("--images", type=not_empty, nargs="+", default=["clutter"], metavar="PATH|NAME",
        help="photos and folders of photos, or the val images of a rendered set, shapes or clutter "
             "(default clutter)")
    add("--limit", type=count, metavar="N",
        help="draw the first N (default 16; 5 of a rendered set)")
    add("--image-size", type=count, metavar="PX",
        help="side of the square to which photos are squeezed for the encoder, and at which "
             "images are rendered (default: the encoders' in training, by the log.jsonl beside "
             "them; without one that of the rendered set's recipe, for photos 224)")
    add("--layer", choices=TAPS, default="conv5", help="feature map A of Grad-CAM (default conv5)")
    add("--target", choices=("similarity", "class"), default="similarity",
        help="score s of Grad-CAM (default similarity)")
    add("--classifier", type=not_empty, nargs="+", default=[], metavar="FILE",
        help="classifier.pth of linear_eval.py, one per encoder")
    add("--class", "--label", dest="label", type=natural, metavar="N",
        help="class that is explained, by its number (default: the predicted)")
    add("--t-stream", action="store_true", help="add each block's attention (needs last.pth)")
    add("--query", type=fraction, nargs=2, default=(0.5, 0.5), metavar=("Y", "X"),
        help="whose attention is drawn, as parts of height and width (default the centre)")
    add("--samples", type=natural, default=0, metavar="N",
        help="score the maps of N images of a rendered set too (default 0)")
    add("--curves", type=not_empty, nargs="+", metavar="RUN",
        help="instead: draw log.jsonl of run directories")
    add("--out", type=not_empty, metavar="PNG",
        help="default attention.png or curves.png; scores go beside it, as .jsonl")
    args = parser.parse_args(argv)
    args.out = Path(args.out or ("curves.png" if args.curves else "attention.png"))
    args.rendered = args.images[0] if args.images in (["shapes"], ["clutter"]) else None
    args.limit = args.limit or (5 if args.rendered else 16)
    args.protocol_version = PROTOCOL_VERSION
    if bool(args.curves) == bool(args.pretrained):
        fail("give either --pretrained, encoders to look at, or --curves, runs to draw")
    if args.out.suffix.lower() != ".png" or args.out.stem == "log":
        fail(f"--out {args.out}: must end in .png, and log.png would overwrite a run's log")
    out = args.out.resolve()
    if out.exists() and {out, *out.parents} & {Path(path).resolve() for path in args.images}:
        fail(f"--out {args.out}: is one of the images that would be drawn")
    wanted = len(args.pretrained or ()) if args.target == "class" else 0
    if len(args.classifier) != wanted or (args.label is not None and not wanted):
        fail("--target class needs one --classifier per encoder; no other takes it, nor --class")
    if args.samples and not args.rendered:
        fail("--samples: photos have no masks to score with; give --images clutter or shapes")
    return args


# ---------------------------------------------------------------------------------------- reading
def usual_size(args):
    """The image size without --image-size. InputError where the encoders' sizes in training differ.

    It stands in the log of the run that an encoder is of. Of two sides, the longer one.
    """
    sizes = {}
    for path in args.pretrained:
        log = Path(path).parent / "log.jsonl"
        if path != "random" and log.is_file():
            settings = next(iter(read_lines(log)), {}).get("args", {})
            if "image_size" in settings:
                sizes[path] = max(settings["image_size"])
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{path} {size} px" for path, size in sizes.items())
        raise InputError(f"trained at different sizes, {found}: give --image-size")
    if sizes:
        return next(iter(sizes.values()))
    return recipe_of(args.rendered)["image_size"] if args.rendered else 224


def load(args, path, classifier):
    """An encoder with path, title, sha256, and if asked for head, classes, model, model_size."""
    one = SimpleNamespace(path=path, title=title_of(path), classifier=classifier, head=None,
                          model=None)
    one.encoder = open_encoder(path, args.arch, args.stem, args.seed)
    if one.encoder.left_out:
        print(f"note: {path}: left out {', '.join(one.encoder.left_out)}", file=sys.stderr)
    one.sha256 = sha256_of(one.encoder)
    if args.image_size % one.encoder.stride:
        raise InputError(f"--image-size {args.image_size}: {path} needs a multiple of "
                         f"{one.encoder.stride}")
    if args.layer == "conv5" and args.image_size == one.encoder.stride:
        print(f"note: {path}: at {args.image_size} px conv5 is a single position, its map the same "
              "everywhere: --layer conv4 or a larger --image-size shows more", file=sys.stderr)
    if classifier:
        one.head, one.classes = load_classifier(classifier, one)
        if args.label is not None and args.label >= len(one.classes):
            raise InputError(f"--class: {classifier} knows 0 to {len(one.classes) - 1}")
    if args.t_stream:
        one.model, one.model_size = load_model(path)
    for module in (one.encoder, one.head, one.model):
        if module is not None:
            module.eval().requires_grad_(False).to(args.device)
    return one


def title_of(path):
    """The run's name for its encoder.pth or last.pth, else the file's, without its ending."""
    name = Path(path).parent.name if Path(path).stem in ("encoder", "last") else ""
    return printable(name or Path(path).stem)


def load_classifier(path, one):
    """-> a classifier that linear_eval.py trained on this encoder, and the names of its classes."""
    saved = load_checkpoint(path)
    if not isinstance(saved, dict) or saved.get("sha256") != one.sha256:
        raise InputError(f"{path}: not a classifier that linear_eval.py trained on this {one.path}")
    classes = saved["classes"]
    head = nn.Sequential(nn.Linear(one.encoder.dim5, len(classes)))
    if saved["head"] == "linear-bn":
        head.append(nn.BatchNorm1d(len(classes)))
    check_state(path, saved["state"], head.state_dict())
    head.load_state_dict(saved["state"])
    return head, classes


def load_model(path):
    """-> the whole CARE in a last.pth, and its images' size in pixels. InputError for BYOL."""
    saved = {} if path == "random" else load_checkpoint(path)
    settings = saved.get("model_args", {"method": "byol"})
    if settings["method"] == "byol":
        raise InputError(f"--t-stream: {path} has no transformer; give a last.pth that has one")
    model = CARE(**settings)
    check_state(path, saved["model"], model.state_dict())
    model.load_state_dict(saved["model"])
    return model, settings["image_size"]


def find_images(args, source):
    """The first --limit images, one after the other: title, image, and the same image to look at.

    source: a rendered set; then the image has the encoders' size, and the one to look at more
    pixels.
    """
    large = source and open_images(args.rendered, "val", size=CELL)
    files = []
    for path in args.images:
        if source is None and Path(path).is_dir():
            photos = ImageFiles(path)
            if photos.passed_over:
                print(f"note: {describe(photos)}", file=sys.stderr)
            files += [photos.path(index) for index in range(len(photos))]
        else:
            files.append(path)
    found = files if source is None else range(len(source))
    if len(found) > args.limit:
        print(f"note: drawn are the first {args.limit} of {len(found):,} images (--limit)",
              file=sys.stderr)
    for item in found[:args.limit]:
        if source is None:
            image = read_image(item, upright=True)
            yield printable(Path(item).stem), image, image
        else:
            image, label, _, _ = source.render(item)
            yield source.classes[label], Image.fromarray(image), large[item][0]


def read_log(run):
    """The curves in a run directory or log.jsonl: (step, value) by key. InputError if none."""
    path = Path(run) / "log.jsonl" if Path(run).is_dir() else Path(run)
    lines = [line for line in read_lines(path) if "step" in line]
    curves = {name: [] for name in CURVES}
    for line in lines:
        for name in CURVES:
            value = line.get(name)
            if isinstance(value, (int, float)) and math.isfinite(value):
                curves[name].append((line["step"], value))
    if not any(curves.values()):
        raise InputError(f"{path}: not a log, or no logged steps of train.py in it")
    return curves


# ------------------------------------------------------------------------------------------- maps
def to_input(image, size, device):
    """A PIL image squeezed to `size`, an int or (height, width) -> (1, 3, height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    pixels = TF.pil_to_tensor(image.resize((width, height), Image.BILINEAR))
    return imagenet_normalize(pixels[None].to(device))  # (1, 3, height, width)


def gradcam(encoder, x, layer, head=None, label=None):
    """Images (B, 3, height, width) -> maps (B, H, W), 0 or more, and the classes explained, (B,).

    Without `head`: of the similarity to the mirrored image, and the classes are None; else of class
    `label`, None: the predicted one.
    """
    at = ("conv4", "conv5").index(layer)
    A = encoder(x)[at].detach().requires_grad_()  # (B, C, H, W)
    z = pool(A)  # (B, C)
    if head is None:
        classes = None
        mirrored = F.normalize(pool(encoder(x.flip(3))[at]), dim=1).detach()  # z' (B, C)
        score = (z * mirrored).sum(1) / z.detach().norm(dim=1).clamp_min(1e-12)  # (B,)
    else:
        scores = head(z if layer == "conv5" else pool(encoder.layer4(A)))  # (B, classes)
        classes = scores.argmax(1)
        if label is not None:
            classes = torch.full_like(classes, label)
        score = scores.gather(1, classes[:, None])  # (B, 1)
    gradient, = torch.autograd.grad(score.sum(), A)  # (B, C, H, W)
    weights = gradient.sum((2, 3), keepdim=True)  # (B, C, 1, 1)
    return F.relu((weights * A.detach()).sum(1)), classes  # (B, H, W), (B,)


def attention_maps(model, x, query):
    """Attention of the position `query` (y, x, 0 to 1) in each block: list of (B, H, W), mean 1."""
    maps = []

    def keep(module, inputs):
        q, k, _ = module.qkv(inputs[0])
        H, W = inputs[0].shape[2:]
        row = min(int(query[0] * H), H - 1)
        column = min(int(query[1] * W), W - 1)
        attention = module.attention(q, k).mean(1)  # (B, N, N)
        heat = attention[:, row * W + column] * (H * W)  # (B, N)
        maps.append(heat.unflatten(1, (H, W)))  # (B, H, W)

    hooks = []
    for block in model.online.transformer:
        hooks.append(block.attention.register_forward_pre_hook(keep))
    model.online(x)
    for hook in hooks:
        hook.remove()
    return maps


def measure(heat, mask):
    """A map (H, W) against an object's mask (H, W), bool -> pointing, energy, area, each 0 to 1.

    pointing: the maximum is inside (of several equal ones, the share that is); energy: share of the
    map's sum inside; area: the object's share of the image, chance for energy. A map of zeros
    counts as uniform.
    """
    if not heat.any():
        heat = np.ones_like(heat)
    pointing = mask[heat == heat.max()].mean()
    energy = heat[mask].sum() / heat.sum()
    return np.array([pointing, energy, mask.mean()])


@cache
def peaks(grid, shape):
    """Where an enlarged map is largest, by the position of its maximum: (H * W, height * width).

    grid: (H, W); shape: (height, width). A row has equal weights, of sum 1, on these pixels: in a
    corner of the map a whole patch, else the few in the middle of the position.
    """
    H, W = grid
    maps = torch.eye(H * W).view(H * W, 1, H, W)
    maps = F.interpolate(maps, shape, mode="bilinear").flatten(1)  # (H * W, height * width)
    largest = maps == maps.amax(1, keepdim=True)
    return (largest / largest.sum(1, keepdim=True)).double().numpy()


def score(args, source, encoders):
    """`measure` in percent, mean of a rendered set's first --samples images: a dict per encoder.

    pointing_chance: pointing if the maximum were anywhere in the map, each position as often;
    pointing_fixed: if it were at the same position in all images, the best one for them.
    """
    sums, positions = [np.zeros(3) for _ in encoders], [0 for _ in encoders]
    for index in tqdm(range(args.samples), desc="scores", leave=False, disable=None):
        image, _, _, mask = source.render(index)
        x = to_input(Image.fromarray(image), args.image_size, args.device)
        for number, one in enumerate(encoders):
            heat, _ = gradcam(one.encoder, x, args.layer, one.head, args.label)  # (1, H, W)
            positions[number] += peaks(heat.shape[1:], mask.shape) @ mask.ravel()  # (H * W,)
            heat = F.interpolate(heat[None], mask.shape, mode="bilinear")[0, 0]  # (height, width)
            sums[number] += measure(heat.double().cpu().numpy(), mask)
    settings = ("image_size", "layer", "target", "label", "samples", "seed", "protocol_version")
    protocol = {"data": args.rendered, "data_digest": source.digest, "precision": "fp32"}
    protocol |= {name: getattr(args, name) for name in settings}
    results = []
    for one, total, anywhere in zip(encoders, sums, positions):
        pointing, energy, area = (100 * total / args.samples).tolist()
        anywhere = 100 * anywhere / args.samples  # (H * W,)
        results.append({"encoder": one.path, "sha256": one.sha256, "arch": one.encoder.arch,
                        "stem": one.encoder.stem, "classifier": one.classifier, **protocol,
                        "pointing": pointing, "energy": energy, "area": area,
                        "pointing_chance": anywhere.mean(), "pointing_fixed": anywhere.max()})
    return results


# ---------------------------------------------------------------------------------------- drawing
def draw_attention(args, source, encoders):
    """A row per image: itself, each encoder's Grad-CAM, with --t-stream each block's attention."""
    rows = []
    for title, image, shown in find_images(args, source):
        x = to_input(image, args.image_size, args.device)
        maps, blocks = [], []
        for one in encoders:
            heat, label = gradcam(one.encoder, x, args.layer, one.head, args.label)
            map_title = one.title if label is None else f"{one.title}: {one.classes[label]}"
            maps.append((map_title, heat[0]))
            if one.model:
                own_x = to_input(image, one.model_size, args.device)
                for number, heat in enumerate(attention_maps(one.model, own_x, args.query), 1):
                    blocks.append((f"{one.title}: block {number}", heat[0]))
        groups = [maps, blocks] if blocks else [maps]
        rows.append(draw_row(title, shown, groups, args.query if blocks else None))
    return Image.fromarray(np.concatenate([np.asarray(row) for row in rows]))


def draw_curves(runs):
    """A legend, then a panel for each of CURVES that any of these runs logged, two in a row."""
    logs = [read_log(run) for run in runs]
    names = [name for name in CURVES if any(log[name] for log in logs)]
    ends = [log[name][-1][0] for log in logs for name in names if log[name]]
    panels_top = LEGEND * len(runs) + 24
    height = panels_top + math.ceil(len(names) / 2) * PANEL_HEIGHT
    figure = Image.new("RGB", (2 * PANEL, height), "white")
    draw = ImageDraw.Draw(figure)
    font = ImageFont.load_default(size=28)
    for number, run in enumerate(runs):
        y = 16 + LEGEND * number + LEGEND // 2
        colour = RUN_COLOURS[number % len(RUN_COLOURS)]
        draw.rectangle((LEFT, y - 4, LEFT + 48, y + 3), colour)
        draw.text((LEFT + 64, y), printable(run), "black", font, anchor="lm")
    for number, name in enumerate(names):
        row, column = divmod(number, 2)
        corner = column * PANEL, panels_top + row * PANEL_HEIGHT
        curves = [log[name] for log in logs]
        draw_panel(draw, corner, name, CURVES[name], curves, max(1, *ends))
    return figure.reduce(2)


# ------------------------------------------------------------------------------------------- main
def main(argv=None):
    args = parse_args(argv)
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False  # float32 throughout, as --precision fp32
    source, encoders = None, []
    with user_errors():
        args.out.parent.mkdir(parents=True, exist_ok=True)
        if args.curves:
            figure = draw_curves(args.curves)
        else:
            args.image_size = args.image_size or usual_size(args)
            if args.rendered:
                source = open_images(args.rendered, "val", size=args.image_size)
                if args.samples > len(source):
                    raise InputError(f"--samples {args.samples}: there are {len(source)} images")
            for path, classifier in zip_longest(args.pretrained, args.classifier):
                encoders.append(load(args, path, classifier))
            figure = draw_attention(args, source, encoders)
        text = ""
        if source is not None and args.samples:
            text = "".join(json.dumps(result) + "\n" for result in score(args, source, encoders))
            write_whole(args.out.with_suffix(".jsonl"), text.encode())
        # last: who finds it finds the scores too
        write_whole(args.out, as_bytes(partial(figure.save, format="PNG", optimize=True)))
        print(f"{args.out}: {figure.width} x {figure.height} pixels")
        print(text, end="")


if __name__ == "__main__":
    main()
