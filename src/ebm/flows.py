r"""Normalising flows: densities that are exact, draw in one pass and differentiate both ways; and
the space in which densities of data are learned.

    x = g(v),  v = h(u),  u ~ N(0, I):    log p(x) = log N(u) + log|du / dv| + log|dv / dx|

The flow is h; g leads from the space of the flow to that of the data, and is fixed before the
first step:

    vectors   v = (x - mean) / deviation, of each column in the training split
    images    y = ((L - 1) x + n) / L,  n ~ U[0, 1)^D          (L grey levels, made continuous)
              v = logit(a + (1 - 2 a) y)                       (Dinh, Sohl-Dickstein & Bengio 2017)

Of an image, log p is that of its grey levels, a lower bound by one draw of the noise n (Theis, van
den Oord & Bethge 2016): log p(x) >= E_n[log p(y)] - D log L; in bits per dimension, its negative
over D log 2.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.func import functional_call
from torch.optim import AdamW, Optimizer

from ebm import EBMError
from ebm.parallel import draws_are_shared
from ebm.variants.base import EBM

log = logging.getLogger(__name__)

Latents = tuple[Tensor, ...]
"""All that is random in draws."""


AT_ONCE = 2**23
"""Numbers of points that go through a flow, or the energy beside it, at once in drawing many."""


def in_slices(function: Callable[..., Tensor], v: Tensor, *known: Tensor) -> Tensor:
    """Values [B] of a function at points [B, *], and what is known of each [B], some at once."""
    parts = zip(*(each.split(_rows_at_once(v)) for each in (v, *known)), strict=True)
    return torch.cat([function(*part) for part in parts])


def _rows_at_once(*points: Tensor) -> int:
    return max(1, AT_ONCE // max(1, sum(x[:1].numel() for x in points)))


class Noise:
    """A density of points [B, *] that is known and can be drawn from."""

    def log_prob(self, v: Tensor) -> Tensor:
        """log density [B] of points [B, *]."""
        raise NotImplementedError

    def latents(self, n: int) -> Latents:
        """What n draws are made of."""
        raise NotImplementedError

    def from_latents(self, *latents: Tensor) -> tuple[Tensor, Tensor]:
        """The draws [n, *] that are made of it and their log density [n]."""
        raise NotImplementedError

    def draw_with_log_prob(self, n: int) -> tuple[Tensor, Tensor]:
        """Draws [n, *] and their log density [n]."""
        return self.from_latents(*self.latents(n))


class Flow(nn.Module, Noise):
    """A module that is such a density; points and densities are differentiable in its
    parameters."""

    def initialise(self, v: Tensor) -> None:
        """Set what depends on data [N, *], if anything does, once, before the first step."""

    def forward(self, v: Tensor) -> Tensor:
        return self.log_prob(v)

    def held(self, v: Tensor) -> Tensor:
        """log density [B] of points [B, *] in which it is differentiable, but not in the
        parameters, which are held at what they are."""
        return functional_call(self, {n: p.detach() for n, p in self.named_parameters()}, v)

    def draw_with_log_prob(self, n: int) -> tuple[Tensor, Tensor]:
        latents = self.latents(n)
        rows = _rows_at_once(*latents)
        parts = zip(*(latent.split(rows) for latent in latents), strict=True)
        draws, log_prob = zip(*(self.from_latents(*part) for part in parts), strict=True)
        return torch.cat(draws), torch.cat(log_prob)


OFF_A_LEVEL = 1e-3
"""A grey is one of the levels if it is no farther from it, in levels."""


def make(shape: tuple[int, ...], kind: str, **settings: Any) -> Flow:
    """The flow of a `kind` over points of `shape`; settings as in `schema.Flow`."""
    if kind == "glow":
        from ebm.glow import Glow

        return Glow(shape, **settings)
    if len(shape) != 1:
        raise EBMError(f"flow {kind!r} does not fit points of shape {shape}; use 'glow'")
    return {"gaussian": Gaussian, "spline": Spline, "coupling": Coupling}[kind](*shape, **settings)


NARROW = 0.1
"""A deviation, of columns of deviation 1, below which a Gaussian of the data is made wider."""


class Gaussian(Flow):
    """N(mean, covariance) of the data: what is known of it at no cost. Nothing is trained. Where
    data hardly vary in some direction, it is a little wider in all: else the log density of what
    lies beside would be beyond all others."""

    mean: Tensor
    scale: Tensor

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dimensions))
        self.register_buffer("scale", torch.eye(dimensions))

    def initialise(self, v: Tensor) -> None:
        if len(v) < 2:
            raise EBMError("a Gaussian of the data takes two training rows at least")
        v = v.double()  # columns that add up to 1 leave float32 a covariance below 0
        covariance = torch.atleast_2d(v.T.cov())
        narrow = torch.linalg.eigvalsh(covariance)[0] < NARROW**2
        jitter = NARROW**2 if narrow else 1e-6
        self.mean.copy_(v.mean(0))
        self.scale.copy_(torch.linalg.cholesky(covariance + jitter * torch.eye(len(v.T)).to(v)))

    def log_prob(self, v: Tensor) -> Tensor:
        return self._normal().log_prob(v)

    def latents(self, n: int) -> Latents:
        """N(0, I) [n, D]."""
        return (torch.randn(n, len(self.mean), dtype=self.mean.dtype, device=self.mean.device),)

    def from_latents(self, *latents: Tensor) -> tuple[Tensor, Tensor]:
        (u,) = latents
        v = self.mean + (self.scale @ u.unsqueeze(2)).squeeze(2)
        return v, self.log_prob(v)

    def _normal(self) -> MultivariateNormal:
        return MultivariateNormal(self.mean, scale_tril=self.scale, validate_args=False)


def adam(
    name: str,
    module: nn.Module,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> dict[str, Optimizer]:
    """What trains a module, under a name; nothing where it has nothing to train."""
    weights = list(module.parameters())
    if not weights:
        return {}
    return {name: AdamW(weights, learning_rate, betas, weight_decay=weight_decay, fused=True)}


@dataclass(frozen=True)
class Defended(Noise):
    """The mixture (1 - share) q + share N of a flow and a broad Gaussian: a defensive mixture
    (Hesterberg 1995), which has draws wherever data might be however narrow the flow becomes, so
    that a density trained against them is low where nothing lies. Of n draws share n come from the
    Gaussian, rounded up or down at random with that expectation, so every draw follows the
    mixture. Where several processes share the draws, share n has to be whole in each: they would
    round each on its own."""

    flow: Flow
    broad: Gaussian
    share: float

    def log_prob(self, v: Tensor) -> Tensor:
        log_q, log_n = self.flow.log_prob(v), self.broad.log_prob(v)
        return torch.logaddexp(math.log1p(-self.share) + log_q, math.log(self.share) + log_n)

    def latents(self, n: int) -> Latents:
        """Latents of the flow and of the Gaussian, and the order of the draws."""
        share = self.share * n
        if draws_are_shared() and not math.isclose(share, round(share)):
            raise EBMError(
                f"model.defence = {self.share}: of {n} draws of a process no whole number"
            )
        broad = int(share + torch.rand(()).item())
        parts = *self.flow.latents(n - broad), *self.broad.latents(broad)
        return *parts, torch.randperm(n, device=parts[0].device)

    def from_latents(self, *latents: Tensor) -> tuple[Tensor, Tensor]:
        *flow, broad, order = latents
        v = torch.cat([self.flow.from_latents(*flow)[0], self.broad.from_latents(broad)[0]])[order]
        return v, self.log_prob(v)


class _Zuko(Flow):
    """A flow of the library zuko over vectors."""

    def __init__(self, lazy: nn.Module) -> None:
        super().__init__()
        self.lazy = lazy

    def log_prob(self, v: Tensor) -> Tensor:
        return self.lazy().log_prob(v)

    def latents(self, n: int) -> Latents:
        """N(0, I) [n, D]."""
        return (self.lazy().base.rsample((n,)),)

    def from_latents(self, *latents: Tensor) -> tuple[Tensor, Tensor]:
        (u,) = latents
        if not len(u):  # zuko knows no 0 draws
            return u, u.sum(1)
        flow = self.lazy()
        v, log_det = flow.transform.inv.call_and_ladj(u)
        return v, flow.base.log_prob(u) - log_det


class Spline(_Zuko):
    """Neural spline flow (Durkan et al. 2019, arXiv:1906.04032): `transforms` rational-quadratic
    splines of so many `bins`, each coordinate's given by the others' through two hidden layers of
    `width`, in two passes (coupling). The splines end at +-5, beyond which points pass as they
    are; data are stretched by `STRETCH` to make use of them."""

    STRETCH = 2.0

    def __init__(self, dimensions: int, transforms: int, bins: int, width: int) -> None:
        from zuko.flows import NSF

        sizes = {"bins": bins, "hidden_features": (width, width), "passes": 2}
        super().__init__(NSF(dimensions, transforms=transforms, **sizes))
        self.log_stretch = dimensions * math.log(self.STRETCH)

    def log_prob(self, v: Tensor) -> Tensor:
        return super().log_prob(self.STRETCH * v) + self.log_stretch

    def from_latents(self, *latents: Tensor) -> tuple[Tensor, Tensor]:
        v, log_prob = super().from_latents(*latents)
        return v / self.STRETCH, log_prob + self.log_stretch


class Coupling(_Zuko):
    """Affine couplings (RealNVP, Dinh, Sohl-Dickstein & Bengio 2017, arXiv:1605.08803), each by
    two hidden layers of `width`."""

    def __init__(self, dimensions: int, transforms: int, width: int) -> None:
        from zuko.flows import RealNVP

        sizes = {"hidden_features": (width, width)}
        super().__init__(RealNVP(dimensions, transforms=transforms, **sizes))


NARROWEST = 1e-7
"""A margin that single precision can tell from none."""


class Space(nn.Module):
    """From data to the space of a flow, and back. `levels`: of the grey of images, 0 for vectors;
    `margin`: a, how far from 0 and 1 the greys are kept."""

    shift: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, ...], levels: int, margin: float) -> None:
        super().__init__()
        if levels < 2 if len(shape) > 1 else levels:
            raise EBMError(
                f"model.levels = {levels}: expected 0 for vectors, else the grey levels"
            )
        if levels and margin < NARROWEST:
            wanted = f"at least {NARROWEST:g} for images, whose logit would be infinite"
            raise EBMError(f"model.margin = {margin:g}: expected {wanted}")
        self.levels, self.margin, self.dimensions = levels, margin, math.prod(shape)
        sizes = () if levels else shape
        self.register_buffer("shift", torch.zeros(sizes))
        self.register_buffer("scale", torch.ones(sizes))

    def initialise(self, data: Tensor) -> None:
        """Fit what is fitted to the data [N, *]."""
        if not self.levels:
            self.shift.copy_(data.mean(0))
            low, high = data.amin(0), data.amax(0)
            self.scale.copy_(torch.where(low < high, data.std(0), 1))  # of one: rounding's
            if few := int(((data == low) | (data == high)).all(0).sum()):
                log.warning(
                    "%d of %d columns have two values at most (one-hot, say, or constant): no "
                    "density is the likeliest of such data, and log p grows for as long as "
                    "training goes on; energies rank all the same",
                    few,
                    self.dimensions,
                )
            return
        greys = (self.levels - 1) * data
        if (greys - greys.round()).abs().max() > OFF_A_LEVEL:
            raise EBMError(f"model.levels = {self.levels}: the data have greys between these")

    def enter(self, x: Tensor) -> Tensor:
        """Data [B, *] as points of the space, greys with fresh noise within their level."""
        return self._enter(x, torch.rand_like(x)) if self.levels else self._enter(x, x)

    def centre(self, x: Tensor) -> Tensor:
        """Points of the space, as by `enter`, but every grey in the middle of its level."""
        return self._enter(x, torch.full_like(x, 0.5))

    def _enter(self, x: Tensor, noise: Tensor) -> Tensor:
        if not self.levels:
            return (x - self.shift) / self.scale
        y = ((self.levels - 1) * x + noise) / self.levels
        return torch.logit(self.margin + (1 - 2 * self.margin) * y)

    def leave(self, v: Tensor) -> Tensor:
        """Points of the space as data [B, *], greys as one of their levels."""
        if not self.levels:
            return self.shift + self.scale * v
        y = (v.sigmoid() - self.margin) / (1 - 2 * self.margin)
        return (self.levels * y).floor().clamp(0, self.levels - 1) / (self.levels - 1)

    def log_det(self, v: Tensor) -> Tensor:
        """log|dv / dx| at points [B, *] of vectors x: [B]; of images log|dv / dy| - D log L with
        y the dequantised pixels in [0, 1], so that log p(v) + this is the log probability of their
        levels."""
        if not self.levels:
            return -self.scale.log().sum().expand(len(v))
        softplus = nn.functional.softplus
        slope = (softplus(v) + softplus(-v)).flatten(1).sum(1)  # -log(w (1 - w)), w = sigmoid(v)
        return slope + self.dimensions * math.log((1 - 2 * self.margin) / self.levels)


class Density(EBM):
    """A flow over data [B, *] of a shape; `flow` are the settings of `schema.Flow`, the others
    those of the `Space`. Its energy is -log p(x), of images that of their grey levels."""

    normalised = True

    def __init__(
        self, shape: tuple[int, ...], flow: Mapping[str, Any], levels: int, margin: float
    ) -> None:
        super().__init__()
        self.space, self.flow = Space(shape, levels, margin), make(shape, **flow)

    def initialise(self, data: Tensor, labels: Tensor | None = None) -> None:
        """Fit the space to the data [N, *], then the flow as far as it goes without training."""
        self.space.initialise(data)
        self.flow.initialise(self.space.enter(data))

    def energy(self, x: Tensor) -> Tensor:
        """-log p(x) for x [B, *], greys at the middle of their levels: [B], in nats."""
        return -self._log_prob(self.space.centre(x))

    def log_likelihood(self, x: Tensor) -> Tensor:
        """log p(x) for x [B, *], of greys the bound by one draw of the noise: [B], in nats."""
        return self._log_prob(self.space.enter(x))

    def _log_prob(self, v: Tensor) -> Tensor:
        return self.flow.log_prob(v) + self.space.log_det(v)

    @torch.no_grad()
    def sample(self, n: int) -> dict[str, Tensor]:
        """`samples` [n, *]: exact draws."""
        return {"samples": self.space.leave(self.flow.draw_with_log_prob(n)[0])}
