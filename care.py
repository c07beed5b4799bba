"""CARE in one file: the two streams, their losses, the momentum update.

"Revitalizing CNN Attention via Transformers in Self-Supervised Visual Representation Learning",
Ge, Liang, Song, Jiao, Wang and Luo, NeurIPS 2021, https://arxiv.org/abs/2110.05340

                 online branch (gradients)               momentum branch (moving average)
  C  x1 -> encoder -> projector_c -> predictor_c -> f1 <-L_c-> f2 <- projector_c <- encoder <- x2
              |                                     ^          ^                       |
            conv4                                 L_att      L_att                   conv4
              v                                     v          v                       v
  T    transformer -> projector_t -> predictor_t -> f3 <-L_t-> f4 <- projector_t <- transformer

  equation  what                                       function                symbol  name
  (1), (3)  L_c, L_t: 2 - 2 cos                        similarity_loss         f1, f3  online
  (2)       softmax((q.k^T + q.p^T) / sqrt(d)).v       MultiHeadSelfAttention  f2, f4  momentum
  (4)       L_att: C-stream against T-stream           attention_loss          lambda  lambda_att
  (5)       L_c + L_t + lambda L_att                   CARE.forward            n       blocks
  Sec. 4.1  1 - (1 - tau_base)(cos(pi t / T) + 1) / 2  tau_at                  t       step

  model = CARE("resnet50")                         # x1, x2: two views, (B, 3, 224, 224), normalised
  for x, y in ((x1, x2), (x2, x1)):                # a step's loss is the sum over both view orders
      model(x, y)["loss"].backward()               # one after the other: half the activations alive
  optimizer.step()
  model.update_momentum(tau_at(step + 1, total_steps))
  torch.save(model.online.encoder.state_dict(), "encoder.pth")  # what is kept

Shapes: B batch, C channels, H W feature grid, N = H*W tokens, h heads, d head width.
"""
import copy
import math

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

ARCHS = {  # the paper's encoders (Tables 1-3), and two small ones
    "resnet18": models.resnet18, "resnet34": models.resnet34, "resnet50": models.resnet50,
    "resnet50w2": models.wide_resnet50_2,  # the paper's ResNet-50(2x): 68.9M parameters
    "resnet101": models.resnet101, "resnet152": models.resnet152,
}
STEMS = ("imagenet", "cifar")
METHODS = ("care", "sequential", "byol")
POSITIONS = ("none", "sincos", "absolute", "relative")
TAPS = ("conv4", "conv5")
ATT_LOSSES = ("mse", "norm")


class InputError(ValueError):
    """A user's mistake in one line: what is wrong, what to do. Raised by deliberate checks only."""


def check_choice(name, value, choices):
    """InputError unless `value` is one of `choices`."""
    if value not in tuple(choices):
        raise InputError(f"{name} {value!r} is none of {', '.join(choices)}")


# ---------------------------------------------------------------------------------------- encoder
class Encoder(nn.Module):
    """A torchvision ResNet without its classifier; the state dict has torchvision's own keys.

    `stem="cifar"` replaces the 7x7 stride-2 convolution and the max-pooling by one 3x3 stride-1
    convolution. Attributes: arch, stem, dim4 and dim5 (widths of conv4, conv5), stride (of conv5).
    """

    def __init__(self, arch="resnet50", stem="imagenet"):
        super().__init__()
        check_choice("arch", arch, ARCHS)
        check_choice("stem", stem, STEMS)
        net = ARCHS[arch](weights=None)  # Kaiming-normal (fan out), every batch-norm weight 1
        self.arch, self.stem = arch, stem
        self.dim4, self.dim5 = net.layer4[0].conv1.in_channels, net.fc.in_features
        self.stride = 32 if stem == "imagenet" else 8
        if stem == "cifar":
            net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
            net.maxpool = nn.Identity()
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            self.add_module(name, getattr(net, name))

    def forward(self, x):
        """Images (B, 3, height, width) -> conv4 (B, dim4, H, W), conv5 (B, dim5, H/2, W/2)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))  # (B, 64, 4H, 4W)
        conv4 = self.layer3(self.layer2(self.layer1(x)))
        conv5 = self.layer4(conv4)
        return conv4, conv5  # (B, dim4, H, W), (B, dim5, H/2, W/2)


def pool(feature_map):
    """Global average: (B, C, H, W) -> (B, C)."""
    return feature_map.mean((2, 3))  # (B, C)


def to_maps(output):
    """What an encoder returned (a map, or a tuple, list or dict of maps) -> list, conv5 last."""
    if isinstance(output, torch.Tensor):
        return [output]
    return list(output.values() if isinstance(output, dict) else output)


def map_shapes(encoder, height, width):
    """Shapes (C, H, W) of the maps of images of that many pixels: of conv5, or of conv4 and conv5.

    Read off a forward pass on zeros by a copy in eval mode, so that the encoder stays as it is.
    InputError when the encoder gives anything but one or two maps.
    """
    first = next((module for module in encoder.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        raise InputError("the encoder has no Conv2d to tell how many channels its images have")
    zeros = first.weight.new_zeros(2, first.in_channels, height, width)
    with torch.no_grad(), torch.random.fork_rng([zeros.device] if zeros.is_cuda else []):
        maps = to_maps(copy.deepcopy(encoder).eval()(zeros))
    shapes = [tuple(getattr(feature_map, "shape", ())) for feature_map in maps]
    if len(shapes) not in (1, 2) or any(len(shape) != 4 for shape in shapes):
        raise InputError(f"the encoder gives shapes {shapes}: return one or two maps (B, C, H, W)")
    (_, _, h4, w4), (_, _, h5, w5) = shapes[0], shapes[-1]
    if h4 < h5 or w4 < w5:
        raise InputError(f"the encoder gives shapes {shapes}: return conv4 before conv5")
    return [shape[1:] for shape in shapes]


# ------------------------------------------------------------------------------------ transformer
class PositionEncoding(nn.Module):
    """The position logits q.p^T of Eq. (2), one table for all heads. InputError for another kind.

    kind (Table 8): `none`; `sincos` (fixed: half the channels encode y, half x); `absolute`
    (learnable, height[y] + width[x]); `relative` (learnable, a vector per row and column offset).
    Learnable tables start as N(0, 1/d). size: the grid (H, W). dim: d, a multiple of 4.
    """

    def __init__(self, kind, size, dim):
        super().__init__()
        check_choice("position", kind, POSITIONS)
        self.kind, self.size = kind, size
        H, W = size
        if kind == "sincos":
            half = dim // 2
            height = F.pad(sincos_table(H, half), (0, half))  # (H, d), zero in the half of x
            width = F.pad(sincos_table(W, half), (half, 0))  # (W, d), zero in the half of y
            self.register_buffer("height", height, persistent=False)
            self.register_buffer("width", width, persistent=False)
        elif kind == "absolute":
            self.height = nn.Parameter(torch.randn(H, dim) * dim ** -0.5)
            self.width = nn.Parameter(torch.randn(W, dim) * dim ** -0.5)
        elif kind == "relative":
            self.rel_height = nn.Parameter(torch.randn(2 * H - 1, dim) * dim ** -0.5)
            self.rel_width = nn.Parameter(torch.randn(2 * W - 1, dim) * dim ** -0.5)

    def forward(self, q):
        """Queries (B, h, N, d) -> q.p^T (B, h, N, N)."""
        if self.kind == "none":
            return q.new_zeros(*q.shape[:3], q.shape[2])  # (B, h, N, N)
        if self.kind == "relative":
            return self.relative_logits(q)  # (B, h, N, N)
        return inner_products(q, self.key_table())  # (B, h, N, N)

    def key_table(self):
        """`sincos` and `absolute`, where p depends on the key's place alone: p, (N, d)."""
        table = self.height[:, None] + self.width  # (H, W, d)
        return table.flatten(0, 1)  # (N, d)

    def relative_logits(self, q):
        """`relative`: q.(rel_height[y' - y + H - 1] + rel_width[x' - x + W - 1]), key (y', x')."""
        H, W = self.size
        # unfold slides a window of H rows along the table: window i is rows i to i + H - 1. Query
        # row y needs rows H - 1 - y to 2H - 2 - y: window H - 1 - y, hence the flip. A stack of
        # slices says the same and is 2 to 7 % slower. The gradients of an index are added up in
        # no fixed order, and a resumed run has to be exact.
        height = self.rel_height.unfold(0, H, 1).flip(0)  # (H, d, H): of y, channel, y'
        width = self.rel_width.unfold(0, W, 1).flip(0)  # (W, d, W): of x, channel, x'
        q = q.unflatten(2, (H, W))  # (B, h, H, W, d)
        if H > 1:
            rows = torch.einsum("bhyxd,ydz->bhyxz", q, height)  # (B, h, H, W, H): z is y'
        else:
            rows = inner_products(q, self.rel_height)  # (B, h, 1, W, 1)
        if W > 1:
            columns = torch.einsum("bhyxd,xdz->bhyxz", q, width)  # (B, h, H, W, W): z is x'
        else:
            columns = inner_products(q, self.rel_width)  # (B, h, H, 1, 1)
        logits = rows.unsqueeze(5) + columns.unsqueeze(4)  # (B, h, H, W, H, W)
        return logits.flatten(4, 5).flatten(2, 3)  # (B, h, N, N)


def inner_products(q, k):
    """q.k^T: (..., M, d) and (..., N, d) -> (..., M, N).

    For a single k without a matmul, whose gradient has an inner dimension of 1: torch compiles a
    kernel for that on the spot, which needs a C compiler on a machine with a GPU.
    """
    if k.shape[-2] == 1:
        return (q * k).sum(-1, keepdim=True)  # (..., M, 1)
    return q @ k.transpose(-2, -1)  # (..., M, N)


def sincos_table(length, dim):
    """Sines, then cosines of positions 0 to length - 1 at dim / 2 frequencies: (length, dim)."""
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2) / dim)  # (dim/2,)
    angles = torch.arange(length)[:, None] * frequencies  # (length, dim/2)
    return torch.cat((angles.sin(), angles.cos()), 1)  # (length, dim)


class MultiHeadSelfAttention(nn.Module):
    """softmax((q.k^T + q.p^T) / sqrt(d)).v over a map of grid `size`, Eq. (2) and Fig. 3, right."""

    def __init__(self, dim, heads, size, position):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1, bias=False)  # w_q, w_k, w_v; each head-major
        self.position = PositionEncoding(position, size, dim // heads)

    def qkv(self, x):
        """(B, C, H, W) -> q, k, v, each (B, h, N, d)."""
        q, k, v = self.to_qkv(x).flatten(2).transpose(1, 2).chunk(3, dim=2)  # (B, N, C) each
        q = q.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, h, N, d)
        k = k.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, h, N, d)
        v = v.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, h, N, d)
        return q, k, v

    def attention(self, q, k):
        """Queries and keys (B, h, N, d) -> attention weights (B, h, N, N); every row sums to 1."""
        q = q / math.sqrt(q.shape[-1])  # before the products: smaller numbers in half precision
        logits = inner_products(q, k) + self.position(q)  # (B, h, N, N)
        return logits.softmax(3)  # Eq. (2) without v (B, h, N, N)

    def fused(self, q, k, v):
        """Faster attention(q, k) @ v, except for `relative`: q.k^T + q.p^T = q.(k + p)^T."""
        if self.position.kind != "none":
            k = k + self.position.key_table()  # (B, h, N, d)
        return F.scaled_dot_product_attention(q, k, v)  # (B, h, N, d)

    def forward(self, x):
        """(B, C, H, W) -> (B, C, H, W)."""
        q, k, v = self.qkv(x)
        if self.position.kind != "relative":  # equal: test_fused_attention_is_the_plain_form
            out = self.fused(q, k, v)  # Eq. (2) (B, h, N, d)
        elif v.shape[2] > 1:
            out = self.attention(q, k) @ v  # Eq. (2) (B, h, N, d)
        else:  # a single token has the weight 1: no matmul, as in inner_products
            out = self.attention(q, k).to(v.dtype) * v  # Eq. (2) (B, h, 1, d)
        out = out.transpose(1, 2).flatten(2)  # (B, N, C)
        return out.transpose(1, 2).unflatten(2, x.shape[2:])  # (B, C, H, W)


class AttentionBlock(nn.Module):
    """1x1 -> self-attention -> 1x1, added to the input, ReLU (Fig. 3, left), with batch norms.

    size: the grid (H, W) it reads. `downsample` halves it; without, dim_in must be dim_out.
    """

    def __init__(self, dim_in, dim_out, heads, size, position, downsample):
        super().__init__()
        dim = math.ceil(dim_out / 4 / (4 * heads)) * (4 * heads)  # a quarter, heads of 4, 8, ...
        self.mlp1 = nn.Conv2d(dim_in, dim, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(dim)
        self.attention = MultiHeadSelfAttention(dim, heads, size, position)
        self.pool = nn.AvgPool2d(2) if downsample else nn.Identity()
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp2 = nn.Conv2d(dim, dim_out, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(dim_out)
        self.shortcut = nn.Identity()
        if downsample:
            conv = nn.Conv2d(dim_in, dim_out, 3, stride=2, padding=1, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(dim_out), nn.ReLU(inplace=True))

    def forward(self, x):
        """(B, dim_in, H, W) -> (B, dim_out, H, W), or (B, dim_out, H/2, W/2) when downsampling."""
        out = F.relu(self.norm1(self.mlp1(x)), inplace=True)
        out = F.relu(self.norm2(self.pool(self.attention(out))), inplace=True)
        out = self.norm3(self.mlp2(out)) + self.shortcut(x)
        return F.relu(out, inplace=True)  # (B, dim_out, H, W) or (B, dim_out, H/2, W/2)


class Transformer(nn.Sequential):
    """n attention blocks (Sec. 3.2) on a map of grid `size`; `downsample`: the first halves it."""

    def __init__(self, n, dim_in, dim_out, heads, size, position, downsample):
        blocks = [AttentionBlock(dim_in, dim_out, heads, size, position, downsample=downsample)]
        if downsample:
            size = (size[0] // 2, size[1] // 2)
        for _ in range(n - 1):
            blocks.append(AttentionBlock(dim_out, dim_out, heads, size, position, downsample=False))
        super().__init__(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


# --------------------------------------------------------------------------------------- branches
def mlp_head(dim_in, hidden_dim, dim_out):
    """Projector or predictor (Sec. 4.1, as BYOL's): (B, dim_in) -> (B, dim_out)."""
    hidden = nn.Linear(dim_in, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True)
    return nn.Sequential(*hidden, nn.Linear(hidden_dim, dim_out))


class Branch(nn.Module):
    """Encoder, transformer, projectors: what momentum copies. shapes: from map_shapes(encoder)."""

    def __init__(self, encoder, shapes, method, blocks, heads, position, tap, detach_trunk,
                 hidden_dim, out_dim):
        super().__init__()
        self.method, self.tap, self.detach_trunk = method, tap, detach_trunk
        self.encoder = encoder
        width = shapes[-1][0]
        if method != "sequential":
            self.projector_c = mlp_head(width, hidden_dim, out_dim)
        if method != "byol":
            if tap == "conv4":
                check_conv4(shapes)
            tapped = shapes[0] if tap == "conv4" else shapes[-1]
            self.transformer = Transformer(
                blocks, tapped[0], width, heads=heads, size=tapped[1:], position=position,
                downsample=tap == "conv4")
            self.projector_t = mlp_head(width, hidden_dim, out_dim)

    def forward(self, x):
        """Views (B, channels, height, width) -> "c" and "t", each (B, out_dim), of its streams."""
        maps = to_maps(self.encoder(x))  # [conv4 (B, C4, H, W), conv5 (B, C5, H/2, W/2)]
        conv5 = maps[-1]
        projections = {}
        if self.method != "sequential":
            projections["c"] = self.projector_c(pool(conv5))  # (B, out_dim)
        if self.method != "byol":
            # paper: conv5 (Fig. 2). release: conv4. here: `tap`, conv4 unless asked
            tapped = maps[0] if self.tap == "conv4" else conv5
            if self.detach_trunk:  # paper: yes (Sec. 3.3). release: no. here: no unless asked
                tapped = tapped.detach()
            projections["t"] = self.projector_t(pool(self.transformer(tapped)))  # (B, out_dim)
        return projections


def check_conv4(shapes):
    """InputError unless the shapes (C, H, W) are of conv4 and of conv5 at half its grid."""
    advice = 'choose another image size, or with tap="conv5" let the transformer read conv5'
    if len(shapes) == 1:
        raise InputError(f"the encoder gives one map, {shapes[0]}, no conv4: {advice}")
    (_, h4, w4), (_, h5, w5) = shapes
    if (h4, w4) != (2 * h5, 2 * w5):
        what = "odd and so not" if h4 % 2 or w4 % 2 else "not"
        raise InputError(f"conv4 is {h4} x {w4}, {what} twice conv5's {h5} x {w5}: {advice}")


# ----------------------------------------------------------------------------------------- losses
def l2_normalize(x):
    """(B, D) -> (B, D) of length 1 over D, in float32 when autocast made it narrower."""
    narrow = x.dtype in (torch.float16, torch.bfloat16)
    return F.normalize(x.float() if narrow else x, dim=1)  # (B, D)


def similarity_loss(a, b):
    """Eq. (1) and (3): mean over the batch of 2 - 2 cos(a, b), 0 to 4; a, b (B, D) normalised."""
    return 2 - 2 * (a * b).sum(1).mean()  # ()


def attention_loss(c, t, kind="mse"):
    """One term of Eq. (4) for normalised c and t, (B, D), averaged over the batch.

    kind: `mse`, |c - t|^2 / D, or `norm`, |c - t|, whose gradient has the length 1 / B, but is 0
    where c = t. Between unrelated outputs, as at the start, |c - t| is sqrt(2).
    """
    # paper: norms, not squared. release: means of squares over B and D. here: mse unless asked
    if kind == "norm":
        return torch.linalg.vector_norm(c - t, dim=1).mean()  # ()
    return F.mse_loss(c, t)  # ()


def output_std(x):
    """Collapse meter of normalised x (B, D): mean of std over B, times sqrt(D); 0 is collapsed."""
    return x.detach().std(0).mean() * x.shape[1] ** 0.5  # ()


def tau_at(step, total_steps, tau_base=0.99):
    """Momentum coefficient at step 0 <= step <= total_steps: from tau_base up to 1 (Sec. 4.1)."""
    return 1 - (1 - tau_base) * (math.cos(math.pi * step / total_steps) + 1) / 2


# ------------------------------------------------------------------------------------------- CARE
class CARE(nn.Module):
    """Both branches, the predictors and the loss. InputError for arguments that do not fit.

    arch: one of ARCHS, or any CNN module that maps images to conv4 and conv5 (tuple, list or dict),
        or to conv5 alone where conv4 is not read. The module itself becomes the online encoder, and
        its deep copy the momentum encoder. Put the model on its device after building it.
    image_size: pixels, int or (height, width). For ARCHS multiples of 32, of 8 with stem="cifar".
    method: `care` (parallel streams), `sequential` (one, transformer on conv5), `byol` (C-stream).
    blocks: n of Table 7. heads: attention heads. position: Table 8.
    tap: the map that the transformer reads. detach_trunk: no T-stream gradients into the encoder.
    lambda_att: of Eq. (5), Table 6. att_loss: Eq. (4) by `mse` (release) or `norm` (as printed).
    hidden_dim, out_dim: of projectors and predictors. stem: of ARCHS.
    """

    def __init__(self, arch="resnet50", image_size=224, method="care", blocks=5, heads=4,
                 position="relative", tap="conv4", detach_trunk=False, lambda_att=100.0,
                 att_loss="mse", hidden_dim=4096, out_dim=256, stem="imagenet"):
        super().__init__()
        check_choice("method", method, METHODS)
        check_choice("tap", tap, TAPS)
        check_choice("att_loss", att_loss, ATT_LOSSES)
        if blocks < 1 or heads < 1:
            raise InputError(f"blocks {blocks}, heads {heads}: the transformer needs at least one")
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        encoder = arch if isinstance(arch, nn.Module) else Encoder(arch, stem)
        if encoder is arch and stem != "imagenet":
            raise InputError(f"stem {stem!r} is for the encoders of ARCHS, not for a module")
        stride = 1 if encoder is arch else encoder.stride
        if height % stride or width % stride or min(height, width) < 1:
            raise InputError(f"image size {height} x {width}: needs multiples of {stride}")
        self.method, self.lambda_att, self.att_loss = method, lambda_att, att_loss
        self.online = Branch(
            encoder, map_shapes(encoder, height, width), method, blocks=blocks, heads=heads,
            position=position, tap="conv5" if method == "sequential" else tap,
            detach_trunk=detach_trunk, hidden_dim=hidden_dim, out_dim=out_dim)
        self.momentum = copy.deepcopy(self.online).requires_grad_(False)
        if method != "sequential":
            self.predictor_c = mlp_head(out_dim, hidden_dim, out_dim)
        if method != "byol":
            self.predictor_t = mlp_head(out_dim, hidden_dim, out_dim)

    def forward(self, x_online, x_momentum):
        """One view order: two views of a batch, (B, channels, height, width) -> dict of scalars.

        loss (differentiable); of the streams loss_c, loss_t, std_c, std_t; loss_att, unscaled.
        """
        online = self.online(x_online)
        with torch.no_grad():  # in train mode on purpose: its batch norms use batch statistics
            momentum = self.momentum(x_momentum)
        out = {}
        if "c" in online:
            f1 = l2_normalize(self.predictor_c(online["c"]))  # (B, out_dim)
            f2 = l2_normalize(momentum["c"])  # (B, out_dim)
            out |= {"loss_c": similarity_loss(f1, f2), "std_c": output_std(f1)}  # Eq. (1)
        if "t" in online:
            f3 = l2_normalize(self.predictor_t(online["t"]))  # (B, out_dim)
            f4 = l2_normalize(momentum["t"])  # (B, out_dim)
            out |= {"loss_t": similarity_loss(f3, f4), "std_t": output_std(f3)}  # Eq. (3)
        if "c" in online and "t" in online:
            # The C-stream learns from the T-stream, not the reverse; the 2nd term has no gradient.
            learned = attention_loss(f1, f3.detach(), self.att_loss)
            out["loss_att"] = learned + attention_loss(f2, f4, self.att_loss)  # Eq. (4)
        loss_c, loss_t, loss_att = (out.get(name, 0) for name in ("loss_c", "loss_t", "loss_att"))
        loss = loss_c + loss_t + self.lambda_att * loss_att  # Eq. (5)
        return {"loss": loss} | {name: value.detach() for name, value in out.items()}

    @torch.no_grad()
    def update_momentum(self, tau):
        """momentum <- tau * momentum + (1 - tau) * online: parameters, no statistics."""
        momentum, online = list(self.momentum.parameters()), list(self.online.parameters())
        torch._foreach_lerp_(momentum, online, 1 - tau)
