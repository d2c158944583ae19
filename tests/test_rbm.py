"""Laws of the RBM, by enumeration of machines small enough to write out."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import softplus

from ebm import EBMError
from ebm.samplers import run
from ebm.variants.rbm import RBM


def machine(visible=6, hidden=4, scale=0.8, chains=0, seed=0):
    torch.manual_seed(seed)
    rbm = RBM((visible,), hidden, 1, chains, 0.1, 0.0, 0.0)
    for parameter in rbm.parameters():
        torch.nn.init.normal_(parameter, std=scale)
    rbm.base_rate.normal_()
    return rbm.double()


def states(units):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=units)), dtype=torch.float64)


def log_p(rbm, visible=6):
    return (-rbm.energy(states(visible))).log_softmax(0)


def test_free_energy_is_the_hidden_units_summed_out():
    rbm, h = machine(), states(4)
    v = states(6)
    joint = v @ rbm.visible_bias + (h @ rbm.hidden_bias)[:, None] + h @ rbm.weight.T @ v.T
    torch.testing.assert_close(rbm.energy(v), -torch.logsumexp(joint, 0))


def test_conditionals_are_those_of_the_joint():
    rbm, h, v = machine(), states(4), states(6)
    joint = torch.exp((v @ rbm.visible_bias)[:, None] + h @ rbm.hidden_bias + v @ rbm.weight @ h.T)
    gibbs = rbm.gibbs()
    torch.testing.assert_close(gibbs.p_hidden(v), joint @ h / joint.sum(1, keepdim=True))
    torch.testing.assert_close(gibbs.p_visible(h), joint.T @ v / joint.sum(0)[:, None])


@pytest.mark.parametrize(("visible", "hidden"), [(6, 4), (4, 6)])
def test_exact_log_partition_is_the_sum_over_all_states(visible, hidden):
    rbm = machine(visible, hidden)
    expected = torch.logsumexp(-rbm.energy(states(visible)), 0)
    torch.testing.assert_close(rbm.log_partition_exact(), expected.detach())


def test_exact_log_partition_refuses_what_it_cannot_sum():
    with pytest.raises(EBMError, match="20"):
        machine(21, 21).log_partition_exact()


def transition(rbm):
    """The exact matrix of one Gibbs step between the states of six visible units."""
    gibbs, v, h = rbm.gibbs(), states(6), states(4)

    def table(p, outcomes):
        return (p[:, None] * outcomes + (1 - p[:, None]) * (1 - outcomes)).prod(2)

    return table(gibbs.p_hidden(v), h) @ table(gibbs.p_visible(h), v)


def test_gibbs_leaves_the_model_invariant():
    """p T = p."""
    rbm = machine()
    p = log_p(rbm).exp()
    torch.testing.assert_close(p @ transition(rbm), p)


def test_gibbs_chains_sample_the_enumerated_distribution():
    rbm, count = machine(), 100000
    torch.manual_seed(1)
    v = run(rbm.gibbs(), torch.zeros(count, 6, dtype=torch.float64), 100).x.detach()
    code = (v @ (2.0 ** torch.arange(5, -1, -1, dtype=torch.float64))).long()
    p = log_p(rbm).exp().detach()
    histogram = torch.bincount(code, minlength=64) / count
    assert ((histogram - p).abs() < 5 * (p * (1 - p) / count).sqrt() + 1e-9).all()


@pytest.mark.parametrize("seed", range(3))
def test_annealing_brackets_the_exact_log_partition(seed):
    rbm = machine(12, 20, scale=0.7, seed=seed)
    exact = rbm.log_partition_exact().item()
    data = states(12)[:: 2**6 - 1]
    low, high = (bound.item() for bound in rbm.annealed_log_partition(data, 400, 2000, 500))
    assert low == pytest.approx(exact, abs=0.1)
    assert high == pytest.approx(exact, abs=0.1)


def test_a_mode_that_annealing_misses_but_data_show_makes_a_gap():
    """Beside what the base rate is near lies a mode of e^3 times its mass, behind a barrier."""
    rbm = machine(144, 5).requires_grad_(False)
    rbm.weight.zero_()
    rbm.weight[:, 0] = 3.0
    for bias in (rbm.base_rate, rbm.visible_bias, rbm.hidden_bias):
        bias.zero_()
    rbm.hidden_bias[0] = 3 - 144 * (softplus(torch.tensor(3.0)).item() - math.log(2))
    exact = rbm.log_partition_exact().item()
    data = torch.ones(10, 144).double()
    low, high = (bound.item() for bound in rbm.annealed_log_partition(data, 50, 300, 100))
    assert low < exact - 2
    assert high > exact


def test_a_small_side_is_summed_and_not_annealed():
    rbm = machine()
    low, high = rbm.log_partition(states(6), chains=1, temperatures=2, burn_in=1)
    assert low == high == rbm.log_partition_exact()


def test_the_annealing_path_ends_where_it_says():
    rbm, v = machine(), states(6)
    torch.testing.assert_close(rbm._annealed_energy(1.0, v), rbm.energy(v))
    free = -v @ rbm.base_rate - 4 * math.log(2)
    torch.testing.assert_close(rbm._annealed_energy(0.0, v), free)


def test_the_training_gradient_is_the_likelihood_gradient_once_the_chains_have_mixed():
    """grad mean F(data) - E_model[grad F], both sides exact."""
    rbm = machine()
    data = states(6)[torch.tensor([3, 17, 40, 63])]
    p = log_p(rbm).exp().detach()
    contrast = rbm.energy(data).mean() - p @ rbm.energy(states(6))
    likelihood = -log_p(rbm)[torch.tensor([3, 17, 40, 63])].mean()
    ours = torch.autograd.grad(contrast, list(rbm.parameters()))
    exact = torch.autograd.grad(likelihood, list(rbm.parameters()))
    torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("persistent", [False, True])
def test_a_training_step_follows_the_exact_gradient(persistent):
    """Of the likelihood from chains that have mixed; from the data that of CD-1, whose second
    term is one step of the exact transition matrix away from them. No derivative of F has a
    standard deviation above 1/2."""
    count, patterns = 200000, torch.tensor([3, 17, 40, 63])
    rbm = machine(chains=count if persistent else 0)
    torch.manual_seed(1)
    if persistent:
        rows = torch.multinomial(log_p(rbm).exp().detach(), count, replacement=True)
        rbm.chains.copy_(states(6)[rows])
        objective = -log_p(rbm)[patterns].mean()
    else:
        after_a_step = transition(rbm)[patterns].mean(0).detach()
        energies = rbm.energy(states(6))
        objective = energies[patterns].mean() - after_a_step @ energies
    exact = torch.autograd.grad(objective, list(rbm.parameters()))
    before = [parameter.detach().clone() for parameter in rbm.parameters()]
    rbm.training_step(states(6)[patterns].repeat(count // len(patterns), 1))
    for old, new, gradient in zip(before, rbm.parameters(), exact, strict=True):
        error = (old - new.detach()) / rbm.learning_rate - gradient
        assert error.abs().max() < 5 * 0.5 / math.sqrt(count)


@pytest.mark.parametrize("chains", [0, 200])
def test_training_raises_the_exact_likelihood(chains):
    torch.manual_seed(2)
    data = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0]], dtype=torch.float32)
    data = data.repeat(50, 1)
    rbm = RBM((6,), 4, 1, chains, 0.1, 0.5, 0.0)
    rbm.initialise(data)

    def likelihood():
        return (-rbm.energy(data).mean() - rbm.log_partition_exact()).item()

    before = likelihood()
    for _ in range(500):
        rbm.training_step(data)
    assert likelihood() > before + 2
    assert likelihood() < -math.log(2) + 1e-6  # two equal patterns: no model beats log 1/2


def test_persistent_chains_move_and_are_part_of_the_state():
    rbm = RBM((6,), 4, 1, 10, 0.1, 0.0, 0.0)
    rbm.initialise(torch.eye(6))
    before = rbm.state_dict()["chains"].clone()
    rbm.training_step(torch.eye(6))
    assert not torch.equal(before, rbm.chains)


def test_grey_data_are_refused():
    with pytest.raises(EBMError, match="binarize"):
        RBM((4,), 2, 1, 0, 0.1, 0.0, 0.0).initialise(torch.full((3, 4), 0.5))


@pytest.mark.parametrize("chains", [0, 10])
def test_contrastive_divergence_takes_its_k_gibbs_steps(chains):
    """From the data, or from where the chains were left; the loss is that at their ends."""
    torch.manual_seed(3)
    rbm, data = RBM((6,), 4, 3, chains, 0.1, 0.0, 0.0), torch.eye(6)
    torch.nn.init.normal_(rbm.weight)
    rbm.initialise(data)
    torch.manual_seed(1)
    end = run(rbm.gibbs(), rbm.chains.clone() if chains else data, 3).x.detach()
    expected = (rbm.energy(data).mean() - rbm.energy(end).mean()).item()
    torch.manual_seed(1)
    logs = rbm.training_step(data)
    assert logs["energy_gap"].item() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(rbm.chains, end if chains else rbm.chains)


def test_weights_decay_and_biases_do_not_and_momentum_carries_all_on():
    """Steps of gradient 0 but for the first: p' = p - 0.1 v, v' = 0.5 v + g + decay p."""
    rbm = RBM((6,), 4, 1, 0, 0.1, 0.5, 0.2).double()
    for parameter, decay in ((rbm.weight, 0.2), (rbm.visible_bias, 0.0), (rbm.hidden_bias, 0.0)):
        torch.nn.init.normal_(parameter)
        p, v = parameter.detach().clone(), torch.zeros_like(parameter)
        for slope in (1.0, 0.0, 0.0):
            rbm.optimizers["energy"].zero_grad()
            parameter.grad = torch.full_like(parameter, slope)
            rbm.optimizers["energy"].step()
            v = 0.5 * v + slope + decay * p
            p = p - 0.1 * v
        torch.testing.assert_close(parameter.detach(), p)


def test_it_begins_as_independent_pixels_of_the_data_and_so_do_its_chains():
    torch.manual_seed(4)
    data = (torch.rand(400, 6) < torch.linspace(0.1, 0.9, 6)).float()
    rbm = RBM((6,), 4, 1, 20000, 0.1, 0.0, 0.0)
    rbm.initialise(data)
    rate = (data.sum(0) + 0.5) / 401
    torch.testing.assert_close(rbm.visible_bias.sigmoid(), rate)
    assert (rbm.chains.mean(0) - rate).abs().max() < 4 * 0.5 / math.sqrt(20000)


def test_the_reconstruction_is_that_of_the_data():
    """A machine that copies every pixel has no error, wherever its chains are."""
    rbm, data = RBM((6,), 6, 1, 50, 0.0, 0.0, 0.0), torch.eye(6)
    rbm.initialise(data)
    with torch.no_grad():
        rbm.weight.copy_(60 * torch.eye(6))
        rbm.visible_bias.fill_(-30.0)
        rbm.hidden_bias.fill_(-30.0)
        rbm.chains.copy_(torch.ones(50, 6))
    assert rbm.training_step(data)["reconstruction_error"].item() == pytest.approx(0, abs=1e-9)


def test_samples_come_after_the_steps_asked_for():
    rbm = RBM((6,), 4, 1, 0, 0.1, 0.0, 0.0)
    rbm.initialise(torch.eye(6))
    torch.manual_seed(5)
    drawn = rbm.sample(20, steps=4)
    torch.manual_seed(5)
    assert torch.equal(drawn["samples"], run(rbm.gibbs(), rbm._base_rate_draws(20), 4).x)
    assert drawn["chain_steps"].tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize(("visible", "hidden"), [(15, 17), (17, 15)])
def test_log_z_of_independent_units_is_a_sum_however_many_states_there_are(visible, hidden):
    """2^15 states are two lots."""
    rbm = machine(visible, hidden).requires_grad_(False)
    rbm.weight.zero_()
    expected = sum(softplus(b).sum() for b in (rbm.visible_bias, rbm.hidden_bias))
    torch.testing.assert_close(rbm.log_partition_exact(), expected)


def test_reverse_annealing_starts_at_any_of_the_data():
    """Between two temperatures alone and without burn-in, log Z is that of data as draws."""
    rbm, points = machine(scale=1.0), states(6)[[1, 2]]
    _, high = rbm.annealed_log_partition(points, 20000, 2, 0)
    start, end = (rbm._annealed_energy(beta, points) for beta in (0.0, 1.0))
    log_z0 = softplus(rbm.base_rate).sum() + 4 * math.log(2)
    expected = log_z0 - ((end - start).exp().mean()).log()
    assert high.item() == pytest.approx(expected.item(), abs=0.05)


def test_reverse_annealing_starts_at_draws_of_the_model_after_its_burn_in():
    """Between two temperatures alone: importance sampling from the model."""
    rbm = machine(scale=1.0)
    unlikely = states(6)[rbm.energy(states(6)).argmax()][None]
    low, high = rbm.annealed_log_partition(unlikely, 40000, 2, 50)
    exact = rbm.log_partition_exact().item()
    assert high.item() == pytest.approx(exact, abs=0.1)
    assert low.item() == pytest.approx(exact, abs=0.1)


def test_the_chains_that_are_shown_lead_to_the_samples():
    rbm = RBM((2, 3), 4, 1, 0, 0.1, 0.0, 0.0)
    rbm.initialise((torch.rand(50, 2, 3) < 0.5).float())
    torch.nn.init.normal_(rbm.weight)
    drawn = rbm.sample(20, steps=4)
    assert torch.equal(drawn["chain"][:, -1], drawn["samples"][:8])
