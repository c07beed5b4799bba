"""The method's proof: `pytest -q test_care.py`, a minute on a CPU, needs nothing but this file,
care.py, the reader of the authors' checkpoint and tests/golden.json.

  equation  what                               test
  (1), (3)  L_c, L_t                           test_golden
  (2)       attention, position encodings      test_relative_encoding_is_the_naive_double_loop,
                                               test_fused_attention_is_the_plain_form
  (4), (5)  L_att, the whole loss              test_golden, test_attention_loss_as_printed,
                                               test_gradients_reach_only_what_they_should
  Sec. 3.3  gradients of the T-stream          test_detach_trunk
  Sec. 4.1  momentum coefficient, update       test_momentum_schedule_and_update
  Fig. 2    streams and taps                   test_methods_and_taps
"""
import copy
import json
import math
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock, ResNet

import care
from care import CARE, Encoder, InputError, MultiHeadSelfAttention, PositionEncoding
from common.weights import load_encoder, load_released, released_key

GOLDEN = json.loads((Path(__file__).parent / "tests" / "golden.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def no_gpu():
    """A repeated run is exact on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", bool)  # False
        patch.setattr(torch.cuda, "device_count", int)  # 0
        yield


class Thin(ResNet):  # with fewer than 16 channels oneDNN (torch 2.14) corrupts memory
    """A ResNet with half of a resnet18's blocks and a quarter of its width, for quick steps."""

    def __init__(self, weights=None):
        super().__init__(BasicBlock, [1, 1, 1, 1])
        self.fc = nn.Linear(128, 1000)

    def _make_layer(self, block, planes, *rest, **named):
        return super()._make_layer(block, planes // 4, *rest, **named)


care.ARCHS["thin"] = Thin


def small(**changes):
    """A small CARE model in float64."""
    torch.manual_seed(0)
    settings = {"arch": "thin", "image_size": 64, "blocks": 2, "hidden_dim": 32, "out_dim": 16}
    return CARE(**settings | changes).double()


def two_views(size=64, batch=4):
    generator = torch.Generator().manual_seed(1)
    shape = (batch, 3, size, size)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2)]


# ------------------------------------------------------------------ the method against the release
# Outputs, losses, gradients and one step of the authors' released code (ResNet-50, 224 px), run
# once in float64 on the two views of `view` with the weights of `fill`. eval: both branches in
# eval mode on view 1, first eight numbers of sample 0. train_parts, train_total: train mode, both
# view orders, as "x1->x2", where online sees x1; "L_att_momentum[x2]" is the momentum term for
# view x2. grad_norm, grad_sum: of the total loss, by released name. after_step: norms after an
# SGD step (rate 0.05, momentum 0.9, weight decay 1e-4) and a momentum update with tau 0.99.
def fill(name, shape, seed=2021):
    """The value of a parameter or buffer, by its released name, behind the golden figures."""
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    random = np.random.RandomState(zlib.crc32(name.encode()) ^ seed)
    z = random.standard_normal(shape).astype(np.float32)
    if name.endswith("running_var"):
        return 1 + 0.1 * np.abs(z)
    if name.endswith("running_mean"):
        return 0.1 * z
    if "pos_emb" in name:
        return z * 128 ** -0.5
    if len(shape) == 4:
        return z * math.sqrt(2.0 / (shape[1] * shape[2] * shape[3]))
    if len(shape) == 2:
        return z * math.sqrt(1.0 / shape[1])
    if name.endswith(("bn3.weight", "net.8.weight")):
        return 0.2 * (1 + 0.1 * z)
    if name.endswith("weight"):
        return 1 + 0.1 * z
    return 0.1 * z


def filled_state(model, prefix=""):
    """A checkpoint in the authors' layout for this model's architecture, filled by the rule."""
    state = {}
    for key, value in model.state_dict().items():
        name = released_key(key)
        state[prefix + name] = torch.from_numpy(np.asarray(fill(name, tuple(value.shape))))
    return state


def view(which, batch=3, size=224):
    values = np.random.RandomState(2021 + which).standard_normal((batch, 3, size, size))
    return torch.from_numpy(values.astype(np.float32)).double()


def close(found, expected, relative=1e-8):
    found = torch.as_tensor(found, dtype=torch.float64)
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=relative, atol=0)


@pytest.fixture(scope="module")
def released_values():
    """Every tensor of the release by name, with the tables of both position encodings."""
    values = {}
    for position in ("absolute", "relative"):
        with torch.device("meta"):
            model = CARE(position=position)
        for key, value in model.state_dict().items():
            name = released_key(key)
            if name not in values:
                values[name] = torch.from_numpy(np.asarray(fill(name, tuple(value.shape))))
    yield values
    values.clear()


@pytest.mark.parametrize("position", ["absolute", "relative"])
def test_golden(position, released_values, tmp_path):
    """The release's figures, from its checkpoint: in eval mode, in train mode, after one step."""
    golden, expected = GOLDEN[position], GOLDEN[position]["eval"]
    with torch.device("meta"):
        model = CARE(position=position)
    model.to_empty(device="cpu")
    names = [released_key(key) for key in model.state_dict()]
    path = tmp_path / "100_ckpt.pth.tar"
    state = {f"module.{name}": released_values[name] for name in names}
    torch.save({"start_epoch": 100, "model": state, "optimizer": {}}, path)
    load_released(model, path)
    if position == "relative":  # the encoder alone, as the evaluation scripts read it, in float32
        encoder = load_encoder(path).eval()
        with torch.no_grad():
            pooled = care.pool(encoder(view(1).float())[1])
        close(pooled[0, :8], expected["pooled_0_first8"], 1e-4)
        close(pooled.mean(), expected["pooled_mean"], 1e-4)
        close(pooled.std(), expected["pooled_std"], 1e-4)
    path.unlink()

    model.to(dtype=torch.float64, memory_format=torch.channels_last).eval()
    x1, x2 = view(1), view(2)
    maps = {}

    def keep_map(module, inputs, output):
        maps[module] = output

    encoder, transformer = model.online.encoder, model.online.transformer
    hooks = [module.register_forward_hook(keep_map) for module in (encoder, transformer)]
    with torch.no_grad():
        online, momentum = model.online(x1), model.momentum(x1)
        outputs = {"f1": model.predictor_c(online["c"]), "f3": model.predictor_t(online["t"]),
                   "f2": momentum["c"], "f4": momentum["t"]}
    for hook in hooks:
        hook.remove()
    for name, value in outputs.items():
        close(care.l2_normalize(value)[0, :8], expected[f"{name}_0_first8"])
    pooled, mapped = care.pool(maps[encoder][1]), maps[transformer]
    close(pooled[0, :8], expected["pooled_0_first8"])
    close([pooled.mean(), pooled.std()], [expected["pooled_mean"], expected["pooled_std"]])
    close(mapped.mean(), expected["transformer_map_mean"])
    close(mapped.std(), expected["transformer_map_std"])

    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9, weight_decay=1e-4)
    total = {"loss": 0, "loss_c": 0, "loss_t": 0, "loss_att": 0}
    for name, x, y in (("x1->x2", x1, x2), ("x2->x1", x2, x1)):
        out = model(x, y)
        out["loss"].backward()
        close(out["loss_c"], golden["train_parts"][f"L_c[{name}]"])
        close(out["loss_t"], golden["train_parts"][f"L_t[{name}]"])
        first, second = name.split("->")
        close(out["loss_att"], golden["train_parts"][f"L_att_online[{first}]"]
              + golden["train_parts"][f"L_att_momentum[{second}]"])
        for key in total:
            total[key] += out[key].detach()
    close([total["loss"], total["loss_c"], total["loss_t"], 100 * total["loss_att"]],
          [golden["train_total"][key] for key in ("loss", "L_c", "L_t", "lambda*L_att")])
    gradients = {released_key(name).removeprefix("student_encoder."): p.grad
                 for name, p in model.named_parameters() if p.grad is not None}
    for name, norm in golden["grad_norm"].items():
        close(gradients[name].norm(), norm)
        assert abs(gradients[name].sum() - golden["grad_sum"][name]) <= 1e-8 * norm
    close(torch.stack([g.norm() for g in gradients.values()]).norm(), golden["all_grad_norm"])

    optimizer.step()
    model.update_momentum(0.99)
    state = {released_key(key): value for key, value in model.state_dict().items()}
    for branch, prefix in (("online", "student_encoder."), ("momentum", "teacher_encoder.")):
        for name, norm in golden["after_step"][branch].items():
            close(state[prefix + name].norm(), norm)


# ----------------------------------------------------------------------------- parts of the method
def test_relative_encoding_is_the_naive_double_loop():
    H, W, d = 3, 5, 8
    encoding = PositionEncoding("relative", (H, W), d).double()
    q = torch.randn(2, 4, H * W, d, dtype=torch.float64)
    expected = torch.zeros(2, 4, H * W, H * W, dtype=torch.float64)
    for i in range(H * W):
        for j in range(H * W):
            (y, x), (key_y, key_x) = divmod(i, W), divmod(j, W)
            p = encoding.rel_height[key_y - y + H - 1] + encoding.rel_width[key_x - x + W - 1]
            expected[:, :, i, j] = q[:, :, i] @ p
    torch.testing.assert_close(encoding(q), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("position", ["none", "sincos", "absolute"])
def test_fused_attention_is_the_plain_form(position):
    attention = MultiHeadSelfAttention(32, 4, (3, 5), position).double()
    x = torch.randn(2, 32, 3, 5, dtype=torch.float64)
    q, k, v = attention.qkv(x)
    p = attention.position(q)
    assert (p == 0).all() if position == "none" else p.shape == (2, 4, 15, 15)
    weights = ((q @ k.transpose(2, 3) + p) / 8 ** 0.5).softmax(3)
    expected = (weights @ v).permute(0, 1, 3, 2).reshape(2, 32, 3, 5)
    torch.testing.assert_close(attention(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(attention.attention(q, k), weights, rtol=1e-12, atol=1e-12)


class Products(TorchDispatchMode):
    """Within this context, the inner dimensions of all batched matmuls, in `inner`."""

    def __init__(self):
        super().__init__()
        self.inner = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.bmm.default:
            self.inner.append(args[0].shape[2])
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1)])
def test_attention_on_one_row_column_or_token(size):
    """By its formula; no inner dimension of 1, for which torch wants a C compiler on a GPU."""
    attention = MultiHeadSelfAttention(32, 4, size, "relative").double()
    x = torch.randn(2, 32, *size, dtype=torch.float64, requires_grad=True)
    with Products() as products:
        out = attention(x)
        out.square().sum().backward()
    assert 1 not in products.inner and bool(products.inner) == (size != (1, 1))
    found = [x.grad, *(parameter.grad for parameter in attention.parameters())]  # none is None
    assert found[1].any() and len(found) == 4

    q, k, v = attention.qkv(x)
    (H, W), table = size, attention.position
    y, x_of = torch.arange(H).repeat_interleave(W), torch.arange(W).repeat(H)
    p = table.rel_height[y - y[:, None] + H - 1] + table.rel_width[x_of - x_of[:, None] + W - 1]
    logits = torch.einsum("bhid,bhjd->bhij", q, k) + torch.einsum("bhid,ijd->bhij", q, p)
    expected = torch.einsum("bhij,bhjd->bhdi", (logits / 8 ** 0.5).softmax(3), v)
    expected = expected.reshape(2, 32, *size)
    wanted = torch.autograd.grad(expected.square().sum(), (x, *attention.parameters()))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, list(wanted), rtol=1e-12, atol=1e-12)


def test_sincos_tells_every_position_apart():
    table = PositionEncoding("sincos", (4, 6), 32).key_table()
    assert (torch.cdist(table, table) + torch.eye(24) > 0.5).all()
    assert not list(PositionEncoding("sincos", (4, 6), 32).parameters())


@pytest.mark.parametrize("size", [64, (64, 96), (96, 32)])
@pytest.mark.parametrize("position", care.POSITIONS)
def test_any_feature_map_size(size, position):
    model = small(image_size=size, position=position)
    height, width = (size, size) if isinstance(size, int) else size
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    assert model(x, x)["loss"].isfinite()
    conv4, conv5 = model.online.encoder(x)
    assert model.online.transformer(conv4).shape == conv5.shape
    assert conv5.shape == (2, 128, height // 32, width // 32)


def test_gradients_reach_only_what_they_should():
    model, (x1, x2) = small(), two_views()
    online, momentum = model.online(x1), model.momentum(x2)
    f1 = care.l2_normalize(model.predictor_c(online["c"]))
    f3 = care.l2_normalize(model.predictor_t(online["t"]))
    f4 = care.l2_normalize(momentum["t"].detach())
    out = model(x1, x2)
    # The gradient of the whole loss in the T-stream is that of L_t alone: L_att sends none into it.
    t_stream = [*model.online.transformer.parameters(), *model.online.projector_t.parameters(),
                *model.predictor_t.parameters()]
    whole = torch.autograd.grad(out["loss"], t_stream)
    alone = torch.autograd.grad(care.similarity_loss(f3, f4), t_stream)
    for a, b in zip(whole, alone):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    model(x1, x2)["loss"].backward()
    assert all(p.grad is None for p in model.momentum.parameters())
    for name, p in model.named_parameters():
        assert name.startswith("momentum") or p.grad is not None, name
    # L_att does reach the C-stream's predictor.
    with_att = model.predictor_c[3].weight.grad.clone()
    model.zero_grad()
    model.lambda_att = 0.0
    model(x1, x2)["loss"].backward()
    assert not torch.allclose(with_att, model.predictor_c[3].weight.grad)
    assert f1.shape == (4, 16)


@pytest.mark.parametrize("detach", [False, True])
def test_detach_trunk(detach):
    model, (x1, x2) = small(detach_trunk=detach, lambda_att=0.0), two_views()
    conv1 = model.online.encoder.conv1.weight
    whole = torch.autograd.grad(model(x1, x2)["loss"], conv1)[0]
    online, momentum = model.online(x1), model.momentum(x2)
    f1 = care.l2_normalize(model.predictor_c(online["c"]))
    f2 = care.l2_normalize(momentum["c"].detach())
    loss_c = care.similarity_loss(f1, f2)
    c_stream_only = torch.autograd.grad(loss_c, conv1)[0]
    assert torch.allclose(whole, c_stream_only, rtol=1e-9) == detach


@pytest.mark.parametrize("position", ["absolute", "relative"])
def test_two_half_steps_are_the_summed_loss_bit_for_bit(position):
    x1, x2 = two_views()
    halves, summed = small(position=position), small(position=position)
    for x, y in ((x1, x2), (x2, x1)):
        halves(x, y)["loss"].backward()
    (summed(x1, x2)["loss"] + summed(x2, x1)["loss"]).backward()
    for a, b in zip(halves.parameters(), summed.parameters()):
        assert a.grad is None and b.grad is None or torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("arch, millions", [("resnet50", 25.56), ("resnet50w2", 68.88),
                                            ("resnet101", 44.55), ("resnet152", 60.19)])
def test_parameter_counts(arch, millions):
    with torch.device("meta"):
        encoder = Encoder(arch)
    classifier = encoder.dim5 * 1000 + 1000
    assert round((sum(p.numel() for p in encoder.parameters()) + classifier) / 1e6, 2) == millions


def test_methods_and_taps():
    x1, x2 = two_views()
    byol = small(method="byol")
    assert set(byol(x1, x2)) == {"loss", "loss_c", "std_c"}
    assert not hasattr(byol.online, "transformer")
    sequential = small(method="sequential", tap="conv5")
    out = sequential(x1, x2)
    assert set(out) == {"loss", "loss_t", "std_t"} and not hasattr(sequential.online, "projector_c")
    assert sequential.online.transformer[0].mlp1.in_channels == 128
    tap5 = small(tap="conv5")
    assert all(isinstance(block.shortcut, torch.nn.Identity) for block in tap5.online.transformer)
    out = tap5(x1, x2)
    assert set(out) == {"loss", "loss_c", "loss_t", "loss_att", "std_c", "std_t"}
    close(out["loss"].detach(), out["loss_c"] + out["loss_t"] + 100 * out["loss_att"], 1e-12)
    assert len(small(blocks=6).online.transformer) == 6


def test_attention_loss_as_printed():
    """Norms, not squared, averaged over the batch; finite gradients, also at c = t; lambda 1.1."""
    generator = torch.Generator().manual_seed(0)
    c, t = torch.randn(2, 64, 256, dtype=torch.float64, generator=generator)
    c, t = care.l2_normalize(c), care.l2_normalize(t)
    naive = sum(math.sqrt(sum((a - b) ** 2 for a, b in zip(*rows))) for rows in zip(c, t)) / 64
    close(care.attention_loss(c, t, "norm"), naive, 1e-12)

    lengths = {}
    for kind in care.ATT_LOSSES:
        leaf = c.clone().requires_grad_()
        care.attention_loss(leaf, t, kind).backward()
        lengths[kind] = leaf.grad.norm(dim=1).mean().item()
    assert lengths["norm"] == pytest.approx(1 / 64)
    comparable = 100 * lengths["mse"] / lengths["norm"]  # 100 x 2 sqrt(2) / 256
    assert comparable == pytest.approx(1.105, rel=0.02)

    same = t.clone().requires_grad_()
    care.attention_loss(same, t, "norm").backward()
    assert same.grad.eq(0).all()

    x1, x2 = two_views()
    plain, printed = small()(x1, x2), small(att_loss="norm")(x1, x2)
    assert torch.equal(plain["loss_c"], printed["loss_c"])
    close(printed["loss"].detach() - 100 * printed["loss_att"],
          plain["loss"].detach() - 100 * plain["loss_att"], 1e-12)
    assert 1 < printed["loss_att"] / 2 < 2  # about sqrt(2) a term


def test_collapse_meter():
    generator = torch.Generator().manual_seed(0)
    assert care.output_std(care.l2_normalize(torch.ones(64, 256))) == 0
    healthy = care.output_std(care.l2_normalize(torch.randn(4096, 256, generator=generator)))
    assert abs(healthy - 1) < 0.01


def test_momentum_schedule_and_update():
    assert care.tau_at(0, 100) == 0.99 and care.tau_at(100, 100) == 1.0
    assert care.tau_at(50, 100) == pytest.approx(0.995)
    model = small()
    for p in model.online.parameters():
        p.data.add_(1.0)
    before = [p.clone() for p in model.momentum.parameters()]
    buffers = [b.clone() for b in model.momentum.buffers()]
    model.update_momentum(0.9)
    for p, old, new in zip(model.momentum.parameters(), before, model.online.parameters()):
        torch.testing.assert_close(p, 0.9 * old + 0.1 * new)
    assert all(map(torch.equal, buffers, model.momentum.buffers()))


@pytest.mark.parametrize("bad, message", [
    ({"image_size": 50}, "image size 50 x 50: needs multiples of 32"),
    ({"image_size": (64, 20), "stem": "cifar"}, "image size 64 x 20: needs multiples of 8"),
    ({"image_size": 0}, "image size 0 x 0: needs multiples of 32"),
    ({"method": "dino"}, "method 'dino' is none of care, sequential, byol"),
    ({"position": "rope"}, "position 'rope' is none of none, sincos, absolute, relative"),
    ({"tap": "conv3"}, "tap 'conv3' is none of conv4, conv5"),
    ({"att_loss": "l1"}, "att_loss 'l1' is none of mse, norm"),
    ({"blocks": 0}, "blocks 0, heads 4: the transformer needs at least one"),
    ({"heads": 0}, "blocks 2, heads 0: the transformer needs at least one"),
    ({"arch": "vgg16"}, "arch 'vgg16' is none of resnet18, resnet34, resnet50"),
    ({"stem": "patch"}, "stem 'patch' is none of imagenet, cifar"),
])
def test_model_refuses(bad, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        small(**bad)


# ---------------------------------------------------------------------------------- around any CNN
class Plain(nn.Module):
    """Four lines of CNN: one input channel, no batch norm, strides 8 and 16."""

    def __init__(self, answer=tuple):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 16, 3, 8, 1), nn.Conv2d(16, 24, 3, 2, 1)
        self.answer = answer

    def forward(self, x):
        conv4 = self.first(x).relu()
        return self.answer((conv4, self.last(conv4)))


def around(encoder, **changes):
    torch.manual_seed(0)
    settings = {"image_size": 64, "blocks": 1, "hidden_dim": 32, "out_dim": 16}
    return CARE(encoder, **settings | changes)


FOREIGN = {  # torchvision's name -> the nodes that give conv4 and conv5, and their channels
    "convnext_tiny": ("features.5", "features.7", 384, 768),
    "regnet_y_400mf": ("trunk_output.block3", "trunk_output.block4", 208, 440),
    "efficientnet_b0": ("features.5", "features.8", 112, 1280),
    "mobilenet_v3_small": ("features.8", "features.12", 48, 576),
    "resnext50_32x4d": ("layer3", "layer4", 1024, 2048),
}


QUICK = [(name, 5) for name in FOREIGN]
LONG = [pytest.param(name, 20, marks=pytest.mark.slow) for name in FOREIGN]


@pytest.mark.parametrize("name, steps", [("one channel", 20), *QUICK, *LONG])
def test_trains_any_cnn(name, steps):
    """The loss of a fixed batch falls; gradients reach all that is online, and only that."""
    torch.manual_seed(0)
    channels = 1 if name == "one channel" else 3
    if name == "one channel":
        encoder, dim4, dim5 = Plain(), 16, 24
    else:
        conv4, conv5, dim4, dim5 = FOREIGN[name]
        network = getattr(torchvision.models, name)(weights=None)
        encoder = create_feature_extractor(network, {conv4: "conv4", conv5: "conv5"})
    own = list(encoder.state_dict())
    size = 64 if name == "one channel" else 32
    model = around(encoder, image_size=size)
    assert model.online.encoder is encoder and model.momentum.encoder is not encoder
    keys = list(model.state_dict())
    assert [f"online.encoder.{key}" for key in own] == keys[:len(own)]
    block = model.online.transformer[0]
    assert (block.mlp1.in_channels, block.mlp2.out_channels) == (dim4, dim5)
    assert block.mlp1.out_channels == {440: 112, 24: 16}.get(dim5, dim5 // 4)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.02, momentum=0.9)
    x1, x2 = torch.randn(2, 4, channels, size, size)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x1, x2)["loss"]
        loss.backward()
        optimizer.step()
        model.update_momentum(0.99)
        losses.append(loss.item())
    assert np.mean(losses[-3:]) < 0.9 * losses[0], losses
    for key, parameter in model.named_parameters():
        assert (parameter.grad is None) == key.startswith("momentum."), key
        assert parameter.requires_grad != key.startswith("momentum."), key


def test_the_look_at_a_module_leaves_it_alone():
    """Weights, statistics, every training flag and the random state stay as they were."""
    encoder = nn.Sequential(nn.Conv2d(2, 8, 3, 4), nn.BatchNorm2d(8), nn.Dropout(), RandomShift())
    encoder.double()
    encoder[1].eval()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    torch.manual_seed(5)
    random_state = torch.random.get_rng_state()
    assert care.map_shapes(encoder, 20, 28) == [(8, 5, 7)]
    assert torch.equal(random_state, torch.random.get_rng_state())
    assert [module.training for module in encoder.modules()] == [True, True, False, True, True]
    assert all(torch.equal(value, encoder.state_dict()[key]) for key, value in before.items())


class RandomShift(nn.Module):
    """Draws a number in eval mode, too."""

    def forward(self, x):
        assert not self.training and x.dtype == torch.float64
        return x + torch.rand(())


@pytest.mark.parametrize("answer", [tuple, list, lambda maps: dict(zip("ab", maps))])
def test_maps_in_a_tuple_list_or_dict(answer):
    x = torch.randn(3, 1, 64, 64)
    for method in care.METHODS:
        assert around(Plain(answer), method=method)(x, x)["loss"].isfinite()


@pytest.mark.parametrize("changes", [{"tap": "conv5"}, {"method": "byol"},
                                     {"method": "sequential"}])
def test_conv5_alone_on_an_odd_grid_of_non_square_images(changes):
    model = around(Plain(lambda maps: maps[1]), image_size=(80, 112), **changes)  # conv5: 5 x 7
    x = torch.randn(3, 1, 80, 112)
    model(x, x)["loss"].backward()
    if "method" not in changes:
        assert model.online.transformer[0].attention.position.size == (5, 7)


def test_a_foreign_encoder_in_channels_last_autocast_and_compiled():
    """Each gives the plain model's losses; nothing in Plain has a batch norm."""
    encoder, (x1, x2) = Plain(), torch.randn(2, 8, 1, 64, 64)
    expected = around(copy.deepcopy(encoder))(x1, x2)
    model = around(copy.deepcopy(encoder)).to(memory_format=torch.channels_last)
    last = model(x1.to(memory_format=torch.channels_last), x2.to(memory_format=torch.channels_last))
    model.online.compile(backend="aot_eager", fullgraph=True)
    model.momentum.compile(backend="aot_eager", fullgraph=True)
    compiled = model(x1, x2)
    for key, value in expected.items():
        torch.testing.assert_close(last[key], value, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(compiled[key], value, rtol=1e-4, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        out = around(encoder)(x1, x2)
    assert all(value.dtype == torch.float32 for value in out.values())
    torch.testing.assert_close(out["loss"], expected["loss"], rtol=0.1, atol=0)
    out["loss"].backward()


def test_more_heads_than_divide_round_the_width_up():
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    model = small(heads=5)
    assert model.online.transformer[0].mlp1.out_channels == 40  # 128 / 4, to a multiple of 20
    assert model(x, x)["loss"].isfinite()


@pytest.mark.parametrize("answer, changes, message", [
    (lambda maps: [*maps, maps[1]], {}, "the encoder gives shapes .*: return one or two maps"),
    (lambda maps: [], {}, r"the encoder gives shapes \[\]: return one or two maps"),
    (lambda maps: maps[1].mean((2, 3)), {}, r"gives shapes \[\(2, 24\)\]: return one or two maps"),
    (lambda maps: maps[::-1], {}, "return conv4 before conv5"),
    (lambda maps: maps[1], {}, r"gives one map, \(24, 4, 4\), no conv4: .*tap=\"conv5\""),
    (lambda maps: maps[:1] * 2, {}, "conv4 is 8 x 8, not twice conv5's 8 x 8: .*tap=\"conv5\""),
    (tuple, {"image_size": (64, 72)}, "conv4 is 8 x 9, odd and so not twice .*another image size"),
    (tuple, {"stem": "cifar"}, "stem 'cifar' is for the encoders of ARCHS"),
    (tuple, {"image_size": 0}, "image size 0 x 0"),
    (tuple, {"heads": 0}, "heads 0"),
])
def test_refuses_what_does_not_fit(answer, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        around(Plain(answer), **changes)
    assert "\n" not in str(caught.value)


def test_refuses_a_module_without_convolution():
    with pytest.raises(InputError, match="no Conv2d to tell how many channels"):
        around(nn.Linear(3, 3))


def test_a_foreign_encoder_is_saved_and_read_back(tmp_path):
    model = around(Plain())
    torch.save(model.online.encoder.state_dict(), tmp_path / "plain.pth")
    fresh = Plain()
    fresh.load_state_dict(torch.load(tmp_path / "plain.pth", weights_only=True))
    assert torch.equal(fresh.last.weight, model.online.encoder.last.weight)
    with pytest.raises(InputError, match="no ResNet encoder"):
        load_encoder(tmp_path / "plain.pth")
