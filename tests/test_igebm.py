"""Laws of implicit generation: the gradient of its objective, its replay buffer, its options."""

import math
from functools import partial

import pytest
import torch
from small_models import MODELS, train

from ebm import EBMError, figures, metrics, tasks
from ebm.demonstrations import demonstrate
from ebm.samplers import value_and_gradient
from ebm.seeds import seed
from ebm.train import DivergenceError, Watch
from ebm.variants import igebm
from ebm.variants.igebm import IGEBM, augmented, free_energy

IMAGES = MODELS["igebm"] | {
    "network": {"kind": "conv", "width": 4, "depth": 1},
    "classes": 3,
}


def build(shape=(4,), settings=MODELS["igebm"], **changes):
    seed("model", 0)
    model = IGEBM(shape, **settings | changes)
    low, high = model.bounds
    model.initialise(low + (high - low) * torch.rand(10, *shape))
    return model


def images(n=8):
    return torch.rand(n, 8, 8), torch.arange(n) % 3


class Quadratic(torch.nn.Module):
    """E(x) = theta |x|^2 / 2."""

    def __init__(self):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor(0.7))

    def of_points(self, x, y=None):
        return self.theta * x.square().sum(1) / 2


def quadratic(network=Quadratic, **changes):
    free = {"bounds": (-9.0, 9.0), "energy_penalty": 0.0, "data_noise": 0.0, "clip": math.inf}
    model = build(ema=0.0, **free, **changes)
    model.network = network()
    model.optimizers["energy"] = torch.optim.SGD(model.network.parameters(), lr=1.0)
    return model


def test_the_step_follows_the_gradient_of_the_likelihood():
    """d/dtheta of E_data[E] - E_chains[E] is half the difference of the mean squared norms."""
    model = quadratic(kl=0.0, entropy=0.0)
    data = torch.randn(16, 4)
    torch.manual_seed(1)
    logs = model.training_step(data)
    chains = model.replay[model.replay_age > 0]
    expected = (data.square().sum(1).mean() - chains.square().sum(1).mean()) / 2
    assert len(chains) == 16
    assert (0.7 - model.network.theta).item() == pytest.approx(expected.item(), rel=1e-4)
    assert logs["energy_gap"].item() == pytest.approx(0.7 * expected.item(), rel=1e-4)


def test_the_kl_term_has_the_gradient_through_the_last_step_only():
    """x~ = y - eps theta y and E_stop(x~) = s |x~|^2 / 2 at s = theta: the derivative by theta is
    -eps s x~.y."""
    model = quadratic(kl=1.0, entropy=0.0, gradient_clip=None)
    batch = model._draw_batch(16)
    energy = partial(model._training_energy, y=None)
    negative = model._langevin(energy, batch.start)
    kl, entropy = model._improvement(negative.x, energy, batch.others)
    (slope,) = torch.autograd.grad(kl, model.network.theta)
    end = negative.x.detach()
    y = negative.gradient.detach() / 0.7
    expected = -model.step_size * 0.7 * (end * y).sum(1).mean()
    assert slope.item() == pytest.approx(expected.item(), rel=1e-4)
    assert kl.item() == pytest.approx(0.35 * end.square().sum(1).mean().item(), rel=1e-5)
    assert entropy == 0


def test_the_entropy_term_is_the_log_distance_to_the_nearest_other_chain():
    model = quadratic(kl=0.0, entropy=1.0)
    x = torch.randn(5, 4, requires_grad=True)
    others = torch.tensor([3, 7, 11])
    _, entropy = model._improvement(x, model.network, others)
    distance = (x[:, None] - model.replay[others]).norm(dim=2).min(1)
    assert entropy.item() == pytest.approx(distance.values.log().mean().item(), rel=1e-5)
    (slope,) = torch.autograd.grad(entropy, x)
    away = x - model.replay[others][distance.indices]
    expected = away / away.square().sum(1, keepdim=True) / 5
    torch.testing.assert_close(slope, expected.detach())


def test_the_entropy_of_near_points_is_not_the_rounding_of_far_ones():
    """Far from the origin, where a difference of squares would be rounding's."""
    model = quadratic(kl=0.0, entropy=1.0, buffer=200)
    near = 100 + torch.rand(256, 4)
    model.replay.copy_(100 + torch.rand(200, 4))
    outcomes = []
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        x = near.to(dtype).requires_grad_()
        _, entropy = model._improvement(x, model.network, torch.arange(200))
        (slope,) = torch.autograd.grad(entropy, x)
        outcomes.append((entropy.item(), slope.double()))
    (single, slope), (double, exact) = outcomes
    assert single == pytest.approx(double, rel=1e-4)
    torch.testing.assert_close(slope, exact, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("option", ["kl", "entropy"])
def test_an_option_changes_the_step_and_its_absence_leaves_no_trace(option):
    outcomes = []
    for weight in (0.0, 0.5):
        model = build(**{"kl": 0.0, "entropy": 0.0} | {option: weight})
        torch.manual_seed(2)
        logs = model.training_step(torch.rand(8, 4))
        outcomes.append([p.clone() for p in model.network.parameters()])
        assert (logs[option] != 0).item() == bool(weight)
    assert any(not torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_chains_are_written_back_where_they_came_from():
    model = build((8, 8), IMAGES, fresh=0.0)
    before = model.replay.clone()
    labels = model.replay_label.clone()
    model.training_step(*images())
    moved = (model.replay != before).flatten(1).any(1)
    assert moved.sum() == 8
    assert torch.equal(model.replay_age, moved.long())
    assert torch.equal(model.replay_label, labels)  # a chain keeps its class


class Wells(Quadratic):
    """Two wells of standard deviation 0.1 at -1 and 1, the right one four times as heavy."""

    def of_points(self, x, y=None):
        squares = torch.stack([(x + 1).square(), (x - 1).square() - 0.02 * math.log(4)])
        return self.theta / 0.7 * -torch.logsumexp(-squares[:, :, 0] / 0.02, 0)


def chains_of_two_wells(jumps):
    """A buffer whose chains begin in either well, half and half, after a hundred steps."""
    free = {"bounds": (-2.0, 2.0), "gradient_clip": None, "noise": "coupled", "fresh": 0.0}
    model = build((1,), step_size=1e-3, jumps=jumps, buffer=4000, ema=0.0, **free)
    model.network = Wells()
    model.optimizers["energy"] = torch.optim.SGD(model.network.parameters(), lr=0.0)
    model.replay.copy_(torch.tensor([-1.0, 1.0]).repeat(2000)[:, None])
    for _ in range(100):
        model.training_step(torch.zeros(1000, 1))
    return (model.replay > 0).double().mean().item()


def test_jumps_alone_tell_the_chains_how_deep_one_well_is_beside_another():
    assert chains_of_two_wells(jumps=0) == pytest.approx(0.5, abs=0.02)
    assert chains_of_two_wells(jumps=2) == pytest.approx(0.8, abs=0.03)


def test_jumps_stay_within_the_bounds_and_say_how_many_were_accepted():
    model = build((2,), jumps=3, bounds=(-2.0, 2.0), step_size=5e-13, noise="coupled")
    jump = model.chains(model.energy).other
    beyond = torch.tensor([[2.1, 0.0], [0.0, -2.1], [math.inf, 0.0], [0.0, 0.0]])
    assert jump.energy(beyond).isfinite().tolist() == [False, False, False, True]
    model.replay.copy_(torch.tensor([[-1.5, -1.5], [1.5, 1.5]]).repeat(30, 1))
    drawn = model.sample(50, steps=4)
    assert drawn["samples"].abs().max() <= 2
    assert drawn["acceptance"].shape == (50,)
    assert 0 < drawn["acceptance"].mean() < 1
    assert "acceptance" not in build((2,)).sample(3, steps=2)


def test_jumps_are_refused_where_the_chains_have_another_temperature():
    with pytest.raises(EBMError, match=r"^model\.jumps = 2: .*`noise: coupled`"):
        build(jumps=2, noise=0.01)


class Slope(Quadratic):
    """Wells at the edge of [0, 1]: x is exponential, of rate 20."""

    def of_points(self, x, y=None):
        return self.theta / 0.7 * 20 * x[:, 0]


def test_jumps_from_the_edge_are_those_of_a_chain_that_stands_there():
    """A walk steps beyond the bounds, where no density is: whatever lies within is no better."""
    free = {"bounds": (0.0, 1.0), "gradient_clip": None, "noise": "coupled"}
    model = build((1,), step_size=1e-4, jumps=8, langevin_steps=20, buffer=2000, **free)
    model.network = model.average = Slope()
    torch.manual_seed(3)
    model.replay.copy_(torch.empty(2000, 1).exponential_(20).clamp(max=1))
    model.replay[:100].uniform_()
    drawn = model.sample(4000, steps=401)["samples"]
    assert drawn.mean().item() == pytest.approx(1 / 20, abs=0.005)
    assert (drawn > 0.5).double().mean() < 0.02


def test_an_energy_of_vectors_may_see_them_through_fourier_features():
    fourier = {"kind": "fourier", "width": 8, "depth": 1, "frequencies": 5, "bandwidth": 2.0}
    model = build((3,), network=fourier, classes=2)
    x, y = torch.rand(8, 3), torch.arange(8) % 2
    assert model.training_step(x, y)["energy_gap"].isfinite()
    assert (model.conditional_energy(x, 0 * y) != model.conditional_energy(x, 0 * y + 1)).any()
    with pytest.raises(EBMError, match="fourier"):
        build((8, 8), network=fourier)


def test_fresh_chains_start_at_age_one_with_a_class_of_their_own():
    model = build((8, 8), IMAGES, fresh=1.0)
    for _ in range(5):
        logs = model.training_step(*images())
    assert logs["reset_share"] == 1
    assert model.replay_age.max() == 1
    assert model.replay_label.max() < 3


def test_the_share_of_fresh_chains_is_the_one_asked_for():
    model = build(fresh=0.05, buffer=4000)
    share = torch.stack([model._draw_batch(2000).reset.float().mean() for _ in range(10)]).mean()
    assert share.item() == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / 20000))


@pytest.mark.parametrize(
    "changes",
    [{}, {"kl": 0.3, "entropy": 0.1}, {"jumps": 2, "noise": "coupled"}, {"spectral_norm": True}],
    ids=str,
)
def test_chains_on_the_recorded_energy_train_to_the_same_bits(changes, monkeypatch):
    def trained():
        model = build((8, 8), IMAGES | changes)
        for n in (8, 8, 6, 8):  # another batch is recorded anew
            torch.manual_seed(n)
            model.training_step(*images(n))
        return model

    recorded = trained()
    assert ("chains" not in recorded.records) == bool(changes.get("spectral_norm"))

    def plain(model, batch):
        return partial(model._training_energy, y=batch.label)

    monkeypatch.setattr(IGEBM, "_chain_energy", plain)
    expected = trained().state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in recorded.state_dict().items())


def test_points_stay_within_the_bounds():
    model = build((8, 8), IMAGES, step_size=50.0, gradient_clip=None)
    model.training_step(*images())
    assert model.replay.min() >= 0
    assert model.replay.max() <= 1


def test_data_beyond_the_bounds_are_refused():
    model = build(bounds=(0.4, 0.6))
    with pytest.raises(EBMError, match=r"model\.bounds"):
        model.initialise(torch.rand(10, 4))


def test_a_buffer_smaller_than_the_batch_is_refused():
    with pytest.raises(EBMError, match=r"model\.buffer"):
        build(buffer=5).training_step(torch.rand(8, 4))
    with pytest.raises(EBMError, match=r"model\.buffer = 8 leaves no neighbours"):
        build(buffer=8, entropy=0.1).training_step(torch.rand(8, 4))
    build(buffer=8, entropy=0.0).training_step(torch.rand(8, 4))


@pytest.mark.usefixtures("bfloat16")
def test_reduced_precision_is_of_the_layers_in_training_only():
    """Energies of size 100 keep steps far below the 0.5 of bfloat16; gradients are as in float32
    but for rounding; what is trained and what is asked afterwards is float32."""
    exact, model = (build((8, 8), IMAGES, precision=p) for p in ("float32", "bfloat16"))
    x, y = images(32)
    assert torch.equal(exact.conditional_energy(x, y), model.conditional_energy(x, y))
    seed("batch", 0)
    batch = model._draw_batch(32)
    with torch.no_grad():
        for one in (exact, model):
            one.network.head.bias.fill_(100.0)
    ways = [
        value_and_gradient(lambda x, of=of: of._training_energy(x, batch.label), batch.start)
        for of in (exact, model)
    ]
    (energy, gradient), (rounded, rough) = ways
    assert rounded.dtype == torch.float32
    assert not torch.equal(energy, rounded)
    assert len(rounded.unique()) > 25
    torch.testing.assert_close(rounded, energy, rtol=0, atol=0.05)
    assert (rough - gradient).norm() < 0.03 * gradient.norm()
    logs = model.training_step(x, y)
    assert all(value.isfinite() for value in logs.values())
    floating = {t.dtype for t in model.state_dict().values() if t.is_floating_point()}
    assert floating == {torch.float32}


def test_vectors_cannot_be_augmented():
    with pytest.raises(EBMError, match=r"model\.augment"):
        build(augment=0.5)


def test_spectral_normalisation_bounds_every_block_at_any_time():
    model = build((8, 8), IMAGES, spectral_norm=True, learning_rate=1e-3)
    for _ in range(40):
        model.training_step(*images())
    for network in (model.network, model.average):
        for block in network.eval().blocks:
            norm = torch.linalg.matrix_norm(block.layer.weight.flatten(1), 2)
            assert norm.item() == pytest.approx(1, abs=0.05)


def test_the_average_is_normalised_by_singular_values_of_its_own():
    """A fast network and a slow average: the vectors of the one do not fit the other."""
    model = build((8, 8), IMAGES, spectral_norm=True, learning_rate=0.03, ema=0.99)
    for _ in range(100):
        model.training_step(*images())
    for block in model.average.eval().blocks:
        norm = torch.linalg.matrix_norm(block.layer.weight.flatten(1), 2)
        assert norm.item() == pytest.approx(1, abs=0.03)


def test_spectral_normalisation_iterates_once_a_step(monkeypatch):
    model = build((8, 8), IMAGES, spectral_norm=True, ema=0.0)
    calls = []
    normaliser = type(model.network.blocks[0].layer.parametrizations.weight[0])
    original = normaliser._power_method
    monkeypatch.setattr(
        normaliser, "_power_method", lambda *a: calls.append(1) or original(*a), raising=True
    )
    model.training_step(*images())
    assert len(calls) == len(model.network.blocks)


def test_spectral_normalisation_leaves_no_weight_untrained():
    """Chains ask for the normalised weights first, and need no graph of them."""
    model = build((8, 8), IMAGES, spectral_norm=True, langevin_steps=5)
    model.training_step(*images())
    without = [name for name, p in model.network.named_parameters() if p.grad is None]
    assert not without


def test_a_free_energy_sums_over_classes_at_its_temperature():
    energies = torch.randn(8, 3, dtype=torch.float64)
    for temperature in (1.0, 0.3):
        found = free_energy(energies, temperature)
        expected = (-energies / temperature).exp().sum(1)
        torch.testing.assert_close((-found / temperature).exp(), expected)
    assert torch.equal(free_energy(energies, 0.0), energies.amin(1))
    torch.testing.assert_close(free_energy(energies, 1e-6), energies.amin(1), rtol=0, atol=2e-6)


@pytest.mark.parametrize("noise", [0.0, 0.005, "coupled"])
def test_the_energy_is_free_over_classes_at_the_temperature_of_the_chains(noise):
    model = build((8, 8), IMAGES, noise=noise, step_size=0.1).eval()
    temperature = {0.0: 0, 0.005: 0.005**2 / 0.2, "coupled": 1}[noise]
    x, _ = images()
    expected = free_energy(model.class_energies(x), temperature)  # of classes without shares
    torch.testing.assert_close(model.energy(x), expected + temperature * math.log(3))


def test_what_a_class_has_in_its_energy_beyond_another_does_not_matter():
    """Nothing in training sets it: chains and data are compared within a class."""

    class Levels(torch.nn.Module):
        def __init__(self, levels):
            super().__init__()
            self.levels = levels

        def of_points(self, x, y=None):
            return (1 + y) * x.mean((1, 2)) + self.levels[y]

    x, _ = images()
    found = []
    for levels in ([0.0, 0.0, 0.0], [4.0, -9.0, 2.0]):
        torch.manual_seed(9)
        model = build((8, 8), IMAGES, ema=0.0)
        model.initialise(x)
        model.network = Levels(torch.tensor(levels))
        found.append(model.eval().class_energies(x))
        chains = model.class_energies(model.replay)
        for k in range(3):
            own = chains[model.replay_label == k, k]
            torch.testing.assert_close(own.mean(), torch.zeros(()), rtol=0, atol=1e-5)
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_chains_are_by_default_as_long_as_those_of_the_buffer():
    model = build(langevin_steps=6)
    model.replay_age.copy_(torch.arange(len(model.replay_age)) % 2 * 3)  # 1.5 on average
    assert model.sample(2)["chain_steps"].tolist()[-1] == 9


def test_a_training_step_moves_the_levels_of_the_classes():
    model, copy = build((8, 8), IMAGES), build((8, 8), IMAGES)
    x, y = images()
    before = model.eval().class_energies(x)
    model.train().training_step(x, y)
    copy.load_state_dict(model.state_dict())
    after = model.eval().class_energies(x)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, copy.eval().class_energies(x))


def test_chains_have_the_classes_of_the_data_as_often():
    """Else no energy is at equilibrium where classes are not equally frequent."""
    model = IGEBM((4,), **MODELS["igebm"] | {"classes": 3, "buffer": 20_000})
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 2, 2])
    seed("model", 0)
    model.initialise(torch.rand(10, 4), labels)
    for drawn in (model.replay_label, model._labels(20_000)):
        shares = drawn.bincount(minlength=3) / 20_000
        assert shares.tolist() == pytest.approx([0.5, 0.2, 0.3], abs=0.015)
    model.initialise(torch.rand(10, 4))
    assert model.frequencies.tolist() == pytest.approx([0.5, 0.2, 0.3])
    fresh = IGEBM((4,), **MODELS["igebm"] | {"classes": 3})
    assert fresh._labels(3000).bincount().tolist() == pytest.approx([1000] * 3, abs=100)


def test_a_class_that_training_never_saw_is_infinitely_unlikely():
    """As in a member of an ensemble that leaves it out: its network was never trained."""
    model = IGEBM((4,), **MODELS["igebm"] | {"classes": 3, "buffer": 100})
    seed("model", 0)
    model.initialise(torch.rand(10, 4), torch.tensor([0, 2] * 5))
    x = torch.rand(6, 4)
    energies = model.class_energies(x)
    assert energies[:, 1].isinf().all()
    assert energies[:, [0, 2]].isfinite().all()
    temperature = model.noise**2 / (2 * model.step_size)
    known = -energies[:, [0, 2]].double() / temperature
    expected = -temperature * (known.logsumexp(1) + math.log(0.5)).float()
    torch.testing.assert_close(model.energy(x), expected, rtol=1e-4, atol=1e-5)
    assert set(model.classify(x)["accuracy"].tolist()) <= {0, 2}


def test_the_energy_is_that_of_the_moving_average():
    model = build(ema=0.9)
    model.training_step(torch.rand(8, 4))
    first = [p.detach().clone() for p in model.network.parameters()]
    model.training_step(torch.rand(8, 4))
    for average, old, new in zip(
        model.average.parameters(), first, model.network.parameters(), strict=True
    ):
        torch.testing.assert_close(average, (0.9 * old + new) / 1.9)
    x = torch.rand(5, 4)
    assert torch.equal(model.energy(x), model.average(x))


def test_it_learns_a_density():
    """Two unequal Gaussians on a line, by a coupled chain: the density itself, not its samples."""
    torch.manual_seed(3)
    means, deviation, share = torch.tensor([-1.0, 1.0]), 0.3, 0.3
    which = (torch.rand(4000) > share).long()
    data = (means[which] + deviation * torch.randn(4000)).clamp(-2.9, 2.9)[:, None]
    model = build(
        (1,),
        network={"kind": "mlp", "width": 32, "depth": 2},
        bounds=(-3.0, 3.0),
        noise="coupled",
        step_size=0.02,
        langevin_steps=10,
        jumps=8,
        gradient_clip=None,
        buffer=2000,
        learning_rate=3e-3,
        data_noise=0.0,
        energy_penalty=0.0,
        clip=10.0,
        ema=0.99,
        kl=0.0,
        entropy=0.0,
    )
    for step in range(600):
        model.training_step(data[torch.arange(step * 256, step * 256 + 256) % 4000])
    line = torch.linspace(-3, 3, 601)[:, None]
    shares = torch.tensor([share, 1 - share])
    true = (shares.log() - ((line - means) / deviation).square() / 2).logsumexp(1)
    assert metrics.grid_kl(true, -model.energy(line).detach()) < 0.03


def test_augmentation_moves_images_and_keeps_their_range():
    torch.manual_seed(4)
    x = torch.zeros(200, 8, 8)
    x[:, 3:5, 3:5] = 1
    moved = augmented(x)
    assert moved.shape == x.shape
    assert 0 <= moved.min() <= moved.max() <= 1
    assert moved.sum((1, 2)).mean().item() == pytest.approx(4, rel=0.2)
    assert not torch.equal(moved[0], moved[1])


def test_completion_believes_what_is_known():
    model = build((8, 8), IMAGES)
    x, y = images()
    known = torch.zeros(8, 8, dtype=torch.bool)
    known[:4] = True
    frames = tasks.complete(model, x, known, y, steps=10)
    assert torch.equal(frames[:, :, :4], x[:, None, :4].expand(-1, frames.shape[1], -1, -1))
    assert not torch.equal(frames[:, 0, 4:], frames[:, -1, 4:])


def test_composing_a_class_with_itself_doubles_its_energy():
    model = build((8, 8), IMAGES)
    _, y = images()
    torch.manual_seed(5)
    composed = tasks.compose(model, [y, y], steps=5)
    torch.manual_seed(5)
    start = model.noise_like(model.replay[:8])
    doubled = tasks._chain(model, lambda x: 2 * model.conditional_energy(x, y), start, 5)
    torch.testing.assert_close(composed, doubled)


def test_denoising_and_transfer_go_downhill():
    model = build((8, 8), IMAGES, noise=0.0, step_size=0.01, gradient_clip=None)
    x, y = images()
    for frames in (tasks.denoise(model, x, y, 30), tasks.transfer(model, x, (y + 1) % 3, 30)):
        assert torch.equal(frames[:, 0], x)
    end = tasks.denoise(model, x, y, 30)[:, -1]
    assert (model.conditional_energy(end, y) <= model.conditional_energy(x, y)).all()


WILD = {"learning_rate": 3.0, "clip": 1e9, "energy_penalty": 0.0, "gradient_clip": None}
"""What nobody should ask for: nothing that restrains the energy, and steps of 3."""


@pytest.mark.parametrize("restarts", [0, 2])
def test_a_run_that_diverges_says_so_in_one_line(tmp_path, restarts, caplog):
    model = build(kl=0.0, entropy=0.0, **WILD)
    watch = Watch({"energy_gap": 10.0}, restarts)
    with pytest.raises(
        DivergenceError, match=r"\|energy_gap\| = .* exceeds its limit 10"
    ) as caught:
        train(model, tmp_path, watch=watch)
    assert "\n" not in str(caught.value)
    assert caplog.text.count("with fresh noise") == restarts


def test_a_run_that_diverges_once_recovers(tmp_path, caplog):
    """One blow to the weights, between two checkpoints: training goes back, and ends in bounds."""
    model = build(kl=0.0, entropy=0.0, **WILD | {"learning_rate": 1e-3})
    step, calls = model.training_step, []

    def hit(x, y=None):
        calls.append(1)
        if len(calls) == 12:
            with torch.no_grad():
                model.network.head.weight.mul_(1e6)
        return step(x, y)

    model.training_step = hit
    progress = train(model, tmp_path, watch=Watch({"energy_gap": 10.0}, 2))
    assert progress.restarts == 1
    assert "diverged at step" in caplog.text
    assert all(abs(row["energy_gap"]) < 10 for row in progress.history)


def test_the_chain_leaves_the_parameters_as_they_were():
    model = build()
    model._langevin(partial(model._training_energy, y=None), model._draw_batch(8).start)
    assert all(p.requires_grad and p.grad is None for p in model.network.parameters())


def test_a_differentiable_gradient_equals_the_plain_one():
    network = build().network
    x = torch.rand(6, 4)
    plain, graph = (value_and_gradient(network, x, differentiable=d)[1] for d in (False, True))
    torch.testing.assert_close(plain, graph.detach())
    assert graph.requires_grad
    assert not plain.requires_grad


def test_an_energy_of_images_may_be_of_all_pixels_at_once():
    model = build((8, 8), MODELS["igebm"] | {"classes": 3})
    x, y = images()
    assert model.training_step(x, y)["energy_gap"].isfinite()
    assert model.sample(4, steps=2)["samples"].shape == (4, 8, 8)


def test_the_step_descends_the_objective_with_all_its_terms():
    """E = theta |x|^2 / 2 and x~ = y - eps theta y: every term's derivative by hand."""
    alpha, kl, entropy, theta = 0.1, 0.4, 0.5, 0.7
    free = {"bounds": (-2.0, 2.0), "data_noise": 0.0, "gradient_clip": None, "clip": math.inf}
    model = build(ema=0.0, energy_penalty=alpha, kl=kl, entropy=entropy, **free)
    model.network, seen = Quadratic(), {}
    model.optimizers["energy"] = torch.optim.SGD(model.network.parameters(), lr=1.0)
    for name in ("_langevin", "_draw_batch"):
        own = getattr(model, name)
        setattr(model, name, lambda *a, of=own, name=name: seen.setdefault(name, of(*a)))
    data, before = 2 * torch.rand(16, 4) - 1, model.replay.clone()
    model.training_step(data)
    end, batch = seen["_langevin"], seen["_draw_batch"]
    x, y = end.x.detach(), end.gradient.detach() / theta
    through = -model.step_size * y  # d x~ / d theta
    others = before[batch.others]
    away = x - others[torch.cdist(x, others).argmin(1)]

    def moment(k):
        return [points.square().sum(1).pow(k).mean() for points in (data, x)]

    (near, far), (near_4, far_4) = moment(1), moment(2)
    slope = (near - far) / 2 + alpha * theta * (near_4 + far_4) / 2
    slope += kl * theta * (x * through).sum(1).mean()
    slope -= entropy * ((away * through).sum(1) / away.square().sum(1)).mean()
    assert (theta - model.network.theta).item() == pytest.approx(slope.item(), rel=1e-4)


def test_the_gradient_is_cut_to_its_norm():
    model = quadratic(kl=0.0, entropy=0.0)
    model.clip = 1e-3
    logs = model.training_step(5 * torch.randn(16, 4))
    assert logs["gradient_norm"] > 1
    assert abs(model.network.theta.item() - 0.7) == pytest.approx(1e-3, rel=1e-3)


def test_a_step_of_the_chains_is_as_many_langevin_steps_as_asked_for():
    """Without noise each shrinks a point by 1 - eps theta."""
    model = quadratic(kl=0.0, entropy=0.0, noise=0.0, fresh=0.0, gradient_clip=None)
    before = model.replay.clone()
    model.training_step(torch.zeros(16, 4))
    moved = model.replay_age > 0
    shrunk = (1 - model.step_size * 0.7) ** model.langevin_steps * before[moved]
    torch.testing.assert_close(model.replay[moved], shrunk)


def test_noise_on_the_data_is_gaussian_and_stays_within_the_bounds():
    sigma, n = 0.3, 20000
    model = quadratic(kl=0.0, entropy=0.0, buffer=n)
    model.data_noise = sigma
    logs = model.training_step(torch.zeros(n, 4))
    noisy = logs["energy_gap"] + 0.35 * model.replay.square().sum(1).mean()
    expected = 0.35 * 4 * sigma**2
    assert noisy.item() == pytest.approx(expected, rel=4 * math.sqrt(2 / (4 * n)) + 0.01)
    model = build((1,), bounds=(0.0, 1.0), data_noise=9.0, kl=0.0, entropy=0.0, ema=0.0)
    model.network = Slope()
    model.optimizers["energy"] = torch.optim.SGD(model.network.parameters(), lr=0.0)
    assert model.training_step(torch.ones(50, 1))["energy_scale"] <= 20


def test_a_chain_is_compared_with_rows_of_the_buffer_that_are_not_in_its_batch():
    batch = build(entropy=0.1)._draw_batch(8)
    assert len(batch.others) == 52
    assert not set(batch.rows.tolist()) & set(batch.others.tolist())


def test_the_network_sees_points_times_their_scale():
    x = torch.rand(5, 4)
    expected = build(input_scale=1.0).energy(3 * x)
    torch.testing.assert_close(build(input_scale=3.0).energy(x), expected)


def test_augmentation_shifts_as_far_to_either_side():
    """By up to a tenth of the side: the middle of a spot in the middle."""
    torch.manual_seed(6)
    line = torch.arange(41.0) - 20
    spot = (-(line[:, None] ** 2 + line**2) / 8).exp()
    moved = augmented(spot.expand(2000, 41, 41))
    total = moved.sum((1, 2))
    middle = torch.stack([(moved.sum(k) * line).sum(1) / total for k in (1, 2)])
    assert middle.mean(1).abs().max() < 0.3
    assert 3 < middle.abs().max() < 41 / 10 * 1.25 * math.sqrt(2)


def test_what_is_completed_follows_its_density_given_what_is_known():
    """E = 10 (x_1 - x_2)^2: without noise what is missing goes all the way to what is known."""

    class Spring(Quadratic):
        def of_points(self, x, y=None):
            return 10 * (x[:, 0] - x[:, 1]).square()

    model = build((2,), noise=0.0, step_size=0.02, gradient_clip=None, ema=0.0)
    model.network = Spring()
    x = torch.tensor([[0.9, 0.0], [0.2, 0.0]])
    frames = tasks.complete(model, x, torch.tensor([True, False]), None, steps=60)
    torch.testing.assert_close(frames[:, -1, 1], x[:, 0], rtol=0, atol=1e-4)


def demonstrated(x, labels, monkeypatch):
    """The images, and what is written over them, of each picture of E(x, y) = 10 |x - y / 2|^2,
    without noise: chains end at the grey of their class, of two classes between the two."""

    class Levels(torch.nn.Module):
        def of_points(self, x, y=None):
            level = 0.5 if y is None else y[:, None, None] / 2
            return 10 * (x - level).square().flatten(1).sum(1)

    free = {"noise": 0.0, "step_size": 0.02, "gradient_clip": None, "ema": 0.0}
    model = build((4, 4), IMAGES, **free, classes=0 if labels is None else 3)
    model.network = Levels()
    for name in ("strips", "chain_strip"):
        monkeypatch.setattr(figures, name, lambda images, titles: (torch.tensor(images), titles))
    shown, captions = {}, {}

    def draw(name, title, caption, drawing):
        shown[name], captions[name] = drawing, caption

    torch.manual_seed(6)
    demonstrate(model, x, labels, 45, draw)
    return shown, captions


def test_demonstrations_show_what_their_captions_say(monkeypatch):
    torch.manual_seed(7)
    x, y = torch.rand(9, 4, 4), torch.tensor([0, 0, 2, 1, 0, 1, 2, 1, 0])
    shown, captions = demonstrated(x, y, monkeypatch)
    first = x[[0, 3, 2]]  # of each class
    grey = torch.tensor([0.0, 0.5, 1.0])

    def ends_at(images, greys):
        expected = greys[:, None, None].expand_as(images[:, -1])
        torch.testing.assert_close(images[:, -1], expected, rtol=0, atol=1e-6)

    composed, steps = shown.pop("composition")
    assert steps == [0, 1, 3, 10, 30, 45]
    ends_at(composed, torch.tensor([0.25, 0.75, 0.5]))
    assert captions["composition"].endswith("row by row: 0 and 1, 1 and 2, 2 and 0.")
    for images, titles in shown.values():
        assert titles == ["test", "step 0", "1", "3", "10", "30", "45"]
        assert torch.equal(images[:, 0], first)
    completed, noisy, carried = (images for images, _ in shown.values())
    assert list(shown) == ["completion", "denoising", "transfer"]
    assert torch.equal(completed[:, :, :2], first[:, None, :2].expand(-1, 7, -1, -1))
    ends_at(completed[:, :, 2:], grey)
    assert ((completed[:, 1] - first).abs()[:, 2:] > 0).all()
    assert (noisy[:, 1] - first).abs().mean() == pytest.approx(0.2, abs=0.05)
    assert (noisy.min(), noisy.max()) == (0, 1)
    ends_at(noisy, grey)
    assert torch.equal(carried[:, 1], first)
    ends_at(carried, grey[[1, 2, 0]])
    assert captions["transfer"].endswith("follow the next one's: 0 to 1, 1 to 2, 2 to 0.")


def test_without_classes_the_first_images_are_completed_and_denoised(monkeypatch):
    x = torch.rand(9, 4, 4)
    shown, _ = demonstrated(x, None, monkeypatch)
    assert list(shown) == ["completion", "denoising"]
    assert all(torch.equal(images[:, 0], x[:8]) for images, _ in shown.values())


class ByClass(torch.nn.Module):
    """E(x, y) = theta_y |x|^2 / 2."""

    def __init__(self):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor([0.3, 0.9]))

    def of_points(self, x, y=None):
        return self.theta[y] * x.square().sum(1) / 2


def test_chains_are_compared_with_data_each_in_its_own_class():
    """d/dtheta_y of the gap is half of the summed squares of class y: of data less of chains."""
    model = quadratic(ByClass, classes=2, kl=0.0, entropy=0.0, fresh=0.5, buffer=200)
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
    model = build(classes=2, fresh=1.0)
    model.replay_label.zero_()
    model.frequencies.copy_(torch.tensor([0.0, 1.0]))
    model.training_step(torch.rand(8, 4), torch.arange(8) % 2)
    assert torch.equal(model.replay_label, (model.replay_age > 0).long())


def test_a_share_of_the_chains_that_go_on_is_augmented(monkeypatch):
    monkeypatch.setattr("ebm.variants.igebm.augmented", lambda x: torch.full_like(x, 7.0))
    conv = {"kind": "conv", "width": 2, "depth": 1}
    model = build((4, 4), network=conv, augment=0.3, fresh=0.2, buffer=8000)
    batch = model._draw_batch(4000)
    marked = (batch.start == 7).flatten(1).all(1)
    assert not (marked & batch.reset).any()
    share = marked[~batch.reset].double().mean().item()
    assert share == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 3200))


def test_chains_start_uniformly_within_the_bounds():
    model = build((1,), bounds=(-3.0, 1.0), buffer=20000)
    for x in (model.replay, model.starts(20000)):
        assert -3 <= x.min() < -2.99
        assert 0.99 < x.max() <= 1
        assert x.mean().item() == pytest.approx(-1, abs=4 * 4 / math.sqrt(12 * 20000))


class Levels(torch.nn.Module):
    """E(x, y) = 10 |x - y / 2|^2."""

    def of_points(self, x, y=None):
        return 10 * (x - y[:, None] / 2).square().sum(1)


def test_samples_of_classes_are_asked_for_in_turn_and_drawn_of_their_own():
    model = build(classes=3, noise=0.0, step_size=0.02, gradient_clip=None, ema=0.0)
    model.network = Levels()
    drawn = model.sample(7, steps=60)
    assert drawn["labels"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    expected = (drawn["labels"] / 2)[:, None].expand(7, 4)
    torch.testing.assert_close(drawn["samples"], expected, rtol=0, atol=1e-3)


def test_chains_that_do_not_fit_into_memory_together_run_in_parts(monkeypatch):
    model = build(classes=3, noise=0.0, step_size=0.02, gradient_clip=None, ema=0.0)
    model.network, rows = Levels(), []
    monkeypatch.setattr(igebm, "AT_ONCE", 160)
    plain = model.conditional_energy
    monkeypatch.setattr(
        model, "conditional_energy", lambda x, y: rows.append(len(x)) or plain(x, y)
    )
    drawn = model.sample(100, steps=60)
    assert set(rows) == {40, 20}
    assert drawn["labels"].tolist() == [n % 3 for n in range(100)]
    expected = (drawn["labels"] / 2)[:, None].expand(100, 4)
    torch.testing.assert_close(drawn["samples"], expected, rtol=0, atol=1e-3)
    assert torch.equal(drawn["chain"][:, -1], drawn["samples"][:32])
    assert drawn["chain_steps"][-1] == 60


def test_chains_jump_as_often_as_asked_and_walk_as_they_were_told():
    model = build((1,), jumps=2, langevin_steps=7, noise="coupled", gradient_clip=0.5)
    chains = model.chains(model.energy)
    assert (chains.every, chains.times) == (7, 2)
    walk = chains.kernel
    assert (walk.step_size, walk.noise, walk.clip) == (0.1, math.sqrt(0.2), 0.5)
    assert (walk.bounds, walk.noise_last) == ((0.0, 1.0), True)
    plain = build((1,), noise=0.01).kernel(model.energy)
    assert (plain.noise, plain.noise_last) == (0.01, False)


def test_levels_follow_the_network_while_it_trains():
    model = build(classes=2, learning_rate=0.1)
    x = torch.rand(8, 4)
    model.train().class_energies(x)
    model.training_step(x, torch.arange(8) % 2)
    found = model.class_energies(x)
    torch.testing.assert_close(found, model.eval().class_energies(x))


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
