r"""Noise-contrastive estimation (Gutmann & Hyvarinen 2010; 2012, JMLR 13:307).

An energy f with a constant log Z of its own, both learned by telling data from draws of a
noise q whose density is known:

    log p(v)  = log b(v) - f(v) - log Z
    V         = E_data[log h(v)] + nu E_q[log(1 - h(v))],   h = sigmoid(log p - log q - log nu)

    paper                     | here
    --------------------------|-----------------------------------------------------------
    p_m^0(.; alpha), c        | b exp(-network), -log_z; b as in `ebm.contrastive`, which keeps p
                              | low beyond all noise
    p_n                       | noise: a Gaussian fitted to the data, or a flow that the first
                              | `warmup` steps train by maximum likelihood and then keep
    nu                        | ratio
    J_T                       | value
    conjugate gradients       | Adam, on fresh noise at every step, with a learning rate for log_z

Samples: Metropolis' algorithm that proposes draws of the noise and starts at one: the more it
accepts, the sooner the start is forgotten (`ebm.samplers.Independence`).

Logged: `value` = V; `accuracy` of the classifier, 1/2 where nothing is left to tell; `log_z`;
`energy_gap` = E_data[-log p] - E_q[-log p]; `noise_loss`, the mean of -log q over data, in the
warm-up that of the flow alone; `gradient_norm`. What a step does not compute is 0.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ebm.contrastive import Contrasted
from ebm.parallel import share, world


class NCE(Contrasted):
    """NCE over points of `shape`; settings as in `nce_config.Model`."""

    def __init__(
        self,
        shape: tuple[int, ...],
        noise: Mapping[str, Any],
        ratio: float,
        **contrasted: Any,
    ) -> None:
        super().__init__(shape, noise, **contrasted)
        self.ratio = ratio

    def turn(self, data: Tensor, warming: bool) -> dict[str, Tensor]:
        noise = self.contrast
        told = data, noise, noise.latents(self._draws(len(data)))
        return self.minimise("energy", self.energy_loss, *told, clip=self.clip)

    def _draws(self, rows: int) -> int:
        """How many draws stand beside so many rows of this process, one at least."""
        return share(max(1, round(self.ratio * rows * world())), "model.ratio: draws of a batch")
