"""What a trained energy does with images beyond drawing them, as pictures: `ebm.tasks` on a few
images of the test split."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ebm import figures, tasks
from ebm.figures import Drawing
from ebm.samplers import milestones

ROWS = 8
NOISE = 0.3
"""Standard deviation of what is added to images that are to be denoised."""

Draw = Callable[[str, str, str, Drawing], None]
"""Called as draw(name, title, caption, drawing)."""


def demonstrate(
    model: tasks.Chained, test: Tensor, labels: Tensor | None, steps: int, draw: Draw
) -> None:
    """Complete and denoise images [N, *] of the test split with `steps` Langevin steps; with a
    conditional model also carry them from class to class and compose classes."""
    x, y = (test[:ROWS], None) if labels is None else _one_of_each(test, labels)
    known = torch.zeros(x.shape[-2:], dtype=torch.bool, device=x.device)
    known[: x.shape[-2] // 2] = True
    frames = tasks.complete(model, x, known, y, steps)
    given = "The upper half is given" if y is None else "The upper half and the class are given"
    caption = f"{given}; the rest begins as noise, and its chains follow the energy of the whole."
    draw("completion", "Completion", caption, _strips(x, frames, steps))
    noisy = (x + NOISE * torch.randn_like(x)).clamp(*model.bounds)
    frames = tasks.denoise(model, noisy, y, steps)
    caption = f"Test images with Gaussian noise of standard deviation {NOISE}, then their chains"
    caption += "." if y is None else ", to which the class is given."
    draw("denoising", "Denoising", caption, _strips(x, frames, steps))
    if y is not None:
        _demonstrate_classes(model, x, y, steps, draw)


def _demonstrate_classes(
    model: tasks.Chained, x: Tensor, y: Tensor, steps: int, draw: Draw
) -> None:
    target = (y + 1) % model.classes
    words = ", ".join(f"{a} to {b}" for a, b in zip(y.tolist(), target.tolist(), strict=True))
    caption = f"Chains that start at a test image of one class and follow the next one's: {words}."
    frames = tasks.transfer(model, x, target, steps)
    draw("transfer", "From class to class", caption, _strips(x, frames, steps))
    words = ", ".join(f"{a} and {b}" for a, b in zip(y.tolist(), target.tolist(), strict=True))
    caption = f"From noise down the sum of the energies of two classes, row by row: {words}."
    frames = tasks.compose(model, [y, target], steps)
    chain = figures.chain_strip(_array(frames), milestones(steps))
    draw("composition", "Composition of two classes", caption, chain)


def animate(chain: Tensor) -> Drawing:
    """Chains [n, T, *] of images as an animation, all side by side."""
    return [figures.image_grid(_array(frame), columns=8) for frame in chain.transpose(0, 1)]


def _one_of_each(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The first image of each class, up to ROWS, and its class."""
    rows = [int((labels == k).nonzero()[0]) for k in labels.unique().tolist()[:ROWS]]
    return x[rows], labels[rows]


def _strips(truth: Tensor, frames: Tensor, steps: int) -> Drawing:
    """The true images [n, *] beside what became of them [n, T, *]."""
    first, *others = milestones(steps)
    titles = ["test", f"step {first}", *(f"{n:,}" for n in others)]
    return figures.strips(_array(torch.cat([truth.unsqueeze(1), frames], 1)), titles)


def _array(x: Tensor) -> Any:
    return x.cpu().numpy()
