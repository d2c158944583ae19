"""The registry of variants: file -> class. A variant is imported only where it is asked for, so
that a stage depends on its own variant and on no other."""

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebm import EBMError

if TYPE_CHECKING:
    from ebm.variants.base import EBM

VARIANTS = {"igebm": "IGEBM", "meg": "MEG", "rbm": "RBM"}


def build(variant: str, shape: tuple[int, ...], model: dict[str, Any]) -> "EBM":
    """A fresh model: `variant` for points of `shape` (no batch axis) with the settings `model`."""
    return getattr(import_module(f"ebm.variants.{variant}"), VARIANTS[variant])(shape, **model)


def load(weights: Path, config: Path) -> "EBM":
    """A trained model from its safetensors file and the configuration beside it, in eval mode.

    Raises EBMError naming the file that is missing, damaged or does not fit the other.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        settings = json.loads(Path(config).read_text(encoding="utf-8"))
        model = build(settings["variant"], tuple(settings["shape"]), settings["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EBMError(f"{config}: not a usable model configuration ({error!r})") from None
    try:
        model.load_state_dict(load_file(weights))
    except (OSError, SafetensorError, RuntimeError) as error:
        detail = " ".join(str(error).split())[:200]
        raise EBMError(f"{weights}: not the weights that {config} describes ({detail})") from None
    return model.eval()
