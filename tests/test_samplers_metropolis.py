"""Laws of random-walk and independence Metropolis and of the search for a step size."""

import math
from functools import partial

import pytest
import torch
from torch.distributions import Normal

from ebm.oracles import Banana
from ebm.samplers import (
    HMC,
    MALA,
    DifferentialEvolution,
    Independence,
    Interspersed,
    RandomWalk,
    State,
    adapt,
    run,
)

pytestmark = pytest.mark.usefixtures("double")


def gaussian(x):
    return x.square().sum(1) / 2


def double_well(x):
    return (x**4 / 4 - x**2).sum(1)


def pick(states, i):
    return State(*(f[i : i + 1].expand_as(f) for f in states[:2]))


def flow(kernel, half_width=4.0, points=401):
    """p(x) T(x, y) off the diagonal of a fine line, with the textbook's Gaussian proposal."""
    line = torch.linspace(-half_width, half_width, points)[:, None]
    states = kernel.init(line)
    proposal = (-((line - line.T) ** 2) / (2 * kernel.step_size**2)).exp()
    accept = [kernel.log_accept(pick(states, i), states).clamp(max=0).exp() for i in range(points)]
    p = (-kernel.energy(line)).softmax(0)
    return p[:, None] * proposal * torch.stack(accept)


@pytest.mark.parametrize("dimensions", [1, 8])
@pytest.mark.parametrize("start", ["exact draws", "elsewhere"])
def test_a_gaussian_has_its_moments(dimensions, start):
    torch.manual_seed(0)
    x = torch.randn(20000, dimensions)
    steps, x = (20, x) if start == "exact draws" else (400, 3 + x / 2)
    x = run(RandomWalk(gaussian, 2.4 / math.sqrt(dimensions)), x, steps).x
    assert x.mean() == pytest.approx(0, abs=3 / math.sqrt(x.numel()))
    assert x.var() == pytest.approx(1, abs=3 * math.sqrt(2 / x.numel()))


@pytest.mark.parametrize("energy", [gaussian, double_well])
def test_it_is_in_detailed_balance_on_a_discretised_line(energy):
    forth = flow(RandomWalk(energy, 0.7))
    torch.testing.assert_close(forth, forth.T)


@pytest.mark.parametrize(
    "fault",
    [
        lambda s, t: t.energy - s.energy,
        lambda s, t: (s.energy - t.energy) / 2,
        lambda s, t: torch.zeros_like(s.energy),
        lambda s, t: (s.energy - t.energy).sign() * (s.energy - t.energy).abs().sqrt(),
    ],
    ids=["sign flipped", "half", "always accepted", "root taken"],
)
def test_a_planted_bug_breaks_detailed_balance(fault):
    class Faulty(RandomWalk):
        def log_accept(self, s, t):
            return fault(s, t)

    forth = flow(Faulty(double_well, 0.7))
    assert (forth - forth.T).abs().max() > 0.01 * forth.max()


class Proposals:
    """Draws of N(0.5, 1.5^2) along every axis, with their log density."""

    def __init__(self, dimensions):
        self.q, self.dimensions, self.asked = Normal(0.5, 1.5), dimensions, 0

    def log_prob(self, x):
        return self.q.log_prob(x).sum(1)

    def draw(self, n):
        self.asked += n
        x = self.q.sample((n, self.dimensions))
        return x, self.log_prob(x)


def independent(energy, proposals, weight=torch.add):
    """A kernel whose -log w is `weight` of the energy of p and of log q."""

    def relative(x):
        return weight(energy(x), proposals.log_prob(x))

    def draw(n):
        x, log_q = proposals.draw(n)
        return x, weight(energy(x), log_q)

    return Independence(relative, draw)


def independent_flow(energy, weight=torch.add, points=301):
    """p(x) T(x, y) off the diagonal of a fine line, for proposals y ~ q, and p(x)."""
    line, proposals = torch.linspace(-4.0, 5.0, points)[:, None], Proposals(1)
    kernel = independent(energy, proposals, weight)
    states = kernel.init(line)
    accept = [kernel.log_accept(pick(states, i), states).clamp(max=0).exp() for i in range(points)]
    p, q = (-energy(line)).softmax(0), proposals.log_prob(line).softmax(0)
    return p[:, None] * q * torch.stack(accept), p


@pytest.mark.parametrize("energy", [gaussian, double_well])
def test_independent_proposals_are_in_detailed_balance_on_a_discretised_line(energy):
    forth, p = independent_flow(energy)
    torch.testing.assert_close(forth, forth.T)
    stay = p - forth.sum(1)
    assert stay.min() > -1e-12
    torch.testing.assert_close(forth.sum(0) + stay, p)


@pytest.mark.parametrize(
    "fault",
    [
        lambda energy, log_q: energy,
        lambda energy, log_q: energy - log_q,
        lambda energy, log_q: log_q,
        lambda energy, log_q: -energy - log_q,
    ],
    ids=["without q", "q upside down", "without p", "sign flipped"],
)
def test_a_bug_planted_in_the_weights_breaks_detailed_balance(fault):
    forth, _ = independent_flow(double_well, fault)
    assert (forth - forth.T).abs().max() > 0.01 * forth.max()


def test_a_gaussian_has_its_moments_from_wider_proposals():
    torch.manual_seed(4)
    draw, n = Proposals(2), 20000
    kernel = independent(gaussian, draw)
    state = run(kernel, kernel.start(n), 25)
    assert draw.asked == 26 * n
    assert state.x.shape == (n, 2)
    assert state.x.mean(0).abs().max() < 4 / math.sqrt(n)
    assert (state.x.var(0) - 1).abs().max() < 4 * math.sqrt(2 / n)
    weight = gaussian(state.x) + draw.log_prob(state.x)
    torch.testing.assert_close(state.energy, weight)


def test_independent_proposals_are_all_accepted_where_they_are_of_the_target():
    draw = Proposals(3)
    kernel = independent(lambda x: 7 - draw.log_prob(x), draw)
    state = kernel.start(50)
    torch.testing.assert_close(state.energy, torch.full((50,), 7.0))
    for _ in range(3):
        before, state = state.x, kernel.step(state)
        torch.testing.assert_close(state.acceptance, torch.ones(50))
        assert (before != state.x).any()


def test_chains_of_independent_proposals_begin_where_they_are_put():
    """At points that the proposals reach too seldom, where w is large, so that they stay."""
    draw, x = Proposals(2), torch.full((100, 2), -9.0)
    kernel = independent(lambda v: 0.1 * v.square().sum(1), draw)
    state = run(kernel, x, 5)
    assert draw.asked == 500
    assert torch.equal(state.x, x)
    torch.testing.assert_close(state.energy, 16.2 + draw.log_prob(x))
    assert state.acceptance.max() < 1e-3
    assert state.steps == 5


HEAVY = 0.8


def unequal_wells(x):
    """-log p of Gaussians of deviation 0.1 at -1 and 1, of weights 1 - HEAVY and HEAVY."""
    centres, weight = torch.tensor([-1.0, 1.0]), torch.tensor([1 - HEAVY, HEAVY])
    return -torch.logsumexp(weight.log() - ((x - centres) / 0.1).square() / 2, 1)


def jumping(kind=DifferentialEvolution):
    """From an archive that holds as many points of one well as of the other."""
    wells = torch.tensor([-1.0, 1.0]).repeat(500)[:, None]
    return kind(unequal_wells, wells + 0.1 * torch.randn(1000, 1))


def share_on_the_right(kernel, n=20000):
    return (run(kernel, -1 + 0.1 * torch.randn(n, 1), 60).x > 0).double().mean().item()


def test_chains_that_jump_find_the_weights_of_wells_they_cannot_walk_to():
    torch.manual_seed(5)
    error = math.sqrt(HEAVY * (1 - HEAVY) / 20000)
    assert share_on_the_right(jumping()) == pytest.approx(HEAVY, abs=4 * error)
    assert share_on_the_right(RandomWalk(unequal_wells, 0.1)) == 0


class Reversed(DifferentialEvolution):
    def log_accept(self, s, t):
        return t.energy - s.energy


class Free(DifferentialEvolution):
    def log_accept(self, s, t):
        return torch.zeros_like(s.energy)


class OneSided(DifferentialEvolution):
    def propose(self, x):
        return self.archive[torch.randint(len(self.archive), (len(x),))]


@pytest.mark.parametrize("kind", [Reversed, Free, OneSided])
def test_a_bug_planted_in_the_jumps_shifts_the_weights_or_the_moments(kind):
    torch.manual_seed(6)
    x = run(jumping(kind), -1 + 0.1 * torch.randn(20000, 1), 60).x
    right = (x > 0).double().mean().item()
    squared = (x.abs() - 1).square().mean().item() / 0.01
    assert abs(right - HEAVY) > 0.02 or abs(squared - 1) > 0.1


def test_jumps_keep_the_moments_within_a_well():
    torch.manual_seed(7)
    x = run(jumping(), -1 + 0.1 * torch.randn(20000, 1), 60).x
    deviations = ((x.abs() - 1) / 0.1).square()
    assert deviations.mean().item() == pytest.approx(1, abs=4 * math.sqrt(2 / 20000))


def test_jumps_are_as_likely_as_the_way_back():
    """Differences of pairs of an archive are symmetric whatever it holds."""
    torch.manual_seed(8)
    kernel = DifferentialEvolution(gaussian, torch.tensor([[0.0], [1.0], [3.0]]))
    moves = kernel.propose(torch.zeros(90000, 1)).flatten()
    for move in (1.0, 2.0, 3.0):
        forth, back = ((moves == sign * move).double().mean().item() for sign in (1, -1))
        assert forth == pytest.approx(1 / 9, abs=0.005)
        assert back == pytest.approx(1 / 9, abs=0.005)


class Walk:
    """Moves every chain by `length`."""

    def __init__(self, length, acceptance=None):
        self.length, self.acceptance = length, acceptance

    def init(self, x):
        return State(x, acceptance=self.acceptance)

    def step(self, state):
        return state._replace(x=state.x + self.length, steps=state.steps + 1)


def test_a_kernel_takes_the_steps_of_another_in_between():
    """Two leaps of 100 before steps 0, 3 and 6."""
    walk, leap = Walk(1.0), Walk(100.0, torch.full((2,), 0.25))
    seen = []
    kernel = Interspersed(walk, leap, every=3, times=2)
    end = run(kernel, torch.zeros(2, 1), 7, lambda step, s: seen.append(s.x[0].item()))
    assert seen == [0, 201, 202, 203, 404, 405, 406, 607]
    assert end.steps == 7
    torch.testing.assert_close(end.acceptance, leap.acceptance)


def test_the_other_kernel_starts_where_chains_may_be():
    seen = []
    leap = Walk(0.0)
    leap.init = lambda x: seen.append(x) or State(x)
    kernel = Interspersed(Walk(1.0), leap, every=1, times=1, start=lambda x: x.clamp(max=2.5))
    assert run(kernel, torch.zeros(1, 1), 4).x.item() == 3.5
    assert torch.cat(seen).flatten().tolist() == [0, 1, 2, 2.5]


def test_mixed_kernels_keep_what_both_keep():
    torch.manual_seed(9)
    kernel = Interspersed(MALA(unequal_wells, 5e-3), jumping(), every=4, times=3)
    error = math.sqrt(HEAVY * (1 - HEAVY) / 20000)
    assert share_on_the_right(kernel) == pytest.approx(HEAVY, abs=4 * error)


def test_the_proposal_is_as_wide_as_it_says_and_symmetric():
    torch.manual_seed(1)
    step = RandomWalk(gaussian, 0.3).propose(torch.full((40000, 2), 5.0)) - 5
    assert step.mean() == pytest.approx(0, abs=4 * 0.3 / math.sqrt(step.numel()))
    assert step.std() == pytest.approx(0.3, abs=4 * 0.3 / math.sqrt(2 * step.numel()))


def test_it_needs_no_gradient_and_one_evaluation_a_step():
    calls = []

    def energy(x):
        assert not torch.is_grad_enabled()
        calls.append(len(x))
        return gaussian(x)

    state = run(RandomWalk(energy, 1.0), torch.randn(10, 2), 7)
    assert len(calls) == 8
    assert state.gradient is None
    torch.testing.assert_close(state.energy, gaussian(state.x))


def test_a_proposal_that_is_no_number_is_refused():
    x = torch.randn(1000, 1)
    after = run(RandomWalk(lambda y: torch.where(y[:, 0] > 0, torch.nan, 0.0), 1.0), x - 9, 3)
    assert after.x.isfinite().all()
    assert (after.x < 0).all()
    assert after.acceptance.isfinite().all()


KERNELS = {
    "random walk": (RandomWalk, 0.234),
    "MALA": (MALA, 0.574),
    "HMC": (partial(HMC, leapfrogs=5), 0.8),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("first", [0.001, 0.1, 10.0])
def test_adaptation_finds_the_step_size_of_the_target_acceptance(name, first):
    kernel, target = KERNELS[name]
    torch.manual_seed(2)
    energy = Banana(1.0, 0.3).energy
    frozen, state = adapt(partial(kernel, energy), torch.randn(500, 2), 150, target, first)
    accepted = []
    run(frozen, state.x, 60, lambda step, s: accepted.append(s.acceptance) if step else None)
    assert torch.stack(accepted).mean().item() == pytest.approx(target, abs=0.03)


def test_the_adapted_kernel_is_a_plain_one_and_stays_as_it_is():
    torch.manual_seed(3)
    frozen, state = adapt(partial(MALA, gaussian), torch.randn(50, 2), 50, 0.574)
    assert type(frozen) is MALA
    assert isinstance(frozen.step_size, float)
    before = frozen.step_size
    run(frozen, state.x, 20)
    assert frozen == MALA(gaussian, before)


class Stub:
    """Accepts exp(-step size) of everything, with a little noise of zero mean."""

    def __init__(self, step_size):
        self.step_size = step_size

    def init(self, x):
        return State(x)

    def step(self, state):
        wobble = 0.02 * (-1) ** state.steps
        acceptance = torch.full((4,), math.exp(-self.step_size) + wobble)
        return State(state.x, acceptance=acceptance, steps=state.steps + 1)


@pytest.mark.parametrize("target", [0.234, 0.574, 0.8])
def test_dual_averaging_solves_for_the_step_size(target):
    """acceptance(eps) = exp(-eps): the answer is -log target."""
    frozen, _ = adapt(Stub, torch.zeros(4, 1), 1000, target)
    assert frozen.step_size == pytest.approx(-math.log(target), rel=0.01)


def test_without_warm_up_the_step_size_is_the_first():
    frozen, state = adapt(Stub, torch.zeros(4, 1), 0, 0.6, step_size=0.01)
    assert frozen.step_size == pytest.approx(0.01)
    assert state.steps == 0


def test_dual_averaging_is_algorithm_five():
    """Written out once more from the paper, for acceptances that are given."""
    seen, step_size, target = [], 0.2, 0.6

    def kernel_with(eps):
        seen.append(eps)
        return Stub(eps)

    adapt(kernel_with, torch.zeros(4, 1), 5, target, step_size)
    log_bar, h_bar, eps, mu = 0.0, 0.0, step_size, math.log(10 * step_size)
    expected = []
    for m in range(1, 6):
        alpha = math.exp(-eps) + 0.02 * (-1) ** (m - 1)
        h_bar = (1 - 1 / (m + 10)) * h_bar + (target - alpha) / (m + 10)
        log_eps = mu - math.sqrt(m) / 0.05 * h_bar
        log_bar = m**-0.75 * log_eps + (1 - m**-0.75) * log_bar
        eps = math.exp(log_eps)
        expected.append(eps)
    assert seen[2:6] == pytest.approx(expected[:4])
    assert seen[-1] == pytest.approx(math.exp(log_bar))
