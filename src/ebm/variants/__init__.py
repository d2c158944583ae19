"""The registry of variants: file -> class. A variant is imported only where it is asked for, so
that a stage depends on its own variant and on no other."""

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebm import EBMError

if TYPE_CHECKING:
    from ebm.variants.base import EBM

VARIANTS = {
    "bigan": "BiGAN",
    "dagmm": "DAGMM",
    "dsebm": "DSEBM",
    "fce": "FCE",
    "flow": "NormalisingFlow",
    "igebm": "IGEBM",
    "kernel_pca": "KernelPCA",
    "meg": "MEG",
    "nce": "NCE",
    "one_class_svm": "OneClassSVM",
    "rbm": "RBM",
    "vae": "VAE",
    "wgan_gp": "WGANGP",
}


def build(
    variant: str,
    shape: tuple[int, ...],
    model: dict[str, Any],
    ensemble: dict[str, Any] | None = None,
) -> "EBM":
    """A fresh model: `variant` for points of `shape` (no batch axis) with the settings `model`, or
    an `ensemble` of such models."""
    from ebm.ensemble import Ensemble

    name = VARIANTS[variant]
    kind = getattr(import_module(f"ebm.variants.{variant}"), name)
    return Ensemble(lambda: kind(shape, **model), **ensemble) if ensemble else kind(shape, **model)


def load(weights: Path, config: Path) -> "EBM":
    """A trained model from its safetensors file and the configuration beside it, in eval mode.

    Raises EBMError naming the file that is missing, damaged or does not fit the other.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        settings = json.loads(Path(config).read_text(encoding="utf-8"))
        shape, ensemble = tuple(settings["shape"]), settings.get("ensemble")
        model = build(settings["variant"], shape, settings["model"], ensemble)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EBMError(f"{config}: not a usable model configuration ({error!r})") from None
    try:
        model.load_state_dict(load_file(weights))
    except (OSError, SafetensorError, RuntimeError) as error:
        detail = " ".join(str(error).split())[:200]
        raise EBMError(f"{weights}: not the weights that {config} describes ({detail})") from None
    return model.eval()
