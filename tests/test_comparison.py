"""The comparison of samplers counts what it pays, and its error is that of exact draws for exact
draws."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from ebm import EBMError, figures
from ebm.comparison import (
    Chains,
    Contender,
    Meter,
    compare,
    contenders,
    error,
    row,
    sample,
    weighted,
)
from ebm.oracles import ORACLES, Banana, Funnel, Ising
from ebm.samplers import HMC, MALA, ParallelTempering, PowerTempering, RandomWalk, SpinGibbs
from ebm.schema import ORACLE_TITLES, OracleName
from pipelines.results import Line

pytestmark = pytest.mark.usefixtures("double")
SETTINGS = {
    "seed": 0,
    "threads": 1,
    "chains": 8,
    "evaluations": 300,
    "warmup": 20,
    "leapfrogs": 3,
    "ladders": {name: [0.3, 1.0] for name in ORACLES},
}


@pytest.fixture(scope="module")
def compared():
    return compare(SETTINGS)


def exact(oracle, chains=200, draws=400):
    x = oracle.sample(chains * draws).unflatten(0, (chains, draws))
    return Chains(Contender("exact", None, x[:, 0]), x, 1.0)


@pytest.mark.parametrize("name", ORACLES)
def test_exact_draws_have_the_error_of_exact_draws_and_are_trusted(name):
    torch.manual_seed(0)
    oracle = ORACLES[name]()
    chains = exact(oracle)
    t = torch.arange(1, 401)
    ratio = error(chains, oracle.expectations) * t.sqrt()
    assert ratio[-1].item() == pytest.approx(1, abs=0.25)
    assert ratio[40:].mean().item() == pytest.approx(1, abs=0.25)
    found = row(oracle, chains)
    assert found["ess"] == pytest.approx(1000, rel=0.1)
    assert found["r_hat"] < 1.01
    assert found["tau"] == pytest.approx(1, rel=0.1)
    assert found["diverged"] == 0


def test_a_bias_shows_as_an_error_that_does_not_fall():
    oracle = Banana()
    chains = exact(oracle)
    chains = Chains(chains.contender, chains.x + torch.tensor([oracle.a, 0]), 1.0)
    assert error(chains, oracle.expectations)[-1].item() == pytest.approx(math.sqrt(0.5), abs=0.05)


@pytest.mark.parametrize(
    ("kernel", "rungs", "cost"),
    [
        (lambda e: RandomWalk(e, 0.1), 1, 1),
        (lambda e: MALA(e, 0.1), 1, 1),
        (lambda e: HMC(e, 0.1, 7), 1, 7),
        (
            lambda e: ParallelTempering(
                lambda beta, x: beta * e(x),
                lambda beta: MALA(lambda x: beta * e(x), 0.1),
                (0.1, 0.5, 1.0),
                sweeps=2,
            ),
            3,
            2 * 3 + 2,
        ),
        (
            lambda e: PowerTempering(
                lambda beta, x: beta * e(x),
                lambda beta: MALA(lambda x: beta * e(x), 0.1),
                (0.1, 0.5, 1.0),
                sweeps=2,
            ),
            3,
            2 * 3,
        ),
    ],
)
def test_the_meter_counts_what_a_kernel_pays(kernel, rungs, cost):
    meter, oracle = Meter(), Banana()
    contender = Contender("", kernel(meter.watch(oracle.energy)), oracle.start(5))
    begun = meter.calls
    chains = sample(contender, meter, 100)
    assert chains.cost == cost
    assert chains.x.shape == (5, 100 // cost, 2)
    trial, starts = 2 * cost, 2 * rungs
    assert meter.calls - begun == starts + trial + cost * chains.x.shape[1]
    assert chains.evaluations[-1] <= 100


def test_a_budget_that_pays_for_no_chain_is_one_line():
    meter, oracle = Meter(), Banana()
    hmc = HMC(meter.watch(oracle.energy), 0.1, 100)
    with pytest.raises(EBMError, match=r"evaluations = 300: 4 transitions of HMC take 400"):
        sample(Contender("HMC", hmc, oracle.start(5)), meter, 300)


def test_importance_sampling_has_weights_that_find_the_expectations():
    torch.manual_seed(1)
    oracle = Banana()
    chains = weighted(oracle, 20, 20000)
    assert error(chains, oracle.expectations)[-1] < 0.05
    found = row(oracle, chains)
    assert 10 < found["ess"] < 1000
    assert found["r_hat"] is None


def test_first_draws_whose_weight_is_nothing_beside_later_ones_have_a_mean_all_the_same():
    """exp(-2000) is 0 in every precision, and 0 / 0 no number."""
    oracle = Banana()
    chains = weighted(oracle, 2, 50)
    late = replace(chains, log_weight=chains.log_weight - 2000 * (torch.arange(50) < 10))
    errors = error(late, oracle.expectations)
    assert errors.isfinite().all()
    early, whole = (
        replace(c, x=c.x[:, part], log_weight=c.log_weight[:, part])
        for c, part in [(chains, slice(10)), (chains, slice(10, 50))]
    )
    torch.testing.assert_close(errors[:10], error(early, oracle.expectations))
    torch.testing.assert_close(errors[10:], error(whole, oracle.expectations))


@pytest.mark.parametrize("name", ORACLES)
def test_no_chain_has_come_any_way_before_evaluations_are_counted(name):
    torch.manual_seed(0)
    oracle = ORACLES[name]()
    rivals = list(contenders(oracle, Meter(), (0.3, 1.0), SETTINGS))
    assert len({rival.name for rival in rivals}) == len(rivals) >= 3
    torch.manual_seed(0)
    start = oracle.start(SETTINGS["chains"])
    assert all(torch.equal(rival.x, start) for rival in rivals)


def test_importance_sampling_is_as_wide_as_coordinates_are_not_their_squares():
    drawn = weighted(Funnel(s=3.0), 4, 10000).x
    assert drawn.std().item() == pytest.approx(6.0, rel=0.02)


@pytest.mark.parametrize("order", [1, -1])
def test_what_cannot_be_known_of_one_expectation_is_not_known_of_the_worst(order):
    """NaN is neither smaller nor larger than anything: not lost by the order of expectations."""
    oracle = Banana()
    chains = weighted(oracle, 4, 100)
    chains = replace(chains, log_weight=None, x=chains.x.clone())
    chains.x[..., 0] = 1.0
    known = oracle.expectations[::order]
    found = row(SimpleNamespace(expectations=known, energy=oracle.energy), chains)
    assert math.isnan(found["ess"])
    assert math.isnan(found["r_hat"])


def test_a_table_has_a_line_for_every_kernel_and_oracle(compared):
    assert all(set(line) == set(Line.model_fields) for line in compared.table)
    kernels = {
        name: [r["kernel"] for r in compared.table if r["oracle"] == name] for name in ORACLES
    }
    continuous = ["random walk", "Langevin", "MALA", "HMC", "tempered MALA", "importance"]
    assert all(found == continuous for name, found in kernels.items() if name != "ising")
    assert kernels["ising"] == ["spin flip", "Gibbs", "tempered Gibbs"]
    assert [Line.model_validate(line) for line in compared.table]


def test_metrics_are_flat_numbers_and_everything_can_be_written(compared):
    assert all(isinstance(value, float) for value in compared.metrics.values())
    assert "8gaussians_tempered_MALA_swaps" in compared.metrics
    assert "banana_random_walk_swaps" not in compared.metrics
    json.dumps([compared.metrics, compared.table])
    names = [name for name, *_ in compared.figures]
    assert names == ["error", *ORACLES]
    for _, title, caption, figure in compared.figures:
        assert title
        assert caption.endswith(".")
        assert len(figures.png(figure)) > 5000
    assert [ax.get_title() for ax in compared.figures[0][-1].axes] == [*ORACLE_TITLES.values()]


def test_every_target_has_a_title_and_a_name_in_the_settings():
    assert ORACLE_TITLES.keys() == ORACLES.keys() == {*get_args(OracleName)}


def test_the_same_seed_gives_the_same_numbers():
    settings = SETTINGS | {"ladders": {"ising": [0.5, 1.0]}}
    first, second, other = (compare(settings | {"seed": s}) for s in (0, 0, 1))
    assert first.metrics == second.metrics
    assert first.metrics != other.metrics


def test_a_lattice_is_counted_by_the_block():
    meter, lattice = Meter(), Ising()
    kernel = SpinGibbs(meter.watch(lattice.p_up), lattice.blocks)
    assert sample(Contender("", kernel, lattice.start(4)), meter, 50).cost == 2


def test_what_a_transition_costs_counts_in_samples_and_times():
    """Exact draws at five evaluations each are worth 200 in 1000, and five evaluations apart."""
    torch.manual_seed(2)
    oracle = Banana()
    found = row(oracle, replace(exact(oracle), cost=5.0))
    assert found["ess"] == pytest.approx(200, rel=0.1)
    assert found["tau"] == pytest.approx(5, rel=0.1)


def test_chains_are_trusted_as_far_as_their_worst_expectation():
    """x_2 is exact, x_1 has a mean of its own in every chain."""
    torch.manual_seed(3)
    oracle = Banana()
    chains = exact(oracle, chains=8)
    chains.x[..., 0] = oracle.a * (torch.randn(8, 1) + 0.1 * torch.randn(8, 400))
    found = row(oracle, chains)
    assert found["r_hat"] > 1.5
    assert found["ess"] < 50


def test_swaps_are_those_of_the_pair_that_swaps_least():
    torch.manual_seed(4)
    meter, seen = Meter(), []
    energy = meter.watch(Banana().energy)
    ladder = ParallelTempering(
        lambda beta, x: beta * energy(x),
        lambda beta: MALA(lambda x: beta * energy(x), 0.1),
        (0.01, 0.9, 1.0),
    )

    def step(state):
        seen.append(ladder.step(state))
        return seen[-1]

    watched = SimpleNamespace(init=ladder.init, step=step)
    found = sample(Contender("", watched, torch.randn(50, 2)), meter, 200)
    rates = torch.stack([s.swap_acceptance for s in seen[2:]]).nanmean((0, 2))
    assert rates[0] < 0.8 * rates[1]
    assert found.swaps == pytest.approx(rates[0].item())
