"""Layers only: networks that know neither energy nor objective."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from ebm import EBMError


def mlp(sizes: Sequence[int], activation: nn.Module) -> nn.Sequential:
    """Linear layers of the given `sizes` (input first) with `activation` between them."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), activation]
    return nn.Sequential(*layers[:-1])


KERNEL, STRIDE, PADDING = 5, 2, 2
"""Geometry of every convolution in an `encoder` and a `decoder`."""

Kind = Literal["mlp", "conv"]


def encoder(
    kind: Kind, shape: tuple[int, ...], widths: Sequence[int], outputs: int
) -> nn.Sequential:
    """Points [B, *shape] to [B, outputs]: hidden layers of `widths`, or convolutions of stride 2
    with so many channels; leaky rectifiers; images ([H, W] or [C, H, W] in [0, 1]) are mapped to
    [-1, 1] first. No normalisation: what comes of a point depends on no other point. The last
    layer computes in the precision of its weights, whatever autocast says: an energy of size 100
    would be rounded to steps of 0.5."""
    first: list[nn.Module] = [Signed()] if len(shape) > 1 else []
    if kind == "mlp":
        sizes = [math.prod(shape), *widths]
        body = [nn.Flatten(), *_rectified([nn.Linear(i, o) for i, o in pairwise(sizes)])]
        return nn.Sequential(*first, *body, Head(sizes[-1], outputs))
    channels, height, breadth = image_shape(shape)
    layers = [nn.Conv2d(i, o, KERNEL, STRIDE, PADDING) for i, o in pairwise([channels, *widths])]
    features = widths[-1] * halved(height, len(widths)) * halved(breadth, len(widths))
    return nn.Sequential(*first, *_rectified(layers), nn.Flatten(), Head(features, outputs))


def _rectified(layers: Sequence[nn.Module]) -> list[nn.Module]:
    return [module for layer in layers for module in (layer, nn.LeakyReLU(0.2))]


def decoder(
    kind: Kind, latent: int, shape: tuple[int, ...], widths: Sequence[int]
) -> nn.Sequential:
    """Latents [B, latent] to points [B, *shape]: hidden layers of `widths`, or transposed
    convolutions of stride 2 from so many channels, each normalised over the batch; rectifiers;
    images end in [0, 1]. The mirror image of an encoder whose widths are reversed."""
    last: list[nn.Module] = [nn.Sigmoid()] if len(shape) > 1 else []
    if kind == "mlp":
        body = mlp([latent, *widths, math.prod(shape)], nn.ReLU())
        return nn.Sequential(body, *last, nn.Unflatten(1, shape))
    channels, height, breadth = image_shape(shape)
    sizes = [(halved(height, k), halved(breadth, k)) for k in range(len(widths), -1, -1)]
    start = (widths[0], *sizes[0])
    layers: list[nn.Module] = [nn.Linear(latent, math.prod(start)), nn.Unflatten(1, start)]
    for (i, o), (high, broad) in zip(pairwise([*widths, channels]), sizes[1:], strict=True):
        extra = 1 - high % 2, 1 - broad % 2  # n becomes 2 n - 1, or 2 n
        layers += [
            BatchNorm(i),
            nn.ReLU(),
            nn.ConvTranspose2d(i, o, KERNEL, STRIDE, PADDING, output_padding=extra),
        ]
    return nn.Sequential(*layers, *last, nn.Flatten(), nn.Unflatten(1, shape))


class BatchNorm(nn.BatchNorm2d):
    """Channels of [B, C, H, W] over the batch and the image, in training by what these are."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:
            needed = "two rows for each update and process"
            why = (
                "images that layers of stride 2 have made one pixel are normalised over the batch"
            )
            raise EBMError(f"train.batch_size: expected {needed}: {why}")
        return super().forward(x)


class Signed(nn.Module):
    """Images in [0, 1], [B, H, W] or [B, C, H, W], as [B, C, H, W] in [-1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * (x.unsqueeze(1) if x.dim() == 3 else x) - 1


class Head(nn.Linear):
    """A linear layer that computes in the precision of its weights even under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class Joint(nn.Module):
    """A number for every pair of a point [B, *shape] and a latent [B, latent]: [B].

    `mlp`: hidden layers of `widths` over both side by side. `conv`: an encoder of the point to as
    many numbers as the latent has, then one hidden layer over both.
    """

    def __init__(
        self, kind: Kind, shape: tuple[int, ...], latent: int, widths: Sequence[int]
    ) -> None:
        super().__init__()
        conv = kind == "conv"
        self.trunk = encoder(kind, shape, widths, latent) if conv else nn.Flatten()
        sizes = [latent, widths[-1]] if conv else [math.prod(shape), *widths]
        self.head = encoder("mlp", (sizes[0] + latent,), sizes[1:], 1)

    def features(self, x: Tensor) -> Tensor:
        """What is left of points [B, *shape] before they meet a latent: [B, D]."""
        return self.trunk(x)

    def pair(self, features: Tensor, z: Tensor) -> Tensor:
        """The number [B] of `features` [B, D] with latents [B, latent]."""
        return self.head(torch.cat([features, z], 1)).squeeze(1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.pair(self.features(x), z)


def image_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Channels, height and breadth of [H, W] or [C, H, W]; EBMError for what is no image."""
    if len(shape) not in (2, 3):
        raise EBMError(f"network 'conv' does not fit points of shape {shape}; use 'mlp'")
    channels, height, breadth = (1, *shape)[-3:]
    return channels, height, breadth


def halved(size: int, times: int) -> int:
    """A side after so many convolutions of stride 2."""
    return -(-size // STRIDE**times)


class Modulation(nn.Module):
    """A gain and a bias for every channel, by class: x [B, C, *] and classes y [B], or None where
    there is but one, to [B, C, *]."""

    def __init__(self, channels: int, classes: int, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((max(classes, 1), channels), gain))
        self.bias = nn.Parameter(torch.zeros(max(classes, 1), channels))

    def forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        gain, bias = (self.gain, self.bias) if y is None else (self.gain[y], self.bias[y])
        shape = (*gain.shape, *[1] * (x.dim() - 2))
        return torch.addcmul(bias.view(shape), gain.view(shape), x)


class Layer(nn.Module):
    """A linear or convolutional layer without bias, a modulation, a swish."""

    def __init__(self, layer: nn.Module, channels: int, classes: int) -> None:
        super().__init__()
        self.layer, self.modulation = layer, Modulation(channels, classes)

    def forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        return F.silu(self.modulation(self.layer(x), y))


class FourierFeatures(nn.Module):
    """Vectors x [B, D] to [x, sin(x W), cos(x W)] [B, D + 2 count] with a fixed W ~ N(0,
    bandwidth^2): what lets a network learn sharp functions of few variables (Tancik et al. 2020,
    arXiv:2006.10739)."""

    frequencies: Tensor

    def __init__(self, dimensions: int, count: int, bandwidth: float) -> None:
        super().__init__()
        self.register_buffer("frequencies", bandwidth * torch.randn(dimensions, count))
        self.outputs = dimensions + 2 * count

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # a phase of 50 is rounded to 0.25
            phase = x.to(self.frequencies.dtype) @ self.frequencies
        return torch.cat([x, phase.sin(), phase.cos()], 1)


def vector_size(shape: tuple[int, ...]) -> int:
    """D of points [D], which Fourier features are of; EBMError of other points."""
    if len(shape) != 1:
        raise EBMError(f"network 'fourier' does not fit points of shape {shape}; use 'conv'")
    return shape[0]


class Residual(nn.Module):
    """Two 3x3 convolutions beside a skip connection, then halving if `down` (the block of Du &
    Mordatch 2019; its second convolution begins at zero, by its gain)."""

    def __init__(self, channels: int, out: int, classes: int, down: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.second = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.skip = None if channels == out else nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.inner, self.outer = Modulation(out, classes), Modulation(out, classes, gain=0.0)
        self.down = down

    def forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        h = F.leaky_relu(self.inner(self.first(x), y), 0.2)
        x = (x if self.skip is None else self.skip(x)) + self.outer(self.second(h), y)
        return F.leaky_relu(F.avg_pool2d(x, 2) if self.down else x, 0.2)


class Scalar(nn.Module):
    """A number for every point [B, *], of class y [B] where there are classes: shape [B]; of
    several `outputs` [B, outputs].

    `blocks` take (x, y); the last one's output is summed over the image if `pool`, else flattened,
    and mapped linearly to the number. `images`: points are [B, C, H, W], not vectors.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        features: int,
        images: bool,
        pool: bool = False,
        outputs: int = 1,
    ) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(blocks), Head(features, outputs)
        self.images, self.pool = images, pool

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, y)
        return self.head(x.sum((2, 3)) if self.pool else x.flatten(1)).squeeze(1)

    def of_points(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The scalar [B] of points as data sets have them: vectors [B, D], grey images [B, H, W]
        or images [B, C, H, W]."""
        if not self.images:
            return self(x.flatten(1), y)
        x = x.view(len(x), -1, *x.shape[-2:])
        return self(x.contiguous(memory_format=torch.channels_last), y)


def scalar(
    kind: str, shape: tuple[int, ...], classes: int = 0, outputs: int = 1, **sizes: Any
) -> Scalar:
    """The `Scalar` of a kind (`mlp`, `fourier`, `conv`, `strided`, `resnet`) and its `sizes` for
    points of `shape`: vectors [D], grey images [H, W] or images [C, H, W]."""
    if kind == "mlp":
        return scalar_mlp(math.prod(shape), classes=classes, outputs=outputs, **sizes)
    if kind == "fourier":
        return scalar_fourier(vector_size(shape), classes=classes, outputs=outputs, **sizes)
    depth = sizes["depth"]
    if len(shape) < 2 or min(shape[-2:]) >> depth == 0:
        raise EBMError(f"network {kind!r} of depth {depth} does not fit points of shape {shape}")
    make = {"conv": scalar_conv, "strided": scalar_strided, "resnet": scalar_resnet}[kind]
    return make(image_shape(shape), classes=classes, outputs=outputs, **sizes)


def scalar_mlp(dimensions: int, width: int, depth: int, classes: int, outputs: int = 1) -> Scalar:
    """`depth` hidden layers of `width` units over vectors [B, dimensions]."""
    sizes = [dimensions, *[width] * depth]
    layers = [Layer(nn.Linear(i, o, bias=False), o, classes) for i, o in pairwise(sizes)]
    return Scalar(layers, width, images=False, outputs=outputs)


def scalar_fourier(
    dimensions: int,
    width: int,
    depth: int,
    frequencies: int,
    bandwidth: float,
    classes: int,
    outputs: int = 1,
) -> Scalar:
    """A `scalar` network over `FourierFeatures` of so many frequencies."""
    features = FourierFeatures(dimensions, frequencies, bandwidth)
    mlp = scalar_mlp(features.outputs, width, depth, classes, outputs)
    return Scalar([features, *mlp.blocks], width, images=False, outputs=outputs)


def scalar_conv(
    shape: tuple[int, int, int], width: int, depth: int, classes: int, outputs: int = 1
) -> Scalar:
    """Over images [B, C, H, W]: a 3x3 convolution to `width` channels, then `depth` 4x4
    convolutions of stride 2, all but the first doubling the channels. Width 64 and depth 3 are
    the MNIST network of the IGEBM code, but for its hidden layer."""
    channels, height, breadth = shape
    layers = [Layer(nn.Conv2d(channels, width, 3, padding=1, bias=False), width, classes)]
    sizes = [width, *(width * 2**k for k in range(depth))]
    for i, o in pairwise(sizes):
        layers.append(Layer(nn.Conv2d(i, o, 4, stride=2, padding=1, bias=False), o, classes))
    features = sizes[-1] * (height >> depth) * (breadth >> depth)
    return Scalar(layers, features, images=True, outputs=outputs)


def scalar_strided(
    shape: tuple[int, int, int], width: int, depth: int, classes: int, outputs: int = 1
) -> Scalar:
    """Over images [B, C, H, W]: `depth` convolutions of stride 2, the first 5x5 to `width`
    channels, the others 3x3, each doubling the channels. A third of the arithmetic of
    `scalar_conv`, and nothing large to keep: the network for 28x28 images on a CPU."""
    channels, height, breadth = shape
    sizes = [channels, *(width * 2**k for k in range(depth))]
    layers: list[Layer] = []
    for i, o in pairwise(sizes):
        kernel = 3 if layers else 5
        layer = nn.Conv2d(i, o, kernel, stride=2, padding=kernel // 2, bias=False)
        layers.append(Layer(layer, o, classes))
        height, breadth = (height + 1) // 2, (breadth + 1) // 2
    return Scalar(layers, sizes[-1] * height * breadth, images=True, outputs=outputs)


def scalar_resnet(
    shape: tuple[int, int, int], width: int, depth: int, classes: int, outputs: int = 1
) -> Scalar:
    """Over images [B, C, H, W]: a stem, then `depth` stages of two residual blocks, the first of
    which halves the image; the second stage doubles the channels. Width 128 and depth 3
    are the CIFAR-10 network of the IGEBM code."""
    blocks: list[nn.Module] = [
        Layer(nn.Conv2d(shape[0], width, 3, padding=1, bias=False), width, classes)
    ]
    sizes = [width, *(min(width * 2**k, 2 * width) for k in range(depth))]
    for i, o in pairwise(sizes):
        blocks += [Residual(i, o, classes, down=True), Residual(o, o, classes, down=False)]
    return Scalar(blocks, sizes[-1], images=True, pool=True, outputs=outputs)


def normalise_spectrally(network: Scalar) -> Scalar:
    """Divide every weight of the blocks by its largest singular value, as a matrix of one row for
    each output (Miyato et al. 2018), kept up by one power iteration whenever it is computed in
    training. Use within `torch.nn.utils.parametrize.cached` for one iteration a training step."""
    for module in network.blocks.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            spectral_norm(module)
    return network
