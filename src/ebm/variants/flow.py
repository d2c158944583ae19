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

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ebm.flows import Density, adam
from ebm.recorded import Loss


class NormalisingFlow(Density):
    """A flow over points of `shape`, vectors or images in [0, 1]; settings as in
    `flow_config.Model`."""

    def __init__(
        self,
        shape: tuple[int, ...],
        flow: Mapping[str, Any],
        levels: int,
        margin: float,
        learning_rate: float,
        betas: tuple[float, float],
        weight_decay: float,
        clip: float | None,
        compile: bool,
    ) -> None:
        super().__init__(shape, flow, levels, margin)
        self.compiled = compile
        self.clip = clip or math.inf
        self.learning_rate, self.betas, self.weight_decay = learning_rate, betas, weight_decay

    def configure_optimizers(self) -> dict[str, Optimizer]:
        return adam("flow", self, self.learning_rate, self.betas, self.weight_decay)

    def training_step(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        v = self.space.enter(x)
        if not self.optimizers:
            return self._loss(v)[1] | {"gradient_norm": v.new_zeros(())}
        return self.minimise("flow", self._loss, v, clip=self.clip)

    def _loss(self, v: Tensor) -> Loss:
        loss = -self._log_prob(v).mean()
        return loss, {"energy_gap": loss}
