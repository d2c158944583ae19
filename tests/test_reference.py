"""The network that measures: it learns, the same seed gives the same bits, files are checked."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ebm import EBMError, data, metrics, reference, seeds
from ebm.reference import Classifier, Inception, Network
from ebm.schema import ClassifierReference, DigitsData, InceptionReference

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SETTINGS = ClassifierReference(
    kind="classifier", width=8, epochs=12, batch_size=64, learning_rate=3e-3, threads=1
)


@pytest.fixture(scope="module")
def prepared():
    split = {"validation": 180, "test": 360, "seed": 0}
    return data.prepare(DigitsData(kind="digits", binarize="none", reference=SETTINGS, **split))


def made(prepared, seed=0):
    seeds.seed("reference", seed)
    return reference.make(SETTINGS, prepared, CPU)


@pytest.fixture(scope="module")
def digits(prepared):
    return made(prepared)


def test_a_classifier_learns_the_digits_in_seconds(digits, prepared):
    assert digits.metrics["accuracy"] > 0.97
    seen = digits.see(prepared.points("test")).classes == prepared.labels("test")
    assert digits.metrics["accuracy"] == seen.double().mean().item()


@pytest.mark.parametrize(("accuracy", "told"), [(0.5, True), (0.74, True), (0.76, False)])
def test_a_classifier_that_knows_little_says_so(caplog, accuracy, told):
    reference._warn_of_ignorance(accuracy, torch.tensor([0, 1, 0, 1]))
    assert ("of which 50.0% are of one class: distances by it mean" in caplog.text) == told


def test_its_floors_are_small_beside_what_noise_scores(digits, prepared):
    test = digits.statistics["test"]
    noise = digits.see(torch.rand(360, 8, 8)).features
    assert 0 < digits.metrics["frechet_distance"] < metrics.frechet_distance(noise, test) / 20
    assert abs(digits.metrics["kernel_distance"]) < metrics.kernel_distance(noise, test) / 20


def test_statistics_are_those_of_the_features(digits, prepared):
    for split in ("train", "test"):
        features = digits.see(prepared.points(split)).features
        mean, covariance = metrics.moments(features)
        assert torch.equal(digits.statistics[split], features)
        assert torch.equal(digits.statistics[f"{split}_mean"], mean)
        assert torch.equal(digits.statistics[f"{split}_covariance"], covariance)


def test_images_that_were_learned_look_like_images_that_were_not(digits):
    """Without warping, training images cover less than half of the test split."""
    train, test = digits.statistics["train"][:360], digits.statistics["test"]
    precision, recall = metrics.precision_recall(train, test)
    assert precision > 0.8
    assert recall > 0.8


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(prepared, digits):
    again, other = made(prepared), made(prepared, seed=1)
    weights = digits.network.state_dict()
    assert all(torch.equal(w, again.network.state_dict()[k]) for k, w in weights.items())
    assert not torch.equal(digits.statistics["test"], other.statistics["test"])


def test_features_do_not_depend_on_the_batch(digits, prepared):
    x = prepared.points("test")
    torch.testing.assert_close(digits.see(x[:7]).features, digits.see(x).features[:7])
    assert not digits.network.training


def test_what_is_written_is_read_back(digits, prepared, tmp_path):
    reference.write(digits, tmp_path)
    back = reference.read(tmp_path, prepared, CPU)
    x = prepared.points("validation")
    assert torch.equal(back.see(x).features, digits.see(x).features)
    assert torch.equal(back.see(x).classes, digits.see(x).classes)
    assert (back.metrics, back.config) == (digits.metrics, digits.config)
    assert all(torch.equal(back.statistics[k], v) for k, v in digits.statistics.items())


@pytest.mark.parametrize("file", ["config.json", "metrics.json", "weights", "statistics"])
@pytest.mark.parametrize("how", ["remove", "truncate"])
def test_a_corrupt_folder_is_one_line_that_names_it(digits, prepared, tmp_path, file, how):
    reference.write(digits, tmp_path)
    path = tmp_path / (file if "." in file else f"{file}.safetensors")
    raw = path.read_bytes()
    path.unlink() if how == "remove" else path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(EBMError, match="run its reference stage again") as caught:
        reference.read(tmp_path, prepared, CPU)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_of_another_network_are_refused(digits, prepared, tmp_path):
    reference.write(digits, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(digits.config | {"width": 4}))
    with pytest.raises(EBMError, match="unusable"):
        reference.read(tmp_path, prepared, CPU)


def test_data_without_labels_cannot_train_a_classifier(prepared):
    images = {k: v for k, v in prepared.tensors.items() if not k.endswith("labels")}
    with pytest.raises(EBMError, match="no labels"):
        reference.make(SETTINGS, data.Prepared(images, prepared.manifest), CPU)


def test_of_one_class_there_is_nothing_to_tell(prepared):
    """A folder of usual images, beside one of outliers: the features would be those of chance."""
    one = {
        k: torch.zeros_like(v) if k.endswith("labels") else v for k, v in prepared.tensors.items()
    }
    with pytest.raises(EBMError, match="the data have one class; use 'coordinates'"):
        reference.make(SETTINGS, data.Prepared(one, prepared.manifest), CPU)


def test_coordinates_are_the_points_themselves(prepared, tmp_path):
    (tmp_path / "config.json").write_text('{"kind": "coordinates"}')
    found = reference.read(tmp_path, prepared, CPU)
    x = prepared.points("test")
    assert torch.equal(found.see(x).features, x.view(-1, 64))
    assert torch.equal(found.statistics["test_mean"], x.double().view(-1, 64).mean(0))
    assert found.see(x).classes is None


@pytest.mark.parametrize("shape", [(8, 8), (28, 28), (3, 32, 32), (1, 9, 13)])
def test_a_classifier_takes_images_of_many_shapes(shape):
    network = Classifier(shape, classes=7, width=2).eval()
    x = torch.rand(5, *shape)
    assert network.features(x).shape == (5, reference.FEATURES)
    assert network.logits(x).shape == (5, 7)
    assert torch.equal(network.logits(x), network.head(network.features(x)))


def test_warping_by_nothing_is_the_identity_and_else_keeps_the_range():
    torch.manual_seed(0)
    x = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(reference.warped(x, 0.0), x)
    moved = reference.warped(x[:, 0], 0.2)
    assert moved.shape == (4, 8, 8)
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert not torch.allclose(moved, x[:, 0], atol=0.1)


@pytest.fixture(scope="module")
def inception():
    torch.manual_seed(0)
    return Inception().eval()


def test_inception_measures_grey_and_coloured_images(inception):
    grey = torch.rand(2, 8, 8)
    with torch.no_grad():
        features = inception.features(grey)
        coloured = inception.features(grey.unsqueeze(1).expand(2, 3, 8, 8))
    assert features.shape == (2, 2048)
    torch.testing.assert_close(features, coloured)


def test_inception_is_written_and_read_like_a_classifier(inception, prepared, tmp_path):
    statistics = {"test": torch.zeros(3, 2)}
    reference.write(
        reference.Reference(inception, {"kind": "inception"}, statistics, {}), tmp_path
    )
    back = reference.read(tmp_path, prepared, CPU)
    x = prepared.points("test")[:1]
    with torch.no_grad():
        assert torch.equal(back.see(x).features, inception.features(x))
    assert back.see(x).classes is None


def test_inception_without_a_network_is_one_line(prepared, monkeypatch):
    def offline(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    settings = InceptionReference(kind="inception", threads=1)
    with pytest.raises(EBMError, match="cannot be had") as caught:
        reference.make(settings, prepared, CPU)
    assert "\n" not in str(caught.value)


def test_every_kind_of_the_schema_has_a_network():
    from typing import get_args

    from ebm.schema import Reference

    kinds = {
        get_args(c.model_fields["kind"].annotation)[0] for c in get_args(get_args(Reference)[0])
    }
    assert kinds | {"parts"} == set(reference.NETWORKS)  # what `classifier` is for stacks
    assert all(issubclass(network, Network) for network in reference.NETWORKS.values())


def test_of_large_images_the_coordinates_are_means_of_pixels():
    x = torch.rand(5, 3, 64, 48)
    means = x.unflatten(2, (16, 4)).unflatten(4, (16, 3)).mean((3, 5))
    assert torch.allclose(Network().features(x), means.flatten(1), atol=1e-6)
    assert torch.allclose(Network().features(x[:, 0]), means[:, 0].flatten(1), atol=1e-6)
    small = torch.rand(5, 16, 16)
    assert torch.equal(Network().features(small), small.flatten(1))


def test_the_stage_imports_no_torch_for_coordinates(tmp_path):
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    code = "import sys; from pipelines.reference import reference; reference('8gaussians'); "
    code += "sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=False)
    assert run.returncode == 0
    config = tmp_path / "models/reference/8gaussians/config.json"
    assert json.loads(config.read_text()) == {"kind": "coordinates"}


def test_its_floors_are_the_distances_of_its_own_splits(digits):
    train, test = digits.statistics["train"], digits.statistics["test"]
    for name in ("frechet_distance", "kernel_distance"):
        assert digits.metrics[name] == pytest.approx(getattr(metrics, name)(train, test))


def test_no_training_image_of_a_classifier_comes_as_it_is(monkeypatch):
    seen = []
    monkeypatch.setattr(reference, "warped", lambda x, reach: seen.append((len(x), reach)) or x)
    network = reference.Classifier((8, 8), classes=2, width=2)
    reference.train(
        network,
        torch.rand(20, 8, 8),
        torch.arange(20) % 2,
        epochs=3,
        batch_size=8,
        learning_rate=1e-3,
    )
    assert seen == [(8, reference.WARP)] * 6
