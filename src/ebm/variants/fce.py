r"""Flow-contrastive estimation (Gao, Nijkamp, Kingma, Xu, Dai & Wu 2020, arXiv:1912.00589).

Noise-contrastive estimation whose noise is a flow that learns to be mistaken for the data: a game
over one value, which the energy ascends and the flow descends.

    V(theta, alpha) = E_data[log p / (p + q)] + E_u[log q(g(u)) / (p(g(u)) + q(g(u)))]
    log p(v) = log b(v) - f_theta(v) - log Z,   q = q_alpha, the density of g_alpha(u), u ~ N(0, I)

    paper           | here
    ----------------|---------------------------------------------------------------------
    f_theta, c      | network, -log_z, which starts where importance sampling from the flow has it
    q_alpha, g      | flow; the first `warmup` steps train it by maximum likelihood
    alternation     | the flow's turn follows one of the energy in which the classifier's accuracy
                    | was over `threshold`; all others are the energy's, which so has half at least
    flow's gradient | through both halves of V: log q, and the draws g(u) themselves
    f_k, c_k        | outputs of the network, which share all layers but the last; the mixture
                    | of equal parts is p
    labelled points | `labelled` of each class, the first of the training split; at most as many as
                    | the batch join every turn of the energy, by `supervision` times the cross
                    | entropy of p(k | v) = p_k(v) / sum_j p_j(v)

Four things stand beside the paper. A share `defence` of the noise is a broad Gaussian of the
data, and in the warm-up the energy of vectors is trained against that alone: a flow that is good
soon has no draws where nothing lies, and an energy trained against it is free to be low there. At
equilibrium V is then above -log 4 by about 0.7 times the share. The energy corrects a density b,
where the paper has none: of vectors the same Gaussian, without which p need not fall beyond all
noise; of images (`tilted`) the flow as it is now, q: then log p - log q is -f - log Z, which
begins at 0 when the warm-up ends, and needs not learn how the flow has changed. In a turn of the
flow b stays what it was, as p does in the paper; afterwards p moves with it. The flow descends V
if the game is `saturating`: V hardly changes with points that the classifier knows for what they
are. If it is not, the flow ascends the same value with the labels exchanged,

    E_data[log q / (p + q)] + E_u[log p(g(u)) / (p(g(u)) + q(g(u)))]

(as Goodfellow et al. 2014 do with the draws' half): the gradient is that of -V where p = q; where
the classifier is right, that of the likelihood of the data and of -KL(q || p). And p(k | v) of a
semi-supervised energy is kept smooth by virtual adversarial training, as the paper combines both
(`roughness`).

Beside a semi-supervised energy a twin of its network learns from the same labels alone: what the
unlabelled points are worth is the difference.

Samples: Metropolis' algorithm that proposes draws of the flow (`ebm.samplers.Independence`).

Logged: `value` = V, at equilibrium -log 4; `accuracy` of the classifier, at equilibrium 1/2;
`flow_turns`, the share of steps that were the flow's; `log_z`; `noise_loss`, the mean of -log q
over data, in the warm-up that of the flow alone; `energy_gap` = E_data[-log p] - E_q[-log p];
`gradient_norm`; `cross_entropy` of the labelled points and `roughness` at the others. What a step
does not compute is 0.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from ebm import EBMError
from ebm.contrastive import LOGGED, Contrasted, value
from ebm.flows import Defended, Latents, Noise, adam
from ebm.parallel import averaged, mine, permutation, share, world
from ebm.recorded import Loss
from ebm.samplers import by_row

TINY = 0.1
"""Share of the radius within which the worst direction is looked for."""


class FCE(Contrasted):
    """FCE over points of `shape`; settings as in `fce_config.Model`."""

    logged = (*LOGGED, "flow_turns", "cross_entropy", "roughness")
    last_accuracy: Tensor
    points: Tensor
    labels: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        flow: Mapping[str, Any],
        threshold: float,
        flow_learning_rate: float,
        saturating: bool,
        classes: int,
        labelled: int,
        supervision: float,
        smoothness: float,
        radius: float,
        **contrasted: Any,
    ) -> None:
        if flow["kind"] == "gaussian":
            raise EBMError("model.flow: a gaussian has nothing to train; the variant nce keeps it")
        super().__init__(shape, flow, **contrasted, outputs=max(classes, 1))
        self.threshold, self.flow_learning_rate = threshold, flow_learning_rate
        self.saturating = saturating
        self.labelled_classes, self.supervision = classes, supervision
        self.smoothness, self.radius = smoothness, radius
        self.register_buffer("last_accuracy", torch.zeros(()))
        self.register_buffer("points", torch.zeros(classes * labelled, *shape))
        self.register_buffer("labels", torch.zeros(classes * labelled, dtype=torch.long))
        if classes:
            self.twin = deepcopy(self.network)
            self.twin.head.bias.requires_grad_(True)

    def configure_optimizers(self) -> dict[str, Optimizer]:
        """Optimisers of every contrasted energy, of the flow's turns and of the twin."""
        settings = self.betas, self.weight_decay
        optimizers = super().configure_optimizers()
        optimizers |= adam("flow", self.noise, self.flow_learning_rate, *settings)
        if self.labelled_classes:
            optimizers |= adam("twin", self.twin, self.learning_rate, *settings)
        return optimizers

    @property
    def needs_labels(self) -> bool:
        return self.labelled_classes > 0

    def initialise(self, data: Tensor, labels: Tensor | None = None) -> None:
        """Keep also the first labelled points of each class; all other labels go unseen."""
        super().initialise(data)
        if labels is not None:
            self._keep_labelled(data, labels)

    def _keep_labelled(self, data: Tensor, labels: Tensor) -> None:
        if (found := int(labels.max()) + 1) != self.labelled_classes:
            raise EBMError(f"model.classes = {self.labelled_classes}: the data have {found}")
        wanted = len(self.labels) // self.labelled_classes
        for k in range(self.labelled_classes):
            rows = (labels == k).nonzero().flatten()[:wanted]
            if len(rows) < wanted:
                raise EBMError(f"model.labelled = {wanted}: class {k} has {len(rows)} points")
            here = slice(k * wanted, (k + 1) * wanted)
            self.points[here], self.labels[here] = data[rows], k

    def turn(self, data: Tensor, warming: bool) -> dict[str, Tensor]:
        noise = self.contrast
        if warming and isinstance(noise, Defended):
            noise = noise.broad
        flow_turn = not warming and self.last_accuracy > self.threshold
        logs = self._flow_turn(data) if flow_turn else self._energy_turn(data, noise)
        seen = averaged(logs["accuracy"])  # all processes take the same turn
        self.last_accuracy.copy_(0 * seen if flow_turn else seen)
        return logs

    def _energy_turn(self, data: Tensor, noise: Noise) -> dict[str, Tensor]:
        told = data, noise, noise.latents(len(data))
        if not len(self.labels):
            return self.minimise("energy", self.energy_loss, *told, clip=self.clip)
        labelled = self._labelled(len(data))
        semi = *told, *labelled, torch.randn_like(data)
        logs = self.minimise("energy", self._supervised_loss, *semi, clip=self.clip)
        self.minimise("twin", self._twin_loss, *labelled, clip=self.clip)
        return logs

    def _supervised_loss(
        self,
        data: Tensor,
        noise: Noise,
        latents: Latents,
        points: Tensor,
        classes: Tensor,
        start: Tensor,
    ) -> Loss:
        """-V plus the cross entropy of labelled points and the roughness (from `start`)."""
        loss, logs = self.energy_loss(data, noise, latents)
        logs["cross_entropy"] = cross_entropy(-self.unnormalised(points) - self.log_z, classes)
        loss = loss + self.supervision * logs["cross_entropy"]
        if self.smoothness:
            logs["roughness"] = self.roughness(data, start)
            loss = loss + self.smoothness * logs["roughness"]
        return loss, logs

    def _twin_loss(self, points: Tensor, classes: Tensor) -> Loss:
        return cross_entropy(self._twin(points), classes), {}

    def _flow_turn(self, data: Tensor) -> dict[str, Tensor]:
        latents = self.contrast.latents(len(data))
        logs = self.minimise("flow", self._flow_loss, data, latents, clip=self.clip)
        return logs | {"flow_turns": torch.ones_like(logs["value"])}

    def _flow_loss(self, data: Tensor, latents: Latents) -> Loss:
        """V, or minus what it is with the labels exchanged; the draws that are made of `latents`
        are differentiable in the flow."""
        draws, log_q_draws = self.contrast.from_latents(*latents)
        (r, r_draws), logs = self.play(data, draws, self.contrast.log_prob(data), log_q_draws)
        return logs["value"] if self.saturating else -value(-r, -r_draws), logs

    def _labelled(self, most: int) -> tuple[Tensor, Tensor]:
        """Labelled points of the space, at most so many, and their classes."""
        wanted = min(len(self.labels), most * world())
        share(wanted, "model.labelled: of all classes in a batch")
        rows = mine(permutation(len(self.labels), self.labels.device)[:wanted])
        return self.space.enter(self.points[rows]), self.labels[rows]

    def roughness(self, v: Tensor, start: Tensor) -> Tensor:
        """How far p(k | v) moves, as KL, when v [B, *] moves by `radius` where it moves it most:
        the local distributional smoothness of virtual adversarial training (Miyato et al. 2018),
        by one power iteration from the directions `start` [B, *]; a scalar."""
        with torch.no_grad():
            before = self._log_posterior(v)
        small = TINY * self.radius * direction(start)
        small.requires_grad_()
        (gradient,) = torch.autograd.grad(
            divergence(before, self._log_posterior(v + small)), small
        )
        far = self.radius * direction(gradient)
        return divergence(before, self._log_posterior(v + far))

    def _log_posterior(self, v: Tensor) -> Tensor:
        """log p(k | v), all classes being as frequent: [B, classes]."""
        return (-self.unnormalised(v) - self.log_z).log_softmax(1)

    def _twin(self, v: Tensor) -> Tensor:
        return -self.twin.of_points(v).view(len(v), -1)

    def classify(self, x: Tensor) -> dict[str, Tensor]:
        """The most likely class of x [B, *], all being as frequent: `accuracy`; and by the twin,
        which knows the labelled points only: `accuracy_supervised`. Both [B]."""
        if not self.labelled_classes:
            return {}
        v = self.space.centre(x)
        return {
            "accuracy": self.log_densities(v).argmax(1),
            "accuracy_supervised": self._twin(v).argmax(1),
        }


def direction(x: Tensor) -> Tensor:
    """x [B, *] with every point brought to the norm 1, but for zeros; by a power of 2 to the size
    of 1 first, as squares of small numbers are 0."""
    largest = x.flatten(1).abs().amax(1).clamp(min=torch.finfo(x.dtype).tiny)
    x = torch.ldexp(x, by_row(-largest.frexp().exponent, x))
    norm = x.flatten(1).norm(dim=1).clamp(min=1e-30)
    return x / by_row(norm, x)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Mean KL(p || q) of distributions [B, K] given by their logs; a scalar."""
    return (log_p.exp() * (log_p - log_q)).sum(1).mean()
