"""Tests of common/weights.py: checkpoints of every layout."""
import math
import pickle
from argparse import Namespace
from collections import defaultdict
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from care import CARE, Encoder, InputError
from common import weights
from common.weights import load_encoder, load_released, released_key
from conftest import Code
from test_care import Thin, filled_state, small


@pytest.mark.parametrize("position, prefix", [("absolute", "module."), ("relative", "")])
def test_load_released(position, prefix, tmp_path):
    model = small(position=position)
    state = filled_state(model, prefix)
    torch.save({"start_epoch": 100, "model": state, "optimizer": {}}, tmp_path / "ckpt.pth.tar")
    load_released(model, tmp_path / "ckpt.pth.tar")
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[prefix + released_key(key)].to(value.dtype))
    before = {key: value.clone() for key, value in small(blocks=3).state_dict().items()}
    others = {"blocks": small(blocks=3), "arch": small(arch="resnet34"),
              "size": small(image_size=96),
              "position": small(position="relative" if position == "absolute" else "absolute")}
    for other in others.values():
        with pytest.raises(ValueError, match="missing|unexpected|wrong shape"):
            load_released(other, tmp_path / "ckpt.pth.tar")
    for key, value in others["blocks"].state_dict().items():
        assert torch.equal(value, before[key])


def test_released_names_in_any_order(monkeypatch):
    key = "online.transformer.0.attention.position.rel_height"
    assert released_key(key) == "student_encoder.trans.net.0.net.3.pos_emb.rel_height"
    keys = [*small().state_dict(), *small(position="absolute").state_dict()]
    names = [released_key(key) for key in keys]
    monkeypatch.setattr(weights, "RELEASED_NAMES", dict(reversed(weights.RELEASED_NAMES.items())))
    assert [released_key(key) for key in keys] == names


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
    monkeypatch.setattr(weights, "ARCHS", {"thin": Thin})
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
    loaded = weights.load_checkpoint(tmp_path / "c.pth")
    assert {key: loaded[key] for key in values} == values and loaded["args"].lr.dtype == np.float32
    assert type(loaded["best"]) is np.float64 and loaded["args"].out == PurePosixPath("runs/a")
    assert torch.equal(loaded["model"]["a"], torch.ones(2))
    assert isinstance(loaded["day"], weights.Inert) and isinstance(loaded["objects"], weights.Inert)


def test_code_in_checkpoints_never_runs(tmp_path):
    """One line names what was refused; numpy follows no address that a forged dtype makes up."""
    path = tmp_path / "code.pth"
    for content, name in ((Code(str(tmp_path / "ran")), "posix.mkdir"),
                          (Encoder("resnet18"), "care.Encoder"),
                          ({"args": Namespace(f=F.relu)}, "torch.nn.functional.relu"),
                          ({"f": getattr}, "getattr")):
        torch.save(content, path)
        with pytest.raises(InputError) as caught:
            weights.load_checkpoint(path)
        message = (f": holds more than tensors and numbers: {name} is not loaded; save the weights"
                   " alone, by torch.save(model.state_dict(), FILE)")
        assert str(caught.value) == f"{path}{message}"
    path.write_bytes(pickle.dumps(Code(str(tmp_path / "ran")), protocol=2))
    with pytest.raises(InputError):
        load_encoder(path)
    assert not (tmp_path / "ran").exists()
    torch.save({"scalar": Forged()}, path)
    assert isinstance(weights.load_checkpoint(path)["scalar"], weights.Inert)


class Forged:
    """A numpy scalar whose dtype says that its eight bytes are the address of an object."""

    def __reduce__(self):
        scalar = np.float64(0).__reduce__()[0]
        return scalar, (ForgedType(), bytes(8))


class ForgedType:
    def __reduce__(self):
        fields = {"f": (np.dtype("O"), 0)}
        return np.dtype, ("V8", False, True), (3, "|", None, ("f",), fields, 8, 1, 0)


# ------------------------------------------------------------------------------------ a model begun
def own_checkpoint(path, **settings):
    """A last.pth as train.py writes it -> the model in it, and its settings."""
    settings = {"arch": "thin", "image_size": [64, 64], "method": "care", "blocks": 2, "heads": 4,
                "position": "relative", "tap": "conv4", "hidden_dim": 32} | settings
    torch.manual_seed(7)
    model = CARE(**settings)
    for branch in (model.online, model.momentum):  # both have seen images, and differ
        branch.encoder(torch.randn(4, 3, 64, 64))
        branch.encoder.conv1.weight.data += torch.rand(())
    torch.save({"model": model.state_dict(), "model_args": settings, "unreadable": [], "step": 3},
               path)
    return model, settings


@pytest.mark.parametrize("position", ["relative", "absolute"])
def test_start_from_a_whole_model(position, tmp_path):
    """Predictors and the momentum branch too; for another size, tables are resized, and said."""
    path = tmp_path / "last.pth"
    model, settings = own_checkpoint(path, position=position)
    fresh = CARE(**settings)
    assert weights.start_from(fresh, path, settings) == []
    assert all(map(torch.equal, fresh.state_dict().values(), model.state_dict().values()))

    other = settings | {"image_size": [128, 96], "detach_trunk": True}
    fresh = CARE(**other)
    remark, = weights.start_from(fresh, path, other)
    assert remark == (f"{path}: position tables resized from [64, 64] to [128, 96] px, linearly "
                      "along each axis")
    before = model.state_dict()
    for key, value in fresh.state_dict().items():
        if ".position." in key:
            rows = np.linspace(0, 1, 2 * len(value) + 1)[1::2] * len(before[key]) - 0.5
            wanted = [np.interp(rows, range(len(column)), column) for column in before[key].T]
            np.testing.assert_allclose(value.T, wanted, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(value, before[key]), key


def test_resized_tables_keep_their_middle():
    """Offset 0 of a relative encoding stays where it is, whatever the two lengths."""
    for before in (1, 3, 7, 13):
        table = torch.arange(before)[:, None] * torch.ones(1, 4)
        for after in (1, 3, 9, 27):
            found = weights.resize_table(table, after)
            assert found.shape == (after, 4)
            torch.testing.assert_close(found[after // 2], table[before // 2])
            torch.testing.assert_close(found, before - 1 - found.flip(0))


def test_start_from_an_encoder(trunk, tmp_path):
    """Both branches get it; heads and transformer stay; the rest of the file is named."""
    path = tmp_path / "e.pth"
    trunk = {key: value + 1 for key, value in trunk.items()}
    torch.save(trunk | under("fc.", HEAD), path)
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert weights.start_from(model, path, {}) == [f"{path}: left out fc"]
    for key, value in model.state_dict().items():
        own = key.removeprefix("online.encoder.").removeprefix("momentum.encoder.")
        wanted = before[key] if own == key else trunk[own].to(value.dtype)
        assert torch.equal(value, wanted), key


def test_start_from_refuses(tmp_path):
    """A model of another shape, in the words of the flags; nothing is changed."""
    path = tmp_path / "last.pth"
    _, settings = own_checkpoint(path, blocks=1, hidden_dim=16)
    other = settings | {"blocks": 3, "hidden_dim": 32, "method": "care"}
    model = CARE(**other)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError) as caught:
        weights.start_from(model, path, other)
    message = (": holds a model of --blocks 1 --hidden-dim 16; give the same, or the encoder.pth "
               "beside it, to start from its encoder alone")
    assert str(caught.value) == f"{path}{message}"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    saved = torch.load(path, weights_only=True)
    saved["model"]["predictor_t.3.bias"] *= math.inf
    torch.save(saved, path)
    with pytest.raises(InputError, match="not finite: predictor_t.3.bias"):
        weights.start_from(CARE(**settings), path, settings)
