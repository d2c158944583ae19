"""Laws of Langevin's kernels, and of annealing: moments, detailed balance, invariance, known
biases. Chance has 4 standard errors, moments of exact kernels 3."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ebm.samplers import (
    HMC,
    MALA,
    DecoupledLangevin,
    InSlices,
    Langevin,
    RandomWalk,
    State,
    ais,
    at_milestones,
    log_mean_exp,
    milestones,
    polynomial_decay,
    run,
    with_acceptance,
)
from ebm.samplers.kernel import metropolise

pytestmark = pytest.mark.usefixtures("double")


def gaussian(x):
    return x.square().sum(1) / 2


def banana(x):
    return x[:, 0] ** 2 / 2 + (x[:, 1] - x[:, 0] ** 2) ** 2


def variance_error(x):
    """Distance of the sample variance of N(0, v) draws from their count's standard error, v =
    1."""
    return math.sqrt(2 / x.numel())


@pytest.mark.parametrize("step_size", [0.1, 0.5])
def test_unadjusted_langevin_has_its_known_bias(step_size):
    torch.manual_seed(0)
    x = run(Langevin(gaussian, step_size), torch.randn(20000, 2), 60).x
    bias = 1 / (1 - step_size / 2)
    assert x.var() == pytest.approx(bias, abs=4 * bias * variance_error(x))


def test_a_sliced_energy_moves_chains_as_the_whole_does_with_fewer_points_at_once():
    sizes = []

    def counted(x):
        sizes.append(len(x))
        return banana(x)

    ends = []
    for energy in (banana, InSlices(counted, 3)):
        torch.manual_seed(0)
        ends.append(run(MALA(energy, 0.1), torch.randn(8, 2), 5).x)
    assert torch.equal(*ends)
    assert sizes == [3, 3, 2] * 6


@pytest.mark.parametrize("step_size", [0.05, 0.5])
@pytest.mark.parametrize("dimensions", [1, 8])
def test_mala_keeps_a_gaussian(step_size, dimensions):
    torch.manual_seed(1)
    state = run(MALA(gaussian, step_size), torch.randn(20000, dimensions), 40)
    assert state.x.var() == pytest.approx(1, abs=3 * variance_error(state.x))
    assert state.x.mean() == pytest.approx(0, abs=3 / math.sqrt(state.x.numel()))


@pytest.mark.parametrize(
    "kernel",
    [Langevin(gaussian, 0.1), MALA(gaussian, 0.1), DecoupledLangevin(gaussian, 0.1, 0.1, 1.0)],
)
def test_no_chain_waits_for_a_number(kernel):
    """A tensor without content has none to wait for."""
    assert run(kernel, torch.empty(5, 2, device="meta"), 3).x.shape == (5, 2)


def test_chains_go_on_from_a_state_with_their_schedule():
    kernel, x = Langevin(gaussian, polynomial_decay(0.1, 2, 0.9)), torch.ones(7, 2)
    torch.manual_seed(3)
    whole = run(kernel, x, 9)
    torch.manual_seed(3)
    seen: list[int] = []
    half = run(kernel, x, 4)
    rest = run(kernel, half, 5, lambda step, state: seen.append(state.steps))
    assert torch.equal(rest.x, whole.x)
    assert seen == [4, 5, 6, 7, 8, 9]
    torch.manual_seed(3)
    assert not torch.equal(run(kernel, run(kernel, x, 4).x, 5).x, whole.x)


def test_mala_converges_to_a_gaussian_from_elsewhere():
    torch.manual_seed(2)
    x = run(MALA(gaussian, 0.3), 5 + torch.randn(20000, 1), 60).x
    assert x.var() == pytest.approx(1, abs=3 * variance_error(x))
    assert x.mean() == pytest.approx(0, abs=3 / math.sqrt(len(x)))


def test_latent_mala_under_a_constant_energy_returns_the_prior():
    """E(G(z)) + |z|^2 / 2 with an E that knows no difference: N(0, I), whatever G is."""
    torch.manual_seed(11)
    weights = torch.randn(3, 5)

    def energy(z):
        return torch.ones_like(torch.tanh(z @ weights)).sum(1) + z.square().sum(1) / 2

    z = run(MALA(energy, 0.4), 3 * torch.rand(20000, 3), 60).x
    assert (z.mean(0).abs() < 3 / math.sqrt(len(z))).all()
    assert (torch.cov(z.T) - torch.eye(3)).abs().max() < 3 * math.sqrt(2 / len(z))


def stationary(step_size, noise):
    """Variance of x' = (1 - eps) (x + noise n): v = (1 - eps)^2 (v + noise^2)."""
    shrink = (1 - step_size) ** 2
    return shrink * noise**2 / (1 - shrink)


@pytest.mark.parametrize(("step_size", "noise"), [(0.2, 0.3), (0.5, 1.0), (1.5, 0.7)])
def test_decoupled_langevin_has_the_variance_of_its_own_temperature(step_size, noise):
    torch.manual_seed(12)
    x = run(DecoupledLangevin(gaussian, step_size, noise), torch.randn(20000, 2), 60).x
    expected = stationary(step_size, noise)
    assert x.var() == pytest.approx(expected, abs=3 * expected * variance_error(x))


def test_coupled_it_is_langevin_seen_half_a_step_later():
    """Its points y before the gradient are Langevin's chain, draw by draw."""
    step_size, steps, start = 0.1, 7, torch.randn(50, 2)
    torch.manual_seed(13)
    decoupled = run(DecoupledLangevin(banana, step_size, math.sqrt(2 * step_size)), start, steps)
    torch.manual_seed(13)
    langevin = Langevin(banana, step_size)
    first = start + math.sqrt(2 * step_size) * torch.randn_like(start)
    y = run(langevin, first, steps - 1)
    torch.testing.assert_close(decoupled.x, langevin.drift(y))
    torch.testing.assert_close(decoupled.energy, y.energy)


def test_with_the_noise_last_it_is_langevin():
    step_size, start = 0.1, torch.randn(50, 2)
    torch.manual_seed(13)
    kernel = DecoupledLangevin(banana, step_size, math.sqrt(2 * step_size), noise_last=True)
    ours = run(kernel, start, 7)
    torch.manual_seed(13)
    torch.testing.assert_close(ours.x, run(Langevin(banana, step_size), start, 7).x)


def test_its_clip_and_bounds_hold():
    kernel = DecoupledLangevin(lambda x: 1000 * gaussian(x), 0.1, 0.5, clip=0.3, bounds=(0.0, 1.0))
    x = torch.rand(500, 2)
    torch.manual_seed(14)
    after = kernel.step(kernel.init(x))
    torch.manual_seed(14)
    y = (x + 0.5 * torch.randn_like(x)).clamp(0, 1)
    torch.testing.assert_close(after.x, y - 0.1 * torch.where(1000 * y > 0.3, 0.3, 1000 * y))


def test_a_schedule_is_asked_for_the_steps_already_made():
    asked = []
    kernel = Langevin(gaussian, lambda step: asked.append(step) or 0.1)
    run(kernel, torch.zeros(3, 1), 4)
    assert sorted(set(asked)) == [0, 1, 2, 3]


def test_polynomial_decay_is_welling_and_tehs():
    schedule = polynomial_decay(0.5, 10, 0.55)
    b, gamma = 10, 0.55
    a = 0.5 * b**gamma
    for step in (0, 1, 50, 10000):
        assert schedule(step) == pytest.approx(a * (b + step) ** -gamma)


def test_a_falling_step_size_takes_the_bias_away():
    """Its variance follows v <- (1 - eps)^2 v + 2 eps on a unit Gaussian, towards 1."""
    schedule, steps, v = polynomial_decay(0.5, 5, 0.9), 200, 1.0
    for step in range(steps):
        v = (1 - schedule(step)) ** 2 * v + 2 * schedule(step)
    torch.manual_seed(15)
    x = run(Langevin(gaussian, schedule), torch.randn(20000, 2), steps).x
    assert x.var() == pytest.approx(v, abs=3 * variance_error(x))
    assert abs(v - 1) < 0.1 * (1 / (1 - 0.25) - 1)


def log_proposal(kernel, to, given):
    """log q written out here once more, from the textbook."""
    mean = given.x - kernel.step_size * given.gradient
    return -((to.x - mean) ** 2).sum(1) / (4 * kernel.step_size)


@pytest.mark.parametrize("energy", [gaussian, banana])
def test_mala_is_in_detailed_balance(energy):
    """p(x) q(y|x) a(x,y) = p(y) q(x|y) a(y,x) for any pair of points."""
    torch.manual_seed(3)
    kernel = MALA(energy, 0.2)
    s, t = kernel.init(torch.randn(500, 2)), kernel.init(torch.randn(500, 2))
    forth = -s.energy + log_proposal(kernel, t, s) + kernel.log_accept(s, t).clamp(max=0)
    back = -t.energy + log_proposal(kernel, s, t) + kernel.log_accept(t, s).clamp(max=0)
    torch.testing.assert_close(forth, back)


def test_mala_leaves_a_discretised_line_invariant():
    """The whole transition matrix on a fine line: rows of rates times p give p again."""
    line = torch.linspace(-4, 4, 401)[:, None]
    kernel = MALA(lambda x: (x**4 / 4 - x**2).sum(1), 0.1)
    states = kernel.init(line)

    def row(i):
        here = State(*(f[i : i + 1].expand_as(f) for f in states[:3]))
        return log_proposal(kernel, states, here) + kernel.log_accept(here, states).clamp(max=0)

    width = line[1, 0] - line[0, 0]
    rates = torch.stack([row(i) for i in range(len(line))]).exp() * width
    rates /= math.sqrt(4 * math.pi * kernel.step_size)
    rates.fill_diagonal_(0)
    rates += torch.diag(1 - rates.sum(1))
    p = (-states.energy).softmax(0)
    torch.testing.assert_close(p @ rates, p, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(
    "fault",
    [
        lambda k, s, t: s.energy - t.energy,
        lambda k, s, t: s.energy - t.energy + k.log_proposal(t, s) - k.log_proposal(s, t),
        lambda k, s, t: (
            s.energy
            - t.energy
            - k.log_proposal(s, t).abs().sqrt()
            + k.log_proposal(t, s).abs().sqrt()
        ),
    ],
    ids=["proposal forgotten", "sign flipped", "norm not squared"],
)
def test_a_planted_bug_in_the_acceptance_breaks_detailed_balance(fault):
    class Faulty(MALA):
        def log_accept(self, s, t):
            return fault(self, s, t)

    torch.manual_seed(4)
    kernel = Faulty(banana, 0.2)
    s, t = kernel.init(torch.randn(500, 2)), kernel.init(torch.randn(500, 2))
    forth = -s.energy + log_proposal(kernel, t, s) + kernel.log_accept(s, t).clamp(max=0)
    back = -t.energy + log_proposal(kernel, s, t) + kernel.log_accept(t, s).clamp(max=0)
    assert (forth - back).abs().max() > 0.01


def test_mala_accepts_tiny_steps_and_rejects_huge_ones():
    torch.manual_seed(5)
    x = torch.randn(1000, 4)
    assert run(MALA(gaussian, 1e-4), x, 2).acceptance.mean() > 0.999
    assert run(MALA(gaussian, 20.0), x, 2).acceptance.mean() < 0.05


def test_a_rejected_proposal_leaves_the_whole_state():
    torch.manual_seed(6)
    kernel = MALA(gaussian, 3.0)
    before = kernel.init(torch.randn(500, 2))
    after = kernel.step(before)
    stayed = (after.x == before.x).all(1)
    assert 0 < stayed.sum() < 500
    torch.testing.assert_close(after.energy, gaussian(after.x))
    torch.testing.assert_close(after.gradient, after.x)


def test_the_rates_of_a_run_are_of_its_own_steps():
    kernel = RandomWalk(lambda x: x.square().sum(1) / 2, 1.0)
    before, first = with_acceptance(kernel, torch.zeros(50, 1), 3)
    after, second = with_acceptance(kernel, before, 5)
    assert (len(first), len(second)) == (3, 5)
    assert second[-1] == after.acceptance.mean()


def test_run_shows_every_step_to_its_observer():
    seen = []
    run(Langevin(gaussian, 0.1), torch.zeros(3, 2), 4, lambda step, state: seen.append(step))
    assert seen == [0, 1, 2, 3, 4]


def test_annealing_finds_the_ratio_of_normalisers_from_both_sides():
    """N(0, I) to N(0, s^2 I) in two dimensions: Z ratio = s^2."""
    torch.manual_seed(8)
    s = 0.3

    def energy_at(beta, x):
        return x.square().sum(1) / 2 * ((1 - beta) + beta / s**2)

    def kernel_at(beta):
        return MALA(lambda x: energy_at(beta, x), 0.05)

    betas = torch.linspace(0, 1, 200).tolist()
    forward = log_mean_exp(ais(energy_at, kernel_at, torch.randn(500, 2), betas))
    reverse = -log_mean_exp(ais(energy_at, kernel_at, s * torch.randn(500, 2), betas[::-1]))
    truth = 2 * math.log(s)
    assert forward == pytest.approx(truth, abs=0.05)
    assert reverse == pytest.approx(truth, abs=0.05)


def test_the_mean_of_weights_in_double_precision_is_exact_to_it():
    assert log_mean_exp(torch.zeros(1000, dtype=torch.float64)).abs() < 1e-12


def test_a_single_jump_is_plain_importance_sampling():
    """With one rung the weight is exp(E0 - E1) of the start, whatever the kernel does."""
    x = torch.randn(50, 2)
    weights = ais(
        lambda beta, x: (1 + beta) * gaussian(x), lambda b: Langevin(gaussian, 0.1), x, [0, 1]
    )
    torch.testing.assert_close(weights, -gaussian(x))


def test_annealing_is_unbiased_however_few_its_rungs():
    """N(0, I) to precision 4 by way of 2, with kernels that draw anew: the mean weight is the
    ratio of the normalisers, rung by rung. A kernel of the rung before shifts the second one."""

    class Anew:
        def __init__(self, beta):
            self.scale = (1 + beta) ** -0.5

        def init(self, x):
            return State(x)

        def step(self, state):
            return State(self.scale * torch.randn_like(state.x))

    torch.manual_seed(9)
    x = torch.randn(40000, 2)
    weights = ais(lambda beta, x: (1 + beta) * gaussian(x), Anew, x, [0, 1, 3])
    assert log_mean_exp(weights) == pytest.approx(-math.log(4), abs=0.03)


def test_decoupled_schedules_are_asked_for_the_steps_already_made():
    asked = {"step": [], "noise": []}
    kernel = DecoupledLangevin(
        gaussian,
        lambda step: asked["step"].append(step) or 0.1,
        lambda step: asked["noise"].append(step) or 0.1,
    )
    run(kernel, torch.zeros(3, 1), 4)
    assert asked == {"step": [0, 1, 2, 3], "noise": [0, 1, 2, 3]}


def test_a_trace_shows_the_first_chains_at_its_milestones():
    """Of a kernel that counts."""

    class Count:
        def init(self, x):
            return State(x)

        def step(self, state):
            return State(state.x + 1)

    x = torch.tensor([[0.0], [100.0], [200.0]])
    state, frames, steps = at_milestones(Count(), x, 45, chains=2)
    assert steps == [0, 1, 3, 10, 30, 45]
    assert frames[..., 0].tolist() == [[0, 1, 3, 10, 30, 45], [100, 101, 103, 110, 130, 145]]
    assert state.x.flatten().tolist() == [45, 145, 245]


def test_the_first_and_the_last_step_are_milestones_once():
    for steps, marks in [(0, [0]), (1, [0, 1]), (30, [0, 1, 3, 10, 30]), (4, [0, 1, 3, 4])]:
        assert milestones(steps) == marks


def test_with_the_noise_last_a_step_may_end_beyond_the_bounds_and_the_next_begins_within():
    """And its gradient is that at the place where it begins, before the cut."""
    kernel = DecoupledLangevin(gaussian, 0.1, 0.5, clip=0.2, bounds=(0.0, 1.0), noise_last=True)
    x = torch.rand(500, 2)
    torch.manual_seed(15)
    after = kernel.step(kernel.init(x))
    torch.manual_seed(15)
    torch.testing.assert_close(after.x, x - 0.1 * x.clamp(max=0.2) + 0.5 * torch.randn_like(x))
    assert after.x.min() < 0
    assert after.x.max() > 1
    torch.testing.assert_close(after.gradient, x)
    torch.testing.assert_close(kernel.step(after).gradient, after.x.clamp(0, 1))


def test_annealing_weighs_small_differences_of_large_energies():
    """A constant along the whole path is no part of a weight."""
    x = torch.randn(50, 2)
    weights = ais(
        lambda beta, x: 1e6 + (1 + beta) * gaussian(x),
        lambda beta: Langevin(gaussian, 0.1),
        x,
        [0, 1],
    )
    torch.testing.assert_close(weights, -gaussian(x), rtol=0, atol=1e-8)


def test_what_the_guide_shows_is_what_comes_out():
    """Chains that stay on their side are told of, tempered ones change it, log Z is bracketed."""
    torch.set_default_dtype(torch.float32)
    guide = (Path(__file__).parents[1] / "docs" / "samplers.md").read_text(encoding="utf-8")
    shown: dict[str, Any] = {}
    diagnoses = []
    for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL):
        exec(block, shown)
        diagnoses.append(shown["diagnose"](torch.stack(shown["seen"][500:], 1)))
    stuck, tempered, _ = diagnoses
    assert stuck.r_hat > 1.1
    assert tempered.r_hat < 1.02
    assert shown["state"].round_trips.min() > 10
    exact = math.log(2 * math.sqrt(math.pi / 8) * math.sqrt(2 * math.pi))
    assert shown["low"].item() == pytest.approx(exact, abs=0.3)
    assert shown["high"].item() == pytest.approx(exact, abs=0.3)


@pytest.mark.parametrize("kernel", [lambda e: MALA(e, 0.3), lambda e: HMC(e, 0.5, 3)])
def test_points_of_any_shape_are_moved_as_vectors_are(kernel):
    """|y - x|^2 and |p|^2 are over all axes of a point."""
    x, ends = torch.randn(200, 2, 3, 4).double(), []
    for points in (x, x.flatten(1)):
        torch.manual_seed(0)
        ends.append(run(kernel(lambda v: v.flatten(1).square().sum(1) / 2), points, 5))
    image, vector = ends
    assert torch.equal(image.x.flatten(1), vector.x)
    torch.testing.assert_close(image.acceptance, vector.acceptance)
    assert 0.05 < vector.acceptance.mean() < 0.95


def test_the_acceptance_of_a_state_is_a_probability_and_not_what_came_of_it():
    stay, go = State(torch.zeros(4, 1)), State(torch.ones(4, 1), steps=1)
    ratio = torch.tensor([0.25, 1.0, 2.0, 0.0])
    torch.testing.assert_close(metropolise(stay, go, ratio.log()).acceptance, ratio.clamp(max=1))
