"""Stacks of images and one-class-out pools: every part is where its split says, and the classifier
of parts finds their modes."""

import gzip
import struct

import pytest
import torch

from ebm import EBMError, data, metrics, reference, seeds
from ebm.data import files
from ebm.schema import ClassifierReference, CoordinatesReference, NoveltyData, StackedData

CPU = torch.device("cpu")
CLASSIFIER = ClassifierReference(
    kind="classifier", width=8, epochs=12, batch_size=64, learning_rate=3e-3, threads=1
)
COUNTS = {"mnist/train": 60, "mnist/t10k": 40}


@pytest.fixture(scope="module")
def stacks():
    counts = {"train": 500, "validation": 20, "test": 300}
    settings = {"base": "digits", "parts": 3, "held_out": 180, "seed": 0, "reference": CLASSIFIER}
    return data.prepare(StackedData(kind="stacked", **counts, **settings))


@pytest.fixture(scope="module")
def judge(stacks):
    seeds.seed("reference", 0)
    return reference.make(CLASSIFIER, stacks, CPU)


def test_the_mode_of_a_stack_is_the_number_that_its_classes_spell():
    assert data.mode(torch.tensor([[0, 0, 7], [9, 1, 2]])).tolist() == [7, 912]


def test_the_parts_of_a_stack_are_images_of_its_split_and_spell_its_mode(stacks):
    for split in data.SPLITS:
        singles = stacks.tensors[f"{split}_parts"]
        classes = stacks.tensors[f"{split}_parts_labels"]
        kinds = {bytes(i.numpy().tobytes()): int(c) for i, c in zip(singles, classes, strict=True)}
        for stack, label in zip(stacks.tensors[split], stacks.labels(split), strict=True):
            found = [kinds[part.numpy().tobytes()] for part in stack]
            assert int("".join(map(str, found))) == label


def test_no_part_of_a_test_stack_was_trained_on(stacks):
    train, test = (
        {image.numpy().tobytes() for image in stacks.tensors[f"{split}_parts"]}
        for split in ("train", "test")
    )
    assert len(test) == 180
    assert not train & test


def test_the_classifier_of_parts_finds_modes(judge, stacks):
    x = stacks.points("test")
    found = judge.see(x).classes
    right = (found == stacks.labels("test")).double().mean().item()
    assert judge.metrics["accuracy"] == right
    assert judge.metrics["part_accuracy"] > 0.97
    assert right == pytest.approx(judge.metrics["part_accuracy"] ** 3, abs=0.05)
    assert judge.see(x).logits.shape == (300, 3, 10)


def test_its_features_of_a_stack_are_those_of_its_parts_one_after_another(judge, stacks):
    x = stacks.points("test")[:5]
    network = judge.network.classifier
    with torch.no_grad():
        parts = [network.features(x[:, part]) for part in range(3)]
    torch.testing.assert_close(judge.see(x).features, torch.cat(parts, 1))


def test_it_comes_back_from_its_folder_and_is_at_rest(judge, stacks, tmp_path):
    """MEG's released counter leaves the classifier in training mode."""
    reference.write(judge, tmp_path)
    again = reference.read(tmp_path, stacks, CPU)
    assert not any(module.training for module in again.network.modules())
    x = stacks.points("test")
    assert torch.equal(again.see(x).classes, judge.see(x).classes)


def test_real_stacks_score_the_floor_of_the_mode_kl(stacks):
    """n uniform draws over K cells: (K - 1) / (2 n) to first order; here of few and many."""
    torch.manual_seed(0)
    for n in (26_000, 200_000):
        kl = metrics.kl_to_uniform(metrics.mode_counts(torch.randint(1000, (n,)), 1000))
        assert kl == pytest.approx(999 / (2 * n), rel=0.15)


def idx(array):
    header = struct.pack(f">HBB{array.dim()}i", 0, 8, array.dim(), *array.shape)
    return gzip.compress(header + array.numpy().tobytes())


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """A mirror with a hundred images, each of which is its own number."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    first = 0
    for part, count in COUNTS.items():
        name = part.removeprefix("mnist/")
        numbers = torch.arange(first, first + count)
        images = numbers.view(-1, 1, 1).expand(-1, 28, 28).to(torch.uint8).contiguous()
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(idx((numbers % 10).to(torch.uint8)))
        first += count
    monkeypatch.setenv(files.MIRROR, str(tmp_path))
    monkeypatch.setattr(files.pooch, "file_hash", lambda path, algorithm: "right")
    monkeypatch.setattr(files, "CHECKSUMS", dict.fromkeys(files.CHECKSUMS, "sha256:right"))


def pool(**changes):
    settings = {"name": "mnist", "train": 0.8, "validation": 5, "seed": 0}
    as_they_are = CoordinatesReference(kind="coordinates")
    return data.prepare(NoveltyData(kind="novelty", reference=as_they_are, **settings | changes))


def test_the_pool_is_split_once_and_completely(mnist):
    tensors = pool().tensors
    assert [len(tensors[split]) for split in data.SPLITS] == [80, 5, 15]
    numbers = torch.cat([tensors[split][:, 0, 0] for split in data.SPLITS])
    assert sorted(numbers.tolist()) == list(range(100))
    assert torch.equal(tensors["test_labels"], tensors["test"][:, 0, 0].long() % 10)


def test_the_released_second_split_is_another_and_leaks(mnist):
    prepared = pool()
    again = prepared.tensors["released_index"]
    assert len(again) == 20
    assert len(again.unique()) == 20
    leaked = (again < 80).double().mean().item()  # rows of train come first
    assert 0.5 < leaked < 1


def test_nothing_left_to_test_is_an_error(mnist):
    with pytest.raises(EBMError, match="leave nothing of 100 images"):
        pool(validation=20)
