"""common/knn.py: kNN against loops, on one rank and two."""
import argparse
import json
import math
import signal
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF

from care import Encoder
from common import knn, views
from common.data import ImageFiles
from common.run import Run
from common.shapes import Shapes
from conftest import images, photo, torchrun


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


def alone():
    """A run of this process, and the arguments that scoring reads."""
    args = argparse.Namespace(image_size=[32, 32], seed=0, workers=0, precision="fp32", out=None)
    return Run(args, ()), args


def score_in_batches_of(monkeypatch, size):
    """Of this many images, over all ranks, in place of SCORING_BATCH."""
    monkeypatch.setattr(Run, "in_order", partialmethod(Run.in_order, batch_size=size))


@pytest.mark.parametrize("count, batch, world", [(10, 4, 1), (10, 4, 2), (7, 6, 3), (2, 8, 4)])
def test_every_image_is_scored_once(count, batch, world, monkeypatch):
    score_in_batches_of(monkeypatch, batch)
    source, seen = Shapes("val", count, 32), []
    for rank in range(world):
        run, _ = alone()
        run.rank, run.world = rank, world
        found = [labels for _, labels in run.in_order(source, TF.pil_to_tensor, "val")]
        assert all(0 < len(labels) <= max(1, batch // world) for labels in found)
        seen += torch.cat(found).tolist() if found else []
    assert sorted(seen) == list(range(count))  # fewer than ten: label = index


def labelled_features(encoder, source):
    """Normalised features and labels, image by image, in numpy."""
    found = []
    for image, label in (source[index] for index in range(len(source))):
        x = TF.normalize(TF.to_tensor(image), views.IMAGENET_MEAN, views.IMAGENET_STD)[None]
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
    score_in_batches_of(monkeypatch, 32)
    run, args = alone()
    val = Shapes("val", 60, 32)
    queries = labelled_features(warm_encoder.eval(), val)
    known = labelled_features(warm_encoder, Shapes("train", 230, 32))
    for count in (230, 70):
        bank = Shapes("train", count, 32)
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
    bank, val = Shapes("train", 20, 32), Shapes("val", 10, 32)
    knn.knn(run, args, warm_encoder, bank, val)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training is mode for module in warm_encoder.modules())
    for name, value in warm_encoder.state_dict().items():
        assert torch.equal(before[name], value)


@pytest.mark.parametrize("batches", [0, 1, 4])
def test_knn_gives_nothing_after_a_signal(batches, warm_encoder, monkeypatch):
    """Before, while features of val are taken, while those of the bank are."""
    run, args = alone()
    in_order, seen = Run.in_order, []

    def interrupted(*arguments, **named):
        for batch in in_order(*arguments, batch_size=5, **named):
            seen.append(batch)
            yield batch
            if len(seen) == batches:
                run.signals.append(signal.SIGTERM)

    monkeypatch.setattr(Run, "in_order", interrupted)
    if batches == 0:
        run.signals.append(signal.SIGTERM)
    found = knn.knn(run, args, warm_encoder, Shapes("train", 20, 32), Shapes("val", 10, 32))
    assert found is None and len(seen) == batches


def test_features_that_are_not_finite_have_no_score(capsys):
    """Finite weights whose activations overflow: kNN's votes would be those of a guess."""
    torch.manual_seed(0)
    run, args = alone()
    encoder = Encoder("thin")
    with torch.no_grad():
        encoder.bn1.weight.fill_(1e30)
        next(encoder.layer1.parameters()).mul_(1e12)
    assert all(value.isfinite().all() for value in encoder.state_dict().values())
    with pytest.raises(SystemExit) as caught:
        knn.knn(run, args, encoder, Shapes("train", 20, 32), Shapes("val", 20, 32), (5,))
    assert caught.value.code == 1
    assert "val features: not finite in torch.float32" in capsys.readouterr().err


def knn_of_a_rank(weights, out):
    """kNN of odd numbers of images; a rank's running statistics are its own on a CPU."""
    run, args = alone()
    encoder = Encoder("thin")
    encoder.load_state_dict(torch.load(weights, weights_only=True))
    Run.in_order = partialmethod(Run.in_order, batch_size=32)
    if run.rank > 0:
        encoder.bn1.running_mean += 1
    found = knn.knn(run, args, encoder, Shapes("train", 231, 32), Shapes("val", 61, 32))
    assert run.rank == 0 or encoder.bn1.running_mean.mean() > 0.5
    Path(f"{out}{run.rank}").write_text(json.dumps(found))


def test_two_ranks_score_knn_as_one(warm_encoder, tmp_path):
    torch.save(warm_encoder.state_dict(), tmp_path / "encoder.pth")
    result = torchrun(2, knn_of_a_rank, tmp_path / "encoder.pth", tmp_path / "rank")
    assert result.returncode == 0, result.stderr
    run, args = alone()
    one = knn.knn(run, args, warm_encoder, Shapes("train", 231, 32), Shapes("val", 61, 32))
    for rank in (0, 1):
        assert json.loads((tmp_path / f"rank{rank}").read_text()) == pytest.approx(one)


# ------------------------------------------------------------------------------------------- RankMe
def test_effective_rank_is_the_papers():
    """exp(entropy of the normalised singular values), against numpy; of known matrices."""
    generator = torch.Generator().manual_seed(0)
    for shape, scale in (((40, 12), 1), ((9, 30), 1e-3)):
        x = torch.randn(shape, generator=generator) * torch.logspace(0, -3, shape[1]) * scale
        values = np.linalg.svd(x.double().numpy(), compute_uv=False)
        p = values / values.sum()
        assert knn.effective_rank(x).item() == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert knn.effective_rank(torch.eye(16) * 5).item() == pytest.approx(16)
    assert knn.effective_rank(torch.ones(20, 8)).item() == pytest.approx(1, abs=1e-3)
    assert knn.effective_rank(torch.zeros(20, 8)).item() == 1


@pytest.mark.parametrize("most, chosen", [(8, range(0, 32, 4)), (40, range(32))])
def test_rankme_is_of_plain_features_of_the_same_images(most, chosen, warm_encoder, monkeypatch):
    """In eval mode and float32 under autocast, too; encoder and random state stay as they are."""
    monkeypatch.setattr(knn, "RANK_IMAGES", most)
    score_in_batches_of(monkeypatch, 5)
    run, args = alone()
    source = Shapes("train", 32, 32)
    rows = []
    warm_encoder.eval()
    for index in chosen:
        x = TF.normalize(TF.to_tensor(source[index][0]), views.IMAGENET_MEAN, views.IMAGENET_STD)
        with torch.no_grad():
            rows.append(warm_encoder(x[None])[1].mean((2, 3))[0].double().numpy())
    values = np.linalg.svd(np.stack(rows), compute_uv=False)
    p = values / values.sum()
    wanted = np.exp(-(p * np.log(p)).sum())
    before = {name: value.clone() for name, value in warm_encoder.state_dict().items()}
    state = torch.get_rng_state()
    for autocast in (run.autocast, torch.autocast("cpu", torch.bfloat16)):
        run.autocast = autocast
        found = knn.rankme(run, args, warm_encoder.train(), source)
        assert found == pytest.approx(wanted, rel=1e-4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in warm_encoder.modules())
    assert all(torch.equal(before[name], value)
               for name, value in warm_encoder.state_dict().items())
    run.signals.append(signal.SIGTERM)
    assert knn.rankme(run, args, warm_encoder, source) is None


def test_rankme_replaces_what_it_cannot_read(warm_encoder, tmp_path, capsys):
    """As training does, and names: one image of a folder does not end a run."""
    files = ImageFiles(images(tmp_path, 10))
    run, args = alone()
    whole = knn.rankme(run, args, warm_encoder, files)
    (tmp_path / "004.png").write_bytes((tmp_path / "005.png").read_bytes())
    replaced = knn.rankme(run, args, warm_encoder, files)
    (tmp_path / "004.png").write_bytes(b"")
    assert knn.rankme(run, args, warm_encoder, files) == replaced != whole
    assert capsys.readouterr().err == ""


def rankme_of_a_rank(weights, out):
    """RankMe of an odd number of images; a rank's running statistics are its own on a CPU."""
    run, args = alone()
    encoder = Encoder("thin")
    encoder.load_state_dict(torch.load(weights, weights_only=True))
    if run.rank > 0:
        encoder.bn1.running_mean += 1
    found = knn.rankme(run, args, encoder, Shapes("train", 61, 32))
    Path(f"{out}{run.rank}").write_text(json.dumps(found))


def test_two_ranks_find_the_rank_of_one(warm_encoder, tmp_path):
    torch.save(warm_encoder.state_dict(), tmp_path / "encoder.pth")
    result = torchrun(2, rankme_of_a_rank, tmp_path / "encoder.pth", tmp_path / "rank")
    assert result.returncode == 0, result.stderr
    run, args = alone()
    one = knn.rankme(run, args, warm_encoder, Shapes("train", 61, 32))
    for rank in (0, 1):
        assert json.loads((tmp_path / f"rank{rank}").read_text()) == pytest.approx(one, rel=1e-4)
