"""Figures: what encoders attend to (the paper's Figure 4), and the curves of training runs.

  python visualize.py --pretrained byol.pth care.pth --images photos/ --out attention.png
  python visualize.py --pretrained random runs/demo/encoder.pth --arch resnet18 --images shapes   with scores
  python visualize.py --pretrained runs/demo/last.pth --t-stream --query 0.5 0.5 --images photo.jpg
  python visualize.py --curves runs/demo runs/demo_byol --out curves.png

Grad-CAM of a score s at a feature map A (Selvaraju et al., ICCV 2017, https://arxiv.org/abs/1610.02391, Eq. 1, 2):
  weight(c) = sum over y, x of ds / dA(c, y, x)        map(y, x) = relu(sum over c of weight(c) A(c, y, x))
paper: the gradient's mean. here: its sum, so that a score w.z of the pooled z = pool(A) is the mean before the relu.
--target similarity: s = z.z' / |z| with |z| and z', the normalised pooled feature of the mirrored image, held fixed:
  map(y, x) = relu(A(y, x).z' / |z|). Its mean before the relu is the cosine of the two, so maps compare across
  encoders; the gradient of the cosine itself, multiplied with A, would sum to zero over the map.
--target class: s = the score of the predicted class, or of --class N, by a classifier of linear_eval.py.
T-stream: the softmax of CARE's Eq. (2) at a query, averaged over heads, times the positions: 1 is uniform.
"""
import hashlib
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

from care import ARCHS, CARE, Encoder, check_state, load_checkpoint, load_encoder, pool
from data import ImageFiles, normalize, open_images
from train import fail, new_parser, user_errors, write_whole

CELL, GAP, BAR, TOP = 192, 8, 60, 22  # pixels: a drawn image's longer side, between images, colour bar, titles
ANCHORS = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # black to yellow, ever lighter
COLOURS = np.stack([np.interp(np.linspace(0, 4, 256), range(5), part) for part in zip(*ANCHORS)], 1).astype(np.uint8)
LINES = ((31, 105, 180), (230, 110, 0), (30, 140, 60), (190, 40, 50), (120, 80, 170))  # colours of runs
CURVES = ("loss", "loss_c", "loss_t", "loss_att", "std_c", "std_t", "lr")


def parse_args(argv=None):
    """The command line as a namespace; a mistake in it is one line on stderr and exit code 2."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--pretrained", nargs="+", metavar="FILE|random", help="encoders, a column each: encoder.pth or last.pth, the "
        "authors' checkpoint, a torchvision or MoCo state dict, or random")
    add("--arch", choices=ARCHS, help="read off the file unless given (random: default resnet50)")
    add("--stem", choices=("imagenet", "cifar"), help="read off the file unless given (random: default imagenet)")
    add("--seed", type=int, default=0, help="initial weights of random (default 0)")
    add("--images", nargs="+", default=["shapes"], metavar="DIR|FILE|shapes", help="a row each (default: five shapes)")
    add("--image-size", type=int, default=224, metavar="PX", help="side of the encoder's input, to which images are "
        "squeezed and at which shapes are rendered; a multiple of 32, of 8 with stem cifar (default 224)")
    add("--layer", choices=("conv4", "conv5"), default="conv5", help="feature map A (default conv5)")
    add("--target", choices=("similarity", "class"), default="similarity", help="the score s (default similarity)")
    add("--classifier", nargs="+", metavar="FILE", help="classifier.pth of linear_eval.py, one per encoder")
    add("--class", type=int, dest="label", metavar="N", help="index of the class (default: the predicted one)")
    add("--t-stream", action="store_true", help="add the transformer's attention, block by block (needs last.pth)")
    add("--query", type=float, nargs=2, default=(0.5, 0.5), metavar=("Y", "X"), help="position whose attention is "
        "drawn, as parts of height and width, 0 to 1 (default the centre)")
    add("--samples", type=int, default=500, help="validation images scored on shapes; 0: none (default 500)")
    add("--curves", nargs="+", metavar="RUN", help="instead: draw log.jsonl of these run directories")
    add("--out", metavar="PNG", help="default attention.png or curves.png; scores beside it, as .jsonl")
    args = parser.parse_args(argv)
    args.out = Path(args.out or ("curves.png" if args.curves else "attention.png"))
    classifiers = len(args.classifier or ())
    if bool(args.curves) == bool(args.pretrained):
        fail("give either --pretrained, encoders to look at, or --curves, runs to draw")
    if args.out.suffix.lower() != ".png" or args.out.is_dir():
        fail(f"--out {args.out}: must be the name of a .png file")
    if not 0 <= args.samples <= 1000 or not all(0 <= part <= 1 for part in args.query):
        fail("--samples must lie between 0 and 1000, and both numbers of --query between 0 and 1")
    if "shapes" in args.images and len(args.images) > 1:
        fail("--images shapes stands alone (a folder of that name: ./shapes)")
    if classifiers != (len(args.pretrained or ()) if args.target == "class" else 0):
        fail(f"--classifier: {classifiers} files; --target class needs one per encoder, no other target takes any")
    if args.label is not None and args.target != "class":
        fail("--class N goes with --target class")
    return args


# ------------------------------------------------------------------------------------------- reading
def load(args, path, classifier, device):
    """An encoder with its title and sha256; its head and classes (--target class), its model (--t-stream)."""
    name = Path(path).parent.name if Path(path).stem in ("encoder", "last") else Path(path).stem
    one = SimpleNamespace(path=path, title=name or path, sha256=None, head=None, model=None)
    if path == "random":
        torch.manual_seed(args.seed)
        one.encoder = Encoder(args.arch or "resnet50", args.stem or "imagenet")
    else:
        one.encoder = load_encoder(path, args.arch, args.stem)
        one.sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if args.image_size < 1 or args.image_size % one.encoder.stride:
        raise ValueError(f"--image-size {args.image_size}: must be a multiple of {one.encoder.stride} for {path}")
    if classifier:
        saved = load_checkpoint(classifier)
        if not isinstance(saved, dict) or saved.get("sha256", "") != one.sha256:
            raise ValueError(f"{classifier}: not a classifier that linear_eval.py trained on this {path}")
        one.classes, count = saved["classes"], len(saved["classes"])
        norm = [nn.BatchNorm1d(count)] if saved["head"] == "linear-bn" else []
        one.head = nn.Sequential(nn.Linear(one.encoder.dim5, count), *norm)
        check_state(classifier, saved["state"], one.head.state_dict())
        one.head.load_state_dict(saved["state"])
        if not 0 <= (args.label or 0) < count:
            raise ValueError(f"--class {args.label}: {classifier} knows the classes 0 to {count - 1}")
    if args.t_stream:
        saved = load_checkpoint(path) if path != "random" else None
        settings = saved.get("model_args") if isinstance(saved, dict) else None
        if not settings or settings["method"] == "byol":
            raise ValueError(f"--t-stream: {path} has no transformer; give last.pth of a run with a T-stream")
        one.model, one.model_size = CARE(**settings), settings["image_size"]
        check_state(path, saved["model"], one.model.state_dict())
        one.model.load_state_dict(saved["model"])
    for module in filter(None, (one.encoder, one.head, one.model)):
        module.eval().requires_grad_(False).to(device)
    return one


def read_image(path):
    """An image file of any mode as a viewer shows it, RGB: EXIF turned, transparency on white; or ValueError."""
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
        raise ValueError(f"{path}: cannot be read as an image ({error})") from None


def find_images(args):
    """The images to draw, one after the other."""
    if args.images == ["shapes"]:
        source = open_images("shapes", "val", size=args.image_size)
        yield from (source[i][0] for i in range(5))
        return
    for path in args.images:
        yield from map(read_image, [file for file, _ in ImageFiles(path).samples] if Path(path).is_dir() else [path])


def to_input(image, size, device):
    """A PIL image squeezed to `size`, an int or (height, width) -> normalised (1, 3, height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    return normalize(TF.pil_to_tensor(image.resize((width, height), Image.BILINEAR))[None].to(device))


# ---------------------------------------------------------------------------------------------- maps
def gradcam(encoder, x, layer, head=None, label=None):
    """Images (B, 3, height, width) -> maps (B, H, W), 0 or more, and the classes explained, (B,) or None.

    Without `head` the score is the similarity to the mirrored image; with it that of class `label`, or the predicted.
    """
    at = ("conv4", "conv5").index(layer)
    A, classes = encoder(x)[at].detach().requires_grad_(), None
    z = pool(A)  # (B, C)
    if head is None:
        mirrored = F.normalize(pool(encoder(x.flip(3))[at]).detach(), dim=1)  # z' (B, C)
        score = (z * mirrored).sum(1) / z.detach().norm(dim=1).clamp_min(1e-12)  # (B,)
    else:
        scores = head(z if layer == "conv5" else pool(encoder.layer4(A)))  # (B, classes)
        classes = scores.argmax(1) if label is None else torch.full_like(scores.argmax(1), label)
        score = scores.gather(1, classes[:, None])[:, 0]  # (B,)
    weights = torch.autograd.grad(score.sum(), A)[0].sum((2, 3), keepdim=True)  # Grad-CAM's Eq. (1) (B, C, 1, 1)
    return F.relu((weights * A.detach()).sum(1)), classes  # Grad-CAM's Eq. (2) (B, H, W)


def attention_maps(model, x, query):
    """Attention of the position `query` (y, x, 0 to 1) in each block: list of (B, H, W), each with mean 1."""
    maps = []

    def keep(module, inputs):
        q, k, _ = module.qkv(inputs[0])
        H, W = inputs[0].shape[2:]
        position = min(int(query[0] * H), H - 1) * W + min(int(query[1] * W), W - 1)
        maps.append(module.attention(q, k).mean(1)[:, position].unflatten(1, (H, W)) * (H * W))

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


def score(args, encoders, device):
    """`measure` in percent over the first --samples validation shapes: one dict per encoder."""
    source, sums = open_images("shapes", "val", size=args.image_size), np.zeros((len(encoders), 3))
    for i in tqdm(range(args.samples), desc="scores", leave=False, disable=None):
        image, _, _, mask = source.render(i)
        x = to_input(Image.fromarray(image), args.image_size, device)
        for row, one in zip(sums, encoders):
            heat = gradcam(one.encoder, x, args.layer, one.head, args.label)[0][None]
            heat = F.interpolate(heat, mask.shape, mode="bilinear")[0, 0]  # (height, width)
            row += measure(heat.double().cpu().numpy(), mask)
    return [{"encoder": one.path, "sha256": one.sha256, "arch": one.encoder.arch, "data": "shapes",
             "samples": args.samples, "image_size": args.image_size, "layer": args.layer, "target": args.target,
             **dict(zip(("pointing", "energy", "area"), (100 * row / args.samples).tolist()))}
            for one, row in zip(encoders, sums)]


# ------------------------------------------------------------------------------------------- drawing
def overlay(image, heat, top):
    """A map (H, W), bilinearly over all of an RGB image, in colours from 0 to `top` -> RGB image."""
    heat = F.interpolate(heat[None, None], image.size[::-1], mode="bilinear")[0, 0].cpu()  # (height, width)
    level = (255 * heat / max(top, 1e-12)).round().clamp(0, 255).long()
    return Image.blend(image.convert("L").convert("RGB"), Image.fromarray(COLOURS[level.numpy()]), 0.6)


def draw_row(image, groups, query=None):
    """An image, then groups of (title, map (H, W)); a group's maps share one scale, drawn as a bar after them."""
    image = image.resize([max(1, round(CELL * side / max(image.size))) for side in image.size], Image.BICUBIC)
    panels, (width, height) = 1 + sum(map(len, groups)), image.size
    row = Image.new("RGB", (panels * (CELL + GAP) + len(groups) * BAR, TOP + max(height, 40)), "white")
    draw, font, x = ImageDraw.Draw(row), ImageFont.load_default(size=14), CELL + GAP
    row.paste(image, (0, TOP))
    draw.text((0, 2), "image", "black", font)
    if query:
        y, left = TOP + query[0] * (height - 1), query[1] * (width - 1)
        draw.ellipse((left - 5, y - 5, left + 5, y + 5), outline="white", fill="red", width=2)
    for group in groups:
        top = max(float(heat.max()) for _, heat in group)
        for title, heat in group:
            row.paste(overlay(image, heat, top), (x, TOP))
            draw.text((x, 2), title[:25], "black", font)
            x += CELL + GAP
        row.paste(Image.fromarray(COLOURS[::-1, None].repeat(12, 1)).resize((12, row.height - TOP)), (x, TOP))
        draw.text((x + 16, TOP), f"{top:.3g}", "black", font)
        draw.text((x + 16, row.height - 2), "0", "black", font, anchor="ls")
        x += BAR
    return row


def stack(pictures, columns=1):
    """Pictures of one width in rows of `columns`, on white."""
    rows = [pictures[i:i + columns] for i in range(0, len(pictures), columns)]
    heights = [max(picture.height for picture in row) + GAP for row in rows]
    figure = Image.new("RGB", (pictures[0].width * columns, sum(heights)), "white")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            figure.paste(picture, (j * picture.width, sum(heights[:i])))
    return figure


def draw_attention(args, encoders, device):
    """A row per image: the image, each encoder's Grad-CAM, with --t-stream each block's attention."""
    rows = []
    for image in find_images(args):
        x, groups = to_input(image, args.image_size, device), [[]]
        for one in encoders:
            heat, label = gradcam(one.encoder, x, args.layer, one.head, args.label)
            groups[0].append((one.title if label is None else f"{one.title}: {one.classes[label]}", heat[0]))
        if args.t_stream:
            groups.append([(f"{one.title}: block {i}, {len(heat[0])} rows", heat[0]) for one in encoders for i, heat in
                           enumerate(attention_maps(one.model, to_input(image, one.model_size, device), args.query), 1)])
        rows.append(draw_row(image, groups, args.query if args.t_stream else None))
    return stack(rows)
