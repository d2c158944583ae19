"""What the oracles say of themselves is true: normalised, drawn from and expected as they are."""

import itertools
import math

import pytest
import torch

from ebm import EBMError, metrics
from ebm.oracles import ORACLES, Banana, Funnel, Ising
from ebm.samplers import value_and_gradient
from ebm.schema import Samplers

pytestmark = pytest.mark.usefixtures("double")
CONTINUOUS = [name for name in ORACLES if name != "ising"]


def test_the_schema_knows_every_oracle():
    annotation = Samplers.model_fields["ladders"].annotation
    assert set(annotation.__args__[0].__args__) == set(ORACLES)


@pytest.mark.parametrize("name", ORACLES)
def test_exact_draws_have_the_known_expectations(name):
    torch.manual_seed(0)
    oracle = ORACLES[name]()
    x = oracle.sample(40000)
    assert x.dtype == oracle.start(3).dtype == torch.float64
    assert x.shape[1:] == oracle.start(3).shape[1:]
    for e in oracle.expectations:
        values = e.function(x)
        error = 4 * e.deviation / math.sqrt(len(x))
        assert values.mean().item() == pytest.approx(e.mean, abs=error)
        assert values.std().item() == pytest.approx(e.deviation, rel=0.03)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_the_draws_are_those_of_the_energy(name):
    """Stein's identities: E[grad E] = 0 and E[x . grad E] = D for draws of exp(-E)."""
    torch.manual_seed(1)
    oracle = ORACLES[name]()
    x = oracle.sample(200000)
    _, gradient = value_and_gradient(oracle.energy, x)
    inner = (x * gradient).sum(1)
    assert inner.mean().item() == pytest.approx(
        x.shape[1], abs=4 * inner.std().item() / math.sqrt(len(x))
    )
    assert (gradient.mean(0).abs() < 4 * gradient.std(0) / math.sqrt(len(x))).all()


@pytest.mark.parametrize(
    ("oracle", "half_width"), [(Banana(1.0, 0.3), 12.0), (Funnel(1.0, 1), 12.0)]
)
def test_the_density_integrates_to_one(oracle, half_width):
    cells = metrics.cell_centres(-half_width, half_width, 1200)
    log_z = metrics.grid_log_partition(oracle.energy(cells), -half_width, half_width)
    assert log_z.item() == pytest.approx(0, abs=2e-3)


def test_the_funnel_is_made_of_normal_distributions():
    torch.manual_seed(2)
    x = torch.randn(50, 10)
    normal = torch.distributions.Normal
    log_p = normal(0, 3.0).log_prob(x[:, 0])
    log_p += normal(0, (x[:, :1] / 2).exp()).log_prob(x[:, 1:]).sum(1)
    torch.testing.assert_close(Funnel().energy(x), -log_p)


def test_the_marginal_of_the_funnel_is_what_its_draws_have():
    torch.manual_seed(3)
    x = Funnel().sample(100000)[:, :2]
    inside = ((x[:, 0] - 1).abs() < 0.5) & ((x[:, 1] - 1).abs() < 0.5)
    cells = metrics.cell_centres(0.5, 1.5, 50)
    share = Funnel().marginal(cells).exp().mean().item()
    error = 4 * math.sqrt(share / len(x))
    assert inside.double().mean().item() == pytest.approx(share, abs=error)


def bonds(side):
    """Every site with the one to its right and the one below, round the edges."""
    for i, j in itertools.product(range(side), repeat=2):
        yield (i, j), (i, (j + 1) % side)
        yield (i, j), ((i + 1) % side, j)


@pytest.mark.parametrize("side", [2, 4])
def test_the_energy_of_a_lattice_is_that_of_its_bonds(side):
    lattice = Ising(side, 0.3)
    x = lattice.states[:: max(1, len(lattice.states) // 200)]
    expected = -0.3 * sum(x[:, *a] * x[:, *b] for a, b in bonds(side))
    torch.testing.assert_close(lattice.energy(x), expected)


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_its_conditionals_are_those_of_the_enumerated_distribution(beta):
    lattice = Ising(2, 0.4)
    for site in itertools.product(range(2), repeat=2):
        up, down = lattice.states.clone(), lattice.states.clone()
        up[:, *site], down[:, *site] = 1, -1
        weights = torch.stack([(-beta * lattice.energy(x)).exp() for x in (up, down)])
        found = lattice.p_up(lattice.states, beta)[:, *site]
        torch.testing.assert_close(found, weights[0] / weights.sum(0))


def test_all_states_are_there_once_and_blocks_cover_the_lattice_without_touching():
    lattice = Ising(4)
    assert len(lattice.states.unique(dim=0)) == 2**16
    black, white = lattice.blocks
    assert (black ^ white).all()
    assert not any(block[a] and block[b] for block in lattice.blocks for a, b in bonds(4))


@pytest.mark.parametrize("side", [3, 6])
def test_a_lattice_that_cannot_be_used_is_refused(side):
    with pytest.raises(EBMError, match=f"side = {side}"):
        Ising(side)


def test_chains_on_a_lattice_begin_all_up_or_all_down():
    torch.manual_seed(3)
    start = ORACLES["ising"]().start(100)
    assert start.shape == (100, 4, 4)
    assert set(start.sum((1, 2)).tolist()) == {-16, 16}
