"""Laws that bugs, planted one at a time, broke while every other test still passed."""

import json
import math
import os

import pytest
import torch
from safetensors.torch import save_file
from test_train import MODELS, OPTIONS, Killed, same, weights
from test_train import data as bits

from ebm import data, files, metrics, reference, variants
from ebm.checkpoint import Checkpoints
from ebm.data import images
from ebm.densities import DENSITIES
from ebm.evaluation.density import sample_scores
from ebm.samplers import HMC, MALA, State, log_mean_exp, run
from ebm.samplers.kernel import metropolise
from ebm.schema import CoordinatesReference, DensityData, ImageData
from ebm.seeds import seed
from ebm.train import Batches, Watch, fit
from ebm.variants.base import EBM
from ebm.variants.flow import NormalisingFlow
from ebm.variants.igebm import IGEBM, augmented
from ebm.variants.meg import MEG
from ebm.variants.rbm import RBM

AS_THEY_ARE = CoordinatesReference(kind="coordinates")


@pytest.mark.parametrize("kernel", [lambda e: MALA(e, 0.3), lambda e: HMC(e, 0.5, 3)])
def test_points_of_any_shape_are_moved_as_vectors_are(kernel):
    """|y - x|^2 and |p|^2 are over all axes of a point."""
    x, ends = torch.randn(200, 2, 3, 4).double(), []
    for points in (x, x.flatten(1)):
        torch.manual_seed(0)
        ends.append(run(kernel(lambda v: v.flatten(1).square().sum(1) / 2), points, 5))
    image, vector = ends
    assert torch.equal(image.x.flatten(1), vector.x)
    torch.testing.assert_close(image.acceptance, vector.acceptance)
    assert 0.05 < vector.acceptance.mean() < 0.95


def test_the_acceptance_of_a_state_is_a_probability_and_not_what_came_of_it():
    stay, go = State(torch.zeros(4, 1)), State(torch.ones(4, 1), steps=1)
    ratio = torch.tensor([0.25, 1.0, 2.0, 0.0])
    torch.testing.assert_close(metropolise(stay, go, ratio.log()).acceptance, ratio.clamp(max=1))


def test_a_log_mean_is_over_the_last_axis():
    x = torch.randn(3, 7)
    torch.testing.assert_close(log_mean_exp(x), x.exp().mean(1).log())


@pytest.mark.parametrize(("visible", "hidden"), [(15, 17), (17, 15)])
def test_log_z_of_independent_units_is_a_sum_however_many_states_there_are(visible, hidden):
    """2^15 states are two lots."""
    torch.manual_seed(0)
    rbm = RBM((visible,), hidden, 1, 0, 0.1, 0.0, 0.0).double().requires_grad_(False)
    rbm.weight.zero_()
    rbm.visible_bias.normal_()
    rbm.hidden_bias.normal_()
    expected = sum(
        torch.nn.functional.softplus(b).sum() for b in (rbm.visible_bias, rbm.hidden_bias)
    )
    torch.testing.assert_close(rbm.log_partition_exact(), expected)


def small_rbm():
    torch.manual_seed(0)
    rbm = RBM((6,), 4, 1, 0, 0.1, 0.0, 0.0).double().requires_grad_(False)
    for tensor in (*rbm.parameters(), rbm.base_rate):
        tensor.normal_()
    return rbm


def test_reverse_annealing_starts_at_any_of_the_data():
    """Between two temperatures alone and without burn-in, log Z is that of data as draws."""
    rbm, points = small_rbm(), torch.eye(6).double()[:2]
    _, high = rbm.annealed_log_partition(points, 20000, 2, 0)
    start, end = (rbm._annealed_energy(beta, points) for beta in (0.0, 1.0))
    log_z0 = torch.nn.functional.softplus(rbm.base_rate).sum() + 4 * math.log(2)
    expected = log_z0 - ((end - start).exp().mean()).log()
    assert high.item() == pytest.approx(expected.item(), abs=0.05)


def test_reverse_annealing_starts_at_draws_of_the_model_after_its_burn_in():
    """Between two temperatures alone: importance sampling from the model."""
    rbm = small_rbm()
    states = (torch.arange(64)[:, None] >> torch.arange(6) & 1).double()
    unlikely = states[rbm.energy(states).argmax()][None]
    low, high = rbm.annealed_log_partition(unlikely, 40000, 2, 50)
    exact = rbm.log_partition_exact().item()
    assert high.item() == pytest.approx(exact, abs=0.1)
    assert low.item() == pytest.approx(exact, abs=0.1)


def test_the_chains_that_are_shown_lead_to_the_samples():
    rbm = RBM((2, 3), 4, 1, 0, 0.1, 0.0, 0.0)
    rbm.initialise((torch.rand(50, 2, 3) < 0.5).float())
    torch.nn.init.normal_(rbm.weight)
    drawn = rbm.sample(20, steps=4)
    assert torch.equal(drawn["chain"][:, -1], drawn["samples"][:8])


def meg(**changes):
    torch.manual_seed(0)
    return MEG((2,), **MODELS["meg"] | changes)


def test_mcmc_samples_stand_beside_what_they_came_from_and_both_are_of_the_averages():
    model = meg(ema=0.5, energy_ema=0.5, energy_learning_rate=0.1, generator_learning_rate=0.1)
    for _ in range(3):
        model.training_step(torch.randn(8, 2))
    torch.manual_seed(1)
    drawn = model.sample(50, steps=3, step_size=0.1)
    torch.manual_seed(1)
    z = model._prior(50)
    with torch.no_grad():
        torch.testing.assert_close(drawn["generator"], model.average(z))
    rates = []
    end = run(
        MALA(
            lambda z: model.energy_average(model.average(z)).squeeze(1) + z.square().sum(1) / 2,
            0.1,
        ),
        z,
        3,
        lambda step, s: rates.append(s.acceptance) if step else None,
    )
    with torch.no_grad():
        torch.testing.assert_close(drawn["samples"], model.average(end.x))
    torch.testing.assert_close(drawn["acceptance"], torch.stack(rates).mean(1))
    assert not torch.allclose(drawn["samples"], drawn["generator"])


def test_every_part_of_a_batch_is_one_energy_step():
    model, seen = meg(energy_steps=4), []
    model._energy_step = lambda part: seen.append(part) or {}
    model._generator_step = lambda n: seen.append(n) or {}
    x = torch.randn(12, 2)
    model.training_step(x)
    assert torch.equal(torch.cat(seen[:-1]), x)
    assert [len(part) for part in seen[:-1]] == [3] * 4
    assert seen[-1] == 3


def test_the_generator_goes_down_the_energy_as_it_is_and_not_its_average():
    models = [meg(ema=0.0, energy_ema=ema) for ema in (0.0, 0.9)]
    for model in models:
        for _ in range(5):
            torch.manual_seed(1)
            model.training_step(torch.ones(8, 2))
    assert same(weights(models[0].generator), weights(models[1].generator))


def test_each_average_has_its_own_decay():
    model = meg(ema=0.5, energy_ema=0.9, energy_steps=1)
    old = {}
    for _ in range(2):
        old = {
            n: [p.detach().clone() for p in getattr(model, n).parameters()]
            for n in ("generator", "energy_network")
        }
        model.training_step(torch.randn(8, 2))
    for network, average, decay in (
        ("generator", model.average, 0.5),
        ("energy_network", model.energy_average, 0.9),
    ):
        for a, before, now in zip(
            average.parameters(), old[network], getattr(model, network).parameters(), strict=True
        ):
            torch.testing.assert_close(a, (decay * before + now) / (1 + decay))


RATES = {
    "meg": {"energy": ("energy_learning_rate",), "generator": ("generator_learning_rate",)},
    "wgan_gp": {"energy": ("energy_learning_rate",), "generator": ("generator_learning_rate",)},
    "bigan": {
        "discriminator": ("discriminator_learning_rate",),
        "generator": ("generator_learning_rate",),
    },
    "nce": {
        "energy": ("learning_rate", "constant_learning_rate"),
        "warmup": ("warmup_learning_rate",),
    },
    "fce": {
        "energy": ("learning_rate", "constant_learning_rate"),
        "warmup": ("warmup_learning_rate",),
        "flow": ("flow_learning_rate",),
        "twin": ("learning_rate",),
    },
}


@pytest.mark.parametrize("name", sorted(RATES))
def test_every_learning_rate_is_that_of_its_own_optimiser(name):
    keys = sorted({key for of in RATES[name].values() for key in of})
    given = {key: 1e-3 * (1 + k) for k, key in enumerate(keys)}
    semi = {"classes": 2, "labelled": 1} if name == "fce" else {}
    model = variants.build(name, (4,), MODELS[name] | given | semi)
    found = {n: [g["lr"] for g in o.param_groups] for n, o in model.optimizers.items()}
    assert found == {n: [given[key] for key in of] for n, of in RATES[name].items()}


def igebm(shape=(4,), **changes):
    seed("model", 0)
    model = IGEBM(shape, **MODELS["igebm"] | changes)
    low, high = model.bounds
    model.initialise(low + (high - low) * torch.rand(10, *shape))
    return model


class ByClass(torch.nn.Module):
    """E(x, y) = theta_y |x|^2 / 2."""

    def __init__(self):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor([0.3, 0.9]))

    def of_points(self, x, y=None):
        return self.theta[y] * x.square().sum(1) / 2


def test_chains_are_compared_with_data_each_in_its_own_class():
    """d/dtheta_y of the gap is half of the summed squares of class y: of data less of chains."""
    free = {"bounds": (-9.0, 9.0), "energy_penalty": 0.0, "data_noise": 0.0, "clip": math.inf}
    model = igebm(classes=2, ema=0.0, kl=0.0, entropy=0.0, fresh=0.5, buffer=200, **free)
    model.network = ByClass()
    model.optimizers["energy"] = torch.optim.SGD(model.network.parameters(), lr=1.0)
    x, y = torch.randn(64, 4), (torch.arange(64) % 4 == 0).long()
    before = model.network.theta.detach().clone()
    model.training_step(x, y)
    moved = model.replay_age > 0
    chains, label = model.replay[moved], model.replay_label[moved]
    expected = torch.stack(
        [(x[y == k].square().sum() - chains[label == k].square().sum()) / 2 / 64 for k in (0, 1)]
    )
    torch.testing.assert_close(before - model.network.theta.detach(), expected)


def test_a_chain_that_starts_anew_keeps_its_new_class():
    model = igebm(classes=2, fresh=1.0)
    model.replay_label.zero_()
    model.frequencies.copy_(torch.tensor([0.0, 1.0]))
    model.training_step(torch.rand(8, 4), torch.arange(8) % 2)
    assert torch.equal(model.replay_label, (model.replay_age > 0).long())


def test_a_share_of_the_chains_that_go_on_is_augmented(monkeypatch):
    monkeypatch.setattr("ebm.variants.igebm.augmented", lambda x: torch.full_like(x, 7.0))
    conv = {"kind": "conv", "width": 2, "depth": 1}
    model = igebm((4, 4), network=conv, augment=0.3, fresh=0.2, buffer=8000)
    batch = model._draw_batch(4000)
    marked = (batch.start == 7).flatten(1).all(1)
    assert not (marked & batch.reset).any()
    share = marked[~batch.reset].double().mean().item()
    assert share == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 3200))


def test_chains_start_uniformly_within_the_bounds():
    model = igebm((1,), bounds=(-3.0, 1.0), buffer=20000)
    for x in (model.replay, model.starts(20000)):
        assert -3 <= x.min() < -2.99
        assert 0.99 < x.max() <= 1
        assert x.mean().item() == pytest.approx(-1, abs=4 * 4 / math.sqrt(12 * 20000))


class Levels(torch.nn.Module):
    """E(x, y) = 10 |x - y / 2|^2."""

    def of_points(self, x, y=None):
        return 10 * (x - y[:, None] / 2).square().sum(1)


def test_samples_of_classes_are_asked_for_in_turn_and_drawn_of_their_own():
    model = igebm(classes=3, noise=0.0, step_size=0.02, gradient_clip=None, ema=0.0)
    model.network = Levels()
    drawn = model.sample(7, steps=60)
    assert drawn["labels"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    expected = (drawn["labels"] / 2)[:, None].expand(7, 4)
    torch.testing.assert_close(drawn["samples"], expected, rtol=0, atol=1e-3)


def test_chains_jump_as_often_as_asked_and_walk_as_they_were_told():
    model = igebm((1,), jumps=2, langevin_steps=7, noise="coupled", gradient_clip=0.5)
    chains = model.chains(model.energy)
    assert (chains.every, chains.times) == (7, 2)
    walk = chains.kernel
    assert (walk.step_size, walk.noise, walk.clip) == (0.1, math.sqrt(0.2), 0.5)
    assert (walk.bounds, walk.noise_last) == ((0.0, 1.0), True)
    plain = igebm((1,), noise=0.01).kernel(model.energy)
    assert (plain.noise, plain.noise_last) == (0.01, False)


def test_levels_follow_the_network_while_it_trains():
    model = igebm(classes=2, learning_rate=0.1)
    x = torch.rand(8, 4)
    model.train().class_energies(x)
    model.training_step(x, torch.arange(8) % 2)
    found = model.class_energies(x)
    torch.testing.assert_close(found, model.eval().class_energies(x))


class Looker(EBM):
    """Keeps what it is given, in which mode."""

    classes = 3

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.begun = [], None

    def configure_optimizers(self):
        return {"w": torch.optim.SGD([self.w], lr=0.1)}

    def initialise(self, x, y=None):
        self.begun = x, y

    def training_step(self, x, y=None):
        assert self.training
        self.seen.append((x, y))
        return {"energy_gap": self.w.detach()}


def looked(model, folder, *data):
    """The rows of the batch of each of 20 steps, and what the model was given there."""
    checkpoints, watch = Checkpoints(folder), Watch({}, 0)
    fit(model, *data, steps=20, watch=watch, checkpoints=checkpoints, **OPTIONS)
    order = Batches(60, 8, 3, torch.device("cpu"))
    return [(order(step), given) for step, given in enumerate(model.seen)]


def test_a_step_sees_the_rows_of_its_batch_with_their_classes_as_points_in_training_mode(tmp_path):
    rows = torch.arange(60, dtype=torch.uint8)[:, None]
    labels = torch.arange(60) % 3
    model = Looker().eval()
    for expected, (x, y) in looked(model, tmp_path, rows, labels):
        torch.testing.assert_close(x[:, 0], expected / 255)
        assert torch.equal(y, labels[expected])
    x, y = model.begun
    torch.testing.assert_close(x, rows / 255)
    assert torch.equal(y, labels)


def test_bits_are_drawn_of_the_greys_of_the_same_rows(tmp_path):
    """Greys of 0 and 1 leave nothing to chance; the data say otherwise."""
    greys = (torch.arange(60)[:, None] >> torch.arange(6) & 1).to(torch.uint8) * 255
    model = Looker()
    for expected, (x, _) in looked(model, tmp_path, 255 - greys, torch.arange(60) % 3, greys):
        assert torch.equal(x, greys[expected] / 255)
    assert torch.equal(model.begun[0], 1 - greys / 255)


CASES = {
    **{name: (name, (4,), {}, None) for name in MODELS},
    "igebm, conditional": ("igebm", (4,), {"classes": 3}, None),
    "igebm, conditional, images": (
        "igebm",
        (8, 8),
        {"classes": 3, "spectral_norm": True, "network": {"kind": "conv", "width": 2, "depth": 1}},
        None,
    ),
    "flow, glow": (
        "flow",
        (4, 4),
        {
            "flow": {"kind": "glow", "levels": 1, "depth": 2, "width": 4},
            "levels": 2,
            "margin": 0.05,
        },
        None,
    ),
    "fce, tilted": ("fce", (4,), {"tilted": True, "defence": 0.0, "warmup": 2}, None),
    "fce, semi-supervised": (
        "fce",
        (4,),
        {"classes": 3, "labelled": 2, "supervision": 1.0, "smoothness": 0.1},
        None,
    ),
    "igebm, ensemble": (
        "igebm",
        (4,),
        {"classes": 3},
        {"members": 2, "snapshots": 2, "every": 2, "without": []},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_state_of_a_model_is_all_there_is_to_it(tmp_path, case):
    """Loaded into a model that began otherwise: the same energies, classes, draws, training."""
    name, shape, changes, ensemble = CASES[case]
    settings = MODELS[name] | changes
    seed("model", 0)
    model = variants.build(name, shape, settings, ensemble)
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(48, *shape, generator=generator) < 0.5).float()
    y = torch.tensor([0, 0, 1, 2]).repeat(12)
    labels = y if model.needs_labels else None
    model.initialise(x, labels)
    for _ in range(5):
        if model.optimizers:
            model.training_step(x[:16], None if labels is None else labels[:16])
    config, file = tmp_path / "config.json", tmp_path / "weights.safetensors"
    config.write_text(
        json.dumps({"variant": name, "shape": shape, "model": settings, "ensemble": ensemble})
    )
    save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, file)
    torch.manual_seed(12345)
    again = variants.load(file, config)
    found = []
    for one in (model.eval(), again):
        torch.manual_seed(7)
        drawn = one.sample(6)
        classes = one.classify(x)
        found.append({"energy": one.energy(x).detach(), **drawn, **classes})
        if one.optimizers:
            one.train()
            for _ in range(2):
                one.training_step(x[:16], None if labels is None else labels[:16])
        found[-1] |= (
            {f"state {k}": v.clone() for k, v in one.state_dict().items()}
            if not one.optimizers
            else {}
        )
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("at", [5, 9, 17])
def test_a_killed_conditional_ensemble_ends_with_the_same_bits(tmp_path, at):
    """Classes, levels, and snapshots at a time that no checkpoint falls upon."""
    chosen = {"members": 2, "snapshots": 2, "every": 3, "without": []}
    settings = MODELS["igebm"] | {"classes": 3}
    labels = torch.tensor([0, 0, 1, 2, 2])[torch.arange(50) % 5]
    options = OPTIONS | {"log_every": 2, "checkpoint_every": 4, "batch_size": 16}

    def trained(folder, dying_at=None):
        seed("model", 0)
        model = variants.build("igebm", (4,), settings, chosen)
        step, calls = model.training_step, []

        def dying(*batch):
            calls.append(1)
            if len(calls) == dying_at:
                raise Killed
            return step(*batch)

        model.training_step = dying
        fit(
            model,
            bits(),
            labels,
            steps=20,
            watch=Watch({}, 0),
            checkpoints=Checkpoints(folder),
            **options,
        )
        return model

    whole = trained(tmp_path / "whole")
    with pytest.raises(Killed):
        trained(tmp_path / "killed", at)
    resumed = trained(tmp_path / "killed")
    assert same(weights(whole), weights(resumed))
    for a, b in zip(whole.eval().histories(), resumed.eval().histories(), strict=True):
        for one, other in zip(a, b, strict=True):
            assert torch.equal(one.energy(bits()), other.energy(bits()))


def test_no_split_of_exact_draws_repeats_another():
    sizes = {"train": 60, "validation": 60, "test": 60}
    prepared = data.prepare(
        DensityData(kind="density", density="25gaussians", seed=0, reference=AS_THEY_ARE, **sizes)
    )
    a, b, c = (prepared.tensors[split] for split in data.SPLITS)
    for one, other in ((a, b), (a, c), (b, c)):
        assert torch.cdist(one, other).min() > 0
        assert (one - other).norm(dim=1).min() > 0


def test_splits_are_binarised_by_draws_of_their_own(monkeypatch):
    half = torch.full((20, 8, 8), 128, dtype=torch.uint8)
    tensors = dict.fromkeys(data.SPLITS, half) | {
        f"{s}_labels": torch.zeros(20) for s in data.SPLITS
    }
    monkeypatch.setattr(images, "splits", lambda *_: ("it", dict(tensors)))
    settings = ImageData(
        kind="images",
        name="mnist",
        binarize="sample",
        outliers=[],
        validation=5,
        seed=0,
        reference=AS_THEY_ARE,
    )
    found = images.prepare(settings).tensors
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        agree = (found[one] == found[other]).double().mean().item()
        assert agree == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(found[one].numel()))


def test_a_sample_is_of_a_mode_up_to_four_deviations_from_it():
    density = DENSITIES["25gaussians"]()
    for far, share in ((3.9, 1.0), (4.1, 0.0)):
        x = density.means + far * density.sigma * torch.tensor([0.6, 0.8])
        assert sample_scores(x, x, density)["high_quality_share"] == share


def test_recall_is_by_the_manifold_of_the_samples_and_precision_by_that_of_the_data():
    """Samples close together among data far apart: each is in the data's, hardly any data in
    theirs."""
    x = torch.tensor([[0.0], [0.1], [0.2], [0.3]])
    y = torch.tensor([[0.15], [5.0], [10.0], [15.0]])
    assert metrics.precision_recall(x, y, 1) == (1.0, 0.25)
    assert metrics.precision_recall(y, x, 1) == (0.25, 1.0)


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


def test_greys_are_dequantised_anew_at_every_step():
    """Two equal images are two points, and at the next step two others."""
    settings = MODELS["flow"] | {
        "flow": {"kind": "glow", "levels": 1, "depth": 1, "width": 4},
        "levels": 3,
        "margin": 0.05,
    }
    flow = NormalisingFlow((4, 4), **settings)
    seen = []
    flow.minimise = lambda name, objective, v, clip: seen.append(v) or (torch.zeros(()), {})
    for _ in range(2):
        flow.training_step(torch.full((2, 4, 4), 0.5))
    points = torch.cat(seen).flatten(1)
    assert len(points.unique(dim=0)) == 4
    assert len(points[0].unique()) == 16


def test_a_kill_while_a_file_is_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "it"
    files.replace(path, b"old")

    def dies(_):
        raise Killed

    monkeypatch.setattr(os, "fsync", dies)
    with pytest.raises(Killed):
        files.replace(path, b"new and longer")
    assert path.read_bytes() == b"old"
    files.replace(path, b"new", sync=False)
    assert [p.name for p in tmp_path.iterdir()] == ["it"]
    assert path.read_bytes() == b"new"


def contrasted(name, **changes):
    torch.manual_seed(0)
    model = variants.build(name, (2,), MODELS[name] | changes)
    model.initialise(torch.randn(400, 2))
    return model


@pytest.mark.parametrize("name", ["nce", "fce"])
def test_with_a_defence_the_generator_is_the_flow_alone(name):
    model = contrasted(name, defence=0.5, tilted=False)
    model.broad.mean.fill_(1000.0)
    drawn = model.sample(200, steps=3)
    assert drawn["generator"].abs().max() < 100


TURNS = {"nce": ["warmup", "energy"], "fce": ["warmup", "energy", "flow", "twin"]}


@pytest.mark.parametrize(("name", "turn"), [(n, t) for n, ts in TURNS.items() for t in ts])
def test_every_gradient_is_cut_to_its_norm(name, turn):
    """Plain descent of rate 1 then moves all weights together by that norm."""
    semi = {"classes": 2, "labelled": 5, "supervision": 1.0} if turn == "twin" else {}
    warmup = 10 if turn == "warmup" else 0
    torch.manual_seed(0)
    model = variants.build(
        name, (2,), MODELS[name] | semi | {"clip": 1e-3, "warmup": warmup, "defence": 0.0}
    )
    x = torch.randn(100, 2) @ torch.tensor([[2.0, 1.0], [0.0, 0.3]]) + 3
    model.initialise(x, torch.arange(100) % 2 if semi else None)
    if turn == "flow":
        model.last_accuracy.fill_(1.0)
    moving = [p for g in model.optimizers[turn].param_groups for p in g["params"]]
    model.optimizers[turn] = torch.optim.SGD(moving, lr=1.0)
    before = [p.detach().clone() for p in moving]
    model.training_step(x)
    moved = torch.cat([(p - q).flatten() for p, q in zip(moving, before, strict=True)])
    assert moved.norm().item() == pytest.approx(1e-3, rel=0.01)


def test_augmentation_turns_and_rescales_as_far_to_either_side():
    """A bar in the middle: its slope, and its mass, which goes with the square of the scale."""
    torch.manual_seed(8)
    line = torch.arange(41.0) - 20
    bar = (-(line[:, None] ** 2) / 4.5 - line**2 / 32).exp()
    moved = augmented(bar.expand(2000, 41, 41)).double()
    mass = moved.sum((1, 2))
    x, y = ((moved.sum(k) * line).sum(1) / mass for k in (1, 2))
    dx, dy = line - x[:, None], line - y[:, None]
    xx, yy = ((moved.sum(k) * d**2).sum(1) / mass for k, d in ((1, dx), (2, dy)))
    xy = (moved * dy[:, :, None] * dx[:, None, :]).sum((1, 2)) / mass
    angle = torch.atan2(2 * xy, xx - yy) / 2
    assert angle.mean().abs() < 4 * 0.15 / math.sqrt(3 * 2000)
    assert 0.14 < angle.abs().max() < 0.16
    scale = (mass / bar.sum()).sqrt()
    assert 0.79 < scale.min() < 0.82
    assert 1.22 < scale.max() < 1.26
    assert scale.log().mean().abs() < 0.02


def test_the_average_has_the_decay_that_it_was_given():
    model = igebm(ema=0.9)
    old = []
    for _ in range(2):
        old = [p.detach().clone() for p in model.network.parameters()]
        model.training_step(torch.rand(8, 4))
    for average, before, now in zip(
        model.average.parameters(), old, model.network.parameters(), strict=True
    ):
        torch.testing.assert_close(average, (0.9 * before + now) / 1.9)
