"""Laws of Hamiltonian Monte Carlo. Its transition on a line is integrated over all places and
momenta, so invariance is checked without chance; one leapfrog is MALA."""

import math

import pytest
import torch

from ebm.oracles import Banana, Funnel
from ebm.samplers import HMC, MALA, State, run

pytestmark = pytest.mark.usefixtures("double")


def gaussian(x):
    return x.square().sum(1) / 2


def double_well(x):
    return (x**4 / 4 - x**2).sum(1)


def drift(kernel, points=601):
    """How much a transition changes the means of x, x^2, cos 3x of exact draws: the sum over
    places and momenta of p(x) N(p; 0, 1) a (f(t) - f(x))."""
    line = torch.linspace(-6, 6, points)
    place, momentum = (m.reshape(-1, 1) for m in torch.meshgrid(line, line, indexing="ij"))
    s = kernel.init(place)
    t, q = kernel.flow(s, momentum)
    accept = kernel.log_accept(s, momentum, t, q).clamp(max=0).exp()
    weight = (-kernel.energy(place) - momentum[:, 0] ** 2 / 2).softmax(0) * accept
    functions = [lambda x: x, lambda x: x**2, lambda x: torch.cos(3 * x)]
    return max(abs((weight * (f(t.x) - f(s.x))[:, 0]).sum().item()) for f in functions)


def tilted(x):
    return double_well(x) + 0.5 * x.sum(1)


@pytest.mark.parametrize("energy", [gaussian, double_well, tilted])
@pytest.mark.parametrize(("step_size", "leapfrogs"), [(0.9, 1), (0.5, 3)])
def test_it_leaves_a_discretised_line_invariant(energy, step_size, leapfrogs):
    assert drift(HMC(energy, step_size, leapfrogs)) < 1e-5


class NoHalfStep(HMC):
    """The first kick is a whole one."""

    def flow(self, s, p):
        return super().flow(s, p - self.step_size / 2 * s.gradient)


class NoLastHalfStep(HMC):
    """The last kick is a whole one."""

    def flow(self, s, p):
        t, q = super().flow(s, p)
        return t, q + self.step_size / 2 * t.gradient


class NoFlip(HMC):
    """The momentum goes on in its direction."""

    def flow(self, s, p):
        t, q = super().flow(s, p)
        return t, -q


class SignFlipped(HMC):
    def log_accept(self, s, p, t, q):
        return -super().log_accept(s, p, t, q)


class KineticForgotten(HMC):
    def log_accept(self, s, p, t, q):
        return s.energy - t.energy


class NotSquared(HMC):
    def log_accept(self, s, p, t, q):
        return s.energy - t.energy + (p.norm(dim=1) - q.norm(dim=1)) / 2


class Unadjusted(HMC):
    def log_accept(self, s, p, t, q):
        return torch.zeros_like(s.energy)


@pytest.mark.parametrize(
    "faulty",
    [NoHalfStep, NoLastHalfStep, SignFlipped, KineticForgotten, NotSquared, Unadjusted],
)
def test_a_planted_bug_breaks_invariance(faulty):
    assert drift(faulty(tilted, 0.5, 3)) > 0.01


def pairs(kernel, dimensions=2, n=200):
    return kernel.init(torch.randn(n, dimensions)), torch.randn(n, dimensions)


def return_error(kernel):
    """Distance from where one began, after going there and back."""
    torch.manual_seed(0)
    s, p = pairs(kernel)
    t, q = kernel.flow(s, p)
    back, again = kernel.flow(t, q)
    return max((back.x - s.x).abs().max().item(), (again - p).abs().max().item())


@pytest.mark.parametrize("energy", [gaussian, Banana().energy, Funnel(n=1).energy])
@pytest.mark.parametrize("leapfrogs", [1, 7])
def test_the_flow_is_its_own_inverse(energy, leapfrogs):
    assert return_error(HMC(energy, 0.1, leapfrogs)) < 1e-9


@pytest.mark.parametrize("faulty", [NoFlip, NoHalfStep, NoLastHalfStep])
def test_a_planted_bug_in_the_flow_is_no_inverse(faulty):
    assert return_error(faulty(Banana().energy, 0.1, 7)) > 0.01


def log_volume(kernel, h=1e-5):
    """log |det| of the flow in the plane of one place and one momentum, by differences."""
    torch.manual_seed(1)
    s, p = pairs(kernel, dimensions=1)

    def flow(dx, dp):
        t, q = kernel.flow(kernel.init(s.x + dx), p + dp)
        return torch.cat([t.x, q], 1)

    columns = [flow(h, 0) - flow(-h, 0), flow(0, h) - flow(0, -h)]
    return torch.linalg.det(torch.stack(columns, 2) / (2 * h)).abs().log()


def test_the_flow_preserves_volume():
    assert log_volume(HMC(double_well, 0.3, 5)).abs().max() < 1e-6


def test_a_flow_with_friction_does_not():
    class Friction(HMC):
        def flow(self, s, p):
            return super().flow(s, 0.9 * p)

    assert log_volume(Friction(double_well, 0.3, 5)).abs().max() > 0.05


def test_acceptance_is_the_change_of_the_hamiltonian_and_antisymmetric():
    torch.manual_seed(2)
    kernel = HMC(Banana().energy, 0.2, 3)
    (s, p), (t, q) = pairs(kernel), pairs(kernel)
    before = Banana().energy(s.x) + (p**2).sum(1) / 2
    after = Banana().energy(t.x) + (q**2).sum(1) / 2
    torch.testing.assert_close(kernel.log_accept(s, p, t, q), before - after)
    torch.testing.assert_close(kernel.log_accept(t, q, s, p), after - before)


@pytest.mark.parametrize("energy", [gaussian, Banana().energy])
def test_one_leapfrog_is_mala(energy):
    """With the step size eps^2 / 2: the same proposals, acceptances and chains, draw by draw."""
    eps, x = 0.6, torch.randn(300, 2)
    ends = []
    for kernel in (HMC(energy, eps, 1), MALA(energy, eps**2 / 2)):
        torch.manual_seed(3)
        ends.append(run(kernel, x, 10))
    hmc, mala = ends
    torch.testing.assert_close(hmc.x, mala.x)
    torch.testing.assert_close(hmc.energy, mala.energy)
    torch.testing.assert_close(hmc.acceptance, mala.acceptance)
    assert 0.1 < mala.acceptance.mean() < 0.99


@pytest.mark.parametrize("dimensions", [1, 8])
@pytest.mark.parametrize("start", ["exact draws", "elsewhere"])
def test_a_gaussian_has_its_moments(dimensions, start):
    torch.manual_seed(4)
    x = torch.randn(20000, dimensions)
    x = run(HMC(gaussian, 0.5, 3), x if start == "exact draws" else 4 + x / 2, 25).x
    assert x.mean() == pytest.approx(0, abs=3 / math.sqrt(x.numel()))
    assert x.var() == pytest.approx(1, abs=3 * math.sqrt(2 / x.numel()))


def test_a_transition_costs_as_many_gradients_as_leapfrogs():
    calls = []

    def energy(x):
        calls.append(len(x))
        return gaussian(x)

    state = run(HMC(energy, 0.3, 4), torch.randn(10, 2), 5)
    assert len(calls) == 1 + 5 * 4
    torch.testing.assert_close(state.energy, gaussian(state.x))
    torch.testing.assert_close(state.gradient, state.x)
    assert state.steps == 5


def test_a_diverged_trajectory_is_refused_and_counts_as_acceptance_zero():
    torch.manual_seed(5)
    kernel = HMC(lambda x: x.square().square().sum(1), 50.0, 10)
    before = kernel.init(torch.randn(100, 2))
    after = kernel.step(before)
    torch.testing.assert_close(after.x, before.x)
    assert isinstance(after, State)
    assert (after.acceptance == 0).all()
