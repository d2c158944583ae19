r"""Glow: a normalising flow for images (Kingma & Dhariwal 2018, arXiv:1807.03039).

An invertible map f from images v to latents z of the same number of axes, D, whose Jacobian has a
cheap determinant, over the prior N(0, I):

    log p(v)  = log N(f(v); 0, I) + log |det df / dv|
    v         = f^-1(z),   z ~ N(0, I)

Multi-scale (figure 2b): at each level every 2x2 square becomes one pixel of four times the
channels, `depth` steps of flow follow, and after all levels but the last half of the channels
leave, as a part of z. A step (table 1), on images of h x w pixels, with its log |det|:

    actnorm    x <- s x + b, by channel                                 h w sum log |s|
    1x1 conv   x <- W x, at every pixel, W = P L (U + diag(exp(d)))     h w sum d
    coupling   (x_a, x_b) = split(x); (log s, t) = NN(x_b)              sum log s
               x_a <- s x_a + t

    paper          | here
    ---------------|-----------------------------------------------------------------------
    s, b           | exp(log_scale), bias; one 1x1 convolution does W (s x + b)
    P              | fixed; W begins as a random rotation
    L, U, log |s|  | below, above and on the diagonal of `factors`; signs of the diagonal fixed
    log s          | BOUND tanh(. / BOUND): a step scales by no more than exp(BOUND), either way
    NN             | convolutions 3x3, 1x1, 3x3 (the last begins at zero) with rectifiers between,
                   | no actnorm within
    p(z_i | h_i)   | N(0, I) for every part: it is the half x_a that leaves, and the coupling
                   | before has just given it a mean and a scale by x_b, which stays
    s, b at start  | set from a batch by `initialise`, when it is called

The maps of all steps of a level are computed at once: tiny matrices cost calls, not arithmetic.
An inverse in bfloat16 is none: do not run a Glow under autocast.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebm import EBMError
from ebm.flows import Flow, Latents
from ebm.variants.base import standard_normal

BOUND = 1.0
"""Bound of |log s| in a coupling."""

SLICE = 4096
"""Images that pass a coupling at once as all do before training: its activations are wider."""


class Glow(Flow):
    """Flow over images `shape`, [H, W] or [C, H, W], whose values may be any real numbers.

    `levels`: how often the sides are halved; `depth`: steps of flow at each; `width`: channels
    within a coupling's network. Raises EBMError where the sides cannot be halved so often.
    """

    def __init__(self, shape: tuple[int, ...], levels: int, depth: int, width: int) -> None:
        super().__init__()
        self.shape, self.dimensions = tuple(shape), math.prod(shape)
        sizes = squeezed(self.shape, levels)
        self.levels = nn.ModuleList(Level(size[0], depth, width) for size in sizes)
        self.parts = [(c // 2, h, w) for c, h, w in sizes[:-1]] + sizes[-1:]
        self.to(memory_format=torch.channels_last)

    def to_latent(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """f(v) [B, D] and log |det df / dv| [B] for v [B, *shape]."""
        h, log_det, parts = self._images(v), v.new_zeros(len(v)), []
        for level in self._levels():
            h, change = level(F.pixel_unshuffle(h, 2))
            log_det = log_det + change
            if level is not self.levels[-1]:
                part, h = h.chunk(2, 1)
                parts.append(part)
        return torch.cat([part.flatten(1) for part in [*parts, h]], 1), log_det

    def from_latent(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """f^-1(z) [B, *shape] and log |det df^-1 / dz| [B], of this map, for z [B, D]."""
        self._expect(z, (self.dimensions,))
        *parts, h = z.split([math.prod(part) for part in self.parts], 1)
        h, log_det = h.unflatten(1, self.parts[-1]), z.new_zeros(len(z))
        for level in reversed(self._levels()):
            if level is not self.levels[-1]:
                h = torch.cat([parts.pop().reshape_as(h), h], 1)
            h, change = level.inverse(h)
            h, log_det = F.pixel_shuffle(h, 2), log_det + change
        return h.reshape(len(z), *self.shape), log_det

    def log_prob(self, v: Tensor) -> Tensor:
        """log p(v) [B] in nats, normalised, for v [B, *shape]."""
        z, log_det = self.to_latent(v)
        return log_normal(z) + log_det

    def latents(self, n: int) -> Latents:
        """z ~ N(0, I), [n, D]."""
        return (standard_normal(self, n, self.dimensions),)

    def from_latents(self, *latents: Tensor) -> tuple[Tensor, Tensor]:
        """v = f^-1(z) [n, *shape] and log p(v) [n] by the same pass; both differentiable."""
        (z,) = latents
        v, log_det = self.from_latent(z)
        return v, log_normal(z) - log_det

    @torch.no_grad()
    def initialise(self, v: Tensor) -> None:
        """Set every actnorm so that over the batch v [B, *shape] each channel leaves it with mean
        0 and variance 1 (section 3.1). Once, before training: each call sets them anew."""
        h = self._images(v)
        for level in self._levels():
            h = level.initialise(F.pixel_unshuffle(h, 2)).chunk(2, 1)[1]

    def _levels(self) -> list["Level"]:
        return [cast(Level, level) for level in self.levels]

    def _images(self, v: Tensor) -> Tensor:
        """[B, *shape] as [B, C, H, W]."""
        self._expect(v, self.shape)
        return v.unsqueeze(1) if v.dim() == 3 else v

    def _expect(self, x: Tensor, shape: tuple[int, ...]) -> None:
        if x.shape[1:] != shape:
            raise EBMError(f"expected points of shape {shape}, got {tuple(x.shape[1:])}")


class Level(nn.Module):
    """`depth` steps of flow on images [B, C, H, W]; C is even."""

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int, depth: int, width: int) -> None:
        super().__init__()
        permutation, sign, factors = factored_rotations(depth, channels)
        self.register_buffer("permutation", permutation)
        self.register_buffer("sign", sign)
        self.factors = nn.Parameter(factors)
        self.log_scale = nn.Parameter(torch.zeros(depth, channels))
        self.bias = nn.Parameter(torch.zeros(depth, channels))
        self.couplings = nn.ModuleList(Coupling(channels, width) for _ in range(depth))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The steps in turn, and their log |det| [B]."""
        log_det = self.log_det(x).expand(len(x))
        for mix, coupling in zip(self.mixings(), self.couplings, strict=True):
            x, change = coupling(F.conv2d(x, *mix))
            log_det = log_det + change
        return x, log_det

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The inverses of the steps, last first, and their log |det| [B]."""
        log_det = -self.log_det(x).expand(len(x))
        for unmix, coupling in zip(self.unmixings()[::-1], self.couplings[::-1], strict=True):
            x, change = cast(Coupling, coupling).inverse(x)
            x, log_det = F.conv2d(x, *unmix), log_det + change
        return x, log_det

    def initialise(self, x: Tensor) -> Tensor:
        """Set the actnorms from a batch step by step; what leaves the last one's coupling."""
        for k, coupling in enumerate(self.couplings):
            variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
            self.log_scale[k] = -(variance + 1e-12).log() / 2
            self.bias[k] = -mean * self.log_scale[k].exp()
            mix = self.mixings()[k]
            x = torch.cat([coupling(F.conv2d(part, *mix))[0] for part in x.split(SLICE)])
        return x

    def log_det(self, x: Tensor) -> Tensor:
        """log |det| of the actnorms and 1x1 convolutions on images of the size of x: a scalar."""
        diagonal = self.factors.diagonal(dim1=1, dim2=2)
        return (self.log_scale + diagonal).sum() * math.prod(x.shape[2:])

    def mixings(self) -> list[tuple[Tensor, Tensor]]:
        """Kernel and bias of x -> W (s x + b), by step."""
        lower, upper = self.triangles()
        w = self.permutation @ lower @ upper
        scaled, bias = w * self.log_scale.exp().unsqueeze(1), w @ self.bias.unsqueeze(2)
        return kernels(scaled, bias.squeeze(2))

    def unmixings(self) -> list[tuple[Tensor, Tensor]]:
        """Kernel and bias of x -> (W^-1 x - b) / s, by step."""
        lower, upper = self.triangles()
        half = torch.linalg.solve_triangular(lower, self.permutation.mT, upper=False)
        inverse = torch.linalg.solve_triangular(upper, half, upper=True)
        scale = (-self.log_scale).exp()
        return kernels(inverse * scale.unsqueeze(2), -self.bias * scale)

    def triangles(self) -> tuple[Tensor, Tensor]:
        """L and U + diag(exp(d)), [depth, C, C]."""
        lower, upper = self.factors.tril(-1), self.factors.triu(1)
        diagonal = self.sign * self.factors.diagonal(dim1=1, dim2=2).exp()
        unit = torch.diag_embed(torch.ones_like(diagonal))
        return lower + unit, upper + torch.diag_embed(diagonal)


class Coupling(nn.Module):
    """One half of the channels, scaled and shifted by what the other says: [B, C, H, W]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels // 2, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 1)
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """s x_a + t beside x_b, and log |det| [B]."""
        a, b = x.chunk(2, 1)
        log_scale, shift = self.affine(b)
        return torch.cat([log_scale.exp() * a + shift, b], 1), log_scale.sum((1, 2, 3))

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x_a - t) / s beside x_b, and log |det| [B] of this map."""
        a, b = x.chunk(2, 1)
        log_scale, shift = self.affine(b)
        return torch.cat([(a - shift) * (-log_scale).exp(), b], 1), -log_scale.sum((1, 2, 3))

    def affine(self, b: Tensor) -> tuple[Tensor, Tensor]:
        """log s and t, each like x_b."""
        h = F.relu(self.second(F.relu(self.first(b))))
        raw, shift = self.last(h).chunk(2, 1)
        return BOUND * torch.tanh(raw / BOUND), shift


def squeezed(shape: tuple[int, ...], levels: int) -> list[tuple[int, int, int]]:
    """[C, H, W] of the images within each level: a quarter of the pixels, four times the
    channels, of which half stay for the next level."""
    if len(shape) not in (2, 3) or levels < 1 or any(side % 2**levels for side in shape[-2:]):
        raise EBMError(
            f"a Glow of {levels} levels does not fit points of shape {shape}: it needs images "
            f"[H, W] or [C, H, W] whose sides are multiples of 2^levels"
        )
    channels, height, breadth = (1, *shape) if len(shape) == 2 else shape
    sides = [(height >> k, breadth >> k) for k in range(1, levels + 1)]
    return [(channels * 2 ** (k + 2), *side) for k, side in enumerate(sides)]


def factored_rotations(count: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random orthogonal matrices P L (U + diag(sign exp(d))): P [count, size, size], the signs
    [count, size], and L, U and d in one matrix each, below, above and on its diagonal."""
    rotation = torch.linalg.qr(torch.randn(count, size, size)).Q
    permutation, lower, upper = torch.linalg.lu(rotation)
    diagonal = upper.diagonal(dim1=1, dim2=2)
    factors = lower.tril(-1) + upper.triu(1) + torch.diag_embed(diagonal.abs().log())
    return permutation, diagonal.sign(), factors


def kernels(matrices: Tensor, biases: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Weights [C, C, 1, 1] and biases [C] of 1x1 convolutions, from [depth, C, C] and
    [depth, C]."""
    weights = matrices[..., None, None].unbind(0)
    return list(zip(weights, biases.unbind(0), strict=True))


def log_normal(z: Tensor) -> Tensor:
    """log N(z; 0, I) [B] for z [B, D]."""
    return -(z.square().sum(1) + z.shape[1] * math.log(2 * math.pi)) / 2
