"""Laws of the estimators: unbiased by enumeration, errors that cover, known effective sizes."""

import itertools
import math

import pytest
import torch

from ebm import EBMError
from ebm.estimators import accept_reject, accepted, importance, kish, monte_carlo, self_normalised

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
