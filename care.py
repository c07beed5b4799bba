"""CARE in one file: the two streams, their losses, and weights in and out.

"Revitalizing CNN Attention via Transformers in Self-Supervised Visual Representation Learning",
Ge, Liang, Song, Jiao, Wang and Luo, NeurIPS 2021, https://arxiv.org/abs/2110.05340

             online branch (gradients)                     momentum branch (moving average)
  C-stream   x1 -> encoder -> projector_c -> predictor_c -> f1 <-L_c-> f2 <- projector_c <- encoder <- x2
                      |                                      ^          ^                      |
                    conv4                                  L_att      L_att                  conv4
                      v                                      v          v                      v
  T-stream        transformer -> projector_t -> predictor_t -> f3 <-L_t-> f4 <- projector_t <- transformer

  equation  what                                        here                    symbol  name
  (1), (3)  L_c, L_t: 2 - 2 cos                         similarity_loss         f1, f3  online outputs
  (2)       softmax((q.k + q.p) / sqrt(d)) v            MultiHeadSelfAttention  f2, f4  momentum outputs
  (4)       L_att: C-stream towards T-stream            attention_loss          lambda  lambda_att
  (5)       L_c + L_t + lambda L_att                    CARE.forward            tau     tau, from tau_at
  Sec. 4.1  1 - (1 - tau_base) (cos(pi t / T) + 1) / 2  tau_at                  n       blocks

  model = CARE(arch="resnet50")                             # x1, x2: two views, (B, 3, 224, 224), normalised
  for x, y in ((x1, x2), (x2, x1)):                         # the step's loss is the sum over both view orders
      model(x, y)["loss"].backward()                        # one order at a time: half the activations alive
  optimizer.step()
  model.update_momentum(tau_at(step + 1, total_steps))
  save_encoder(model.online.encoder, "encoder.pth")         # what is kept after pretraining

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
    "resnet50w2": models.wide_resnet50_2,  # the paper's ResNet-50(2x): 68.9M parameters, 11.4 GFLOPs
    "resnet101": models.resnet101, "resnet152": models.resnet152,
}
METHODS = ("care", "sequential", "byol")
POSITIONS = ("none", "sincos", "absolute", "relative")
TAPS = ("conv4", "conv5")


class InputError(ValueError):
    """A mistake of the user's, in one line: what is wrong and what to do. Raised by deliberate checks only."""


# ---------------------------------------------------------------------------------------------- encoder
class Encoder(nn.Module):
    """A torchvision ResNet without its classifier; the state dict has torchvision's own keys.

    `stem="cifar"` replaces the 7x7 stride-2 convolution and the max-pooling by one 3x3 stride-1 convolution.
    Attributes: arch, stem, dim4 and dim5 (widths of conv4 and conv5), stride (of conv5).
    """

    def __init__(self, arch="resnet50", stem="imagenet"):
        super().__init__()
        for what, value, choices in (("arch", arch, ARCHS), ("stem", stem, ("imagenet", "cifar"))):
            if value not in choices:
                raise InputError(f"{what} {value!r} is none of {', '.join(choices)}")
        net = ARCHS[arch](weights=None)  # Kaiming-normal (fan out) convolutions, every batch-norm weight 1
        self.arch, self.stem, self.stride = arch, stem, 32 if stem == "imagenet" else 8
        self.dim4, self.dim5 = net.layer4[0].conv1.in_channels, net.fc.in_features
        if stem == "cifar":
            net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
            net.maxpool = nn.Identity()
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            self.add_module(name, getattr(net, name))

    def forward(self, x):
        """Images (B, 3, height, width) -> conv4 (B, dim4, H, W), conv5 (B, dim5, H/2, W/2)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        conv4 = self.layer3(self.layer2(self.layer1(x)))
        return conv4, self.layer4(conv4)


def pool(feature_map):
    """Global average: (B, C, H, W) -> (B, C)."""
    return feature_map.mean((2, 3))


# ------------------------------------------------------------------------------------------ transformer
class PositionEncoding(nn.Module):
    """The position logits q.p^T of Eq. (2); one table for all heads. ValueError for an unknown kind.

    kind (Table 8): `none`; `sincos` (fixed: half the channels encode y, half x); `absolute` (learnable,
    height[y] + width[x]); `relative` (learnable, a vector per row and column offset). Learnable: N(0, 1/d).
    """

    def __init__(self, kind, size, dim):
        super().__init__()
        if kind not in POSITIONS:
            raise InputError(f"position {kind!r} is none of {', '.join(POSITIONS)}")
        self.kind, self.size = kind, size
        for name, length, padding in (("height", size[0], (0, dim // 2)), ("width", size[1], (dim // 2, 0))):
            if kind == "sincos":
                frequency = 10000.0 ** (-torch.arange(0, dim // 2, 2) / (dim // 2))  # (d/4,)
                angle = torch.arange(length)[:, None] * frequency  # (length, d/4)
                table = F.pad(torch.cat((angle.sin(), angle.cos()), 1), padding)
                self.register_buffer(name, table, persistent=False)  # (length, d)
            elif kind == "absolute":
                setattr(self, name, nn.Parameter(torch.randn(length, dim) * dim ** -0.5))
            elif kind == "relative":
                setattr(self, f"rel_{name}", nn.Parameter(torch.randn(2 * length - 1, dim) * dim ** -0.5))

    def absolute(self):
        """p as a table (N, d) for `sincos` and `absolute`."""
        return (self.height[:, None] + self.width).flatten(0, 1)  # (H, W, d) -> (N, d)

    def forward(self, q):
        """Queries (B, h, N, d) -> q.p^T (B, h, N, N), zero for `none`."""
        if self.kind == "none":
            return q.new_zeros(())
        if self.kind != "relative":
            return q @ self.absolute().T  # (B, h, N, N)
        # Window y of the flipped view is table[H-1-y : 2H-1-y], so [y, :, y'] is the vector of offset y' - y.
        # Unlike indexing, unfold has a deterministic backward, which exact resuming needs.
        H, W = self.size
        height = self.rel_height.unfold(0, H, 1).flip(0)  # (H, d, H)
        width = self.rel_width.unfold(0, W, 1).flip(0)  # (W, d, W)
        q = q.unflatten(2, (H, W))  # (B, h, H, W, d)
        rows = torch.einsum("bhyxd,ydz->bhyxz", q, height)  # (B, h, H, W, H)
        columns = torch.einsum("bhyxd,xdz->bhyxz", q, width)  # (B, h, H, W, W)
        return (rows[..., None] + columns[..., None, :]).flatten(4).flatten(2, 3)  # (B, h, N, N)


class MultiHeadSelfAttention(nn.Module):
    """softmax((q.k^T + q.p^T) / sqrt(d)).v over all positions of a feature map, Eq. (2) and Fig. 3, right."""

    def __init__(self, dim, heads, size, position):
        super().__init__()
        if dim % (4 * heads):
            raise InputError(f"heads {heads}: {dim} attention channels do not split into multiples of 4")
        self.heads = heads
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1, bias=False)  # w_q, w_k, w_v; each head-major
        self.position = PositionEncoding(position, size, dim // heads)

    def qkv(self, x):
        """(B, C, H, W) -> q, k, v, each (B, h, N, d)."""
        qkv = self.to_qkv(x).permute(0, 2, 3, 1).flatten(1, 2)  # (B, N, 3C)
        return qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, h, N, d)

    def attention(self, q, k):
        """Queries and keys (B, h, N, d) -> attention weights (B, h, N, N); every row sums to 1."""
        logits = q @ k.transpose(-2, -1) + self.position(q)  # (B, h, N, N)
        return torch.softmax(logits / math.sqrt(q.shape[-1]), dim=-1)  # Eq. (2), the softmax

    def forward(self, x):
        """(B, C, H, W) -> (B, C, H, W)."""
        q, k, v = self.qkv(x)
        if self.position.kind == "relative":
            out = self.attention(q, k) @ v  # Eq. (2) (B, h, N, d)
        else:  # absolute encodings need no second matmul: q.k^T + q.p^T = q.(k + p)^T
            k = k if self.position.kind == "none" else k + self.position.absolute()
            out = F.scaled_dot_product_attention(q, k, v)  # Eq. (2) (B, h, N, d)
        out = out.transpose(1, 2).flatten(2)  # (B, N, C)
        return out.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)  # (B, C, H, W)


class AttentionBlock(nn.Module):
    """1x1 -> self-attention -> 1x1, added to the input, ReLU (Fig. 3, left); batch norms as in the release.

    `downsample` halves the grid `size` after the attention; without it, dim_in and dim_out must be equal.
    """

    def __init__(self, dim_in, dim_out, heads, size, position, downsample):
        super().__init__()
        dim = dim_out // 4
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
        return F.relu(self.norm3(self.mlp2(out)) + self.shortcut(x), inplace=True)


class Transformer(nn.Sequential):
    """n attention blocks (Sec. 3.2), width dim_in -> dim_out, grid `size`; `downsample`: from twice that."""

    def __init__(self, n, dim_in, dim_out, heads, size, position, downsample):
        first_size = (2 * size[0], 2 * size[1]) if downsample else size
        first = AttentionBlock(dim_in, dim_out, heads, first_size, position, downsample)
        rest = (AttentionBlock(dim_out, dim_out, heads, size, position, False) for _ in range(n - 1))
        super().__init__(first, *rest)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


# --------------------------------------------------------------------------------------------- branches
def mlp_head(dim_in, hidden_dim, dim_out):
    """Projector or predictor (Sec. 4.1, as BYOL's): (B, dim_in) -> (B, dim_out)."""
    return nn.Sequential(nn.Linear(dim_in, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True),
                         nn.Linear(hidden_dim, dim_out))


class Branch(nn.Module):
    """Encoder, transformer, projectors: what momentum copies; `byol`: no T-stream, `sequential`: only it."""

    def __init__(self, arch, stem, size, method, blocks, heads, position, tap, detach_trunk,
                 hidden_dim, out_dim):
        super().__init__()
        self.method, self.tap, self.detach_trunk = method, tap, detach_trunk
        self.encoder = Encoder(arch, stem)
        width = self.encoder.dim5
        if method != "sequential":
            self.projector_c = mlp_head(width, hidden_dim, out_dim)
        if method != "byol":
            dim_in = self.encoder.dim4 if tap == "conv4" else width
            self.transformer = Transformer(blocks, dim_in, width, heads, size, position, tap == "conv4")
            self.projector_t = mlp_head(width, hidden_dim, out_dim)

    def forward(self, x):
        """Views (B, 3, height, width) -> {"c": (B, out_dim), "t": (B, out_dim)}, the streams that exist."""
        conv4, conv5 = self.encoder(x)
        out = {}
        if self.method != "sequential":
            out["c"] = self.projector_c(pool(conv5))
        if self.method != "byol":
            x = conv4 if self.tap == "conv4" else conv5  # paper: conv5 (Fig. 2). release: conv4. here: --tap
            # paper: T-stream gradients stay in the T-stream (Sec. 3.3). release: trunk too. here: a flag
            x = x.detach() if self.detach_trunk else x
            out["t"] = self.projector_t(pool(self.transformer(x)))
        return out


# ----------------------------------------------------------------------------------------------- losses
def normalize(x):
    """l2-normalise (B, D) over D, in float32 when autocast made it narrower."""
    return F.normalize(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x, dim=1)


def similarity_loss(a, b):
    """Eq. (1) and (3): mean over the batch of 2 - 2 cos(a, b), 0 to 4, of normalised a and b (B, D)."""
    return 2 - 2 * (a * b).sum(1).mean()


def attention_loss(c, t):
    """One term of Eq. (4): mean squared difference (batch and dimensions) of normalised c and t (B, D)."""
    return F.mse_loss(c, t)


def output_std(x):
    """Collapse meter of normalised x (B, D): mean over D of std over B, times sqrt(D); 0 collapsed, 1 not."""
    return x.detach().std(0).mean() * x.shape[1] ** 0.5


def tau_at(step, total_steps, tau_base=0.99):
    """Momentum coefficient at optimiser step 0 <= step <= total_steps, from tau_base up to 1 (Sec. 4.1)."""
    return 1 - (1 - tau_base) * (math.cos(math.pi * step / total_steps) + 1) / 2


# ------------------------------------------------------------------------------------------------- CARE
class CARE(nn.Module):
    """Both branches, the predictors and the loss. ValueError for arguments that do not fit together.

    image_size: pixels, an int or (height, width), multiples of 32 (of 8 with stem="cifar").
    method: `care` (parallel streams), `sequential` (one stream, transformer on conv5), `byol` (C-stream).
    blocks: n of Table 7. heads: attention heads. position: Table 8. tap: the map that the transformer reads.
    detach_trunk: keep T-stream gradients out of the encoder. lambda_att: lambda of Eq. (5), Table 6.
    hidden_dim, out_dim: widths of projectors and predictors.
    """

    def __init__(self, arch="resnet50", image_size=224, method="care", blocks=5, heads=4, position="relative",
                 tap="conv4", detach_trunk=False, lambda_att=100.0, hidden_dim=4096, out_dim=256,
                 stem="imagenet"):
        super().__init__()
        for what, value, choices in (("method", method, METHODS), ("tap", tap, TAPS)):
            if value not in choices:
                raise InputError(f"{what} {value!r} is none of {', '.join(choices)}")
        if blocks < 1:
            raise InputError(f"blocks {blocks}: the transformer needs at least one")
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        stride = 32 if stem == "imagenet" else 8
        if height % stride or width % stride or min(height, width) < stride:
            raise InputError(f"image size {height} x {width}: not multiples of {stride} (stem {stem})")
        self.lambda_att = lambda_att
        self.online = Branch(arch, stem, (height // stride, width // stride), method, blocks, heads, position,
                             "conv5" if method == "sequential" else tap, detach_trunk, hidden_dim, out_dim)
        self.momentum = copy.deepcopy(self.online).requires_grad_(False)
        if method != "sequential":
            self.predictor_c = mlp_head(out_dim, hidden_dim, out_dim)
        if method != "byol":
            self.predictor_t = mlp_head(out_dim, hidden_dim, out_dim)

    def forward(self, x_online, x_momentum):
        """One view order: two views of a batch, (B, 3, height, width) each -> dict of scalars.

        loss (differentiable); by stream loss_c, loss_t, std_c, std_t (collapse); of both loss_att (unscaled).
        """
        online = self.online(x_online)
        with torch.no_grad():  # batch norms in train mode here too, with running statistics of their own
            momentum = self.momentum(x_momentum)
        out = {"loss": 0.0}
        if "c" in online:
            f1, f2 = normalize(self.predictor_c(online["c"])), normalize(momentum["c"])
            out["loss_c"] = similarity_loss(f1, f2)  # Eq. (1)
            out["std_c"] = output_std(f1)
            out["loss"] = out["loss"] + out["loss_c"]
        if "t" in online:
            f3, f4 = normalize(self.predictor_t(online["t"])), normalize(momentum["t"])
            out["loss_t"] = similarity_loss(f3, f4)  # Eq. (3)
            out["std_t"] = output_std(f3)
            out["loss"] = out["loss"] + out["loss_t"]
        if "c" in online and "t" in online:  # the second term has no gradient; both are in Eq. (4)
            out["loss_att"] = attention_loss(f1, f3.detach()) + attention_loss(f2, f4)  # Eq. (4)
            out["loss"] = out["loss"] + self.lambda_att * out["loss_att"]  # Eq. (5)
        return {name: value if name == "loss" else value.detach() for name, value in out.items()}

    @torch.no_grad()
    def update_momentum(self, tau):
        """momentum <- tau * momentum + (1 - tau) * online, parameters only: buffers are each branch's own."""
        torch._foreach_lerp_(list(self.momentum.parameters()), list(self.online.parameters()), 1 - tau)

    def load_released(self, path):
        """Load a checkpoint in the authors' layout. ValueError, nothing changed, if keys or shapes differ."""
        state = load_state(path)
        own = {released_key(key): (key, value) for key, value in self.state_dict().items()}
        check_state(path, state, {key: value for key, (_, value) in own.items()})
        self.load_state_dict({key: state[theirs] for theirs, (key, _) in own.items()})


# ------------------------------------------------------------------------------------ weights in and out
RELEASED_NAMES = {  # part of a key of CARE.state_dict() -> the authors' name for it; replaced in this order
    "online.": "student_encoder.", "momentum.": "teacher_encoder.", ".encoder.": ".",
    "projector_c.": "fc1.", "predictor_c.0": "student_encoder.fc1.4",
    "predictor_c.1": "student_encoder.fc1.5", "predictor_c.3": "student_encoder.fc1.7",
    "projector_t.": "fc2.", "predictor_t.0": "student_encoder.fc2.4",
    "predictor_t.1": "student_encoder.fc2.5", "predictor_t.3": "student_encoder.fc2.7",
    "transformer.": "trans.net.", "mlp1.": "net.0.", "norm1.": "net.1.", "attention.": "net.3.",
    "position.": "pos_emb.", "norm2.": "net.5.", "mlp2.": "net.7.", "norm3.": "net.8.",
}
PREFIXES = ("online.encoder.", "student_encoder.", "encoder_q.", "base_encoder.", "encoder.", "backbone.", "")


def released_key(key):
    """The authors' name, less `module.`, of a key of CARE.state_dict()."""
    for ours, theirs in RELEASED_NAMES.items():
        key = key.replace(ours, theirs)
    return key


def load_checkpoint(path):
    """What torch.save wrote, on the CPU. ValueError when it is broken or holds code, which never runs."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever broken bytes make the unpickler raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: truncated, not a checkpoint, or more than tensors ({reason})") from None


def load_state(path):
    """The tensors by name in a checkpoint file, without `module.`; ValueError when it holds no state dict."""
    state = load_checkpoint(path)
    for name in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{path}: holds no state dict of tensors")
    return {key.removeprefix("module."): value for key, value in state.items()}


def check_state(path, state, wanted, ignore=()):
    """ValueError, in one line, unless `state` has the keys and shapes of `wanted` and finite values only.

    `num_batches_tracked` may be missing; keys that start with one of `ignore` may be there.
    """
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    extra = [key for key in state if key not in wanted and not key.startswith(tuple(ignore))]
    shapes = [f"{key} is {tuple(state[key].shape)}, not {tuple(wanted[key].shape)}"
              for key in wanted if key in state and state[key].shape != wanted[key].shape]
    bad = [key for key in wanted if key in state and not torch.isfinite(state[key]).all()]
    problems = {"missing": missing, "unexpected": extra, "wrong shape:": shapes, "not finite:": bad}
    for what, keys in problems.items():
        if keys:
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            raise InputError(f"{path}: {what} {', '.join(keys[:5])}{more}")


def save_encoder(encoder, file):
    """Write an encoder's state dict, in torchvision's keys, on the CPU, to a path or a file object."""
    torch.save({key: value.cpu() for key, value in encoder.state_dict().items()}, file)


def load_encoder(path, arch=None, stem=None):
    """The encoder in `encoder.pth`, `last.pth`, the authors' release, a torchvision or MoCo-like state dict.

    arch and stem are read off the shapes; ValueError when a given one contradicts them, or when a key is
    missing, unknown (other than `fc.*`), of another shape or not finite.
    """
    state = load_state(path)
    prefix = next((p for p in PREFIXES if p + "conv1.weight" in state), None)
    if prefix is None:
        raise InputError(f"{path}: no ResNet encoder in it (no conv1.weight under any known name)")
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    found_stem = "cifar" if state["conv1.weight"].shape[-1] == 3 else "imagenet"
    with torch.device("meta"):  # of nested architectures, which share as many keys, the smallest comes first
        wanted = {name: Encoder(name, found_stem).state_dict() for name in ARCHS}
    found_arch = max(ARCHS, key=lambda name: sum(key in state and state[key].shape == value.shape
                                                 for key, value in wanted[name].items()))
    for what, given, found in (("arch", arch, found_arch), ("stem", stem, found_stem)):
        if given not in (None, found):
            raise InputError(f"{path}: {what} {given} was asked for, but the file holds {found}")
    check_state(path, state, wanted[found_arch], ignore=("fc.", "trans.", "fc1.", "fc2."))
    encoder = Encoder(found_arch, found_stem)
    encoder.load_state_dict(state, strict=False)  # without num_batches_tracked, with fc, perhaps
    return encoder
