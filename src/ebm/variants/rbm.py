r"""Restricted Boltzmann machine with binary units (Smolensky 1986; Hinton 2002).

    E(v, h) = -b.v - c.h - v.W.h,     F(v) = -b.v - sum_j log(1 + exp(c_j + (v W)_j))

`energy` is the free energy F, so p(v) = exp(-F(v)) / Z. The gradient of the log-likelihood is
-grad F(data) + E_model[grad F]; contrastive divergence (CD-k, Hinton 2002) takes the second term
after k Gibbs steps from the data, persistent contrastive divergence (PCD, Tieleman 2008) from
chains that live on from update to update.

    paper    | here
    ---------|---------------------------------------------------------------------------
    W        | weight [V, H]
    b, c     | visible_bias [V], hidden_bias [H]
    k        | k

Centering (Montavon & Müller 2012) was tried and left out: on binarised digits it did not raise the
held-out likelihood at any of three learning rates.

Logged: `energy_gap` = mean F(data) - mean F(chains), the loss, which hovers around 0;
`gradient_norm`; `reconstruction_error` = mean squared distance of v to p(v | h ~ p(h | v)).
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.optim import SGD, Optimizer

from ebm import EBMError
from ebm.samplers import BlockGibbs, ais, at_milestones, draw, log_mean_exp, run
from ebm.variants.base import EBM, descend

ENUMERABLE = 20
"""The side with at most this many units is summed out exactly: 2^20 terms."""


class RBM(EBM):
    """Bernoulli-Bernoulli RBM over points of `shape`; settings as in `rbm_config.Model`."""

    base_rate: Tensor
    chains: Tensor
    sharded = ("chains",)

    def __init__(
        self,
        shape: tuple[int, ...],
        hidden: int,
        k: int,
        chains: int,
        learning_rate: float,
        momentum: float,
        weight_decay: float,
    ) -> None:
        super().__init__()
        self.shape, self.k = shape, k
        visible = math.prod(shape)
        self.weight = nn.Parameter(0.01 * torch.randn(visible, hidden))
        self.visible_bias = nn.Parameter(torch.zeros(visible))
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))
        self.register_buffer("base_rate", torch.zeros(visible))
        self.register_buffer("chains", torch.zeros(chains, visible))
        self.learning_rate, self.momentum = learning_rate, momentum
        self.weight_decay = weight_decay

    def configure_optimizers(self) -> dict[str, Optimizer]:
        groups: list[dict[str, Any]] = [
            {"params": [self.weight], "weight_decay": self.weight_decay},
            {"params": [self.visible_bias, self.hidden_bias]},
        ]
        return {"energy": SGD(groups, self.learning_rate, self.momentum)}

    def initialise(self, data: Tensor, labels: Tensor | None = None) -> None:
        """Visible biases at the log-odds of the pixels (Hinton 2012, section 8); chains from
        there."""
        _require_binary(data)
        mean = (data.flatten(1).sum(0) + 0.5) / (len(data) + 1)
        self.base_rate.copy_(mean.logit())
        with torch.no_grad():
            self.visible_bias.copy_(self.base_rate)
        self.chains.copy_(draw(mean.expand_as(self.chains)))

    def energy(self, x: Tensor) -> Tensor:
        """F(x) of bits [B, *], in nats; EBMError if there are greys among them."""
        _require_binary(x)
        return self._free_energy(x.flatten(1))

    def _free_energy(self, v: Tensor) -> Tensor:
        return -v @ self.visible_bias - softplus(self.hidden_bias + v @ self.weight).sum(1)

    def gibbs(self, beta: float = 1.0) -> BlockGibbs:
        """p(h | v) and p(v | h) of this model, or of the one at `beta` of the annealing path."""
        weight, c, b = beta * self.weight, beta * self.hidden_bias, self._annealed_bias(beta)
        return BlockGibbs(
            p_hidden=lambda v: torch.sigmoid(c + v @ weight),
            p_visible=lambda h: torch.sigmoid(b + h @ weight.T),
        )

    def training_step(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        data = x.flatten(1)
        with torch.no_grad():
            gibbs = self.gibbs()
            model = run(gibbs, self.chains if len(self.chains) else data, self.k).x
            reconstruction = gibbs.p_visible(draw(gibbs.p_hidden(data)))
        if len(self.chains):
            self.chains.copy_(model)

        loss = self._free_energy(data).mean() - self._free_energy(model).mean()
        norm = descend(self.optimizers["energy"], loss)
        return {
            "energy_gap": loss.detach(),
            "gradient_norm": norm,
            "reconstruction_error": (data - reconstruction).square().sum(1).mean(),
        }

    @torch.no_grad()
    def sample(self, n: int, steps: int = 1000) -> dict[str, Tensor]:
        """`samples` after `steps` Gibbs steps from the base rate, `probability` of their pixels,
        and `chain` [8, T, *], eight of the chains at steps 0, 1, 3, 10, 30 ... `chain_steps`
        [T]."""
        gibbs = self.gibbs()
        state, chain, marks = at_milestones(gibbs, self._base_rate_draws(n), steps, chains=8)
        probability = gibbs.p_visible(gibbs.p_hidden(state.x))
        return {
            "samples": state.x.view(n, *self.shape),
            "probability": probability.view(n, *self.shape),
            "chain": chain.unflatten(2, self.shape),
            "chain_steps": torch.tensor(marks),
        }

    def portraits(self) -> dict[str, Tensor]:
        return {"filters": self.weight.detach().T.reshape(-1, *self.shape)}

    @torch.no_grad()
    def log_partition_exact(self) -> Tensor:
        """log Z by summing over all states of the smaller side, which may have <= 20 units."""
        rbm = self._double()
        visible, hidden = rbm.weight.shape
        if min(visible, hidden) > ENUMERABLE:
            raise EBMError(f"exact log Z needs a side of at most {ENUMERABLE} units")
        states_bias, other_bias, weight = (
            (rbm.hidden_bias, rbm.visible_bias, rbm.weight.T)
            if hidden <= visible
            else (rbm.visible_bias, rbm.hidden_bias, rbm.weight)
        )
        units = len(states_bias)
        bits = torch.arange(units, device=weight.device)
        terms = []
        for first, last in pairwise([*range(0, 2**units, 2**14), 2**units]):
            codes = torch.arange(first, last, device=weight.device)
            states = (codes[:, None] >> bits & 1).double()
            terms.append(states @ states_bias + softplus(other_bias + states @ weight).sum(1))
        return torch.logsumexp(torch.cat(terms), 0)

    def log_partition(self, data: Tensor, **settings: int) -> tuple[Tensor, Tensor]:
        """Exactly where a side is small enough, else by annealing with `rbm_config.Evaluate`."""
        if min(self.weight.shape) > ENUMERABLE:
            return self.annealed_log_partition(data, **settings)
        exact = self.log_partition_exact()
        return exact, exact

    @torch.no_grad()
    def annealed_log_partition(
        self, data: Tensor, chains: int, temperatures: int, burn_in: int
    ) -> tuple[Tensor, Tensor]:
        """log Z from below and from above, by forward and reverse annealed importance sampling.

        The path of Salakhutdinov & Murray (2008) from the base-rate model (weights 0, visible
        biases at the data's log-odds) to this one. The reverse runs start from `chains` Gibbs
        chains, `burn_in` steps after they left points of the `data` [N, *]: what forward runs
        never reach but data show makes a gap. Modes that neither comes to are missed by both.
        """
        rbm = self._double()
        log_z0 = softplus(rbm.base_rate).sum() + rbm.weight.shape[1] * math.log(2)
        betas = torch.linspace(0, 1, temperatures).tolist()
        start = rbm._base_rate_draws(chains)
        forward = ais(rbm._annealed_energy, rbm.gibbs, start, betas)
        rows = torch.randint(len(data), (chains,), device=data.device)
        end = run(rbm.gibbs(), data[rows].flatten(1).double(), burn_in).x
        reverse = ais(rbm._annealed_energy, rbm.gibbs, end, betas[::-1])
        return log_z0 + log_mean_exp(forward), log_z0 - log_mean_exp(reverse)

    def _annealed_bias(self, beta: float) -> Tensor:
        return (1 - beta) * self.base_rate + beta * self.visible_bias

    def _annealed_energy(self, beta: float, v: Tensor) -> Tensor:
        hidden = softplus(beta * (self.hidden_bias + v @ self.weight)).sum(1)
        return -v @ self._annealed_bias(beta) - hidden

    def _base_rate_draws(self, n: int) -> Tensor:
        return draw(self.base_rate.sigmoid().expand(n, -1))

    def _double(self) -> "RBM":
        """A copy in float64, for sums whose last digits matter."""
        hidden = self.weight.shape[1]
        copy = RBM(self.shape, hidden, self.k, len(self.chains), 1.0, 0.0, 0.0)
        copy.load_state_dict(self.state_dict())
        return copy.double().to(self.weight.device)


def _require_binary(data: Tensor) -> None:
    if not ((data == 0) | (data == 1)).all():
        wanted = "data sets of kind digits or images have `binarize`"
        raise EBMError(f"binary units know 0 and 1, no greys; {wanted}")
