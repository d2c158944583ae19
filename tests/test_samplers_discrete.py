"""Laws of the kernels for bits and spins: their exact transition matrices leave the enumerated
distribution as it is, and what they draw follows those matrices."""

import itertools
import math

import pytest
import torch

from ebm.oracles import Ising
from ebm.samplers import BlockGibbs, SpinFlip, SpinGibbs, run
from ebm.variants.rbm import RBM

pytestmark = pytest.mark.usefixtures("double")
LATTICE = Ising(side=2, coupling=0.3)
DRAWS = 40000


def gibbs_matrix(p_up, block, states):
    """T[s, t] of one block: the product over its sites, and nothing else may change."""
    up = p_up(states)[:, None]
    chosen = torch.where(states[None] > 0, up, 1 - up)
    same = states[:, None] == states[None]
    return torch.where(block, chosen, same.to(up)).flatten(2).prod(2)


def flip_matrix(kernel, states):
    state, rates = kernel.init(states), torch.zeros(len(states), len(states))
    for i, j in itertools.permutations(range(len(states)), 2):
        if (states[i] != states[j]).sum() == 1:
            s, t = (type(state)(*(f[k : k + 1] for f in state[:2])) for k in (i, j))
            rates[i, j] = kernel.log_accept(s, t).clamp(max=0).exp() / states[0].numel()
    return rates + torch.diag(1 - rates.sum(1))


def rbm_matrix(rbm, visible, hidden):
    """T[v, w] = sum_h p(h | v) p(w | h)."""
    gibbs = rbm.gibbs()

    def product(p, bits):
        return torch.where(bits[None] > 0, p[:, None], 1 - p[:, None]).prod(2)

    return product(gibbs.p_hidden(visible), hidden) @ product(gibbs.p_visible(hidden), visible)


def all_bits(n):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)))


def tiny_rbm():
    torch.manual_seed(0)
    rbm = RBM((4,), 3, 1, 0, 0.1, 0.0, 0.0).double().requires_grad_(False)
    for parameter in rbm.parameters():
        parameter.copy_(torch.randn_like(parameter))
    return rbm


def counts(drawn, states):
    """How often each of `states` was drawn."""
    same = (drawn.flatten(1)[:, None] == states.flatten(1)[None]).all(2)
    assert same.any(1).all()
    return same.sum(0)


def chi_squared(found, p):
    """In standard deviations from its mean."""
    expected = found.sum() * p
    kept = p > 0
    assert found[~kept].sum() == 0
    freedom = kept.sum().item() - 1
    statistic = ((found - expected)[kept] ** 2 / expected[kept]).sum().item()
    return (statistic - freedom) / math.sqrt(2 * freedom)


def matrix_of_gibbs():
    first, second = (gibbs_matrix(LATTICE.p_up, b, LATTICE.states) for b in LATTICE.blocks)
    return first @ second


CASES = {
    "spin flip": (
        lambda: SpinFlip(LATTICE.energy),
        lambda: flip_matrix(SpinFlip(LATTICE.energy), LATTICE.states),
        lambda: (LATTICE.states, LATTICE.probabilities),
    ),
    "Gibbs": (
        lambda: SpinGibbs(LATTICE.p_up, LATTICE.blocks),
        matrix_of_gibbs,
        lambda: (LATTICE.states, LATTICE.probabilities),
    ),
    "block Gibbs": (
        lambda: tiny_rbm().gibbs(),
        lambda: rbm_matrix(tiny_rbm(), all_bits(4), all_bits(3)),
        lambda: (all_bits(4), (-tiny_rbm().energy(all_bits(4))).softmax(0)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_exact_transition_matrix_leaves_the_enumerated_distribution_invariant(name):
    _, matrix, target = CASES[name]
    rates, (_, p) = matrix(), target()
    torch.testing.assert_close(rates.sum(1), torch.ones(len(p)))
    torch.testing.assert_close(p @ rates, p)


@pytest.mark.parametrize("name", ["spin flip", "block Gibbs"])
def test_what_is_reversible_is_in_detailed_balance(name):
    _, matrix, target = CASES[name]
    flow = target()[1][:, None] * matrix()
    torch.testing.assert_close(flow, flow.T)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("start", [0, 5])
def test_what_is_drawn_follows_the_matrix(name, start):
    kernel, matrix, target = CASES[name]
    states, _ = target()
    torch.manual_seed(start)
    x = run(kernel(), states[start : start + 1].expand(DRAWS, *states.shape[1:]).clone(), 1).x
    assert chi_squared(counts(x, states), matrix()[start]) < 4


@pytest.mark.parametrize(
    "faulty",
    [
        lambda: gibbs_matrix(lambda x: LATTICE.p_up(x) ** 2, LATTICE.blocks[0], LATTICE.states),
        lambda: gibbs_matrix(lambda x: LATTICE.p_up(-x), LATTICE.blocks[0], LATTICE.states),
        lambda: gibbs_matrix(lambda x: LATTICE.p_up(x, 0.5), LATTICE.blocks[0], LATTICE.states),
        lambda: gibbs_matrix(LATTICE.p_up, torch.ones(2, 2).bool(), LATTICE.states),
    ],
    ids=["squared", "sign flipped", "factor of two missing", "neighbours drawn at once"],
)
def test_a_planted_bug_in_gibbs_sampling_breaks_invariance(faulty):
    p = LATTICE.probabilities
    assert (p @ faulty() - p).abs().max() > 0.001


@pytest.mark.parametrize(
    "fault",
    [
        lambda s, t: t.energy - s.energy,
        lambda s, t: (s.energy - t.energy) / 2,
        lambda s, t: -t.energy,
    ],
    ids=["sign flipped", "half", "where it stands forgotten"],
)
def test_a_planted_bug_in_the_spin_flip_breaks_invariance(fault):
    class Faulty(SpinFlip):
        def log_accept(self, s, t):
            return fault(s, t)

    p = LATTICE.probabilities
    assert (p @ flip_matrix(Faulty(LATTICE.energy), LATTICE.states) - p).abs().max() > 0.001


@pytest.mark.parametrize("name", ["spin flip", "Gibbs"])
def test_a_lattice_of_sixteen_spins_keeps_its_known_expectations(name):
    lattice = Ising()
    kernel = {
        "spin flip": SpinFlip(lattice.energy),
        "Gibbs": SpinGibbs(lattice.p_up, lattice.blocks),
    }[name]
    torch.manual_seed(1)
    x = run(kernel, lattice.sample(4000), 20).x
    for e in lattice.expectations:
        error = 3 * e.deviation / math.sqrt(len(x))
        assert e.function(x).mean().item() == pytest.approx(e.mean, abs=error)


def test_block_gibbs_converges_to_the_joint_it_was_made_from():
    """Two binary units with a known joint: the histogram of v is its marginal."""
    torch.manual_seed(7)
    joint = torch.tensor([[0.4, 0.1], [0.2, 0.3]])  # [v, h]
    given_v = joint[:, 1] / joint.sum(1)
    given_h = joint[1] / joint.sum(0)
    kernel = BlockGibbs(lambda v: given_v[v.long()], lambda h: given_h[h.long()])  # [B, 1]
    v = run(kernel, torch.zeros(200000, 1), 30).x
    expected = joint[1].sum().item()
    error = 4 * math.sqrt(expected * (1 - expected) / len(v))
    assert v.mean().item() == pytest.approx(expected, abs=error)
