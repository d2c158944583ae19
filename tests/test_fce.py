"""Laws of flow-contrastive estimation: the game and whose turn it is, what few labels and the
smoothness of their posterior do."""

import math
from copy import deepcopy

import pytest
import torch
from small_models import MODELS, OPTIONS, WATCH, same, weights
from torch.distributions import Categorical, kl_divergence

from ebm import EBMError
from ebm.checkpoint import Checkpoints
from ebm.contrastive import value
from ebm.ensemble import Ensemble
from ebm.metrics import cell_centres
from ebm.train import fit
from ebm.variants.fce import FCE, direction, divergence

MLP = {"kind": "mlp", "width": 16, "depth": 1}
SEMI = {"classes": 2, "labelled": 3, "supervision": 1.0, "smoothness": 0.5, "radius": 0.3}


def model(shape=(2,), **changes):
    torch.manual_seed(0)
    settings = {"network": MLP, "defence": 0.0, "warmup": 0, "clip": None, "weight_decay": 0.1}
    return FCE(shape, **MODELS["fce"] | settings | changes)


def blobs(n):
    """Two blobs, and which of them."""
    y = torch.arange(n) % 2
    return 0.5 * torch.randn(n, 2) + torch.tensor([[1.0, -1.0], [-1.0, 1.5]])[y], y


def ready(n=400, **changes):
    """A model off its start, with its data."""
    fce = model(**changes)
    torch.manual_seed(1)
    x, y = blobs(n)
    fce.initialise(x.to(fce.log_z.dtype), y if fce.needs_labels else None)
    return fce, x.to(fce.log_z.dtype)


def parts(fce):
    """What the energy's turns move, what the flow's do."""
    state = weights(fce)
    flow = {name for name in state if name.startswith("noise.flow")}
    assert flow
    energy = {name for name in state if name.startswith(("network.", "log_z"))}
    return {n: state[n] for n in energy}, {n: state[n] for n in flow}


def test_one_class_alone_is_learned_too():
    fce = model(**SEMI | {"classes": 1})
    x = torch.randn(40, 2)
    fce.initialise(x, torch.zeros(40, dtype=torch.long))
    for _ in range(3):
        assert fce.training_step(x)["cross_entropy"] == 0
    assert fce.classify(x)["accuracy_supervised"].tolist() == [0] * 40


def flow_turn_logits(fce, data, seed, p=None):
    """log p - log q in the flow's turn with the draws of a seed, and with the density of another
    model `p`."""
    torch.manual_seed(seed)
    draws, log_q = fce.contrast.draw_with_log_prob(len(data))
    v, p = fce.space.enter(data), p or fce
    return p.log_density(v) - fce.contrast.log_prob(v), p.log_density(draws) - log_q


def flow_turn_value(fce, data, seed, p=None):
    """V of the flow's turn, likewise."""
    return value(*flow_turn_logits(fce, data, seed, p))


def flow_turn_loss(fce, data, seed, p=None):
    """What the flow descends in its turn, likewise, by the probabilities of the classes."""
    data_is_data, draws_are_data = (r.sigmoid() for r in flow_turn_logits(fce, data, seed, p))
    if fce.saturating:
        return data_is_data.log().mean() + (1 - draws_are_data).log().mean()
    return -(1 - data_is_data).log().mean() - draws_are_data.log().mean()


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("saturating", [False, True])
@pytest.mark.parametrize("tilted", [False, True])
@pytest.mark.parametrize("defence", [0.0, 0.25])
def test_the_flow_s_gradient_passes_through_its_density_and_its_draws(tilted, defence, saturating):
    """By finite differences of what it descends with common random numbers."""
    fce, data = ready(40, tilted=tilted, defence=defence, warmup=0, saturating=saturating)
    with torch.no_grad():
        fce.network.head.weight += 0.3 * torch.randn_like(fce.network.head.weight)
    fce.warm_up(data)
    flow = list(fce.noise.parameters())
    fce.optimizers["flow"] = torch.optim.SGD(flow, lr=1.0)
    fce.last_accuracy.fill_(1.0)
    before, twin, held = [p.detach().clone() for p in flow], deepcopy(fce), deepcopy(fce)
    torch.manual_seed(2)
    logs = fce.training_step(data)
    assert logs["flow_turns"] == 1
    gradients = [old - p.detach() for old, p in zip(before, flow, strict=True)]
    assert logs["value"].item() == pytest.approx(flow_turn_value(twin, data, 2).item())
    step, through_q = 1e-5, 0.0
    with torch.no_grad():
        for parameter, gradient in zip(twin.noise.parameters(), gradients, strict=True):
            if parameter.dim() != 1:
                continue
            ends = []
            for sign in (1, -1):
                parameter[0] += sign * step
                ends.append(flow_turn_loss(twin, data, 2, held).item())
                parameter[0] -= sign * step
            slope = (ends[0] - ends[1]) / (2 * step)
            assert gradient[0].item() == pytest.approx(slope, abs=1e-6)
            through_q = max(through_q, abs(slope))
    assert through_q > 1e-3


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("gap", [0.0, 20.0])
def test_a_game_that_does_not_saturate_has_the_same_gradient_where_nothing_is_left_to_tell(gap):
    """And where the classifier is right about all, by a `gap` of log p - log q, that of the
    likelihood of the data and of KL(q || p), while that of V is next to nothing."""
    fce, data = ready(40, tilted=True)
    v = fce.space.enter(data)
    fce.unnormalised = lambda x: torch.where((x[:, None] == v).all(2).any(1), -gap, gap)[:, None]
    flow = list(fce.noise.parameters())

    def gradient(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, flow)])

    def turn(saturating):
        fce.saturating = saturating
        return gradient(fce._flow_loss(v, latents)[0])

    latents = fce.contrast.latents(40)
    one, other = turn(True), turn(False)
    if gap == 0:
        torch.testing.assert_close(one, other)
        return
    draws, log_q = fce.contrast.from_latents(*latents)
    kl = (log_q - fce.log_density(draws, fce.flow.held)).mean()
    torch.testing.assert_close(other, gradient(kl - fce.contrast.log_prob(v).mean()))
    assert one.norm() < 1e-6 * other.norm()


@pytest.mark.parametrize("semi", [{}, SEMI])
def test_an_energy_turn_leaves_the_flow_alone_and_a_flow_turn_the_energy(semi):
    fce, data = ready(**semi, defence=0.1)
    for accuracy, turn in [(0.0, 0), (1.0, 1)]:
        fce.last_accuracy.fill_(accuracy)
        energy, flow = parts(fce)
        assert fce.training_step(data[:100])["flow_turns"] == turn
        energy_now, flow_now = parts(fce)
        assert same(energy, energy_now) == (turn == 1)
        assert same(flow, flow_now) == (turn == 0)


@pytest.mark.parametrize("tilted", [False, True])
def test_the_energy_ascends_the_value_and_the_flow_descends_it(tilted):
    rates = {"learning_rate": 1e-4, "flow_learning_rate": 1e-4, "constant_learning_rate": 1e-4}
    for accuracy, sign in [(0.0, 1), (1.0, -1)]:
        fce, data = ready(**rates, tilted=tilted)
        with torch.no_grad():
            fce.network.head.weight += 0.3 * torch.randn_like(fce.network.head.weight)
        fce.last_accuracy.fill_(accuracy)
        held = deepcopy(fce)
        before = flow_turn_value(fce, data, 3).item()
        torch.manual_seed(3)
        assert fce.training_step(data)["value"].item() == pytest.approx(before, rel=1e-5)
        after = flow_turn_value(fce, data, 3, held if accuracy else fce).item()
        assert sign * (after - before) > 1e-5


def test_the_flow_moves_only_after_an_energy_turn_that_was_right_often_enough():
    fce, data = ready(threshold=0.62, warmup=4, learning_rate=1e-2, flow_learning_rate=1e-3)
    previous, turns = {"flow_turns": 0.0, "accuracy": 0.0}, []
    for step in range(60):
        logs = fce.training_step(data[torch.randint(400, (100,))])
        allowed = previous["flow_turns"] == 0 and previous["accuracy"] > 0.62
        assert bool(logs["flow_turns"]) == (step >= 4 and allowed)
        turns.append(bool(logs["flow_turns"]))
        previous = logs
    assert 3 < sum(turns) <= 28


def test_a_tilted_energy_is_the_flow_until_the_warm_up_ends_and_moves_with_it_afterwards():
    fce, data = ready(tilted=True, warmup=5, warmup_learning_rate=1e-2)
    energy, _ = parts(fce)
    for _ in range(5):
        x = fce.space.enter(data)
        loss, logs = -fce.flow.log_prob(x).mean(), fce.training_step(data)
        assert {name for name, number in logs.items() if number != 0} <= {"log_z", "noise_loss"}
        torch.testing.assert_close(logs["noise_loss"], loss.detach())
    assert same(energy, parts(fce)[0])
    x = fce.space.enter(data)
    torch.testing.assert_close(fce.log_density(x), fce.flow.log_prob(x))
    logs = fce.training_step(data)
    assert logs["value"].item() == pytest.approx(-math.log(4), abs=1e-5)
    assert logs["energy_gap"].abs() < 1  # of one density at two sets of points
    tilt, flow = fce.log_density(x) - fce.flow.log_prob(x), fce.flow.log_prob(x)
    torch.testing.assert_close(tilt.unsqueeze(1), -fce.unnormalised(x) - fce.log_z)
    fce.last_accuracy.fill_(1.0)
    assert fce.training_step(data)["flow_turns"] == 1
    assert not torch.allclose(flow, fce.flow.log_prob(x))
    torch.testing.assert_close(tilt, fce.log_density(x) - fce.flow.log_prob(x))


def test_the_rate_of_the_warm_up_falls_and_the_flow_is_told_from_the_broad_noise_alone():
    fce, data = ready(warmup=4, defence=0.3)
    (group,) = fce.optimizers["warmup"].param_groups
    rates, asked = [], []
    fce._energy_turn = lambda data, noise: asked.append(noise) or {"accuracy": torch.tensor(1.0)}
    fce._flow_turn = lambda data: asked.append("flow") or {"accuracy": torch.tensor(1.0)}
    for _ in range(7):
        group["lr"] = 1e-3
        fce.training_step(data)
        rates.append(group["lr"])
    assert rates == pytest.approx([1e-3] * 3 + [5e-4] + [1e-3] * 3)
    assert asked[:4] == [fce.broad] * 4
    assert asked[4:] == ["flow", fce.contrast, "flow"]


def test_images_have_no_broad_noise():
    with pytest.raises(EBMError, match=r"model\.defence = 0\.1: expected 0 for images"):
        model((8, 8), defence=0.1)


def test_a_gaussian_is_no_flow_to_play_with():
    with pytest.raises(EBMError, match=r"model\.flow"):
        model(flow={"kind": "gaussian"})


def test_both_densities_approach_that_of_the_data():
    fce, data = ready(
        4000,
        flow={"kind": "coupling", "transforms": 2, "width": 16},
        network={"kind": "mlp", "width": 32, "depth": 2},
        warmup=60,
        warmup_learning_rate=2e-2,
        learning_rate=5e-3,
        flow_learning_rate=2e-3,
        defence=0.05,
    )
    turns = 0
    for _ in range(300):
        logs = fce.training_step(data[torch.randint(4000, (256,))])
        turns += int(logs["flow_turns"])
    assert 0 < turns < 150
    test, _ = blobs(4000)
    truth = torch.stack(
        [
            -(test - mean).square().sum(1) / (2 * 0.25)
            for mean in torch.tensor([[1.0, -1.0], [-1.0, 1.5]])
        ]
    ).logsumexp(0) - math.log(2 * 2 * math.pi * 0.25)
    with torch.no_grad():
        lost = [(truth + of.energy(test)).mean().item() for of in (fce, fce.noise)]
        total = (-fce.energy(cell_centres(-6, 6, 150).float())).logsumexp(0) + 2 * math.log(0.08)
    assert total.item() == pytest.approx(0, abs=0.1)
    assert lost[0] < 0.12
    assert lost[1] < 0.4


def test_the_first_labelled_points_of_each_class_are_kept_and_no_other_label_is_seen():
    fce, data = ready(**SEMI)
    _, y = blobs(400)
    expected = torch.cat([data[y == k][:3] for k in range(2)])
    assert torch.equal(fce.points, expected)
    assert fce.labels.tolist() == [0, 0, 0, 1, 1, 1]
    lies = torch.where(torch.arange(400) < 6, y, 1 - y)
    liar = model(**SEMI)
    torch.manual_seed(1)
    blobs(400)  # the same draws as in `ready`
    liar.initialise(data, lies)
    for of, classes in ((fce, y), (liar, lies)):
        torch.manual_seed(4)
        of.training_step(data[:50], classes[:50])
        of.training_step(data[50:100], None)
    assert same(weights(fce), weights(liar))


def test_too_few_labelled_points_are_one_line():
    fce, data = ready(**SEMI)
    y = (torch.arange(400) < 398).long()
    with pytest.raises(EBMError, match=r"model\.labelled = 3: class 0 has 2 points"):
        fce.initialise(data, y)
    with pytest.raises(EBMError, match=r"model\.classes = 2: the data have 3"):
        fce.initialise(data, torch.arange(400) % 3)


def test_an_ensemble_shows_its_members_the_labels_they_need():
    ensemble = Ensemble(lambda: model(**SEMI), members=2, snapshots=0, every=1, without=[])
    x, y = blobs(60)
    assert ensemble.needs_labels
    ensemble.initialise(x, y)
    assert all(member.labels.sum() == 3 for member in ensemble.members)
    assert not Ensemble(model, members=2, snapshots=0, every=1, without=[]).needs_labels


def test_the_densities_of_the_classes_mix_to_the_density():
    fce, data = ready(**SEMI)
    with torch.no_grad():
        fce.log_z += torch.tensor([0.3, -0.8])
        v = fce.space.enter(data)
        each, whole = fce.log_densities(v), fce.log_density(v)
        torch.testing.assert_close(each.exp().mean(1), whole.exp())
        posterior = each - each.logsumexp(1, keepdim=True)
        torch.testing.assert_close(fce._log_posterior(v), posterior)
        shared = fce.network.head.weight
        assert shared.shape[0] == 2  # all layers but the last
    named = fce.classify(data)
    assert torch.equal(named["accuracy"], posterior.argmax(1))


def test_the_energy_and_its_twin_learn_two_blobs_from_three_points_of_each():
    fce, data = ready(**SEMI, learning_rate=1e-2)
    for _ in range(60):
        logs = fce.training_step(data[torch.randint(400, (64,))])
    assert logs["cross_entropy"] < 0.1
    _, y = blobs(400)
    for found in fce.classify(data).values():
        assert (found == y).float().mean() > 0.95
    assert ready()[0].classify(data) == {}


def test_at_most_a_batch_of_labelled_points_joins_it():
    fce, _ = ready(**SEMI | {"labelled": 20})
    points, classes = fce._labelled(7)
    assert points.shape == (7, 2)
    everything, _ = fce._labelled(100)
    assert everything.shape == (40, 2)
    distance = torch.cdist(points, fce.space.enter(fce.points))
    assert torch.equal(fce.labels[distance.argmin(1)], classes)


@pytest.mark.usefixtures("double")
def test_a_posterior_that_is_constant_is_smooth():
    fce, data = ready(**SEMI)
    torch.nn.init.zeros_(fce.network.head.weight)
    roughness = fce.roughness(data, torch.randn_like(data))
    assert roughness.item() == pytest.approx(0, abs=1e-15)
    gradient = torch.autograd.grad(roughness, fce.network.head.weight)[0]
    assert gradient.isfinite().all()


@pytest.mark.usefixtures("double")
def test_the_roughness_is_in_the_direction_in_which_a_linear_posterior_changes_most():
    fce, _ = ready(**SEMI)
    torch.manual_seed(5)
    w = torch.tensor([1.5, -2.0])
    fce.unnormalised = lambda v: torch.stack([v @ w, torch.zeros(len(v))], 1)
    for point in torch.randn(6, 1, 2):
        before = fce._log_posterior(point)

        def moved(by, point=point, before=before):
            return divergence(before, fce._log_posterior(point + by)).item()

        found = fce.roughness(point, torch.randn_like(point)).item()
        both = [moved(sign * 0.3 * direction(w[None])) for sign in (1, -1)]
        assert min(abs(found - value) for value in both) < 1e-12
        around = [moved(0.3 * direction(torch.randn(1, 2))) for _ in range(50)]
        assert max(around) <= max(both)
        assert found > sum(around) / 50


@pytest.mark.usefixtures("double")
def test_divergence_and_direction_in_closed_form():
    torch.manual_seed(6)
    p, q = torch.randn(5, 4).log_softmax(1), torch.randn(5, 4).log_softmax(1)
    expected = kl_divergence(Categorical(logits=p), Categorical(logits=q)).mean()
    torch.testing.assert_close(divergence(p, q), expected)
    assert divergence(p, p) == 0
    x = torch.randn(5, 2, 3)
    unit = direction(x)
    torch.testing.assert_close(unit.flatten(1).norm(dim=1), torch.ones(5))
    torch.testing.assert_close(direction(7 * x), unit)
    along = (unit * x).flatten(1).sum(1)
    torch.testing.assert_close(along, x.flatten(1).norm(dim=1))
    assert torch.equal(direction(torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("size", [1e-38, 1e-30, 3e-24, 1.0, 1e30])
def test_a_direction_has_the_norm_1_however_small_what_it_is_of(size):
    """Squares of numbers below 1e-23 are 0 in float32. A gradient that is nearly flat has such."""
    x = torch.tensor([[3.0, -4.0]])
    torch.testing.assert_close(direction(size * x), x / 5)


def test_samples_come_with_the_flow_s_own_draws_and_every_acceptance():
    fce, _ = ready(defence=0.2)
    drawn = fce.sample(30, steps=12)
    assert {n: tuple(t.shape) for n, t in drawn.items()} == {
        "samples": (30, 2),
        "generator": (30, 2),
        "acceptance": (12,),
    }
    assert not torch.equal(drawn["samples"], drawn["generator"])
    assert ((drawn["acceptance"] > 0) & (drawn["acceptance"] <= 1)).all()


@pytest.mark.parametrize(("tilted", "defence"), [(0, 0.0), (0, 0.3), (1, 0.0), (1, 0.3)])
def test_the_energy_of_a_draw_is_relative_to_the_noise(monkeypatch, tilted, defence):
    """Whose density at a draw is known, and of a tilted energy that is all that it needs of it."""
    fce, x = ready(tilted=bool(tilted), defence=defence, **SEMI)
    v = fce.space.enter(x)
    torch.nn.init.normal_(fce.network.head.weight)
    torch.nn.init.normal_(fce.log_z)
    expected = fce.contrast.log_prob(v) - fce.log_density(v)
    torch.testing.assert_close(fce.relative_energy(v, fce.contrast.log_prob(v)), expected)
    draws, energy = fce.draw_with_energy(50)
    torch.testing.assert_close(energy, fce.contrast.log_prob(draws) - fce.log_density(draws))
    asked = []
    monkeypatch.setattr(fce.flow, "log_prob", lambda v: asked.append(len(v)) or v.sum(1))
    fce.draw_with_energy(50)
    assert bool(asked) == (defence > 0)


def test_a_killed_semi_supervised_run_ends_with_the_same_bits(tmp_path):
    x, y = blobs(40)

    def train(folder, steps):
        fce = model(**SEMI, warmup=6, tilted=True)
        options = OPTIONS | {"cooldown": 0.0}
        fit(fce, x, y, steps=steps, watch=WATCH, checkpoints=Checkpoints(folder), **options)
        return weights(fce)

    expected = train(tmp_path / "whole", 25)
    train(tmp_path / "killed", 13)
    assert same(expected, train(tmp_path / "killed", 25))


def test_images_are_told_from_a_flow_of_images():
    """Tilted, of five levels, with labels of two classes: what no other shape exercises."""
    glow = {"kind": "glow", "levels": 1, "depth": 1, "width": 4}
    conv = {"kind": "conv", "width": 2, "depth": 1}
    changes = {"flow": glow, "network": conv, "levels": 5, "margin": 0.01, "tilted": True}
    fce = model((4, 4), **SEMI | changes, warmup=3)
    torch.manual_seed(7)
    y = torch.arange(64) % 2
    x = ((torch.rand(64, 4, 4) + y[:, None, None]) * 2).round() / 4
    fce.initialise(x, y)
    torch.testing.assert_close(fce.energy(x), fce.noise.energy(x))
    for _ in range(8):
        logs = fce.training_step(x)
    assert all(value.isfinite() for value in logs.values())
    assert torch.equal(fce.energy(x), fce.energy(x))
    drawn = fce.sample(9, steps=3)
    for name in ("samples", "generator"):
        assert torch.equal(drawn[name], (4 * drawn[name]).round() / 4)
        assert drawn[name].shape == (9, 4, 4)
    assert fce.classify(x)["accuracy"].shape == (64,)


@pytest.mark.usefixtures("double")
def test_a_semi_supervised_turn_descends_the_value_the_labels_and_the_roughness():
    """-V + s cross entropy + l roughness, each by the same draws; the step is its gradient."""
    fce, x = ready(**SEMI | {"supervision": 3.0, "smoothness": 0.7})
    moving = [*(p for p in fce.network.parameters() if p.requires_grad), fce.log_z]
    fce.optimizers["energy"] = torch.optim.SGD(moving, lr=1.0)
    data = fce.space.enter(x[:50])
    torch.manual_seed(8)
    draws, log_q = fce.contrast.from_latents(*fce.contrast.latents(50))
    points, classes = fce._labelled(50)
    start = torch.randn_like(data)
    r = fce.log_density(data) - fce.contrast.log_prob(data)
    v = value(r, fce.log_density(draws) - log_q)
    labels = torch.nn.functional.nll_loss(fce._log_posterior(points), classes)
    rough = fce.roughness(data, start)
    expected = torch.autograd.grad(-v + 3.0 * labels + 0.7 * rough, moving)
    before = [p.detach().clone() for p in moving]
    torch.manual_seed(8)
    logs = fce.training_step(x[:50])
    assert logs["cross_entropy"].item() == pytest.approx(labels.item())
    assert logs["roughness"].item() == pytest.approx(rough.item())
    for p, old, slope in zip(moving, before, expected, strict=True):
        torch.testing.assert_close(p.detach(), old - slope)


@pytest.mark.usefixtures("double")
def test_the_roughness_moves_the_posterior_of_the_point_aside_not_that_of_the_point():
    """KL(p || q) with p held: on a line there are two directions, and one is found."""
    fce, _ = ready(**SEMI)
    w = torch.tensor(1.3, requires_grad=True)
    fce.unnormalised = lambda v: torch.stack([w * v[:, 0], 0 * v[:, 0]], 1)
    for point in torch.tensor([[-0.8], [0.1], [1.7]]):
        v = point[None]
        found = fce.roughness(v, torch.ones(1, 1))
        held = fce._log_posterior(v).detach()
        both = [divergence(held, fce._log_posterior(v + far)) for far in (-0.3, 0.3)]
        expected = min(both, key=lambda kl: abs(kl.item() - found.item()))
        slopes = [torch.autograd.grad(kl, w)[0].item() for kl in (found, expected)]
        assert slopes[0] == pytest.approx(slopes[1])


def test_labelled_points_enter_the_space_like_all_others():
    fce, data = ready(**SEMI)
    fce.space.initialise(5 + 3 * data)
    points, classes = fce._labelled(100)
    everything = fce.space.enter(fce.points)
    distance, row = torch.cdist(points, everything).min(1)
    assert distance.max() < 1e-5
    assert torch.equal(fce.labels[row], classes)
