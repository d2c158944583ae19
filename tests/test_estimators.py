"""Laws of the estimators: unbiased by enumeration, errors that cover, known effective sizes; and
the log Z that draws of two densities determine, and how well."""

import itertools
import math

import pytest
import torch
from test_contrastive import RATIOS, ratios
from torch.distributions import MultivariateNormal, Normal

from ebm import EBMError
from ebm.contrastive import value
from ebm.densities import DENSITIES
from ebm.estimators import (
    accept_reject,
    accepted,
    importance,
    kish,
    log_partition,
    log_partition_variance,
    monte_carlo,
    self_normalised,
)
from ebm.flows import Gaussian
from ebm.metrics import cell_centres
from ebm.samplers import log_mean_exp

pytestmark = pytest.mark.usefixtures("double")
P = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
Q = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
F = torch.tensor([3.0, -1.0, 7.0, 2.0], dtype=torch.float64)
TRUTH = (P * F).sum()


def expectation(estimate, draws, q=Q):
    """Of estimate(indices), exactly: over all `draws`-tuples that q can give."""
    return sum(
        q[list(tuple_)].prod() * estimate(torch.tensor(tuple_))
        for tuple_ in itertools.product(range(4), repeat=draws)
    )


@pytest.mark.parametrize("draws", [2, 4])
def test_importance_sampling_is_unbiased(draws):
    found = expectation(lambda i: importance(F[i], (P / Q).log()[i]).value, draws)
    torch.testing.assert_close(found, TRUTH)


def test_so_is_its_squared_error_bar():
    """The expected squared standard error is the variance of the estimate."""

    def squared(i):
        return importance(F[i], (P / Q).log()[i]).error ** 2

    def second(i):
        return importance(F[i], (P / Q).log()[i]).value ** 2

    torch.testing.assert_close(expectation(squared, 3), expectation(second, 3) - TRUTH**2)


def test_the_bias_of_self_normalised_weights_falls_with_the_number_of_draws():
    biases = [
        abs(expectation(lambda i: self_normalised(F[i], (P / Q).log()[i]).value, n) - TRUTH)
        for n in (2, 4, 7)
    ]
    assert biases[0] > biases[1] > biases[2] > 0


@pytest.mark.parametrize(
    "fault",
    [
        lambda i: (Q / P).log()[i],
        lambda i: (P / Q).log()[i] / 2,
        lambda i: P.log()[i],
        lambda i: torch.zeros(len(i)),
    ],
    ids=["upside down", "root taken", "proposal forgotten", "no weights"],
)
def test_a_planted_bug_in_the_weights_is_a_bias(fault):
    found = expectation(lambda i: importance(F[i], fault(i)).value, 3)
    assert abs(found - TRUTH) > 0.05


def test_self_normalised_weights_may_lack_a_constant():
    i = torch.multinomial(Q, 50, replacement=True)
    log_weight = (P / Q).log()[i]
    for one, other in zip(
        self_normalised(F[i], log_weight), self_normalised(F[i], log_weight - 700), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_equal_weights_are_plain_monte_carlo():
    values = torch.randn(1000)
    plain, zero = monte_carlo(values), torch.zeros(1000)
    for weighted in (importance(values, zero), self_normalised(values, zero)):
        torch.testing.assert_close(weighted.value, plain.value)
        torch.testing.assert_close(weighted.error, plain.error, rtol=1e-3, atol=0)
        torch.testing.assert_close(weighted.ess, plain.ess)


def replicate(name):
    i = torch.multinomial(Q, 400, replacement=True)
    log_weight = (P / Q).log()
    return {
        "monte carlo": lambda: monte_carlo(F[torch.multinomial(P, 400, replacement=True)]),
        "importance": lambda: importance(F[i], log_weight[i]),
        "self-normalised": lambda: self_normalised(F[i], log_weight[i]),
        "accept-reject": lambda: accept_reject(F[i], log_weight[i], log_weight.max().item()),
    }[name]()


@pytest.mark.parametrize("name", ["monte carlo", "importance", "self-normalised", "accept-reject"])
def test_the_standard_error_is_the_spread_of_the_estimates(name):
    torch.manual_seed(0)
    found = [replicate(name) for _ in range(1500)]
    off = torch.stack([(e.value - TRUTH) / e.error for e in found])
    assert off.mean().abs() < 0.15
    assert off.std() == pytest.approx(1, abs=0.08)


@pytest.mark.parametrize(
    ("weights", "size"),
    [
        ([1, 1, 1, 1], 4),
        ([1, 0, 0, 0], 1),
        ([1, 1, 0, 0], 2),
        ([3, 1], 1.6),
        ([1e300, 1e300], 2),
    ],
)
def test_known_weights_have_their_effective_sample_size(weights, size):
    assert kish(torch.tensor(weights, dtype=torch.float64).log()).item() == pytest.approx(size)


@pytest.mark.parametrize("constant", [-3e6, -3e4, 3e6])
def test_a_constant_of_the_log_weights_does_not_matter_in_single_precision(constant):
    equal = torch.full((1000,), constant, dtype=torch.float32)
    assert kish(equal).item() == pytest.approx(1000, rel=1e-5)


def test_lognormal_weights_are_worth_exp_of_minus_their_variance():
    torch.manual_seed(1)
    n = 400000
    assert kish(0.8 * torch.randn(n)).item() / n == pytest.approx(math.exp(-0.64), rel=0.02)


def test_what_accept_reject_keeps_is_exact_and_as_much_as_the_bound_allows():
    torch.manual_seed(2)
    i = torch.multinomial(Q, 100000, replacement=True)
    log_bound = (P / Q).log().max().item() + 0.1
    kept = i[accepted((P / Q).log()[i], log_bound)]
    share = math.exp(-log_bound)
    assert len(kept) / len(i) == pytest.approx(share, abs=4 * math.sqrt(share / len(i)))
    found = torch.bincount(kept, minlength=4) / len(kept)
    assert ((found - P).abs() < 4 * (P * (1 - P) / len(kept)).sqrt()).all()
    assert accept_reject(F[i], (P / Q).log()[i], log_bound).ess < len(i)


def test_a_bound_that_is_none_is_an_error():
    with pytest.raises(EBMError, match=r"exceeds log bound 0\.5"):
        accepted(torch.tensor([0.0, 1.0]), 0.5)
    with pytest.raises(EBMError, match="log weight nan exceeds"):
        accepted(torch.tensor([math.nan, 0.0]), 0.5)


def test_the_error_of_two_draws_is_half_their_distance():
    """The unbiased variance of 0 and 2 is 2, that of their mean 1."""
    assert monte_carlo(torch.tensor([0.0, 2.0])).error == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_error_bar_does_not_vanish_in_half_precision(dtype):
    values = torch.arange(70_000).remainder(2).to(dtype)
    found = monte_carlo(values)
    assert found.ess == 70_000
    assert found.error.item() == pytest.approx(0.5 / math.sqrt(70_000), rel=0.02)


@pytest.mark.parametrize("nu", [0.5, 1.0, 10.0])
def test_the_constant_is_where_the_value_is_highest(nu):
    data, noise = torch.randn(30) * 3, torch.randn(round(30 * nu)) * 3
    c = log_partition(data, noise, nu)
    v = [value(data - c - s, noise - c - s, nu).item() for s in (-0.01, 0.0, 0.01)]
    assert v[1] > max(v[0], v[2])
    for constant in (5, 2e6, -2e6):
        found = log_partition(data + constant, noise + constant, nu)
        assert found - constant == pytest.approx(c, abs=1e-6)
    assert log_partition(*ratios(nu=nu, n=8000), nu) == pytest.approx(0, abs=1e-3)


GAUSSIAN = MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
EIGHT, GRID = DENSITIES["8gaussians"](), DENSITIES["25gaussians"]()
KNOWN = {
    "unit Gaussian": (GAUSSIAN.log_prob, lambda n: GAUSSIAN.sample((n,))),
    "8gaussians": (EIGHT.log_prob, EIGHT.sample),
    "25gaussians": (GRID.log_prob, GRID.sample),
}


@pytest.mark.parametrize("name", KNOWN)
def test_log_z_is_found_within_a_twentieth(name):
    """From 10,000 points and 100 draws of a Gaussian with the data's moments for each."""
    log_prob, sample = KNOWN[name]
    torch.manual_seed(0)
    noise, data = Gaussian(2), sample(10_000)
    noise.initialise(data)
    draws, log_q = noise.draw_with_log_prob(1_000_000)
    log_p = torch.cat([log_prob(part) for part in draws.split(100_000)])
    log_z = math.log(2 * math.pi)
    r = log_prob(data) + log_z - noise.log_prob(data)
    found = log_partition(r, log_p + log_z - log_q, 100.0)
    assert found == pytest.approx(log_z, abs=0.05)
    grid = cell_centres(-4, 4, 800)
    variance = log_partition_variance(log_prob(grid), noise.log_prob(grid), 100.0, 1e-4)
    assert abs(found - log_z) < 4 * math.sqrt(variance / 10_000)


UNIT, WIDE = (Normal(*torch.tensor(pair).double()) for pair in [(0.0, 1.0), (0.5, 1.5)])


def theory(nu, p=UNIT, q=WIDE):
    line = -12 + 24 * (torch.arange(4000) + 0.5) / 4000
    return log_partition_variance(p.log_prob(line), q.log_prob(line), nu, 24 / 4000)


@pytest.mark.parametrize("nu", [0.5, 4.0])
def test_the_variance_is_that_of_many_trials(nu):
    torch.manual_seed(1)
    n, trials = 400, 250

    def trial():
        draws = UNIT.sample((n,)), WIDE.sample((round(nu * n),))
        return log_partition(*(UNIT.log_prob(x) - WIDE.log_prob(x) for x in draws), nu)

    errors = torch.tensor([trial() for _ in range(trials)])
    measured = n * errors.square().mean().item()
    assert measured == pytest.approx(theory(nu), rel=4 * math.sqrt(2 / trials))
    assert errors.mean().abs() < 4 * math.sqrt(theory(nu) / n / trials) + 2 / n


def test_the_variance_falls_with_nu_to_that_of_importance_sampling():
    """1 / nu of it, which is chi^2 of p and q: in closed form for Gaussians."""
    values = [theory(nu) for nu in (0.1, 1.0, 10.0, 100.0, 1e4)]
    assert values == sorted(values, reverse=True)
    precision = 2 - 1 / 1.5**2
    a = -0.5 / 1.5**2
    exponent = (a**2 / precision + 0.5**2 / 1.5**2) / 2
    chi = 1.5 / math.sqrt(precision) * math.exp(exponent) - 1
    assert 1e6 * theory(1e6) == pytest.approx(chi, rel=1e-3)
    assert all(0 <= theory(nu, WIDE, WIDE) < 1e-9 for nu in RATIOS)


@pytest.mark.parametrize(
    ("data", "noise"), [(1.0, -math.inf), (math.inf, -1.0), (math.inf, -math.inf)]
)
def test_noise_that_never_meets_the_data_is_one_line(data, noise):
    with pytest.raises(EBMError, match="does not meet the data"):
        log_partition(torch.full((5,), data), torch.full((10,), noise), 2.0)


@pytest.mark.parametrize("gap", [50, 300, 2000])
def test_noise_that_is_a_chasm_away_from_the_data_is_one_line(gap):
    """V has a maximum there, or is flat for as far as numbers tell, and no draw knows where."""
    data = gap + torch.rand(100, dtype=torch.float64)
    for at in (0.0, 7.0):
        with pytest.raises(EBMError, match="does not meet the data"):
            log_partition(at + data, at - data, 1.0)


def test_ratios_that_are_no_numbers_are_refused():
    with pytest.raises(EBMError, match="does not meet the data"):
        log_partition(torch.tensor([0.0, math.nan]), torch.zeros(4), 2.0)


def test_a_grid_that_holds_too_much_mass_leaves_no_variance_below_nothing():
    """p = q of mass 1.1: 1 / I is less than 1 + 1 / nu."""
    log_p = torch.full((4,), math.log(1.1 / 4), dtype=torch.float64)
    assert log_partition_variance(log_p, log_p, 2.0, 1.0) == 0


def test_a_log_mean_is_over_the_last_axis():
    x = torch.randn(3, 7)
    torch.testing.assert_close(log_mean_exp(x), x.exp().mean(1).log())
