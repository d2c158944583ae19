"""What images are measured with: a network's features, and those of the data set's own splits.

Distances between sets of images are distances between their features. A reference folder holds
`config.json`, what builds the network again, and, unless that is `coordinates`,
`weights.safetensors`, `statistics.safetensors` (`train` and `test`: features [n, D] of the first
KEPT images; `<split>_mean` [D] and `<split>_covariance` [D, D] of all of them) and `metrics.json`:

    accuracy            share of the test split that the classifier assigns to its class, or to
                        its mode if it is a stack; then `part_accuracy` of single images
    frechet_distance    between the features of all of train and all of test: its floor
    kernel_distance     the same of the features that are kept
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

from ebm import EBMError, metrics
from ebm.data import Prepared, mode, unit
from ebm.schema import ClassifierReference, InceptionReference
from ebm.variants.base import descend

log = logging.getLogger(__name__)

KEPT = 10000
"""Features kept of a split, for metrics that look at single points."""

BATCH = 256
"""Images that go through the network at once."""

SIDE = 16
"""Pixels to a side of images that are compared by their coordinates."""

FEATURES = 64
"""Number of features of a classifier."""

WARP = 0.2
"""How far the training images of a classifier are warped."""


class Network(nn.Module):
    """Points [N, *] to features [N, D]. Where there is nothing to learn: vectors as they are,
    images as no more than SIDE x SIDE means of their pixels, as distances take D^3 time."""

    def features(self, x: Tensor) -> Tensor:
        if x.dim() > 2 and max(x.shape[-2:]) > SIDE:
            x = F.adaptive_avg_pool2d(_channels(x), SIDE)
        return x.flatten(1)


class Classifier(Network):
    """Convolutions of `width`, twice and four times the width, the last two of stride 2; a linear
    layer of FEATURES units; all of them normalised over the batch and rectified; a linear layer.

    `shape` of one image: [H, W] or [C, H, W].
    """

    def __init__(self, shape: tuple[int, ...], classes: int, width: int) -> None:
        super().__init__()
        channels, height, side = (1, *shape)[-3:]
        last = 4 * width * -(-height // 4) * -(-side // 4)
        self.body = nn.Sequential(
            *_convolution(channels, width, 1),
            *_convolution(width, 2 * width, 2),
            *_convolution(2 * width, 4 * width, 2),
            nn.Flatten(),
            nn.Linear(last, FEATURES, bias=False),
            nn.BatchNorm1d(FEATURES, affine=False),  # so that each feature counts alike
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, classes)

    def features(self, x: Tensor) -> Tensor:
        """The penultimate layer of images [N, *shape] in [0, 1]: [N, FEATURES]."""
        return self.body(_channels(x).contiguous(memory_format=torch.channels_last))

    def logits(self, x: Tensor) -> Tensor:
        """Unnormalised log-probabilities of the classes: [N, classes]."""
        return self.head(self.features(x))


class Parts(Network):
    """A classifier of single images, looking at each channel of a stack [N, parts, H, W]."""

    def __init__(self, shape: tuple[int, ...], classes: int, width: int) -> None:
        super().__init__()
        self.classifier = Classifier(shape, classes, width)

    def features(self, x: Tensor) -> Tensor:
        """Features of the parts, one after another: [N, parts * FEATURES]."""
        return self.classifier.features(x.flatten(0, 1)).view(len(x), -1)

    def head(self, features: Tensor) -> Tensor:
        """Logits of the classes of each part by its features: [N, parts, classes]."""
        logits = self.classifier.head(features.view(-1, FEATURES))
        return logits.view(len(features), -1, logits.shape[1])


class Inception(Network):
    """Inception v3 as torchvision has it, trained on ImageNet: features [N, 2048] after the last
    pooling, of images resized to 299 x 299, grey ones with three equal channels.

    These are not the weights that published FIDs are computed with: compare within this project.
    """

    def __init__(self) -> None:
        from torchvision.models import inception_v3

        super().__init__()
        self.network = inception_v3(weights=None, aux_logits=False, init_weights=False)
        self.network.fc = nn.Identity()

    def download(self) -> "Inception":
        """Itself, with the weights that torchvision downloads; EBMError says why not."""
        from torchvision.models import Inception_V3_Weights

        try:
            weights = Inception_V3_Weights.IMAGENET1K_V1.get_state_dict()
        except (OSError, RuntimeError) as error:
            problem = f"torchvision's weights cannot be had ({error})"
            raise EBMError(f"reference.kind = 'inception': {problem}; use 'classifier'") from None
        self.network.load_state_dict(
            {k: w for k, w in weights.items() if not k.startswith(("AuxLogits.", "fc."))}
        )
        return self

    def features(self, x: Tensor) -> Tensor:
        x = _channels(x)
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        x = F.interpolate(x, (299, 299), mode="bilinear", antialias=True)
        return self.network(2 * x - 1)


NETWORKS = {
    "coordinates": Network,
    "classifier": Classifier,
    "parts": Parts,
    "inception": Inception,
}


def _convolution(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    layer = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]


def _channels(x: Tensor) -> Tensor:
    return x.unsqueeze(1) if x.dim() == 3 else x


@dataclass(frozen=True)
class Seen:
    """What a network sees in points: `features` [N, D]; a classifier unnormalised
    log-probabilities of the classes too, `logits` [N, classes], or [N, parts, classes] of those of
    each part of a stack."""

    features: Tensor
    logits: Tensor | None

    @property
    def classes(self) -> Tensor | None:
        """The most likely class of each image [N], of a stack its mode, which is the number whose
        digits are the classes of the parts."""
        if self.logits is None:
            return None
        found = self.logits.argmax(-1)
        return found if found.dim() == 1 else mode(found)


@dataclass(frozen=True)
class Reference:
    """A network, the `config` that builds it, and what it says of a data set's own splits."""

    network: Network
    config: dict[str, Any]
    statistics: dict[str, Tensor]
    metrics: dict[str, float]

    @property
    def classifies(self) -> bool:
        """Whether the network is a classifier."""
        return isinstance(self.network, Classifier | Parts)

    def see(self, x: Tensor) -> Seen:
        """What the network sees in points [N, *] that lie where it lies, or in bytes that
        `ebm.data.unit` makes points of, by one look at each."""
        features = metrics.in_batches(lambda part: self.network.features(unit(part)), x, BATCH)
        if not isinstance(self.network, Classifier | Parts):
            return Seen(features, None)
        return Seen(features, metrics.in_batches(self.network.head, features, BATCH))


def make(
    settings: ClassifierReference | InceptionReference, prepared: Prepared, device: torch.device
) -> Reference:
    """The reference that `settings` describe, on `device`; draws from torch's global
    generator."""
    if settings.kind == "inception":
        found = measure(Inception().download(), {"kind": "inception"}, prepared, device)
    else:
        found = measure(*_trained(settings, prepared, device), prepared, device)
    found.metrics.update(_floors(found, prepared, device))
    return found


def _trained(
    settings: ClassifierReference, prepared: Prepared, device: torch.device
) -> tuple[Network, dict[str, Any]]:
    """A classifier of the training split, of stacks one of their parts, and the config that builds
    it."""
    stacked = "train_parts" in prepared.tensors
    split = "train_parts" if stacked else "train"
    images, labels = prepared.points(split), prepared.labels(split)
    if labels is None:
        raise EBMError("reference.kind = 'classifier': the data have no labels; use 'coordinates'")
    if (classes := int(labels.max()) + 1) < 2:
        raise EBMError("reference.kind = 'classifier': the data have one class; use 'coordinates'")
    built: dict[str, Any] = {
        "shape": list(images.shape[1:]),
        "classes": classes,
        "width": settings.width,
    }
    network = (Parts if stacked else Classifier)(**built).to(device)
    classifier = network.classifier if isinstance(network, Parts) else network
    options = settings.model_dump(include={"epochs", "batch_size", "learning_rate"})
    train(classifier, images.to(device), labels.to(device), **options)
    return network, {"kind": "parts" if stacked else "classifier", **built}


def train(
    network: Classifier,
    images: Tensor,
    labels: Tensor,
    epochs: int,
    batch_size: int,
    learning_rate: float,
) -> None:
    """Fit `network` to the `labels` [N] of `images` [N, *] by Adam; the learning rate rises to
    `learning_rate` and falls to nothing in one cycle (Smith & Topin 2018). No image comes twice
    alike: a classifier that knows them by heart sees them otherwise than images that are new to
    it, and nothing could be held against them."""
    optimizer = torch.optim.Adam(network.parameters(), learning_rate)
    size = min(batch_size, len(images))
    steps = len(images) // size
    schedule = OneCycleLR(optimizer, learning_rate, total_steps=epochs * steps)
    network.train()
    for _ in range(epochs):
        order = torch.randperm(len(images)).to(images.device)
        for rows in order[: steps * size].view(steps, size):
            loss = F.cross_entropy(network.logits(warped(images[rows], WARP)), labels[rows])
            descend(optimizer, loss)
            schedule.step()


def warped(images: Tensor, reach: float) -> Tensor:
    """Images [N, H, W] or [N, C, H, W], each under an affine map of its own, whose six numbers are
    within `reach` of the identity's, at random; what comes in from outside is 0."""
    x = _channels(images)
    identity = torch.eye(2, 3, device=x.device)
    theta = identity + reach * (2 * torch.rand(len(x), 2, 3, device=x.device) - 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False).view(images.shape)


def measure(
    network: Network, config: dict[str, Any], prepared: Prepared, device: torch.device
) -> Reference:
    """The reference of `network`, which `config` builds, with the statistics of train and test
    split, on `device`."""
    found = Reference(network.to(device).eval(), config, {}, {})
    for split in ("train", "test"):
        features = found.see(prepared.tensors[split].to(device)).features
        mean, covariance = metrics.moments(features)
        moments = {f"{split}_mean": mean, f"{split}_covariance": covariance}
        found.statistics.update({split: features[:KEPT].clone(), **moments})
    return found


def _floors(found: Reference, prepared: Prepared, device: torch.device) -> dict[str, float]:
    """What the data set's own splits score by what was `found`."""
    of = found.statistics
    floors = {
        "frechet_distance": metrics.gaussian_frechet_distance(
            of["train_mean"], of["train_covariance"], of["test_mean"], of["test_covariance"]
        ),
        "kernel_distance": metrics.kernel_distance(of["train"], of["test"]),
    }
    labels, test = prepared.labels("test"), prepared.tensors["test"].to(device)
    classes = found.see(test).classes if found.classifies else None
    if labels is not None and classes is not None:
        floors["accuracy"] = (classes == labels.to(device)).double().mean().item()
        _warn_of_ignorance(floors["accuracy"], labels)
    if isinstance(found.network, Parts):
        singles, truth = (prepared.tensors[f"test_parts{end}"] for end in ("", "_labels"))
        judge = found.network.classifier
        guess = metrics.in_batches(lambda x: judge.logits(unit(x)), singles.to(device), BATCH)
        floors["part_accuracy"] = (guess.argmax(1) == truth.to(device)).double().mean().item()
    return floors


def _warn_of_ignorance(accuracy: float, labels: Tensor) -> None:
    """A warning if a classifier is nearer to one that always names the most frequent class of the
    test `labels` [N] than to one that is always right."""
    blind = labels.bincount().max().item() / len(labels)
    if accuracy < (1 + blind) / 2:
        told = f"right on {accuracy:.1%} of the test images, of which {blind:.1%} are of one class"
        advice = "distances by it mean little; more epochs or smaller batches may teach it more"
        log.warning("the classifier is %s: %s", told, advice)


def write(reference: Reference, folder: Path) -> None:
    """Write the files of `reference` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"weights": reference.network.state_dict(), "statistics": reference.statistics}
    for name, content in tensors.items():
        (folder / f"{name}.safetensors").write_bytes(save(content))
    for name, content in (("config", reference.config), ("metrics", reference.metrics)):
        text = json.dumps(content, indent=2) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def read(folder: Path, prepared: Prepared, device: torch.device) -> Reference:
    """The reference in `folder`, on `device`; that of coordinates is made of `prepared`. EBMError
    names the folder if it cannot be used."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        network = NETWORKS[config["kind"]](**{k: v for k, v in config.items() if k != "kind"})
        if config["kind"] == "coordinates":
            return measure(network, config, prepared, device)
        network.load_state_dict(load_file(folder / "weights.safetensors"))
        kept = load_file(folder / "statistics.safetensors")
        numbers = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, RuntimeError) as error:
        problem = " ".join(repr(error).split())[:200]
        raise EBMError(f"{folder}: unusable ({problem}); run its reference stage again") from None
    statistics = {name: tensor.to(device) for name, tensor in kept.items()}
    return Reference(network.to(device).eval(), config, statistics, numbers)
