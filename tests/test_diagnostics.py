"""Laws of the diagnostics: independent draws, autoregressions, chains that disagree."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ebm.diagnostics import autocorrelation_time, diagnose, swap_rates

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("double")


def autoregression(rho, chains=8, draws=5000):
    """x' = rho x + sqrt(1 - rho^2) n, from its stationary N(0, 1)."""
    torch.manual_seed(0)
    x, trace = torch.randn(chains), []
    for _ in range(draws):
        x = rho * x + (1 - rho**2) ** 0.5 * torch.randn(chains)
        trace.append(x)
    return torch.stack(trace, 1)


def test_independent_draws_are_worth_their_number():
    torch.manual_seed(1)
    trace = torch.randn(8, 2000)
    found = diagnose(trace)
    assert found.r_hat == pytest.approx(1, abs=0.005)
    assert found.ess_bulk == pytest.approx(trace.numel(), rel=0.1)
    assert found.ess_tail == pytest.approx(trace.numel(), rel=0.1)
    assert found.mcse == pytest.approx(trace.numel() ** -0.5, rel=0.1)
    assert found.autocorrelation_time == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("rho", [0.5, 0.8, 0.95])
def test_an_autoregression_is_worth_what_is_known(rho):
    trace = autoregression(rho)
    tau = (1 + rho) / (1 - rho)
    found = diagnose(trace)
    assert found.ess_bulk == pytest.approx(trace.numel() / tau, rel=0.15)
    assert found.autocorrelation_time == pytest.approx(tau, rel=0.15)
    assert autocorrelation_time(trace) == found.autocorrelation_time
    assert found.mcse == pytest.approx((tau / trace.numel()) ** 0.5, rel=0.15)
    assert found.r_hat < 1.02


@pytest.mark.parametrize("unit", [2.0**-70, 2.0**70, 1e-300])
def test_in_another_unit_a_trace_is_worth_the_same(unit):
    """As that of a density may be, which is tiny where the energy is high."""
    trace = autoregression(0.8, draws=500)
    plain, found = diagnose(trace), diagnose(unit * trace)
    assert found._replace(mcse=0.0) == pytest.approx(plain._replace(mcse=0.0))
    assert found.mcse == pytest.approx(unit * plain.mcse)


def test_an_alternating_chain_is_worth_more_than_its_number():
    assert diagnose(autoregression(-0.5)).ess_bulk > 1.5 * 8 * 5000


def test_chains_in_different_places_are_told():
    trace = torch.randn(4, 1000)
    assert diagnose(trace + torch.tensor([[0.0], [0.0], [0.0], [2.0]])).r_hat > 1.1


def test_chains_of_different_width_are_told():
    """By the folded ranks: their means agree."""
    trace = torch.randn(4, 1000)
    assert diagnose(trace * torch.tensor([[1.0], [1.0], [1.0], [4.0]])).r_hat > 1.1


def test_a_drift_within_a_chain_is_told():
    """By the split: the chains agree with each other."""
    assert diagnose(torch.randn(4, 1000) + torch.linspace(0, 3, 1000)).r_hat > 1.1


def test_ranks_make_heavy_tails_harmless():
    torch.manual_seed(2)
    assert diagnose(torch.distributions.Cauchy(0, 1).sample((4, 1000))).r_hat < 1.01


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3.0])
def test_a_trace_that_says_nothing_has_no_number(value):
    trace = torch.full((4, 100), 3.0)
    trace[1, 50] = value
    assert all(number != number for number in diagnose(trace))
    assert math.isnan(autocorrelation_time(trace))


def test_swap_rates_are_means_over_time_and_ladders():
    swaps = torch.tensor([[[0.2, 0.4], [torch.nan, torch.nan]], [[0.6, 0.8], [1.0, 0.0]]])
    torch.testing.assert_close(swap_rates(swaps), torch.tensor([0.5, 0.5]))


def test_arviz_is_imported_when_it_is_asked():
    code = "import sys, pipelines, ebm.diagnostics; print({'arviz_stats'} & {*sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == "set()\n", result.stderr


def test_tails_are_worth_what_the_worse_of_their_two_quantiles_is():
    trace = autoregression(0.95)

    def worth(q):
        beyond = (trace <= trace.flatten().quantile(q)).double()
        return trace.numel() / autocorrelation_time(beyond)

    tails, quartiles = (min(worth(q), worth(1 - q)) for q in (0.05, 0.25))
    assert diagnose(trace).ess_tail == pytest.approx(tails, rel=0.02)
    assert tails > 1.2 * quartiles
