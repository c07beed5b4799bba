"""Checkpoints in: the ResNet in any file that holds one, read without executing anything.

`load_encoder` finds it in files of ours, of the authors, torchvision, MoCo and other tools;
`load_released` reads the authors' whole model, `start_from` one of ours or an encoder;
`load_checkpoint` reads any file of torch.save's.
"""
import argparse
import errno
import hashlib
import os
import pathlib
import re
import types

import numpy as np
import torch
import torch.nn.functional as F

from care import ARCHS, Encoder, InputError

# ----------------------------------------------------------------------------------- any checkpoint
class Inert:
    """Takes the place of numpy's types: unpickling the real ones can be made to read any memory."""

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state


def numpy_scalar(dtype, data):
    """A number or string of numpy's, from its dtype and bytes as the file has them; or Inert."""
    code = dtype.state[1] + dtype.args[0]  # byte order, kind and size, as "<f8"
    if not re.fullmatch("[<>|][biufcSU][0-9]+", code):
        return Inert(code, data)
    return np.ndarray((), code, data)[()]


HARMLESS = {  # types that a checkpoint may hold besides tensors -> what is called for them
    "argparse.Namespace": argparse.Namespace, "types.SimpleNamespace": types.SimpleNamespace,
    "pathlib.PosixPath": pathlib.PurePosixPath, "pathlib.WindowsPath": pathlib.PureWindowsPath,
    "numpy.dtype": Inert, "numpy.ndarray": Inert,
    "numpy.core.multiarray.scalar": numpy_scalar, "numpy._core.multiarray.scalar": numpy_scalar,
    "numpy.core.multiarray._reconstruct": Inert, "numpy._core.multiarray._reconstruct": Inert,
    "collections.defaultdict": lambda factory: {}, "builtins.dict": dict, "builtins.list": list,
    "builtins.int": int, "builtins.float": float, "builtins.bytes": bytes,
}


def load_checkpoint(path):
    """What torch.save wrote, on the CPU. InputError when broken or with more than HARMLESS."""
    try:
        with torch.serialization.safe_globals([(call, name) for name, call in HARMLESS.items()]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes make the unpickler raise anything
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which is of a short file
            raise
        text = str(error) or type(error).__name__
    if refused := re.search(r"GLOBAL (\S+)", text):
        raise InputError(f"{path}: holds more than tensors and numbers: {refused[1]} is not loaded;"
                         " save the weights alone, by torch.save(model.state_dict(), FILE)")
    reason = text.split("WeightsUnpickler error:")[-1].strip().split("\n")[0]
    raise InputError(f"{path}: truncated, not a checkpoint, or more than tensors ({reason})")


def check_state(path, state, wanted):
    """InputError unless `state` is finite, with the keys (counts aside) and shapes of `wanted`."""
    missing = [key for key in wanted if key not in state and "num_batches_tracked" not in key]
    extra = [key for key in state if key not in wanted]
    both = [key for key in wanted if key in state]
    shapes = [f"{key} is {tuple(state[key].shape)}, not {tuple(wanted[key].shape)}"
              for key in both if state[key].shape != wanted[key].shape]
    bad = [key for key in both if not torch.isfinite(state[key]).all()]
    problems = {"missing": missing, "unexpected": extra, "wrong shape:": shapes, "not finite:": bad}
    for what, keys in problems.items():
        if keys:
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            raise InputError(f"{path}: {what} {', '.join(keys[:5])}{more}")


# ----------------------------------------------------------------------------------------- encoders
def find_trunks(tree, place=""):
    """ResNets in nested dicts: {"net": {"a.conv1.weight": t}} -> {"net.a.": (tensors, "a.")}."""
    found = {}
    tensors = {str(key): value for key, value in tree.items() if isinstance(value, torch.Tensor)}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= find_trunks(value, f"{place}{key}.")
    for key in tensors:
        prefix = key.removesuffix("conv1.weight")
        if prefix != key and prefix + "layer1.0.conv1.weight" in tensors:
            found[place + prefix] = (tensors, prefix)
    return found


def is_online(prefix):
    """Whether a prefix names the online encoder, not its moving average or something unknown."""
    parts = prefix.split(".")[:-1]
    plain = ("module", "_orig_mod", "model", "state_dict", "backbone", "encoder")
    online = ("online", "student", "encoder_q", "base_encoder")
    return all(part in plain for part in parts) or any(part.startswith(online) for part in parts)


def read_trunk(path, prefix=None):
    """Return a dict of tensors with a ResNet in it, and its prefix: the given or the online one."""
    checkpoint = load_checkpoint(path)
    if not isinstance(checkpoint, dict):
        raise InputError(f"{path}: holds no state dict of tensors")
    trunks = find_trunks(checkpoint)
    if not trunks:
        raise InputError(f"{path}: no ResNet encoder in it (no conv1 beside layer1.0.conv1)")
    chosen = [trunk for trunk in trunks if len(trunks) == 1 or is_online(trunk)]
    if prefix is not None:
        chosen = [trunk for trunk in trunks if trunk.rstrip(".") == prefix.rstrip(".")]
    if len(chosen) != 1:
        raise InputError(f"{path}: which ResNet of {', '.join(map(repr, trunks))}? Save one alone,"
                         " or choose with load_encoder(..., prefix=...)")
    return trunks[chosen[0]]


def load_encoder(path, arch=None, stem=None, prefix=None):
    """The ResNet in a checkpoint of ours, of the authors' or of any other tool.

    arch and stem are read off the shapes. Of several ResNets the online one is taken, or the one
    under `prefix`. Other weights (fc, projectors) are left out and named in `left_out`.
    A 3x3 stem has padding 1 here; one trained with padding 2 (solo-learn's CIFAR ResNets) looks the
    same in a file, and its features come out 17 % off. InputError when arch or stem contradict the
    file, when several ResNets might be meant, for missing, unknown, misshapen or infinite tensors.
    """
    tensors, prefix = read_trunk(path, prefix)
    state, left_out = {}, []
    for key, value in tensors.items():
        name = key[os.path.commonprefix((key, prefix)).rfind(".") + 1:]  # without the common part
        if key.startswith(prefix) and re.match(r"(conv|bn|norm|layer|stem|downsample)\d*\.", name):
            state[name] = value
        elif name.split(".")[0] not in left_out:
            left_out.append(name.split(".")[0])
    found_stem = "cifar" if state["conv1.weight"].shape[-1] == 3 else "imagenet"
    with torch.device("meta"):
        wanted = {name: Encoder(name, found_stem).state_dict() for name in ARCHS}

    def matches(name):  # -> how many tensors of this architecture the file has
        same = [key in state and state[key].shape == x.shape for key, x in wanted[name].items()]
        return sum(same)

    found_arch = max(ARCHS, key=matches)  # of equals the first: the smallest
    for what, given, found in (("arch", arch, found_arch), ("stem", stem, found_stem)):
        if given not in (None, found):
            raise InputError(f"{path}: {what} {given} was asked for, but the file holds {found}")
    check_state(path, state, wanted[found_arch])
    encoder = Encoder(found_arch, found_stem)
    encoder.load_state_dict(state, strict=False)  # num_batches_tracked may be missing
    encoder.left_out = left_out
    return encoder


def checkpoint_file(text):
    """A type= of argparse: a file that is there, or `random`."""
    if os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text}: is a folder; give a file, as encoder.pth in it")
    if text != "random" and not os.path.isfile(text):
        raise argparse.ArgumentTypeError(f"{text or 'is empty'}: no such file (nor random)")
    return text


def open_encoder(pretrained, arch, stem, seed):
    """The encoder of a --pretrained: a checkpoint's, or of random weights drawn by the seed."""
    if pretrained != "random":
        return load_encoder(pretrained, arch, stem)
    torch.manual_seed(seed)
    encoder = Encoder(arch or "resnet50", stem or "imagenet")
    encoder.left_out = []
    return encoder


def sha256_of(encoder):
    """The sha256 of an encoder's tensors: it identifies the encoder independently of the file."""
    digest = hashlib.sha256()
    for name, tensor in encoder.state_dict().items():
        if not name.endswith("num_batches_tracked"):  # no feature depends on it; some files lack it
            digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def sha256_of_file(path):
    """The sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------ a model begun
SHAPING = ("method", "blocks", "heads", "position", "tap", "hidden_dim")  # besides arch and stem
OWN_KEYS = {"model", "model_args", "unreadable"}  # among those of a last.pth of train.py


def start_from(model, path, settings):
    """Load into a CARE, made with `settings`, all that a last.pth of train.py holds.

    Of any other file the encoder, into both branches. Position tables for another image size are
    resized linearly, along each axis. -> remarks. InputError, and nothing changed, if it differs.
    """
    checkpoint = load_checkpoint(path)
    if not isinstance(checkpoint, dict) or OWN_KEYS - checkpoint.keys():
        encoder = load_encoder(path, model.online.encoder.arch, model.online.encoder.stem)
        for branch in (model.online, model.momentum):
            branch.encoder.load_state_dict(encoder.state_dict())
        left_out = ", ".join(encoder.left_out)
        return [f"{path}: left out {left_out}"] if left_out else []
    then = checkpoint["model_args"]
    differ = [f"--{name.replace('_', '-')} {then[name]}" for name in SHAPING
              if name in then and then[name] != settings[name]]
    if differ:
        raise InputError(f"{path}: holds a model of {' '.join(differ)}; give the same, or the "
                         "encoder.pth beside it, to start from its encoder alone")
    state, own = checkpoint["model"], model.state_dict()
    remarks = []
    for key in own:
        if ".position." in key and key in state and len(state[key]) != len(own[key]):
            state[key] = resize_table(state[key], len(own[key]))
            remarks = [f"{path}: position tables resized from {then['image_size']} to "
                       f"{settings['image_size']} px, linearly along each axis"]
    check_state(path, state, own)
    model.load_state_dict(state)
    return remarks


def resize_table(table, length):
    """A position table (L, d), of rows, columns or offsets -> (length, d), by linear interpolation.

    Ends of the range it covers stay ends, so that the middle, offset 0, stays the middle.
    """
    resized = F.interpolate(table.T[None], length, mode="linear", align_corners=False)
    return resized[0].T  # (length, d)


# ------------------------------------------------------------------------------- the authors' model
# Part of a key of CARE.state_dict() -> the authors' name for it. Part by part,
# online.transformer.0.attention.position.rel_height becomes
# student_encoder.trans.net.0.net.3.pos_emb.rel_height. No part is in another: any order will do.
RELEASED_NAMES = {
    "online.": "student_encoder.", "momentum.": "teacher_encoder.", ".encoder.": ".",
    "projector_c.": "fc1.", "projector_t.": "fc2.", "transformer.": "trans.net.",
    "predictor_c.0.": "student_encoder.fc1.4.", "predictor_t.0.": "student_encoder.fc2.4.",
    "predictor_c.1.": "student_encoder.fc1.5.", "predictor_t.1.": "student_encoder.fc2.5.",
    "predictor_c.3.": "student_encoder.fc1.7.", "predictor_t.3.": "student_encoder.fc2.7.",
    "attention.": "net.3.", "position.": "pos_emb.", "mlp1.": "net.0.", "mlp2.": "net.7.",
    "norm1.": "net.1.", "norm2.": "net.5.", "norm3.": "net.8.",
}


def released_key(key):
    """The authors' name, less `module.`, of a key of CARE.state_dict()."""
    for ours, theirs in RELEASED_NAMES.items():
        key = key.replace(ours, theirs)
    return key


def load_released(model, path):
    """Load the authors' checkpoint into a CARE. InputError, and nothing changed, if it differs."""
    tensors, prefix = read_trunk(path)
    wrapper = prefix.removesuffix("student_encoder.")  # as "module."
    state = {key.removeprefix(wrapper): value for key, value in tensors.items()}
    own = model.state_dict()
    check_state(path, state, {released_key(key): value for key, value in own.items()})
    model.load_state_dict({key: state[released_key(key)] for key in own})
