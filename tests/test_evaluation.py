"""What an evaluation says of models and samples whose truth is known."""

import math
from copy import deepcopy
from dataclasses import replace
from typing import get_args

import pytest
import torch
from small_models import MODELS

from ebm import EBMError, data, figures, metrics, reference, seeds, variants
from ebm.densities import DENSITIES
from ebm.evaluation import EVALUATORS, Evaluation, contrast, evaluate, images
from ebm.evaluation.density import density_scores, sample_scores
from ebm.evaluation.result import bound
from ebm.outliers import outlier_sets
from ebm.reference import Reference
from ebm.schema import ClassifierReference, Dataset, DensityData, DigitsData
from ebm.variants.base import EBM
from pipelines import words

CPU = torch.device("cpu")
DISTANCES = ("frechet_distance", "frechet_distance_extrapolated", "kernel_distance")
IMAGE_METRICS = {*DISTANCES, "sample_precision", "sample_recall"}
SETTINGS = ClassifierReference(
    kind="classifier", width=8, epochs=12, batch_size=64, learning_rate=3e-3, threads=1
)


class Oracle(EBM):
    """The true density as a model."""

    def __init__(self, density):
        super().__init__()
        self.density = density

    def energy(self, x):
        return -self.density.log_prob(x) + 3


class Nearest(EBM):
    """E(x) = squared distance to the nearest point that it was given."""

    def __init__(self, points):
        super().__init__()
        self.points = points.flatten(1)

    def energy(self, x):
        return torch.cdist(x.flatten(1), self.points).min(1).values ** 2


@pytest.fixture(scope="module")
def digits():
    split = {"validation": 180, "test": 360, "seed": 0}
    return data.prepare(DigitsData(kind="digits", binarize="none", reference=SETTINGS, **split))


@pytest.fixture(scope="module")
def measure(digits):
    seeds.seed("reference", 0)
    return reference.make(SETTINGS, digits, CPU)


def measured(model, samples, prepared, measure, settings=None):
    seeds.seed("evaluate", 0)
    return evaluate(model, samples, prepared, measure, {"flagged": None} | (settings or {}))


@pytest.fixture(scope="module")
def real(digits, measure):
    """The validation split, as samples of a perfect conditional model."""
    samples = {"samples": digits.points("validation"), "labels": digits.labels("validation")}
    return measured(Nearest(digits.points("train")), samples, digits, measure)


def test_real_images_score_as_their_references_say(real):
    assert set(real.metrics) >= IMAGE_METRICS
    for name in IMAGE_METRICS:
        (entry,) = real.references[name]
        kind = "ceiling" if name in ("sample_precision", "sample_recall") else "floor"
        assert entry["kind"] == kind
        assert "136 training images" in entry["source"]  # of 180, in the shares of test
    assert real.metrics["frechet_distance"] < 2 * real.references["frechet_distance"][0]["value"]
    assert real.metrics["frechet_distance_extrapolated"] < real.metrics["frechet_distance"]
    assert abs(real.metrics["kernel_distance"]) < 0.05
    assert min(real.metrics["sample_precision"], real.metrics["sample_recall"]) > 0.8


def test_one_in_a_hundred_validation_points_is_not_below_the_threshold(digits, real):
    model = Nearest(digits.points("train"))
    energies = model.energy(digits.points("validation"))
    flagged = (energies.double() >= real.thresholds["energy"]).double().mean().item()
    assert flagged == pytest.approx(0.01, abs=1 / len(energies))


def test_another_share_to_flag_is_heeded(digits, measure):
    model = Nearest(digits.points("train"))
    nothing = {"samples": digits.points("validation")[:0]}
    found = measured(model, nothing, digits, measure, {"flagged": 0.2})
    energies = model.energy(digits.points("validation"))
    flagged = (energies.double() >= found.thresholds["energy"]).double().mean().item()
    assert flagged == pytest.approx(0.2, abs=1 / len(energies))


def test_the_published_likelihood_is_of_drawn_mnist_alone(digits, measure):
    settings = {"hidden": 4, "k": 1, "chains": 0, "learning_rate": 0.1, "momentum": 0.0}
    rbm = variants.build("rbm", (8, 8), settings | {"weight_decay": 0.0}, None)
    binary = {name: x.round() if name in data.SPLITS else x for name, x in digits.tensors.items()}
    drawn = [("mnist", "sample"), ("mnist", "dynamic")]
    for name, how in (*drawn, ("mnist", "threshold"), ("fashion-mnist", "sample")):
        about = digits.manifest["settings"] | {"name": name, "binarize": how}
        prepared = data.Prepared(binary, digits.manifest | {"settings": about})
        found = measured(rbm, {"samples": binary["train"][:0]}, prepared, measure)
        kinds = {entry["kind"] for entry in found.references["log_likelihood"]}
        assert ("published" in kinds) == ((name, how) in drawn)


def test_log_z_is_annealed_by_its_own_settings_whatever_share_is_flagged(digits, measure):
    settings = {"hidden": 24, "k": 1, "chains": 0, "learning_rate": 0.1, "momentum": 0.0}
    rbm = variants.build("rbm", (8, 8), settings | {"weight_decay": 0.0}, None)
    binary = {name: x.round() if name in data.SPLITS else x for name, x in digits.tensors.items()}
    prepared, nothing = data.Prepared(binary, digits.manifest), {"samples": binary["train"][:0]}
    annealing = {"chains": 10, "temperatures": 5, "burn_in": 2}
    found, other = (
        measured(rbm, nothing, prepared, measure, annealing | {"flagged": share})
        for share in (None, 0.2)
    )
    assert math.isfinite(found.metrics["log_partition"])
    assert found.metrics == other.metrics
    assert found.thresholds["energy"] > other.thresholds["energy"]


def test_noise_is_far_and_one_class_covers_little(digits, measure, real):
    model = Nearest(digits.points("train"))
    noise = measured(model, {"samples": torch.rand(180, 8, 8)}, digits, measure)
    zeros = digits.points("train")[digits.labels("train") == 0]
    one = measured(model, {"samples": zeros}, digits, measure)
    for found in (noise, one):
        assert all(found.metrics[name] > 3 * abs(real.metrics[name]) for name in DISTANCES)
    assert one.metrics["sample_precision"] > 0.8
    assert one.metrics["sample_recall"] < 0.2
    assert noise.metrics["sample_precision"] < 0.5


def test_samples_of_classes_in_turn_are_measured_in_the_shares_of_the_data(digits, measure):
    """Right samples of balanced classes are no worse for data that are not."""
    test, truth = digits.points("test"), digits.labels("test")
    keep = (truth != 0) | (torch.arange(len(truth)) % 8 == 0)
    tensors = digits.tensors | {"test": test[keep], "test_labels": truth[keep]}
    x, y = digits.points("train"), digits.labels("train")
    rows = torch.cat([(y == k).nonzero()[:100, 0] for k in range(10)])
    samples = {"samples": x[rows], "labels": y[rows]}
    prepared = data.Prepared(tensors, digits.manifest)
    rare = reference.measure(measure.network, measure.config, prepared, CPU)
    found = measured(Nearest(x), samples, prepared, rare).metrics
    unaware = measured(Nearest(x), {"samples": x[rows]}, prepared, rare).metrics
    assert found["frechet_distance"] < 0.8 * unaware["frechet_distance"]


def test_too_few_samples_in_the_shares_of_classes_are_told_with_how_many_it_takes():
    with pytest.raises(EBMError, match=r"sample\.count = 100: 9 are left .* 30 on: try 334$"):
        images.enough(torch.zeros(9), 100)
    images.enough(torch.zeros(30), 334)


def test_what_is_not_finite_is_no_reference():
    result = Evaluation()
    result.refer("log_partition_error", math.inf, "exact", "nothing")
    assert not result.references


def test_samples_are_kept_in_the_shares_that_are_wanted():
    labels, wanted = torch.arange(300) % 3, torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    kept = labels[images.in_shares(labels, wanted)]
    assert kept.bincount().tolist() == [100, 50, 17]
    everything = images.in_shares(labels, torch.tensor([0, 3]))  # nobody asked for 3
    assert everything.tolist() == list(range(300))


def test_conditional_accuracy_is_the_share_of_the_class_asked_for(digits, measure, real):
    ceiling = real.references["conditional_accuracy"][0]
    assert ceiling["kind"] == "ceiling"
    right = measure.see(digits.points("test")).classes == digits.labels("test")
    each = [right[digits.labels("test") == k].double().mean().item() for k in range(10)]
    assert ceiling["value"] == pytest.approx(sum(each) / 10)
    assert real.metrics["conditional_accuracy"] > 0.95
    x, y = digits.points("validation"), digits.labels("validation")
    wrong = {"samples": x, "labels": torch.where(torch.arange(180) < 45, y, (y + 1) % 10)}
    found = measured(Nearest(x), wrong, digits, measure)
    assert found.metrics["conditional_accuracy"] == pytest.approx(0.25, abs=0.03)


class ByClass(Nearest):
    """Its class of a point is that of the nearest training image."""

    def __init__(self, x, y):
        super().__init__(x)
        self.y = y

    def classify(self, x):
        distances = torch.cdist(x.flatten(1), self.points)
        by_class = torch.stack([distances[:, self.y == k].amin(1) for k in range(10)], 1)
        return {"accuracy": by_class.argmin(1)}


def test_the_accuracy_of_a_model_is_the_share_in_which_it_sees_their_own_class(
    digits, measure, real
):
    x, y = digits.points("train"), digits.labels("train")
    test, own = digits.points("test"), digits.labels("test")
    nearest = y[torch.cdist(test.flatten(1), x.flatten(1)).argmin(1)]
    drawn = {"samples": digits.points("validation"), "acceptance": torch.linspace(0, 1, 180)}
    found = measured(ByClass(x, y), drawn, digits, measure)
    assert found.metrics["accuracy"] == (nearest == own).double().mean().item() > 0.95
    (baseline,) = found.references["accuracy"]
    right = (measure.see(test).classes == own).double().mean().item()
    assert (baseline["kind"], baseline["value"]) == ("baseline", right)
    assert found.metrics["acceptance"] == pytest.approx(0.5)
    assert not {"accuracy", "acceptance"} & real.metrics.keys()


def test_every_kind_of_data_has_its_evaluator():
    kinds = {
        get_args(s.model_fields["kind"].annotation)[0] for s in get_args(get_args(Dataset)[0])
    }
    assert kinds == EVALUATORS.keys()


def test_the_classifier_looks_once_at_each_set_of_images(digits, measure):
    looks, network = [], deepcopy(measure.network)
    network.body.register_forward_pre_hook(lambda _, x: looks.append(len(x[0])))
    x, y = digits.points("validation"), digits.labels("validation")
    samples = {"samples": x, "labels": y, "generator": torch.rand(100, 8, 8)}
    model = ByClass(digits.points("train"), digits.labels("train"))
    found = measured(model, samples, digits, replace(measure, network=network))
    assert {"conditional_accuracy", "inception_score_generator"} < found.metrics.keys()
    assert sum(looks) == 136 + 100 + 136 + 360 + 180  # of samples, those in the shares of test


def test_the_inception_score_is_that_of_the_classes_shown(digits, measure, real):
    (ceiling,) = real.references["inception_score"]
    assert ceiling["kind"] == "ceiling"
    assert "the test split" in ceiling["source"]
    probabilities = measure.see(digits.points("test")).logits.softmax(1)
    assert ceiling["value"] == pytest.approx(metrics.inception_score(probabilities))
    assert real.metrics["inception_score"] == pytest.approx(ceiling["value"], rel=0.1)
    one = digits.points("train")[digits.labels("train") == 0][:60]
    found = measured(Nearest(one), {"samples": one}, digits, measure)
    assert found.metrics["inception_score"] < 1.5 < real.metrics["inception_score"]


def test_a_generator_is_measured_before_mcmc_as_its_samples_after(digits, measure):
    x, noise = digits.points("validation"), torch.rand(180, 8, 8)
    model = Nearest(digits.points("train"))
    found = measured(model, {"samples": x, "generator": noise}, digits, measure).metrics
    alone = measured(model, {"samples": noise}, digits, measure).metrics
    for name in ("frechet_distance", "kernel_distance", "sample_recall", "inception_score"):
        assert found[f"{name}_generator"] == pytest.approx(alone[name])
        assert found[name] != pytest.approx(alone[name])


def test_an_unconditional_model_or_one_without_a_classifier_has_no_such_accuracy(digits, measure):
    x, y = digits.points("validation"), digits.labels("validation")
    found = measured(Nearest(x), {"samples": x}, digits, measure)
    assert "conditional_accuracy" not in found.metrics
    coordinates = reference.measure(reference.Network(), {"kind": "coordinates"}, digits, CPU)
    found = measured(Nearest(x), {"samples": x, "labels": y}, digits, coordinates)
    assert "conditional_accuracy" not in found.metrics
    assert set(found.metrics) >= IMAGE_METRICS


def test_high_energy_is_the_score_of_an_anomaly(digits, real):
    names = [f"auroc_{name}" for name in outlier_sets(digits, 5, 0)]
    assert len(names) >= 3
    assert set(names) <= set(real.metrics)
    mean = sum(real.metrics[name] for name in names) / len(names)
    assert real.metrics["auroc_mean"] == pytest.approx(mean)
    assert real.metrics["auroc_uniform"] > 0.99


def test_an_auroc_is_that_of_the_whole_test_split(digits, measure, monkeypatch):
    """Published test images are not in random order: the first of MNIST's are the cleaner ones."""
    model, test = Nearest(digits.points("train")), digits.points("test")
    monkeypatch.setattr(images, "ENERGIES", 20)
    found = measured(model, {"samples": digits.points("validation")}, digits, measure)
    outliers = outlier_sets(digits, 20, digits.manifest["settings"]["seed"])["interpolation"]
    expected = metrics.auroc(model.energy(test), model.energy(outliers))
    assert found.metrics["auroc_interpolation"] == pytest.approx(expected)
    assert expected != metrics.auroc(model.energy(test[:20]), model.energy(outliers))


def test_the_opposite_energy_has_the_opposite_auroc(digits, measure, real):
    class Opposite(Nearest):
        def energy(self, x):
            return -super().energy(x)

    samples = {"samples": digits.points("validation")}
    found = measured(Opposite(digits.points("train")), samples, digits, measure)
    for name in (name for name in real.metrics if name.startswith("auroc_")):
        assert found.metrics[name] == pytest.approx(1 - real.metrics[name])


def test_bytes_score_as_the_points_they_stand_for(digits, measure, real):
    """A data set of images is stored in bytes: 255 steps of a level, and nothing else changes."""
    stored = {
        k: (t * 255).round().to(torch.uint8) if t.is_floating_point() else t
        for k, t in digits.tensors.items()
    }
    samples = {"samples": digits.points("validation"), "labels": digits.labels("validation")}
    prepared = data.Prepared(stored, digits.manifest)
    found = measured(Nearest(prepared.points("train")), samples, prepared, measure)
    for name in IMAGE_METRICS | {"conditional_accuracy"}:
        assert found.metrics[name] == pytest.approx(real.metrics[name], abs=0.05)


def test_pictures_are_drawn_of_what_is_there(digits, measure, real):
    names = [name for name, *_ in real.figures]
    assert names == ["samples", "data", "energies"]
    x = digits.points("validation")
    chain = {"chain": x[:32].view(8, 4, 8, 8), "chain_steps": torch.arange(4)}
    found = measured(Nearest(x), {"samples": x, **chain}, digits, measure)
    assert [name for name, *_ in found.figures] == [
        "samples",
        "data",
        "chain",
        "animation",
        "energies",
    ]


def test_a_model_that_draws_nothing_is_measured_by_its_energies_alone(digits, measure, real):
    none = {"samples": torch.empty(0, 8, 8)}
    found = measured(Nearest(digits.points("train")), none, digits, measure)
    expected = {k: v for k, v in real.metrics.items() if k.startswith("auroc")}
    assert expected
    assert found.metrics == expected
    assert found.thresholds == real.thresholds
    assert [name for name, *_ in found.figures] == ["data", "energies"]


def test_too_few_samples_are_one_line(digits, measure):
    with pytest.raises(EBMError, match=r"sample\.count = 3: "):
        measured(
            Nearest(digits.points("train")), {"samples": torch.rand(3, 8, 8)}, digits, measure
        )


def test_the_same_seed_gives_the_same_numbers(digits, measure, real):
    samples = {"samples": digits.points("validation"), "labels": digits.labels("validation")}
    again = measured(Nearest(digits.points("train")), samples, digits, measure)
    assert again.metrics == real.metrics


def plane(name="8gaussians"):
    settings = {"density": name, "train": 4000, "validation": 10, "test": 1000, "seed": 0}
    return data.prepare(DensityData(kind="density", reference={"kind": "coordinates"}, **settings))


@pytest.mark.parametrize("name", ["8gaussians", "swissroll"])
def test_the_true_density_scores_what_its_references_say(name):
    """Samples without a generator, as of a Langevin chain."""
    prepared = plane(name)
    torch.manual_seed(0)
    samples = {"samples": prepared.density.sample(4000).float()}
    measure = Reference(reference.Network(), {"kind": "coordinates"}, {}, {})
    found = measured(Oracle(prepared.density), samples, prepared, measure, {"grid": 180})
    assert isinstance(found, Evaluation)
    assert not [name for name in found.metrics if name.endswith("_generator")]
    assert found.metrics["grid_kl"] == pytest.approx(0, abs=1e-4)
    exact = found.references["log_likelihood"][0]["value"]
    assert found.metrics["log_likelihood"] == pytest.approx(exact, abs=3e-3)
    assert found.metrics["high_quality_share"] > 0.99
    if name == "8gaussians":
        assert found.metrics["modes"] == found.metrics["modes_total"] == 8


class Leaking(Oracle):
    """The true density, and as much again in a mode beyond the square."""

    def energy(self, x):
        away = (x - x.new_tensor([4.0, -3.0])).square().sum(1) / (2 * 0.1**2)
        beside = -away - math.log(2 * math.pi * 0.1**2) - 3
        return -torch.logaddexp(-super().energy(x), beside)


@pytest.mark.parametrize("support", [None, (-2.0, 2.0), (-5.0, 5.0), (-2.0, 5.0)])
def test_what_a_density_has_beyond_the_square_is_lost(support):
    prepared = plane("8gaussians")
    torch.manual_seed(0)
    samples = {"samples": prepared.density.sample(1000).float()}
    measure = Reference(reference.Network(), {"kind": "coordinates"}, {}, {})
    model = Leaking(prepared.density)
    model.support = support
    found = measured(model, samples, prepared, measure, {"grid": 180})
    share = 0.5 if support in (None, (-5.0, 5.0)) else 0.0
    assert found.metrics["outside"] == pytest.approx(share, abs=1e-3)
    assert found.metrics["grid_kl"] == pytest.approx(-math.log(1 - share), abs=1e-3)
    exact = found.references["log_likelihood"][0]["value"] + math.log(1 - share)
    assert found.metrics["log_likelihood"] == pytest.approx(exact, abs=4e-3)
    assert found.references["outside"][0]["value"] == 0


def test_a_support_within_the_square_is_all_that_a_density_has():
    prepared = plane("8gaussians")
    torch.manual_seed(0)
    samples = {"samples": prepared.density.sample(1000).float()}
    measure = Reference(reference.Network(), {"kind": "coordinates"}, {}, {})
    model = Oracle(prepared.density)
    model.support = (-2.0, 1.0)  # without the modes on the right
    found = measured(model, samples, prepared, measure, {"grid": 180})
    assert found.metrics["grid_kl"] == math.inf
    assert found.metrics["log_likelihood"] == -math.inf
    assert found.metrics["log_density_mse"] == math.inf
    assert str(found.metrics["outside"]) == "0.0"


class Undefined(Oracle):
    """The true density, no number at one side."""

    def energy(self, x):
        return torch.where(x[:, 0] > 1.9, torch.nan, super().energy(x))


def test_what_is_undefined_is_not_said_to_be_perfect():
    prepared = plane("8gaussians")
    grid = metrics.cell_centres(-2.0, 2.0, 40)
    test = prepared.points("test")
    true, true_test = (prepared.density.log_prob(x.double()) for x in (grid, test))
    found, _ = density_scores(Undefined(prepared.density), grid, test, true, true_test)
    assert found
    assert all(map(math.isnan, found.values()))


def test_a_lost_mode_is_seen():
    prepared = plane()
    samples = prepared.points("train")
    kept = (samples - prepared.density.modes[0].float()).norm(dim=1) > 0.5
    measure = Reference(reference.Network(), {"kind": "coordinates"}, {}, {})
    found = measured(
        Oracle(prepared.density), {"samples": samples[kept]}, prepared, measure, {"grid": 60}
    )
    assert found.metrics["modes"] == 7
    assert found.metrics["mode_kl"] > 0.1


@pytest.mark.parametrize(
    ("variant", "title"),
    [
        ("nce", "Draws of the noise"),
        ("fce", "Draws of the flow"),
        ("meg", "Generator, before MCMC"),
    ],
)
def test_what_chains_began_with_has_its_own_name(variant, title):
    prepared = plane()
    model = variants.build(variant, (2,), MODELS[variant]).eval()
    before, after = torch.zeros(40, 2), torch.ones(40, 2)
    measure = Reference(reference.Network(), {"kind": "coordinates"}, {}, {})
    samples = {"samples": after, "generator": before}
    found = measured(model, samples, prepared, measure, {"grid": 40})
    _, _, caption, picture = found.figures[-1]
    panels = {ax.get_title(): ax.collections[-1] for ax in picture.axes[2:4]}
    assert list(panels) == [title, "After MCMC"]
    for points, x in zip(panels.values(), (before, after), strict=True):
        assert points.get_offsets().tolist() == x.tolist()
    assert f"draws of the {title.split(',')[0].split()[-1].lower()}" in caption
    assert ("broad Gaussian" in caption) == (variant != "meg" and model.defence > 0)


def untrained(name, prepared, **changes):
    """A contrastive energy that is to learn a density."""
    seeds.seed("model", 0)
    base = {"defence": 0.0, "warmup": 0, "learning_rate": 1e-2}
    model = variants.build(name, (2,), MODELS[name] | base | changes)
    x, y = prepared.points("train"), prepared.tensors.get("train_labels")
    model.initialise(x, y if model.needs_labels else None)
    return model.eval()


def contrasted(name, prepared, **changes):
    """A contrastive energy fitted to a density, and its evaluation on it."""
    model, x = untrained(name, prepared, **changes).train(), prepared.points("train")
    for start in range(0, 2560, 128):
        model.training_step(x[start : start + 128])
    model.eval()
    samples = model.sample(400, steps=5)
    measure = Reference(reference.Network(), {"kind": "coordinates"}, {}, {})
    return model, samples, measured(model, samples, prepared, measure, {"grid": 100})


def test_an_energy_told_from_noise_is_measured_beside_that_noise(monkeypatch):
    monkeypatch.setattr(contrast, "POINTS", 200)
    monkeypatch.setattr(contrast, "TRIALS", 8)
    prepared = plane("25gaussians")
    model, samples, found = contrasted("nce", prepared, noise={"kind": "gaussian"})
    grid = metrics.cell_centres(-2.0, 2.0, 100).float()
    test = prepared.points("test")
    with torch.no_grad():
        around = metrics.cell_centres(-6.0, 6.0, 300).float()
        inside, total = (
            metrics.in_batches(lambda x: -model.energy(x).double(), cells).logsumexp(0).item()
            + 2 * math.log(4 / 100)
            for cells in (grid, around)
        )
        likelihood = -model.energy(test).mean().item()
        of_noise = -model.noise.energy(test).mean().item()
    assert found.metrics["log_partition_left"] == pytest.approx(total)
    assert found.references["log_partition_left"][0]["value"] == 0
    assert found.metrics["log_likelihood"] == pytest.approx(likelihood - total, rel=1e-5)
    assert found.metrics["outside"] == pytest.approx(1 - math.exp(inside - total), rel=1e-4)
    assert 0.001 < found.metrics["outside"] < 0.5
    assert found.metrics["log_likelihood_generator"] == pytest.approx(of_noise, rel=1e-5)
    assert "log_partition_generator" not in found.metrics  # nothing to be learned
    truth = prepared.density.log_prob(metrics.cell_centres(-2.0, 2.0, 100))
    truth -= truth.logsumexp(0) + 2 * math.log(4 / 100)
    for kind, of in (("", model), ("_generator", model.noise)):
        learned = -metrics.in_batches(of.energy, grid).double()
        if of is model:
            learned -= total
        kl = (truth.softmax(0) * (truth - learned)).sum().item()  # of all the noise, not a square
        assert found.metrics[f"grid_kl{kind}"] == pytest.approx(kl, rel=1e-4)
    assert not [name for name in found.metrics if name.startswith("accuracy")]
    assert found.metrics["acceptance"] == pytest.approx(samples["acceptance"].mean().item())
    assert {"modes_generator", "frechet_distance_generator"} <= found.metrics.keys()
    (theory,) = found.references["log_partition_error"]
    assert 0 < found.metrics["log_partition_error"] < 5 * theory["value"]
    assert theory["value"] == pytest.approx(math.sqrt(1.3 / 200), rel=0.05)
    assert [name for name, *_ in found.figures] == ["noise", "theory", "density"]
    (ax,) = found.figures[1][-1].axes
    assert ax.get_xlabel() == "ν, noise draws per data point"
    assert ax.get_ylabel() == "RMS error of log Z"
    expected, shown = (line.get_ydata() for line in ax.lines)
    assert found.metrics["log_partition_error"] == shown[-1]
    assert theory["value"] == expected[-1]
    for nu, a, b in zip(contrast.RATIOS, shown, expected, strict=True):
        assert nu < 1 or 0.3 < a / b < 2.5  # the theory is one of many points


def test_of_images_the_noise_tells_what_is_left_of_a_learned_constant():
    """A tilted energy begins as its noise, so that what is wrong is known."""
    flow = {"kind": "glow", "levels": 2, "depth": 1, "width": 4}
    sizes = {"network": {"kind": "conv", "width": 4, "depth": 1}, "levels": 17, "margin": 1e-6}
    kinds = {"flow": flow, "tilted": True, "defence": 0.0}
    model = variants.build("fce", (8, 8), MODELS["fce"] | sizes | kinds)
    draws = contrast.SLICES * contrast.SLICE
    for off in (0.0, 0.7):
        torch.nn.init.constant_(model.log_z, off)
        found = Evaluation()
        contrast.measure_constant(found, model)
        assert found.metrics["log_partition_left"] == pytest.approx(-off, abs=1e-5)
        assert found.metrics["log_partition_ess"] == pytest.approx(draws, rel=1e-5)
    assert found.references["log_partition_left"][0]["value"] == 0
    torch.nn.init.normal_(model.network.head.weight, std=2.0)
    contrast.measure_constant(found, model)
    assert found.metrics["log_partition_ess"] < 0.9 * draws


def test_a_learned_constant_that_is_off_is_no_likelihood(digits, measure):
    """The energy is its noise but for the constant: so are its bits, whatever that is. Where few
    draws of the noise count, nobody knows them."""
    flow = {"kind": "glow", "levels": 2, "depth": 1, "width": 4}
    sizes = {"network": {"kind": "conv", "width": 4, "depth": 1}, "levels": 17, "margin": 1e-6}
    kinds = {"flow": flow, "tilted": True, "defence": 0.0}
    model = variants.build("fce", (8, 8), MODELS["fce"] | sizes | kinds)
    nothing = {"samples": torch.empty(0, 8, 8)}
    for off in (0.0, 50.0):
        torch.nn.init.constant_(model.log_z, off)
        found = measured(model, nothing, digits, measure).metrics
        for end in ("", "_train"):
            own, flows = found[f"bits_per_dim{end}"], found[f"bits_per_dim{end}_generator"]
            assert own == pytest.approx(flows, abs=0.2)  # noise within the levels is drawn
    torch.nn.init.normal_(model.network.head.weight, std=50.0)
    found = measured(model, nothing, digits, measure).metrics
    assert found["log_partition_ess"] < 100
    assert math.isnan(found["bits_per_dim"])
    assert math.isnan(found["bits_per_dim_train"])


def test_a_semi_supervised_energy_is_measured_as_a_classifier():
    prepared = plane("2spirals")
    few = {"classes": 2, "labelled": 10, "supervision": 1.0}
    model, _, found = contrasted("fce", prepared, **few)
    y = prepared.labels("test")
    for name, classes in model.classify(prepared.points("test")).items():
        share = (classes == y).double().mean().item()
        assert found.metrics[name] == pytest.approx(share)
        assert share > 0.5
    assert found.references["accuracy"] == [
        {
            "value": found.metrics["accuracy_supervised"],
            "kind": "baseline",
            "source": "the same network, trained on the same labels alone",
        }
    ]
    assert "log_partition_error" not in found.metrics  # draws of a flow cost something
    (_, title, _, picture), *_ = found.figures
    assert title == "Noise and classes"
    panels = [ax.get_title() for ax in picture.axes[:3]]
    assert panels == ["Noise", "Class 0", "Class 1"]
    classes = [ax.images[0].get_array() for ax in picture.axes[1:3]]
    with torch.no_grad():
        grid = metrics.cell_centres(-2.0, 2.0, 100).float()
        mixed = torch.logaddexp(*(torch.tensor(c) for c in classes)) - math.log(2)
        expected = -model.energy(grid).view(100, 100)
    torch.testing.assert_close(mixed.to(expected), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["samples", "generator"])
def test_samples_that_are_no_numbers_are_one_line(digits, measure, name):
    drawn = torch.rand(40, 8, 8)
    samples = {"samples": drawn, "generator": drawn.clone()}
    samples[name][[3, 7]] = math.nan
    with pytest.raises(EBMError, match=f"2 of 40 {name} are not finite numbers"):
        measured(Nearest(drawn), samples, digits, measure)


class Bounded(Nearest):
    """The same, with log Z known to lie between 1 and 3."""

    def log_partition(self, data, **settings):
        return torch.tensor(1.0), torch.tensor(3.0)


def test_a_likelihood_is_of_the_test_split_between_its_bounds(digits, measure):
    """And its baseline knows the pixels' rates in the training split alone."""
    binary = {k: x.round() if k in data.SPLITS else x for k, x in digits.tensors.items()}
    train, test = binary["train"], binary["test"]
    model = Bounded(train[:50])
    prepared = data.Prepared(binary, digits.manifest)
    found = measured(model, {"samples": train[:0]}, prepared, measure)
    mean = {"": -model.energy(test).mean().item(), "_train": -model.energy(train).mean().item()}
    names = {"": 2, "_lower": 3, "_upper": 1, "_train": 2}
    for end, log_z in names.items():
        of = mean["_train" if end == "_train" else ""]
        assert found.metrics[f"log_likelihood{end}"] == pytest.approx(of - log_z, rel=1e-5)
    rate = (train.sum(0) + 0.5) / (len(train) + 1)
    expected = torch.where(test == 1, rate, 1 - rate).log().sum((1, 2)).mean().item()
    (baseline,) = found.references["log_likelihood"]
    assert baseline["value"] == pytest.approx(expected, rel=1e-5)


class Normalised(Nearest):
    """The same, as if it were -log p."""

    normalised = True


def test_bits_per_dimension_are_of_the_test_split_in_units_of_log_2(digits, measure):
    model = Normalised(digits.points("train")[:50])
    found = measured(model, {"samples": torch.empty(0, 8, 8)}, digits, measure)
    for end, x in (("", digits.points("test")), ("_train", digits.points("train")[:360])):
        expected = model.energy(x).mean().item() / math.log(2) / 64
        assert found.metrics[f"bits_per_dim{end}"] == pytest.approx(expected, rel=1e-5)


def test_images_are_held_against_the_test_split_and_their_floor_is_of_training_images(
    digits, measure
):
    """Of as many, in the order in which they are."""
    features = {split: measure.see(digits.points(split)).features for split in data.SPLITS}
    found = measured(
        Nearest(digits.points("train")), {"samples": digits.points("validation")}, digits, measure
    )
    for name in ("frechet_distance", "kernel_distance"):
        distance = getattr(metrics, name)
        of_samples = distance(features["validation"], features["test"])
        of_train = distance(features["train"][:180], features["test"])
        assert found.metrics[name] == pytest.approx(of_samples, rel=1e-6)
        assert found.references[name][0]["value"] == pytest.approx(of_train, rel=1e-6)


def test_points_are_held_against_the_test_split_and_exact_draws_are_those_of_training():
    prepared = plane()
    train, test = prepared.points("train"), prepared.points("test")
    measure = Reference(reference.Network(), {"kind": "coordinates"}, {}, {})
    x = train[-500:]
    found = measured(Oracle(prepared.density), {"samples": x}, prepared, measure, {"grid": 180})
    entropy = prepared.density.log_prob(test).mean().item()
    assert found.references["log_likelihood"][0]["value"] == pytest.approx(entropy, rel=1e-5)
    floors = [metrics.frechet_distance(part, test) for part in train.split(500)]
    (floor,) = found.references["frechet_distance"]
    assert floor["value"] == pytest.approx(sum(floors) / 8)
    assert floor["source"].startswith("mean of 8 times 500 exact draws")
    assert found.metrics["frechet_distance"] == pytest.approx(metrics.frechet_distance(x, test))


def mosaic(result, k):
    """The ink of a picture whose tiles are 4 x 4 pixels, magnified 12 times."""
    return result.figures[k][-1].axes[0].images[0].get_array()


def test_samples_of_each_class_stand_in_a_column_and_each_chain_in_a_row():
    labels, result = torch.arange(24) % 3, Evaluation()
    grey = (labels / 2).view(-1, 1, 1).expand(-1, 4, 4)
    images._draw_samples(result, {"samples": grey, "labels": labels}, 16)
    ink = mosaic(result, 0)
    assert ink.shape == (6 * 48 + 5 * 4, 3 * 48 + 2 * 4)
    for k in range(3):
        assert set(ink[:, 52 * k : 52 * k + 48].compressed()) == {k / 2}
    chain = (torch.arange(10) / 10).view(-1, 1, 1, 1).expand(-1, 2, 4, 4)
    steps = torch.tensor([0, 1])
    images._draw_chains(result, EBM(), {"chain": chain, "chain_steps": steps})
    ink = mosaic(result, 1)
    assert ink.shape == (8 * 48 + 7 * 8, 2 * 48 + 4)
    for k in range(8):
        (shown,) = set(ink[56 * k : 56 * k + 48].compressed())
        assert shown == pytest.approx(k / 10)


def against_a_gaussian():
    """An energy that is to learn 8 Gaussians, its noise a Gaussian fitted to them."""
    return untrained("nce", plane(), noise={"kind": "gaussian"})


def test_what_is_left_of_a_constant_is_the_mean_weight_of_draws_of_the_noise():
    model, found = against_a_gaussian(), Evaluation()
    torch.nn.init.normal_(model.network.head.weight, std=2.0)
    torch.manual_seed(4)
    contrast.measure_constant(found, model)
    torch.manual_seed(4)
    draws = [model.contrast.draw_with_log_prob(contrast.SLICE) for _ in range(contrast.SLICES)]
    with torch.no_grad():
        weight = torch.cat([model.log_density(v).double() - q.double() for v, q in draws]).exp()
    assert found.metrics["log_partition_left"] == pytest.approx(weight.mean().log().item())
    worth = weight.sum().square() / weight.square().sum()
    assert found.metrics["log_partition_ess"] == pytest.approx(worth.item())
    assert worth < 0.9 * len(weight)


def test_an_estimate_that_is_off_by_the_same_every_time_has_an_error(monkeypatch):
    monkeypatch.setattr(contrast, "_errors", lambda model, density, nu: torch.full((4,), -nu))
    found, density = Evaluation(), plane().density
    contrast._theory(found, against_a_gaussian(), density, metrics.cell_centres(-2.0, 2.0, 20))
    assert found.metrics["log_partition_error"] == 100  # of the last of RATIOS


def test_real_data_are_the_floor_of_what_is_better_lower_and_the_ceiling_of_the_rest():
    x = torch.randn(50, 2).double()
    names = sample_scores(x, x, DENSITIES["8gaussians"]()).keys() | IMAGE_METRICS
    for name in names - {"modes_total"}:
        assert bound(name) == ("floor" if words.METRICS[name].better < 0 else "ceiling")


def test_densities_are_drawn_under_their_own_names():
    prepared, model = plane("swissroll"), against_a_gaussian()
    torch.nn.init.normal_(model.network.head.weight, std=2.0)
    samples = {"samples": prepared.points("test")[:40]}
    measure = Reference(reference.Network(), {"kind": "coordinates"}, {}, {})
    found = measured(model, samples, prepared, measure, {"grid": 20})
    drawn = {name: picture for name, _, _, picture in found.figures}
    grid = metrics.cell_centres(-2.0, 2.0, 20)
    with torch.no_grad():
        learned = -model.energy(grid.float()) - found.metrics["log_partition_left"]
        noise = -model.noise.energy(grid.float())
    panels = {ax.get_title(): ax for ax in (*drawn["noise"].axes, *drawn["density"].axes)}
    truth = prepared.density.log_prob(grid)
    named = {"Noise": noise, "True density": truth, "Learned density": learned}
    for title, log_p in named.items():
        shown = torch.tensor(panels[title].images[0].get_array())
        torch.testing.assert_close(shown.flatten().to(log_p), log_p, rtol=1e-4, atol=1e-4)
    (points,) = panels["Samples"].collections[-1:]
    assert len(points.get_offsets()) == 40


def test_the_images_that_are_shown_are_those_of_the_samples_and_of_the_test_split(digits, real):
    labels = digits.labels("validation")
    columns = int(labels.max()) + 1
    expected = [(digits.points("validation")[: 6 * columns], columns)]
    expected.append((digits.points("test")[:96], 16))
    for k, (x, columns) in enumerate(expected):
        (ax,) = figures.image_grid(x.numpy(), columns).axes
        ink = ax.images[0].get_array()
        assert mosaic(real, k).filled(-1).tolist() == ink.filled(-1).tolist()


def test_a_sample_is_of_a_mode_up_to_four_deviations_from_it():
    density = DENSITIES["25gaussians"]()
    for far, share in ((3.9, 1.0), (4.1, 0.0)):
        x = density.means + far * density.sigma * torch.tensor([0.6, 0.8])
        assert sample_scores(x, x, density)["high_quality_share"] == share
