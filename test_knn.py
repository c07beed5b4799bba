"""knn.py: labelled images, scoring them in order, and kNN."""
import argparse
import json
import math
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from torchvision import transforms

import care
import data
import knn
from care import Encoder, save_encoder
from conftest import CPU, class_folders, images, photo, torchrun
from run import setup_ranks


# ---------------------------------------------------------------------------------- labelled images
def labelled(data="shapes:4000", size=32, **more):
    return SimpleNamespace(data=str(data), data_root="data", image_size=[size, size], **more)


def test_labels_are_as_many_of_every_class_and_always_the_same(tmp_path):
    train, val = knn.open_labelled(labelled(seed=0), 100)
    assert knn.labels_of(train).bincount().tolist() == [10] * 10
    assert val.split == "val" and val.classes == data.Shapes.classes
    other_seed, _ = knn.open_labelled(labelled(seed=1), 100)
    assert list(train.indices) == list(other_seed.indices)
    whole, _ = knn.open_labelled(labelled(data="shapes:50"), 100)
    assert len(whole) == 50
    with pytest.raises(care.InputError, match="9 labels are fewer than the 10 classes"):
        knn.open_labelled(labelled(), 9)
    for split, names in (("train", "ab"), ("val", "ac")):
        class_folders(tmp_path / "set" / split, names)
    with pytest.raises(care.InputError, match="differ in classes .b, c"):
        knn.open_labelled(labelled(tmp_path / "set"))
    with pytest.raises(care.InputError, match="no folder train"):
        knn.open_labelled(labelled(images(tmp_path / "flat", 3)))


# ---------------------------------------------------------------------------------- scoring and kNN
def test_scoring_crops_are_torchvisions():
    """Resize 256, centre crop 224; a picture that has the input's size is scored whole."""
    standard = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    picture = photo(0, height=300, width=400)
    found = knn.centre_crop(picture, [224, 224])
    assert torch.equal(found, TF.pil_to_tensor(standard(picture)))
    whole = photo(1, height=32, width=48)
    assert torch.equal(knn.centre_crop(whole, [32, 48]), TF.pil_to_tensor(whole))
    assert knn.centre_crop(whole, [48, 32]).shape == (3, 48, 32)


def test_top_k_is_a_naive_count():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(50, 12, generator=generator)
    labels = torch.randint(12, (50,), generator=generator)
    first = five = 0
    for row, label in zip(scores.tolist(), labels.tolist()):
        rank = sum(score > row[label] for score in row)
        first, five = first + (rank < 1), five + (rank < 5)
    assert knn.count_correct(scores, labels).tolist() == [first, five]
    assert knn.count_correct(scores[:, :3], labels % 3)[1] == 50  # fewer than five classes


def alone(**changes):
    """A run on one rank, and the arguments that scoring reads."""
    run = SimpleNamespace(rank=0, world=1, device=CPU, stopping=[],
                          autocast=torch.autocast("cpu", enabled=False))
    vars(run).update(changes)
    return run, SimpleNamespace(image_size=[32, 32], seed=0, workers=0, out="x")


@pytest.mark.parametrize("count, batch, world", [(10, 4, 1), (10, 4, 2), (7, 6, 3), (2, 8, 4)])
def test_every_image_is_scored_once(count, batch, world, monkeypatch):
    monkeypatch.setattr(knn, "SCORING_BATCH", batch)
    monkeypatch.setattr(knn, "agree", lambda flag: max(int(flag), 0))
    seen = []
    for rank in range(world):
        run, args = alone(rank=rank, world=world)
        source = data.Shapes("val", count, 32)
        found = [labels for _, labels in knn.batches_in_order(run, args, source, "val")]
        assert all(0 < len(labels) <= max(1, batch // world) for labels in found)
        seen += torch.cat(found).tolist() if found else []
    assert sorted(seen) == list(range(count))  # fewer than ten: label = index


def labelled_features(encoder, source):
    """Normalised features and labels, image by image, in numpy."""
    found = []
    for image, label in (source[index] for index in range(len(source))):
        x = TF.normalize(TF.to_tensor(image), data.IMAGENET_MEAN, data.IMAGENET_STD)[None]
        with torch.no_grad():
            feature = encoder(x)[1].mean((2, 3))[0].numpy().astype(np.float64)
        found.append((feature / np.sqrt((feature ** 2).sum()), label))
    return found


def brute_force(queries, bank, k):
    """Top-1 and top-5 in percent, by loops."""
    first = five = 0
    for query, truth in queries:
        votes = [0.0] * 10
        cosines = sorted(((float(query @ other), label) for other, label in bank), reverse=True)
        for cosine, label in cosines[:k]:
            votes[label] += math.exp(cosine / 0.07)
        rank = sum(vote > votes[truth] for vote in votes)
        first, five = first + (rank == 0), five + (rank < 5)
    return 100 * first / len(queries), 100 * five / len(queries)


@pytest.fixture(scope="module")
def warm_encoder():
    """Its batch norms have seen images."""
    torch.manual_seed(0)
    encoder = Encoder("thin")
    for seed in range(30):
        image = TF.to_tensor(photo(seed, 64, 64))
        encoder(torch.stack([image, image.flip(2), image.flip(1)]) * 4 - 2)
    return encoder


def test_knn_is_a_brute_force_loop(warm_encoder, monkeypatch):
    """k = 20 is the head of k = 200, batch by batch; a bank smaller than k votes as a whole."""
    monkeypatch.setattr(knn, "SCORING_BATCH", 32)
    run, args = alone()
    val = data.Shapes("val", 60, 32)
    queries = labelled_features(warm_encoder.eval(), val)
    known = labelled_features(warm_encoder, data.Shapes("train", 230, 32))
    for count in (230, 70):
        bank = data.Shapes("train", count, 32)
        found = knn.knn(run, args, warm_encoder.train(), bank, val)
        for k, suffix in ((20, ""), (200, "_k200")):
            expected = brute_force(queries, known[:count], k)
            assert (found[f"top1{suffix}"], found[f"top5{suffix}"]) == pytest.approx(expected)
    assert found["top1"] != found["top1_k200"]
    first = knn.knn(run, args, warm_encoder, bank, val, ks=(20,))
    assert first == {"top1": found["top1"], "top5": found["top5"]}


@pytest.mark.parametrize("mode", [True, False])
def test_knn_leaves_the_encoder_and_the_random_state_alone(mode, warm_encoder):
    before = {name: value.clone() for name, value in warm_encoder.state_dict().items()}
    warm_encoder.train(mode)
    run, args = alone()
    state = torch.get_rng_state()
    bank, val = data.Shapes("train", 20, 32), data.Shapes("val", 10, 32)
    knn.knn(run, args, warm_encoder, bank, val)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training is mode for module in warm_encoder.modules())
    for name, value in warm_encoder.state_dict().items():
        assert torch.equal(before[name], value)


@pytest.mark.parametrize("batches", [0, 1, 4])
def test_knn_gives_nothing_after_a_signal(batches, warm_encoder, monkeypatch):
    """Before, while features of val are taken, while those of the bank are."""
    run, args = alone()
    monkeypatch.setattr(knn, "SCORING_BATCH", 5)
    batches_in_order, seen = knn.batches_in_order, []

    def interrupted(*arguments):
        for batch in batches_in_order(*arguments):
            seen.append(batch)
            yield batch
            if len(seen) == batches:
                run.stopping.append(signal.SIGTERM)

    monkeypatch.setattr(knn, "batches_in_order", interrupted)
    if batches == 0:
        run.stopping.append(signal.SIGTERM)
    found = knn.knn(run, args, warm_encoder, data.Shapes("train", 20, 32),
                            data.Shapes("val", 10, 32))
    assert found is None and len(seen) == batches


def knn_of_a_rank(weights, out):
    """kNN of odd numbers of images; a rank's running statistics are its own on a CPU."""
    rank, world, device = setup_ranks(argparse.Namespace(workers=0))
    run, args = alone(rank=rank, world=world, device=device)
    encoder = Encoder("thin")
    encoder.load_state_dict(torch.load(weights, weights_only=True))
    knn.SCORING_BATCH = 32
    if rank > 0:
        encoder.bn1.running_mean += 1
    found = knn.knn(run, args, encoder, data.Shapes("train", 231, 32),
                            data.Shapes("val", 61, 32))
    assert rank == 0 or encoder.bn1.running_mean.mean() > 0.5
    Path(f"{out}{rank}").write_text(json.dumps(found))


def test_two_ranks_score_knn_as_one(warm_encoder, tmp_path):
    save_encoder(warm_encoder, tmp_path / "encoder.pth")
    result = torchrun(2, knn_of_a_rank, tmp_path / "encoder.pth", tmp_path / "rank")
    assert result.returncode == 0, result.stderr
    run, args = alone()
    one = knn.knn(run, args, warm_encoder, data.Shapes("train", 231, 32),
                          data.Shapes("val", 61, 32))
    for rank in (0, 1):
        assert json.loads((tmp_path / f"rank{rank}").read_text()) == pytest.approx(one)
