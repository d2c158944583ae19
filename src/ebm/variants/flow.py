r"""A normalising flow, trained by maximum likelihood: the baseline of flow-contrastive estimation,
and the noise that it begins with.

    log p(x) = log N(u; 0, I) + log|det du / dx|,    L = -E_data[log p(x)]

    kind       | after
    -----------|----------------------------------------------------------------------------
    spline     | Durkan, Bekasov, Murray & Papamakarios 2019 (arXiv:1906.04032), by zuko
    coupling   | Dinh, Sohl-Dickstein & Bengio 2017 (arXiv:1605.08803), by zuko
    glow       | Kingma & Dhariwal 2018 (arXiv:1807.03039), `ebm.glow`
    gaussian   | mean and covariance of the data; needs no step

Images are dequantised by uniform noise (`ebm.flows` has the formulas). The energy is -log p(x), of
images that of their grey levels, at the middle of each level.

Logged: `energy_gap`, the mean of -log p(x) over data (a normalised density has no second term);
`gradient_norm`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ebm.flows import Density
from ebm.variants.base import EBM, descend


class NormalisingFlow(EBM):
    """A flow over points of `shape`, vectors or images in [0, 1]; settings as in
    `flow_config.Model`."""

    normalised = True

    def __init__(
        self,
        shape: tuple[int, ...],
        flow: Mapping[str, Any],
        levels: int,
        margin: float,
        learning_rate: float,
        betas: tuple[float, float],
        weight_decay: float,
        clip: float,
    ) -> None:
        super().__init__()
        self.clip = clip
        self.density = Density(shape, flow, levels, margin)
        self.optimizer = torch.optim.AdamW(
            self.density.parameters(), learning_rate, betas, weight_decay=weight_decay
        )

    def initialise(self, data: Tensor) -> None:
        self.density.initialise(data)

    def energy(self, x: Tensor) -> Tensor:
        """-log p(x) for x [B, *]: [B], in nats."""
        return -self.density.log_prob(x)

    def training_step(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        loss = -self.density.log_prob(x, self.density.space.enter(x)).mean()
        norm = descend(self.optimizer, loss, self.clip)
        return {"energy_gap": loss.detach(), "gradient_norm": norm}

    def log_likelihood(self, x: Tensor) -> Tensor:
        """log p(x) for x [B, *], of images the bound by one draw of the noise: [B], in nats."""
        return self.density.log_prob(x, self.density.space.enter(x))

    @torch.no_grad()
    def sample(self, n: int) -> dict[str, Tensor]:
        """`samples` [n, *]: exact draws."""
        v, _ = self.density.flow.draw_with_log_prob(n)
        return {"samples": self.density.space.leave(v)}
