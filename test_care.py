"""Tests of the method, its parts, and weights in and out: `pytest -q test_care.py`.

  equation  what                               test
  (1), (3)  L_c, L_t                           test_golden
  (2)       attention, position encodings      test_relative_encoding_is_the_naive_double_loop,
                                               test_fused_attention_is_the_plain_form
  (4), (5)  L_att, the whole loss              test_golden,
                                               test_gradients_reach_only_what_they_should
  Sec. 3.3  gradients of the T-stream          test_detach_trunk
  Sec. 4.1  momentum coefficient, update       test_momentum_schedule_and_update
  Fig. 2    streams and taps                   test_methods_and_taps
"""
import copy
import json
import math
import pickle
import re
import zlib
from argparse import Namespace
from collections import defaultdict
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import care
from care import (CARE, Encoder, InputError, MultiHeadSelfAttention, PositionEncoding, load_encoder,
                  save_encoder)
from conftest import Code, Thin, slow


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
        name = care.released_key(key)
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
            name = care.released_key(key)
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
    names = [care.released_key(key) for key in model.state_dict()]
    path = tmp_path / "100_ckpt.pth.tar"
    state = {f"module.{name}": released_values[name] for name in names}
    torch.save({"start_epoch": 100, "model": state, "optimizer": {}}, path)
    model.load_released(path)
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
    gradients = {care.released_key(name).removeprefix("student_encoder."): p.grad
                 for name, p in model.named_parameters() if p.grad is not None}
    for name, norm in golden["grad_norm"].items():
        close(gradients[name].norm(), norm)
        assert abs(gradients[name].sum() - golden["grad_sum"][name]) <= 1e-8 * norm
    close(torch.stack([g.norm() for g in gradients.values()]).norm(), golden["all_grad_norm"])

    optimizer.step()
    model.update_momentum(0.99)
    state = {care.released_key(key): value for key, value in model.state_dict().items()}
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
LONG = [pytest.param(name, 20, marks=slow) for name in FOREIGN]


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
    save_encoder(model.online.encoder, tmp_path / "plain.pth")
    fresh = Plain()
    fresh.load_state_dict(torch.load(tmp_path / "plain.pth", weights_only=True))
    assert torch.equal(fresh.last.weight, model.online.encoder.last.weight)
    with pytest.raises(InputError, match="no ResNet encoder"):
        load_encoder(tmp_path / "plain.pth")


# ------------------------------------------------------------------------------ weights in and out
@pytest.mark.parametrize("position, prefix", [("absolute", "module."), ("relative", "")])
def test_load_released(position, prefix, tmp_path):
    model = small(position=position)
    state = filled_state(model, prefix)
    torch.save({"start_epoch": 100, "model": state, "optimizer": {}}, tmp_path / "ckpt.pth.tar")
    model.load_released(tmp_path / "ckpt.pth.tar")
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[prefix + care.released_key(key)].to(value.dtype))
    before = {key: value.clone() for key, value in small(blocks=3).state_dict().items()}
    others = {"blocks": small(blocks=3), "arch": small(arch="resnet34"),
              "size": small(image_size=96),
              "position": small(position="relative" if position == "absolute" else "absolute")}
    for other in others.values():
        with pytest.raises(ValueError, match="missing|unexpected|wrong shape"):
            other.load_released(tmp_path / "ckpt.pth.tar")
    for key, value in others["blocks"].state_dict().items():
        assert torch.equal(value, before[key])


def test_released_names_in_any_order(monkeypatch):
    key = "online.transformer.0.attention.position.rel_height"
    assert care.released_key(key) == "student_encoder.trans.net.0.net.3.pos_emb.rel_height"
    keys = [*small().state_dict(), *small(position="absolute").state_dict()]
    names = [care.released_key(key) for key in keys]
    monkeypatch.setattr(care, "RELEASED_NAMES", dict(reversed(care.RELEASED_NAMES.items())))
    assert [care.released_key(key) for key in keys] == names


@pytest.mark.parametrize("arch, stem", [("resnet18", "cifar"), ("resnet34", "imagenet"),
                                        ("resnet50", "cifar"), ("resnet50w2", "imagenet"),
                                        ("resnet101", "imagenet"), ("resnet152", "imagenet")])
def test_load_encoder_tells_arch_and_stem(arch, stem, tmp_path, monkeypatch):
    with torch.device("meta"):
        encoder = Encoder(arch, stem)
    state = {key: torch.zeros((), dtype=value.dtype).expand(value.shape)  # a few bytes in the file
             for key, value in encoder.state_dict().items()}
    torch.save(state, tmp_path / "e.pth")
    monkeypatch.setattr(nn.init, "kaiming_normal_", lambda weight, **_: weight)
    loaded = load_encoder(tmp_path / "e.pth")
    assert (loaded.arch, loaded.stem, loaded.left_out) == (arch, stem, [])
    assert not any(value.any() for value in loaded.state_dict().values())


@pytest.fixture
def trunk(monkeypatch):
    """A small ResNet's state dict; no other architecture is known."""
    monkeypatch.setattr(care, "ARCHS", {"thin": Thin})
    torch.manual_seed(0)
    return Encoder("thin").state_dict()


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


HEAD = {"0.weight": torch.zeros(3, 512)}  # of any name


def layouts(trunk):
    """Name -> a checkpoint with this trunk in it, and what is to be left out."""
    other = {key: value + 1 for key, value in trunk.items()}  # a moving average, say
    head = under("fc.", HEAD)
    return {
        "torchvision": (trunk | head, ["fc"]),
        "untracked": ({k: v for k, v in trunk.items() if "num_batches_tracked" not in k}, []),
        "half": ({key: value.half() for key, value in trunk.items()}, []),
        "compiled": (under("_orig_mod.", trunk), []),
        "compiled in DDP": ({"model": under("module._orig_mod.encoder.", trunk)}, []),
        "any prefix": ({"net": under("a.b_1.", trunk) | under("a.neck.", HEAD)}, ["neck"]),
        "ours": ({"step": 3, "model": under("momentum.encoder.", other)
                  | under("online.encoder.", trunk) | under("online.projector_c.", HEAD)},
                 ["momentum", "projector_c"]),
        "moco v2": ({"epoch": 1, "state_dict": under("module.encoder_q.", trunk | head)
                     | under("module.encoder_k.", other) | {"module.queue": torch.zeros(2, 3)}},
                    ["fc", "encoder_k", "queue"]),
        "moco v3": ({"state_dict": under("module.base_encoder.", trunk)
                     | under("module.momentum_encoder.", other)}, ["momentum_encoder"]),
        "lightning": ({"state_dict": under("backbone.", trunk) | under("projection_head.", HEAD),
                       "hyper_parameters": {"lr": 0.1}}, ["projection_head"]),
        "solo-learn": ({"state_dict": under("momentum_backbone.", other)
                        | under("backbone.", trunk) | under("classifier.", HEAD)},
                       ["momentum_backbone", "classifier"]),
        "swav": ({"epoch": 1, "state_dict": under("module.", trunk)
                  | under("module.prototypes.", HEAD) | under("module.projection_head.", HEAD)},
                 ["prototypes", "projection_head"]),
        "dino": ({"teacher": under("backbone.", other) | under("head.", HEAD),
                  "student": under("module.backbone.", trunk) | under("module.head.", HEAD),
                  "args": Namespace(arch="resnet18"), "epoch": 3}, ["head"]),
        "vicreg": ({"epoch": 1, "model": under("module.backbone.", trunk)
                    | under("module.projector.", HEAD), "optimizer": {"state": {0: HEAD}}},
                   ["projector"]),
        "byol": ({"online_network_state_dict": under("encoder.", trunk),
                  "target_network_state_dict": under("encoder.", other)}, []),
    }


@pytest.mark.parametrize("name", layouts({}))
def test_load_encoder_reads_every_layout(name, trunk, tmp_path):
    """The online trunk under any prefix; what stands beside it is named."""
    checkpoint, left_out = layouts(trunk)[name]
    torch.save(checkpoint, tmp_path / "e.pth")
    loaded = load_encoder(tmp_path / "e.pth")
    assert (loaded.arch, loaded.stem, loaded.left_out) == ("thin", "imagenet", left_out)
    own = loaded.state_dict()
    for key, value in trunk.items():
        assert torch.equal(own[key], value.half().float() if name == "half" else value), key


def test_load_encoder_asks_which_of_several(trunk, tmp_path):
    path = tmp_path / "e.pth"
    right = {key: value + 1 for key, value in trunk.items()}
    torch.save({"net": under("left.", trunk) | under("right.", right)}, path)
    with pytest.raises(InputError) as caught:
        load_encoder(path)
    message = (": which ResNet of 'net.left.', 'net.right.'? Save one alone,"
               " or choose with load_encoder(..., prefix=...)")
    assert str(caught.value) == f"{path}{message}"
    for prefix in ("net.right.", "net.right"):
        loaded = load_encoder(path, prefix=prefix)
        assert torch.equal(loaded.conv1.weight, trunk["conv1.weight"] + 1)
        assert loaded.left_out == ["left"]
    with pytest.raises(InputError, match="which ResNet of"):
        load_encoder(path, prefix="middle")
    torch.save(under("student.", trunk) | under("online.", right), path)
    with pytest.raises(InputError, match="which ResNet of 'student.', 'online.'"):
        load_encoder(path)


def test_load_encoder_refuses(trunk, tmp_path):
    path = tmp_path / "e.pth"

    def refused(content, match, **given):
        torch.save(content, path)
        with pytest.raises(InputError, match=match) as caught:
            load_encoder(path, **given)
        assert "\n" not in str(caught.value)

    refused(trunk, "resnet50 was asked for, but the file holds thin", arch="resnet50")
    refused(trunk, "stem cifar was asked for", stem="cifar")
    incomplete = {key: value for key, value in trunk.items() if key != "layer3.0.conv1.weight"}
    refused(incomplete, "missing layer3.0.conv1.weight")
    refused(under("a.", incomplete), "missing layer3.0.conv1.weight")
    for inside in ("layer9.weight", "layer1.0.se.weight", "conv2.weight"):
        refused(trunk | {inside: torch.zeros(1)}, f"unexpected {inside}")
    refused(trunk | {"bn1.weight": torch.zeros(3)}, "wrong shape: bn1.weight")
    refused(trunk | {"bn1.weight": trunk["bn1.weight"] * math.nan}, "not finite: bn1.weight")
    refused({"weights": torch.zeros(3)}, "no ResNet encoder")
    refused([1, 2], "no state dict")
    with pytest.raises(FileNotFoundError):
        load_encoder(tmp_path / "none.pth")
    torch.save(trunk, path)
    whole = path.read_bytes()
    for length in (0, 1, 10_000, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="truncated"):
            load_encoder(path)


def test_checkpoints_with_values_beside_the_weights(tmp_path):
    """Numbers of numpy's, Namespaces, paths and the like are read as they were."""
    values = {"best": np.float64(71.2), "seen": np.int64(7), "done": np.bool_(True),
              "name": np.str_("é"), "empty": np.str_(""),
              "args": Namespace(lr=np.float32(0.5), out=Path("runs/a")),
              "more": SimpleNamespace(a=[1]), "history": defaultdict(list, loss=[2.0])}
    others = {"random": np.random.get_state(), "day": np.datetime64("2021-10-11"),
              "kind": np.dtype("O"), "objects": np.array([None], dtype=object)}
    torch.save({"model": {"a": torch.ones(2)}} | values | others, tmp_path / "c.pth")
    loaded = care.load_checkpoint(tmp_path / "c.pth")
    assert {key: loaded[key] for key in values} == values and loaded["args"].lr.dtype == np.float32
    assert type(loaded["best"]) is np.float64 and loaded["args"].out == PurePosixPath("runs/a")
    assert torch.equal(loaded["model"]["a"], torch.ones(2))
    assert isinstance(loaded["day"], care.Inert) and isinstance(loaded["objects"], care.Inert)


def test_code_in_checkpoints_never_runs(tmp_path):
    """One line names what was refused; numpy follows no address that a forged dtype makes up."""
    path = tmp_path / "code.pth"
    for content, name in ((Code(str(tmp_path / "ran")), "posix.mkdir"),
                          (Encoder("resnet18"), "care.Encoder"),
                          ({"args": Namespace(f=F.relu)}, "torch.nn.functional.relu"),
                          ({"f": getattr}, "getattr")):
        torch.save(content, path)
        with pytest.raises(InputError) as caught:
            care.load_checkpoint(path)
        message = (f": holds more than tensors and numbers: {name} is not loaded; save the weights"
                   " alone, by torch.save(model.state_dict(), FILE)")
        assert str(caught.value) == f"{path}{message}"
    path.write_bytes(pickle.dumps(Code(str(tmp_path / "ran")), protocol=2))
    with pytest.raises(InputError):
        load_encoder(path)
    assert not (tmp_path / "ran").exists()
    torch.save({"scalar": Forged()}, path)
    assert isinstance(care.load_checkpoint(path)["scalar"], care.Inert)


class Forged:
    """A numpy scalar whose dtype says that its eight bytes are the address of an object."""

    def __reduce__(self):
        scalar = np.float64(0).__reduce__()[0]
        return scalar, (ForgedType(), bytes(8))


class ForgedType:
    def __reduce__(self):
        fields = {"f": (np.dtype("O"), 0)}
        return np.dtype, ("V8", False, True), (3, "|", None, ("f",), fields, 8, 1, 0)


# ---------------------------------------------------------------------------------- golden numbers
# Outputs, losses, gradients and one step of the authors' released code (ResNet-50, 224 px), run
# once in float64 on the two views of `view` with the weights of `fill`. eval: both branches in
# eval mode on view 1, first eight numbers of sample 0. train_parts, train_total: train mode, both
# view orders, as "x1->x2", where online sees x1; "L_att_momentum[x2]" is the momentum term for
# view x2. grad_norm, grad_sum: of the total loss, by released name. after_step: norms after an
# SGD step (rate 0.05, momentum 0.9, weight decay 1e-4) and a momentum update with tau 0.99.
GOLDEN = json.loads("""
{"absolute": {"eval": {"pooled_mean": 1.7756194707011925, "pooled_std": 2.0517042837496957,
"pooled_0_first8": [2.5540486228263752, 0.9189660064949041, 0.27411932877611356, 0.736994158516361,
0.028263601550921464, 1.6866480683415774, 0.4364266862961439, 0.04602342327543906], "f1_0_first8":
[0.003538822989646087, -0.02495642003227202, 0.05391495323125643, 0.16279727872997612,
-0.053694497767539165, 0.004813299742052349, -0.029011391303165268, -0.056643816010744606],
"f3_0_first8": [0.04191866116697192, 0.0454283930160665, 0.042163650724508554, -0.08937252480371344,
-0.08314999743536501, 0.003366834956660878, 0.04564162233614407, -0.014460219802311871],
"f2_0_first8": [-0.008301382291667816, 0.0006764947071574368, -0.11309818284298664,
-0.02464124083569241, -0.015010604667907705, 0.06007356456144095, -0.1231151347024109,
0.07091436546835782], "f4_0_first8": [0.0012446626848258463, -0.011336724545721063,
0.01741102713409061, -0.02837219283402234, 0.05204941258235092, 0.08431005476054311,
0.07916015589970121, 0.02961029761664298], "transformer_map_mean": 1.9112474678212683,
"transformer_map_std": 2.2007184049681316}, "train_parts": {"L_c[x1->x2]": 1.9474592838595524,
"L_c[x2->x1]": 2.091788969944875, "L_t[x1->x2]": 2.0756669708082964, "L_t[x2->x1]":
1.9831425710239283, "L_att_online[x1]": 0.008117649761050613, "L_att_online[x2]":
0.008061227889334456, "L_att_momentum[x2]": 0.007644396143721889, "L_att_momentum[x1]":
0.007681466354938614}, "train_total": {"loss": 11.248531810541209, "L_c": 4.039248253804427, "L_t":
4.058809541832225, "lambda*L_att": 3.150474014904557}, "grad_norm": {"conv1.weight":
83.9055896663312, "bn1.weight": 6.351513389169708, "layer1.0.conv1.weight": 9.661435210747085,
"layer3.5.conv2.weight": 21.22018282963558, "layer4.0.downsample.0.weight": 12.158130760372233,
"layer4.2.conv3.weight": 1.9205925563369155, "trans.net.0.shortcut.0.weight": 76.05031908429359,
"trans.net.0.net.0.weight": 27.644655003776094, "trans.net.0.net.3.to_qkv.weight":
17.114098914695727, "trans.net.0.net.3.pos_emb.height": 0.44248001088889266,
"trans.net.0.net.3.pos_emb.width": 0.5379085894444854, "trans.net.4.net.3.to_qkv.weight":
7.109926063944777, "trans.net.4.net.7.weight": 5.333634574885192, "fc1.0.weight":
18.254938820949967, "fc1.3.weight": 12.608322689063247, "fc1.4.weight": 3.264791154851933,
"fc1.7.weight": 8.388067728017827, "fc2.0.weight": 22.8319440750204, "fc2.7.weight":
7.846244150819012}, "grad_sum": {"conv1.weight": -80.76597074904964, "bn1.weight":
-1.3372206173772574, "layer1.0.conv1.weight": -2.79442182489091, "layer3.5.conv2.weight":
-3.4233659529273677, "layer4.0.downsample.0.weight": -23.97914089520962, "layer4.2.conv3.weight":
-5.490106273287397, "trans.net.0.shortcut.0.weight": 1042.7156908387478, "trans.net.0.net.0.weight":
55.73995899492614, "trans.net.0.net.3.to_qkv.weight": -121.41813924454647,
"trans.net.0.net.3.pos_emb.height": 2.229119666630197e-16, "trans.net.0.net.3.pos_emb.width":
2.5326962749261384e-16, "trans.net.4.net.3.to_qkv.weight": -8.685346802338504,
"trans.net.4.net.7.weight": 2.5040449240547566, "fc1.0.weight": 77.0782654305575, "fc1.3.weight":
-0.3403805037723915, "fc1.4.weight": 2.638075646311279, "fc1.7.weight": 52.58433868732324,
"fc2.0.weight": -18.313586200800387, "fc2.7.weight": 124.67634157278513}, "all_grad_norm":
188.6783990104372, "after_step": {"online": {"conv1.weight": 12.03765713158644,
"layer4.2.conv3.weight": 63.95372829542739, "trans.net.4.net.7.weight": 64.09166863607919,
"fc1.0.weight": 63.99384374739337, "fc2.3.weight": 15.996487637085483, "bn1.running_mean":
0.6497191639305808, "layer4.2.bn3.running_var": 45.56575513728046, "fc1.1.running_mean":
8.336375519718999}, "momentum": {"conv1.weight": 11.159538630141872, "layer4.2.conv3.weight":
63.36864835842491, "trans.net.4.net.7.weight": 63.36076788467019, "fc1.0.weight":
63.375422782517646, "fc2.3.weight": 15.838225244638949, "bn1.running_mean": 0.5998932458566877,
"layer4.2.bn3.running_var": 45.58297378138011, "fc1.1.running_mean": 8.160419109781685}}},
"relative": {"eval": {"pooled_mean": 1.7756194707011925, "pooled_std": 2.0517042837496957,
"pooled_0_first8": [2.5540486228263752, 0.9189660064949041, 0.27411932877611356, 0.736994158516361,
0.028263601550921464, 1.6866480683415774, 0.4364266862961439, 0.04602342327543906], "f1_0_first8":
[0.003538822989646087, -0.02495642003227202, 0.05391495323125643, 0.16279727872997612,
-0.053694497767539165, 0.004813299742052349, -0.029011391303165268, -0.056643816010744606],
"f3_0_first8": [0.040722379015514294, 0.04594760239587129, 0.04158939906941564,
-0.08986424354449757, -0.08331381305525566, 0.0029848672410615457, 0.044863436914710654,
-0.01364133640022283], "f2_0_first8": [-0.008301382291667816, 0.0006764947071574368,
-0.11309818284298664, -0.02464124083569241, -0.015010604667907705, 0.06007356456144095,
-0.1231151347024109, 0.07091436546835782], "f4_0_first8": [0.000719095470088737,
-0.014300216422436238, 0.017273482700602794, -0.02946023558450092, 0.051444148876412604,
0.08432221797040994, 0.0791481889205617, 0.02936928697818375], "transformer_map_mean":
1.9124413546569674, "transformer_map_std": 2.201214375455488}, "train_parts": {"L_c[x1->x2]":
1.9474592838595524, "L_c[x2->x1]": 2.091788969944875, "L_t[x1->x2]": 2.0548064261939607,
"L_t[x2->x1]": 2.0370844551826166, "L_att_online[x1]": 0.008084644033181008, "L_att_online[x2]":
0.008056252317829795, "L_att_momentum[x2]": 0.007574802425696238, "L_att_momentum[x1]":
0.007592074395560939}, "train_total": {"loss": 11.261916452407803, "L_c": 4.039248253804427, "L_t":
4.091890881376577, "lambda*L_att": 3.1307773172267983}, "grad_norm": {"conv1.weight":
95.91264002334917, "bn1.weight": 6.332343058944432, "layer1.0.conv1.weight": 11.007027319104171,
"layer3.5.conv2.weight": 24.593958650848254, "layer4.0.downsample.0.weight": 12.059130905864672,
"layer4.2.conv3.weight": 1.9059831396714506, "trans.net.0.shortcut.0.weight": 89.79258720436457,
"trans.net.0.net.0.weight": 32.28829081154443, "trans.net.0.net.3.to_qkv.weight": 19.61147092288713,
"trans.net.0.net.3.pos_emb.rel_height": 0.3965086830255227, "trans.net.0.net.3.pos_emb.rel_width":
0.4105851406444063, "trans.net.4.net.3.to_qkv.weight": 8.7957357425576, "trans.net.4.net.7.weight":
6.173027679287046, "fc1.0.weight": 18.025681786164558, "fc1.3.weight": 12.687825286018546,
"fc1.4.weight": 3.285539918163374, "fc1.7.weight": 8.362929563996737, "fc2.0.weight":
27.873190771930894, "fc2.7.weight": 7.801321425641719}, "grad_sum": {"conv1.weight":
-81.63807326702155, "bn1.weight": -0.7289532706544577, "layer1.0.conv1.weight": 18.50244134466952,
"layer3.5.conv2.weight": 111.31359668906607, "layer4.0.downsample.0.weight": -19.114952848905947,
"layer4.2.conv3.weight": -6.83193308066996, "trans.net.0.shortcut.0.weight": 140.4119709506457,
"trans.net.0.net.0.weight": 25.628729415166923, "trans.net.0.net.3.to_qkv.weight":
54.994536726506695, "trans.net.0.net.3.pos_emb.rel_height": -8.224757680475037e-16,
"trans.net.0.net.3.pos_emb.rel_width": -1.3118846287074604e-15, "trans.net.4.net.3.to_qkv.weight":
-37.51760740494025, "trans.net.4.net.7.weight": 0.4769814126128997, "fc1.0.weight":
70.23468082385693, "fc1.3.weight": -4.831195408415541, "fc1.4.weight": 3.2692406390330575,
"fc1.7.weight": 47.0969284577525, "fc2.0.weight": -6.747017827125983, "fc2.7.weight":
124.95633779287475}, "all_grad_norm": 218.19678945812936, "after_step": {"online": {"conv1.weight":
12.259808553689377, "layer4.2.conv3.weight": 63.953727202856754, "trans.net.4.net.7.weight":
64.09185700954461, "fc1.0.weight": 63.993682319462586, "fc2.3.weight": 16.00200309061499,
"bn1.running_mean": 0.6497191639305808, "layer4.2.bn3.running_var": 45.56575513728046,
"fc1.1.running_mean": 8.336375519718999}, "momentum": {"conv1.weight": 11.158810848576382,
"layer4.2.conv3.weight": 63.368648336039406, "trans.net.4.net.7.weight": 63.36077189092994,
"fc1.0.weight": 63.37542411662645, "fc2.3.weight": 15.838232763945767, "bn1.running_mean":
0.5998932458566877, "layer4.2.bn3.running_var": 45.58297378138011, "fc1.1.running_mean":
8.160419109781685}}}}
""")
