"""Laws of parallel tempering: one rung is the plain kernel; swaps are in detailed balance with the
enumerated product of the rungs; replicas climb as the scheme says."""

import math

import pytest
import torch

from ebm import EBMError
from ebm.diagnostics import swap_rates
from ebm.oracles import Ising
from ebm.samplers import (
    HMC,
    MALA,
    DecoupledLangevin,
    Independence,
    Interspersed,
    ParallelTempering,
    PowerTempering,
    RandomWalk,
    SpinGibbs,
    State,
    run,
)
from ebm.variants.rbm import RBM

pytestmark = pytest.mark.usefixtures("double")
LATTICE = Ising(side=2, coupling=0.3)
BETAS = (0.2, 0.6, 1.0)
KINDS = [ParallelTempering, PowerTempering]


def gaussian(x):
    return x.square().sum(1) / 2


def two_wells(x):
    return 8 * (x.square() - 1).square().sum(1)


def tempered(energy, betas=BETAS, kernel=lambda e: MALA(e, 0.1), kind=ParallelTempering, **more):
    def energy_at(beta, x):
        return beta * energy(x)

    return kind(energy_at, lambda beta: kernel(lambda x: energy_at(beta, x)), betas, **more)


def of_spins(kind=ParallelTempering, betas=BETAS):
    return kind(
        lambda beta, x: beta * LATTICE.energy(x),
        lambda beta: SpinGibbs(lambda x: LATTICE.p_up(x, beta), LATTICE.blocks),
        betas,
    )


@pytest.mark.parametrize(
    "kernel", [lambda e: MALA(e, 0.3), lambda e: RandomWalk(e, 0.9), lambda e: HMC(e, 0.3, 3)]
)
def test_one_rung_is_the_plain_kernel_bit_for_bit(kernel):
    x, ends = torch.randn(50, 2), []
    for chains in (kernel(gaussian), tempered(gaussian, (1.0,), kernel)):
        torch.manual_seed(0)
        ends.append(run(chains, x, 20))
    plain, ladder = ends
    assert torch.equal(plain.x, ladder.x)
    assert torch.equal(plain.energy, ladder.energy)
    assert torch.equal(plain.acceptance, ladder.acceptance)
    assert plain.steps == ladder.steps


def flow(kernel, k):
    """pi_k(a) pi_k+1(b) alpha(a, b -> b, a) for all pairs of states: [16, 16]."""
    states = LATTICE.states
    a, b = (i.flatten() for i in torch.meshgrid(*[torch.arange(len(states))] * 2, indexing="ij"))
    below, above = (
        s.init(states[i]) for s, i in zip(kernel.kernels[k : k + 2], (a, b), strict=True)
    )
    offered = kernel.exchanged(k, below, above)
    accept = kernel.log_accept(k, below, above, *offered).clamp(max=0).exp()
    low, high = ((-beta * LATTICE.energy(states)).softmax(0) for beta in kernel.betas[k : k + 2])
    return (low[a] * high[b] * accept).view(len(states), len(states))


@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cached", [False, True])
def test_swaps_are_in_detailed_balance_with_the_product_of_the_rungs(k, kind, cached):
    """With kernels that cache energies, and with those that know none."""
    kernel = (
        tempered(LATTICE.energy, kernel=lambda e: RandomWalk(e, 1.0), kind=kind)
        if cached
        else of_spins(kind)
    )
    forth = flow(kernel, k)
    torch.testing.assert_close(forth, forth.T)
    assert forth.sum() < 0.999


class SignFlipped(ParallelTempering):
    def log_accept(self, k, *states):
        return -super().log_accept(k, *states)


class HalfForgotten(ParallelTempering):
    """Only what the lower rung has to say."""

    def log_accept(self, k, below, above, to_below, to_above):
        return self._energy(k, below) - self._energy(k, to_below)


class SameTemperature(ParallelTempering):
    """As if both rungs were the upper one: always 0."""

    def log_accept(self, k, below, above, to_below, to_above):
        upper = self._energy(k + 1, below) + self._energy(k + 1, above)
        return upper - self._energy(k + 1, to_below) - self._energy(k + 1, to_above)


class Squared(ParallelTempering):
    def log_accept(self, k, *states):
        return 2 * super().log_accept(k, *states)


FAULTY = [SignFlipped, HalfForgotten, SameTemperature, Squared]


@pytest.mark.parametrize("faulty", FAULTY)
def test_a_wrong_swap_ratio_breaks_detailed_balance(faulty):
    forth = flow(of_spins(faulty), 0)
    assert (forth - forth.T).abs().max() > 0.01 * forth.max()


def from_exact_draws(kernel, n, steps):
    """Rungs at exact draws of their own distributions, `steps` later."""
    state = kernel.init(LATTICE.states[:1].expand(n, 2, 2))
    rungs = []
    for one, beta in zip(kernel.kernels, kernel.betas, strict=True):
        p = (-beta * LATTICE.energy(LATTICE.states)).softmax(0)
        rungs.append(one.init(LATTICE.states[torch.multinomial(p, n, replacement=True)]))
    state = state._replace(rungs=tuple(rungs))
    for _ in range(steps):
        state = kernel.step(state)
    return state


def worst_chi_squared(kernel, n=20000):
    """Of the rungs' histograms over the 16 states, in standard deviations from the mean."""
    torch.manual_seed(1)
    state, worst = from_exact_draws(kernel, n, 6), 0.0
    weights = 2.0 ** torch.arange(4)
    for rung, beta in zip(state.rungs, kernel.betas, strict=True):
        found = torch.bincount(((rung.x.flatten(1) > 0) * weights).sum(1).long(), minlength=16)
        expected = n * (-beta * LATTICE.energy(LATTICE.states)).softmax(0)
        statistic = ((found - expected) ** 2 / expected).sum().item()
        worst = max(worst, (statistic - 15) / math.sqrt(30))
    return worst


def test_every_rung_keeps_its_enumerated_distribution():
    assert worst_chi_squared(of_spins()) < 4


@pytest.mark.parametrize("faulty", FAULTY)
def test_a_wrong_swap_ratio_loses_it(faulty):
    assert worst_chi_squared(of_spins(faulty)) > 10


def test_the_path_of_annealing_serves_a_small_rbm():
    """`energy_at` and `kernel_at` as `ais` has them; the target's 16 visible states enumerated."""
    torch.manual_seed(7)
    rbm = RBM((4,), 3, 1, 0, 0.1, 0.0, 0.0).double().requires_grad_(False)
    for tensor in (*rbm.parameters(), rbm.base_rate):
        tensor.copy_(1.5 * torch.randn_like(tensor))
    kernel = ParallelTempering(rbm._annealed_energy, rbm.gibbs, (0.0, 0.5, 1.0))
    state = run(kernel, torch.zeros(20000, 4), 30)
    weights = 2.0 ** torch.arange(4)
    states = (torch.arange(16)[:, None] >> torch.arange(4) & 1).double()
    found = torch.bincount((state.x * weights).sum(1).long(), minlength=16)
    expected = len(state.x) * (-rbm.energy(states)).softmax(0)
    assert (((found - expected) ** 2 / expected).sum().item() - 15) / math.sqrt(30) < 4


def test_swap_acceptance_is_what_exact_draws_have():
    torch.manual_seed(2)
    state = from_exact_draws(of_spins(), 20000, 2)
    for k, found in enumerate(swap_rates(state.swap_acceptance[None])):
        expected = flow(of_spins(), k).sum().item()
        assert found.item() == pytest.approx(expected, abs=4 * 0.5 / math.sqrt(20000))


def test_pairs_not_tried_yet_are_no_number_and_left_out_of_the_rates():
    kernel = tempered(gaussian)
    first = kernel.step(kernel.init(torch.randn(10, 2)))
    second = kernel.step(first)
    assert first.swap_acceptance[0].isfinite().all()
    assert first.swap_acceptance[1].isnan().all()
    assert second.swap_acceptance.isfinite().all()
    assert torch.equal(second.swap_acceptance[0], first.swap_acceptance[0])
    rates = swap_rates(torch.stack([first.swap_acceptance, second.swap_acceptance]))
    torch.testing.assert_close(rates, second.swap_acceptance.mean(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", [lambda e: MALA(e, 0.1), lambda e: HMC(e, 0.2, 2)])
def test_what_is_cached_belongs_to_the_rung_after_a_swap(kernel, kind):
    torch.manual_seed(3)
    ladder = tempered(two_wells, kernel=kernel, kind=kind)
    state = run(ladder, torch.randn(200, 2), 9)
    assert (state.swap_acceptance > 0.05).any()
    for rung, beta in zip(state.rungs, BETAS, strict=True):
        expected = ladder.kernel_at(beta).init(rung.x)
        torch.testing.assert_close(rung.energy, expected.energy)
        torch.testing.assert_close(rung.gradient, expected.gradient)
        assert rung.steps == 9


@pytest.mark.parametrize("kernel", [lambda e: MALA(e, 0.1), lambda e: HMC(e, 0.2, 2)])
def test_powers_of_a_density_trade_places_as_any_path_does_without_a_look(kernel):
    """The same chains, at as many evaluations fewer as there are places offered."""
    calls, ends, paid = 0, [], []

    def counted(x):
        nonlocal calls
        calls += 1
        return two_wells(x)

    for kind in KINDS:
        calls = 0
        torch.manual_seed(3)
        x = torch.randn(200, 2)
        ends.append(run(tempered(counted, kernel=kernel, kind=kind), x, 9))
        paid.append(calls)
    for one, other in zip(ends[0].rungs, ends[1].rungs, strict=True):
        torch.testing.assert_close(one, other)
    assert paid[0] - paid[1] == 2 * 9


def test_the_top_of_the_ladder_is_the_target():
    torch.manual_seed(4)
    state = run(tempered(gaussian), torch.randn(20, 2), 3)
    assert state.x is state.rungs[-1].x
    torch.testing.assert_close(state.energy, gaussian(state.x))
    torch.testing.assert_close(state.gradient, state.x)


def test_a_gaussian_has_its_moments_on_every_rung():
    torch.manual_seed(5)
    state = run(tempered(gaussian, kernel=lambda e: MALA(e, 0.5)), 2 + torch.randn(20000, 2), 40)
    for rung, beta in zip(state.rungs, BETAS, strict=True):
        error = 3 / math.sqrt(rung.x.numel())
        assert rung.x.mean() == pytest.approx(0, abs=error / math.sqrt(beta))
        assert rung.x.var() == pytest.approx(1 / beta, abs=math.sqrt(2) * error / beta)


def test_it_crosses_a_wall_that_stops_the_plain_kernel():
    torch.manual_seed(6)
    right = torch.ones(500, 1)
    plain = run(MALA(two_wells, 0.02), right, 200).x
    ladder = run(tempered(two_wells, (0.03, 0.1, 0.3, 1.0), lambda e: MALA(e, 0.02)), right, 800).x
    assert (plain > 0).double().mean() > 0.95
    assert (ladder > 0).double().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(500))


class Lazy:
    """A kernel that stays where it is, on a flat energy: every swap is accepted."""

    def init(self, x):
        return State(x, torch.zeros(len(x)))

    def step(self, state):
        return state._replace(steps=state.steps + 1)


@pytest.mark.parametrize("rungs", [2, 3, 4, 7])
def test_without_refusals_a_replica_climbs_a_rung_a_step(rungs):
    """Syed et al. 2021: the scheme is then deterministic, a round trip takes 2 K steps for each of
    K replicas, so one ends at every second step on average."""
    kernel = ParallelTempering(
        lambda beta, x: torch.zeros(len(x)), lambda beta: Lazy(), tuple(range(rungs))
    )
    steps = 40 * rungs
    state = run(kernel, torch.zeros(3, 1), steps)
    assert (state.swap_acceptance == 1).all()
    first_arrivals = 2 * rungs
    assert (state.round_trips <= steps / 2).all()
    assert (state.round_trips >= (steps - 2 * first_arrivals) / 2).all()


def test_a_replica_that_turns_round_half_way_makes_no_trip():
    """Refuse the upper pair: nobody reaches the target's end and comes back."""

    class Cut(ParallelTempering):
        def log_accept(self, k, *states):
            return torch.full((3,), -math.inf if k == 1 else 0.0)

    kernel = Cut(lambda beta, x: torch.zeros(len(x)), lambda beta: Lazy(), BETAS)
    assert (run(kernel, torch.zeros(3, 1), 50).round_trips == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_that_keep_something_else_than_the_energy_are_refused(kind):
    """The swap ratio would lack the density that they propose from, or be that of other points."""
    normal = torch.distributions.Normal(torch.zeros(2), 1.0)

    def draw(n):
        x = normal.sample((n,))
        return x, torch.zeros(n)

    independent = Independence(lambda x: torch.zeros(len(x)), draw)
    for kernel in (independent, DecoupledLangevin(gaussian, 0.1, 0.1)):
        name = type(kernel).__name__
        jumping = Interspersed(Interspersed(kernel, kernel, 2, 1), kernel, 2, 1)
        for rung in (kernel, jumping):
            ladder = kind(lambda beta, x: beta * gaussian(x), lambda _, rung=rung: rung, BETAS)
            with pytest.raises(EBMError, match=f"^{name} is no kernel of a rung"):
                ladder.init(torch.zeros(3, 2))


def test_swaps_keep_no_graph_of_what_the_parameters_of_an_energy_went_through():
    scale = torch.nn.Parameter(torch.ones(()))
    spins = of_spins()
    ladder = ParallelTempering(
        lambda beta, x: scale * spins.energy_at(beta, x), spins.kernel_at, BETAS
    )
    state = run(ladder, LATTICE.states, 3)
    assert not state.swap_acceptance.requires_grad


def test_sweeps_are_transitions_between_swaps():
    state = run(tempered(gaussian, sweeps=5), torch.randn(4, 2), 3)
    assert [rung.steps for rung in state.rungs] == [15, 15, 15]
    assert state.steps == 3


def test_a_swap_of_two_states_that_cannot_be_is_refused_and_counted():
    def walled(x):
        return torch.where(x.abs().amax(1) < 1, gaussian(x), torch.inf)

    ladder = tempered(walled, kernel=lambda e: RandomWalk(e, 1e-3))
    state = run(ladder, torch.full((10, 2), 3.0), 1)
    assert torch.equal(state.swap_acceptance[0], torch.zeros(10))
    assert swap_rates(state.swap_acceptance[None])[0] == 0


def test_a_swap_leaves_the_acceptance_of_a_rung_where_it_is():
    """It is that of the last proposal there, whoever made it."""

    class Told:
        def __init__(self, beta):
            self.beta = beta

        def init(self, x):
            return State(x)

        def step(self, state):
            acceptance = torch.full((len(state.x),), self.beta)
            return State(state.x, acceptance=acceptance, steps=state.steps + 1)

    betas = (0.25, 0.5, 1.0)
    state = run(ParallelTempering(lambda beta, x: 0 * x[:, 0], Told, betas), torch.zeros(2, 1), 4)
    assert [rung.acceptance.tolist() for rung in state.rungs] == [[beta] * 2 for beta in betas]
    assert state.acceptance.tolist() == [1, 1]


def test_a_trip_ends_where_it_began():
    """Without refusals the replica of the start is at the target after K - 1 steps, and back after
    2 K - 1: half of that is no round trip."""
    ladder = ParallelTempering(
        lambda b, x: torch.zeros(len(x)), lambda beta: Lazy(), (0.0, 0.3, 0.6, 1.0)
    )
    state = run(ladder, torch.zeros(3, 1), 6)
    assert (state.round_trips == 0).all()
    assert (ladder.step(state).round_trips == 1).all()


def test_the_acceptance_of_a_swap_is_a_probability():
    class Quarter(ParallelTempering):
        def log_accept(self, k, *states):
            return torch.full((3,), math.log(0.25))

    ladder = Quarter(lambda b, x: torch.zeros(len(x)), lambda beta: Lazy(), (0.0, 1.0))
    state = run(ladder, torch.zeros(3, 1), 1)
    torch.testing.assert_close(state.swap_acceptance, torch.full((1, 3), 0.25))
