"""Laws of BiGAN: the score, the losses, who moves when and which way."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as binary_cross_entropy

from ebm.variants.bigan import BiGAN, cross_entropy


def model(shape=(2,), **changes):
    """A small BiGAN in float64."""
    torch.manual_seed(0)
    settings = {
        "network": "mlp",
        "encoder": [16],
        "generator": [16],
        "discriminator": [16, 16],
        "latent": 2,
        "mix": 0.1,
        "generator_learning_rate": 1e-3,
        "discriminator_learning_rate": 1e-3,
        "betas": (0.5, 0.999),
        "ema": 0.0,
    }
    return BiGAN(shape, **settings | changes).double()


NETWORKS = ("encoder", "generator", "discriminator")


class Linear(nn.Module):
    """The logit d(x, z) = a.x + b.z, with the interface of a joint network."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def features(self, x):
        return x

    def pair(self, x, z):
        return x @ self.a + z @ self.b

    forward = pair


def snapshot(network):
    return [p.detach().clone() for p in network.parameters()]


def moved(network, before):
    return any(not torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))


def step(bigan, x, which):
    """One of the two steps, as in a training step."""
    z = bigan._prior(len(x))
    code, fake = bigan.encoder(x), bigan.generator(z)
    if which == "discriminator":
        return bigan._discriminator_step(x, code.detach(), fake.detach(), z)
    return bigan._generator_step(x, code, fake, z)


@pytest.mark.parametrize(
    ("which", "movers"),
    [("discriminator", {"discriminator"}), ("generator", {"encoder", "generator"})],
)
def test_each_step_moves_its_own_networks_only(which, movers):
    bigan = model()
    before = {name: snapshot(getattr(bigan, name)) for name in NETWORKS}
    step(bigan, torch.randn(8, 2).double(), which)
    assert {name for name in NETWORKS if moved(getattr(bigan, name), before[name])} == movers


def test_the_cross_entropy_is_that_of_ones_and_zeros():
    a, b = torch.randn(7).double(), torch.randn(7).double()
    expected = binary_cross_entropy(a, torch.ones_like(a)) + binary_cross_entropy(
        b, torch.zeros_like(b)
    )
    torch.testing.assert_close(cross_entropy(a, b), expected)
    assert cross_entropy(torch.zeros(3), torch.zeros(3)).item() == pytest.approx(2 * math.log(2))


def test_the_discriminator_learns_that_data_pairs_are_one():
    bigan = model(discriminator_learning_rate=1e-2)
    x = 3 + torch.randn(64, 2).double()
    logs = [step(bigan, x, "discriminator") for _ in range(100)]
    assert logs[0]["discriminator_loss"] == pytest.approx(2 * math.log(2), abs=0.3)
    assert logs[-1]["discriminator_loss"] < 0.2
    assert logs[-1]["energy_gap"] < -2
    assert bigan.discriminator(x, bigan.encoder(x)).mean() > 0


def test_the_generators_step_exchanges_the_labels():
    """Under d = a.x + b.z the generator climbs along a and the encoder goes down along b: a wrong
    sign in either term fails."""
    bigan = model()
    a, b = torch.tensor([1.0, -2.0]).double(), torch.tensor([-0.5, 1.5]).double()
    bigan.discriminator = Linear(a, b)
    bigan.optimizers["generator"] = torch.optim.SGD(
        [*bigan.encoder.parameters(), *bigan.generator.parameters()], lr=1e-2
    )
    x, z = torch.randn(32, 2).double(), torch.randn(32, 2).double()
    code, made = bigan.encoder(x), bigan.generator(z)
    logs = bigan._generator_step(x, code, made, z)
    expected = cross_entropy(made @ a + z @ b, x @ a + code @ b)
    torch.testing.assert_close(logs["generator_loss"], expected.detach())
    assert (bigan.generator(z) @ a).mean() > (made @ a).mean()
    assert (bigan.encoder(x) @ b).mean() < (code @ b).mean()


@pytest.mark.parametrize("mix", [0.0, 0.1, 1.0])
def test_the_score_mixes_the_reconstruction_with_the_discriminator(mix):
    bigan = model((2, 3), mix=mix)
    x = torch.rand(5, 2, 3).double()
    z = bigan.encoder(x)
    distance = (x - bigan.generator(z)).abs().sum((1, 2))
    real = torch.sigmoid(bigan.discriminator(x, z))
    torch.testing.assert_close(bigan.energy(x), (1 - mix) * distance - mix * real.log())


def test_a_pair_that_looks_real_and_comes_back_has_the_lowest_score():
    bigan = model()
    bigan.encoder, bigan.generator = nn.Identity(), nn.ReLU()
    bigan.discriminator = Linear(torch.ones(2).double(), torch.zeros(2).double())
    comes_back, fails, looks_made = torch.tensor([[1.0, 1], [-1, 3], [0, 0]]).double()
    energy = bigan.energy(torch.stack([comes_back, fails, looks_made]))
    assert energy[0] == energy.min()
    assert energy[1].item() == pytest.approx(0.9 * 1 + 0.1 * math.log1p(math.exp(-2)))
    assert energy[2].item() == pytest.approx(0.1 * math.log(2))


def test_scores_and_samples_are_those_of_the_averages():
    bigan = model(ema=0.9)
    bigan.training_step(torch.randn(8, 2).double())
    current = [p for name in NETWORKS for p in getattr(bigan, name).parameters()]
    first = [p.detach().clone() for p in current]
    bigan.training_step(torch.randn(8, 2).double())
    for average, p, old in zip(bigan.average.parameters(), current, first, strict=True):
        torch.testing.assert_close(average, (0.9 * old + p.detach()) / 1.9)
        assert not torch.equal(average, p)
    x = torch.randn(5, 2).double()
    torch.manual_seed(1)
    energy, drawn = bigan.energy(x), bigan.sample(4)["samples"]
    kept, bigan.average = bigan.average, None
    assert not torch.equal(bigan.energy(x), energy)
    bigan.encoder, bigan.generator, bigan.discriminator = kept
    torch.manual_seed(1)
    assert torch.equal(bigan.energy(x), energy)
    assert torch.equal(bigan.sample(4)["samples"], drawn)


@pytest.mark.parametrize("shape", [(8, 8), (2, 9, 8)])
def test_images_go_through_convolutions(shape):
    widths = {"encoder": [4, 8], "generator": [8, 4], "discriminator": [4, 8]}
    bigan = model(shape, network="conv", **widths, ema=0.9)
    x = torch.rand(6, *shape).double()
    bigan.training_step(x)
    bigan.eval()
    torch.testing.assert_close(bigan.energy(x), torch.cat([bigan.energy(r[None]) for r in x]))
    drawn = bigan.sample(5)["samples"]
    assert drawn.shape == (5, *shape)
    assert 0 <= drawn.min() <= drawn.max() <= 1


def test_it_learns_a_gaussian_and_to_invert_its_generator():
    networks = {"encoder": [64], "generator": [64], "discriminator": [64, 64], "ema": 0.99}
    rates = {"generator_learning_rate": 1e-3, "discriminator_learning_rate": 2e-3}
    bigan = model(**networks, **rates, betas=(0.5, 0.9)).float()
    torch.manual_seed(2)
    mean = torch.tensor([0.5, -0.5])
    for _ in range(800):
        logs = bigan.training_step(mean + 0.3 * torch.randn(128, 2))
    drawn = bigan.sample(2000)["samples"]
    assert drawn.mean(0).tolist() == pytest.approx(mean.tolist(), abs=0.1)
    assert drawn.std(0).tolist() == pytest.approx([0.3, 0.3], abs=0.1)
    assert logs["discriminator_loss"].item() == pytest.approx(2 * math.log(2), abs=0.1)
    x = mean + 0.3 * torch.randn(2000, 2)
    far = mean + 3 * torch.randn(2000, 2)
    chance = bigan.mix * math.log(2)
    assert bigan.energy(x).mean().item() == pytest.approx(chance, abs=0.1)
    assert bigan.energy(far).mean() > 5 * bigan.energy(x).mean()
