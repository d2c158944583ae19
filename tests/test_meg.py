"""Laws of MEG: the bound, the score penalty, who moves when, the latent target."""

import math

import pytest
import torch
from small_models import MODELS, same, weights

from benchmarks import meg as benchmark
from ebm import EBMError
from ebm.samplers import MALA, run
from ebm.variants.base import autocast, multiplies_bfloat16
from ebm.variants.meg import MEG


def model(shape=(2,), **changes):
    """A small MEG in float64."""
    torch.manual_seed(0)
    widths = {name: [16, 16] for name in ("energy", "generator", "statistics")}
    settings = MODELS["meg"] | widths | {"latent": 3, "ema": 0.0, "energy_ema": 0.0}
    return MEG(shape, **settings | changes).double()


def images(**changes):
    """One of images with three channels, with convolutions."""
    widths = {"energy": [4, 8], "generator": [8, 4], "statistics": [4, 8]}
    return model((3, 8, 8), network="conv", **widths | changes)


def snapshot(network):
    return [p.detach().clone() for p in network.parameters()]


def moved(network, before):
    return any(not torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))


def test_the_energy_step_moves_the_energy_only():
    meg = model()
    before = {n: snapshot(getattr(meg, n)) for n in ("energy_network", "generator", "statistics")}
    meg._energy_step(torch.randn(8, 2).double())
    assert moved(meg.energy_network, before["energy_network"])
    assert not moved(meg.generator, before["generator"])
    assert not moved(meg.statistics, before["statistics"])


def test_the_generator_step_moves_generator_and_statistics_only():
    meg = model()
    before = {n: snapshot(getattr(meg, n)) for n in ("energy_network", "generator", "statistics")}
    meg._generator_step(8)
    assert not moved(meg.energy_network, before["energy_network"])
    assert moved(meg.generator, before["generator"])
    assert moved(meg.statistics, before["statistics"])


FOURIER = {"kind": "fourier", "frequencies": 5, "bandwidth": 1.5}


@pytest.mark.parametrize("network", ["mlp", FOURIER])
def test_the_logged_score_norm_is_the_squared_gradient_by_finite_differences(network):
    meg = model(energy_learning_rate=1e-12, network=network)
    data = torch.randn(8, 2, dtype=torch.float64)
    h = 1e-6
    steps = h * torch.eye(2, dtype=torch.float64)
    slopes = [(meg.energy(data + d) - meg.energy(data - d)) / (2 * h) for d in steps]
    expected = torch.stack(slopes).square().sum(0).mean()
    logged = meg._energy_step(data)["score_norm"]
    torch.testing.assert_close(logged, expected.detach(), rtol=1e-5, atol=0)


def test_the_score_of_an_image_is_taken_over_all_its_axes():
    """The released code's norm is over the channels of each pixel, averaged over the pixels: a
    penalty that is smaller by the number of pixels."""
    meg = images(energy_learning_rate=1e-12)
    data = torch.rand(5, 3, 8, 8, dtype=torch.float64)
    logged = meg._energy_step(data)["score_norm"]
    x = data.clone().requires_grad_()
    (score,) = torch.autograd.grad(meg.energy(x).sum(), x)
    torch.testing.assert_close(logged, score.square().sum((1, 2, 3)).mean())
    released = score.square().sum(1).mean()
    assert logged.item() == pytest.approx(64 * released.item())


@pytest.mark.parametrize(("able", "kind"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_processor_without_bfloat16_computes_in_float32_and_says_so_once(
    able, kind, monkeypatch, caplog
):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: able)
    multiplies_bfloat16.cache_clear()
    layer = torch.nn.Linear(3, 2).float()
    for _ in range(2):
        with autocast(torch.bfloat16, layer.weight):
            assert layer(torch.zeros(1, 3).float()).dtype == kind
    assert len(caplog.records) == (not able)
    multiplies_bfloat16.cache_clear()


@pytest.mark.parametrize("able", [True, False])
def test_a_gpu_that_only_emulates_bfloat16_does_not_multiply_it(able, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able)
    multiplies_bfloat16.cache_clear()
    assert multiplies_bfloat16("cuda") == able
    multiplies_bfloat16.cache_clear()


@pytest.mark.usefixtures("bfloat16")
def test_reduced_precision_leaves_energies_and_weights_as_they_are():
    """Layers compute with 8 bits of mantissa, which round an energy of 100 to steps of 0.5; the
    last layer does not."""
    meg = images(precision="bfloat16").float()
    with torch.no_grad():
        meg.energy_network[-1].bias.fill_(100.0)
    logs = meg.training_step(torch.rand(8, 3, 8, 8))
    assert all(value.isfinite() for value in logs.values())
    assert {p.dtype for p in meg.parameters()} == {torch.float32}
    with autocast(meg.precision, torch.empty(0)):
        energy = meg.energy_network(torch.rand(64, 3, 8, 8))
    assert energy.dtype == torch.float32
    assert len(energy.unique()) > 60


def test_fourier_features_are_of_the_energy_alone_and_stay_as_they_are_drawn():
    meg, plain = model(network=FOURIER, energy_ema=0.9), model()
    features = meg.energy_network[0].frequencies
    assert features.shape == (2, 5)
    for _ in range(3):
        meg.training_step(torch.randn(8, 2).double())
    assert torch.equal(features, model(network=FOURIER).energy_network[0].frequencies)
    assert torch.equal(features, meg.energy_average[0].frequencies)
    for part in ("generator", "statistics"):
        shapes = [[w.shape for w in weights(getattr(m, part)).values()] for m in (meg, plain)]
        assert shapes[0] == shapes[1]


def test_fourier_features_are_of_vectors():
    with pytest.raises(EBMError, match=r"'fourier' does not fit points of shape \(8, 8\)"):
        model((8, 8), network=FOURIER)


@pytest.mark.parametrize("network", ["mlp", FOURIER])
def test_the_energy_is_that_of_the_moving_average(network):
    meg = model(energy_ema=0.9, network=network)
    x = torch.randn(5, 2).double()
    before = meg.energy(x)
    meg._energy_step(torch.randn(8, 2).double())
    assert not torch.equal(meg.energy_network(x).squeeze(1), before)
    first = snapshot(meg.energy_network)
    meg._energy_step(torch.randn(8, 2).double())
    weights = zip(meg.energy_average.parameters(), meg.energy_network.parameters(), strict=True)
    for (average, current), old in zip(weights, first, strict=True):
        torch.testing.assert_close(average, (0.9 * old + current.detach()) / 1.9)
    assert torch.equal(meg.energy(x), meg.energy_average(x).squeeze(1))


@pytest.mark.parametrize("shape", [(28, 28), (3, 28, 28), (1, 9, 6), (3, 8, 8)])
def test_the_generator_of_images_makes_images_of_their_shape_within_their_range(shape):
    widths = {name: [4, 4, 4] for name in ("energy", "generator", "statistics")}
    meg = model(shape, network="conv", **widths)
    drawn = meg.sample(6)["samples"]
    assert drawn.shape == (6, *shape)
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert meg.energy(drawn).shape == (6,)


def test_the_information_bound_knows_nothing_of_independent_pairs_and_stays_below_zero():
    meg = model()
    with torch.no_grad():
        meg.statistics.head[-1].weight.zero_()
        meg.statistics.head[-1].bias.zero_()
    x, z = torch.randn(64, 2).double(), torch.randn(64, 3).double()
    ignorant = meg.information(x, z, z.roll(1, 0))
    assert ignorant.item() == pytest.approx(-2 * math.log(2))


def jensen_shannon(r):
    """JSD of two standard normals of correlation r from independent ones, by a sum over a grid."""
    z, step = torch.linspace(-8, 8, 801).double(), 16 / 800
    a, b = z[:, None], z
    apart = torch.exp(-(a * a + b * b) / 2) / (2 * math.pi)
    quadratic = (a * a - 2 * r * a * b + b * b) / (1 - r * r)
    joint = torch.exp(-quadratic / 2) / (2 * math.pi * math.sqrt(1 - r * r))
    middle = (joint + apart) / 2

    def relative(p):
        return torch.special.xlogy(p, p / middle).sum().item() * step**2

    return (relative(joint) + relative(apart)) / 2


def test_the_information_bound_at_its_optimum_is_a_jensen_shannon_divergence():
    """With T = log p(x,z) / p(x)p(z) the bound is 2 JSD - 2 log 2; a correlated Gaussian pair."""
    torch.manual_seed(1)
    r, n = 0.8, 400000
    z = torch.randn(n, 1).double()
    x = r * z + math.sqrt(1 - r * r) * torch.randn(n, 1).double()
    meg = model(latent=1)

    class Optimal(torch.nn.Module):
        def forward(self, pair):
            a, b = pair[:, :1], pair[:, 1:]
            quadratic = (r * r * (a * a + b * b) - 2 * r * a * b) / (2 * (1 - r * r))
            return -quadratic - math.log(1 - r * r) / 2

    meg.statistics.head = torch.nn.Sequential(Optimal(), torch.nn.Unflatten(0, (-1, 1)))
    bound = meg.information(x, z, z.roll(1, 0)).item()

    def mean_log_share(a, b, sign):
        ratio = Optimal()(torch.cat([a, b], 1))
        return torch.nn.functional.logsigmoid(sign * ratio).mean().item()

    divergence = mean_log_share(x, z, 1) + mean_log_share(x, z.roll(1, 0), -1)
    assert bound == pytest.approx(divergence, abs=1e-9)
    assert -2 * math.log(2) < bound < 0
    assert bound == pytest.approx(2 * jensen_shannon(r) - 2 * math.log(2), abs=0.005)


def test_latent_mala_with_a_constant_energy_returns_the_prior():
    """The test that the released sampler fails: without the prior z would diffuse away."""
    meg = model().float()
    with torch.no_grad():
        for p in meg.energy_network.parameters():
            p.zero_()
    torch.manual_seed(2)
    z = run(MALA(lambda z: meg.latent_energy(z, 1.0), 0.3), torch.randn(20000, 3), 50).x
    assert z.var().item() == pytest.approx(1, abs=4 * math.sqrt(2 / z.numel()))
    assert z.mean().item() == pytest.approx(0, abs=4 / math.sqrt(z.numel()))


def test_the_latent_energy_is_beta_times_energy_plus_the_prior():
    meg = model()
    z = torch.randn(5, 3).double()
    expected = 2.5 * meg.energy(meg.generator(z)) - torch.distributions.Normal(0, 1).log_prob(
        z
    ).sum(1)
    offset = 1.5 * math.log(2 * math.pi)
    torch.testing.assert_close(meg.latent_energy(z, 2.5), expected - offset)


def test_it_learns_a_gaussian_that_is_not_its_prior():
    torch.manual_seed(3)
    widths = {name: [64, 64] for name in ("energy", "generator", "statistics")}
    meg = model(score_penalty=0.1, entropy=2.0, ema=0.99, **widths).float()
    for _ in range(600):
        meg.training_step(torch.tensor([0.5, -0.5]) + 0.3 * torch.randn(128, 2))
    drawn = meg.sample(2000)["samples"].detach()
    assert drawn.mean(0).tolist() == pytest.approx([0.5, -0.5], abs=0.12)
    assert drawn.std(0).tolist() == pytest.approx([0.3, 0.3], abs=0.15)


@pytest.mark.parametrize("case", benchmark.CASES, ids=lambda case: case.title)
def test_an_iteration_is_the_published_update(case, capsys):
    """Written down term by term as released, but for the norm of the penalty."""
    benchmark.check_update(case)
    assert "float64" in capsys.readouterr().out


@pytest.mark.parametrize("able", [True, False])
def test_the_benchmark_times_bfloat16_where_the_processor_has_it(able, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "bfloat16", lambda: able)
    threads = str(torch.get_num_threads())
    benchmark.main(["--threads", threads, "--rounds", "1", "--seconds", "0", "--small"])
    lines = capsys.readouterr().out
    assert "published update" in lines
    assert ("ours, bfloat16" in lines) == able
    assert "stacked" in lines


def test_samples_are_of_the_temperature_asked_for():
    """Draw by draw those of an energy that is as many times as steep."""
    one, steep = model(), model()
    with torch.no_grad():
        for p in steep.energy_network[-1].parameters():
            p.mul_(3.0)
    drawn = []
    for meg, beta in ((one, 3.0), (steep, 1.0)):
        torch.manual_seed(4)
        drawn.append(meg.sample(50, steps=20, step_size=0.1, inverse_temperature=beta))
    torch.testing.assert_close(drawn[0]["samples"], drawn[1]["samples"])
    torch.testing.assert_close(drawn[0]["acceptance"], drawn[1]["acceptance"])


def test_mcmc_samples_stand_beside_what_they_came_from_and_both_are_of_the_averages():
    meg = model(ema=0.5, energy_ema=0.5, energy_learning_rate=0.1, generator_learning_rate=0.1)
    for _ in range(3):
        meg.training_step(torch.randn(8, 2).double())
    torch.manual_seed(1)
    drawn = meg.sample(50, steps=3, step_size=0.1)
    torch.manual_seed(1)
    z = meg._prior(50)
    with torch.no_grad():
        torch.testing.assert_close(drawn["generator"], meg.average(z))
    rates = []
    end = run(
        MALA(
            lambda z: meg.energy_average(meg.average(z)).squeeze(1) + z.square().sum(1) / 2,
            0.1,
        ),
        z,
        3,
        lambda step, s: rates.append(s.acceptance) if step else None,
    )
    with torch.no_grad():
        torch.testing.assert_close(drawn["samples"], meg.average(end.x))
    torch.testing.assert_close(drawn["acceptance"], torch.stack(rates).mean(1))
    assert not torch.allclose(drawn["samples"], drawn["generator"])


def test_every_part_of_a_batch_is_one_energy_step():
    meg, seen = model(energy_steps=4), []
    meg._energy_step = lambda part: seen.append(part) or {}
    meg._generator_step = lambda n: seen.append(n) or {}
    x = torch.randn(12, 2)
    meg.training_step(x)
    assert torch.equal(torch.cat(seen[:-1]), x)
    assert [len(part) for part in seen[:-1]] == [3] * 4
    assert seen[-1] == 3


def test_the_generator_goes_down_the_energy_as_it_is_and_not_its_average():
    megs = [model(energy_ema=ema) for ema in (0.0, 0.9)]
    for meg in megs:
        for _ in range(5):
            torch.manual_seed(1)
            meg.training_step(torch.ones(8, 2).double())
    assert same(weights(megs[0].generator), weights(megs[1].generator))


def test_each_average_has_its_own_decay():
    meg = model(ema=0.5, energy_ema=0.9, energy_steps=1)
    old = {}
    for _ in range(2):
        old = {
            n: [p.detach().clone() for p in getattr(meg, n).parameters()]
            for n in ("generator", "energy_network")
        }
        meg.training_step(torch.randn(8, 2).double())
    for network, average, decay in (
        ("generator", meg.average, 0.5),
        ("energy_network", meg.energy_average, 0.9),
    ):
        for a, before, now in zip(
            average.parameters(), old[network], getattr(meg, network).parameters(), strict=True
        ):
            torch.testing.assert_close(a, (decay * before + now) / (1 + decay))
