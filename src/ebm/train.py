"""The one training loop: steps, seeds, checkpoints and the divergence watch, for any variant.

Every draw is a function of where a run is: the order of the rows of (seed, restarts, epoch), the
noise and the chains of (seed, restarts, step). A run that is killed at any moment and started
again therefore ends with the same weights, bit for bit. Over several processes weights agree up to
rounding, or, where each draws on its own, are as good (`ebm.parallel`).
"""

import logging
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ebm import EBMError, parallel, seeds
from ebm.checkpoint import Checkpoints
from ebm.data import unit
from ebm.samplers import draw
from ebm.variants.base import EBM

log = logging.getLogger(__name__)

Logs = dict[str, float]
Listener = Callable[[int, int, Logs], None]
"""Called as listener(step, restarts, scalars) every `log_every` steps."""


class DivergenceError(EBMError):
    """Training left the limits of its watch more often than it may go back."""


@dataclass
class Progress:
    """How far a training has come: `history` is one row of scalars every `log_every` steps."""

    step: int = 0
    restarts: int = 0
    seconds: float = 0.0
    history: list[Logs] = field(default_factory=list)


@dataclass(frozen=True)
class Watch:
    """A scalar that is not finite, or whose absolute value exceeds its limit, is divergence."""

    limits: Mapping[str, float]
    restarts: int

    def check(self, logged: Collection[str]) -> None:
        """EBMError if a limit is one of a scalar that is not among the `logged`."""
        for name in self.limits:
            if name not in logged:
                known = ", ".join(logged)
                raise EBMError(f"train.watch.limits: unknown scalar {name!r}; logged: {known}")

    def complaint(self, scalars: Logs) -> str | None:
        """The first scalar that is out of bounds, in words; None if all is well."""
        for name, value in scalars.items():
            if not math.isfinite(value):
                return f"{name} is {value}"
            if abs(value) > self.limits.get(name, math.inf):
                return f"|{name}| = {abs(value):.4g} exceeds its limit {self.limits[name]:.4g}"
        return None


class Batches:
    """Row indices of the batch of a step: each epoch is a fresh permutation of all rows, drawn
    from (seed, restarts, epoch), cut into whole batches."""

    def __init__(self, rows: int, size: int, seed: int, device: torch.device) -> None:
        self.rows, self.size, self.seed, self.device = rows, size, seed, device
        self.per_epoch = rows // size
        self._drawn_for, self._order = (-1, 0), torch.empty(0)

    def __call__(self, step: int, restarts: int = 0) -> Tensor:
        epoch, position = divmod(step, self.per_epoch)
        if self._drawn_for != (epoch, restarts):
            again = [restarts] if restarts else []  # as if there were none, until there is one
            seed = seeds.mix("order", self.seed, epoch, *again)
            generator = torch.Generator().manual_seed(seed)
            self._order = torch.randperm(self.rows, generator=generator).to(self.device)
            self._drawn_for = (epoch, restarts)
        return self._order[position * self.size : (position + 1) * self.size]


def fit(
    model: EBM,
    data: Tensor,
    labels: Tensor | None = None,
    greys: Tensor | None = None,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    log_every: int,
    checkpoint_every: int,
    cooldown: float,
    watch: Watch,
    checkpoints: Checkpoints,
    listener: Listener = lambda step, restarts, scalars: None,
) -> Progress:
    """Train `model` on the rows of `data` [N, *], which lies on the model's device, for `steps`;
    a conditional one with their `labels` [N]. Where there are `greys` [N, *], a step sees bits
    drawn anew from them; what a model looks at once, or keeps, is the data.

    A model that is fitted to all rows at once is left as `initialise` made it by `steps` of 0.
    Resumes from `checkpoints` where there are any; the last is of the end. The learning rates fall
    linearly to zero over the last share `cooldown` of the steps. On divergence (see Watch)
    training goes back to the older of the kept checkpoints, because the newer may already carry
    the trouble, and on with rows in another order and fresh noise. Raises DivergenceError when
    that has happened more than `watch.restarts` times.

    Processes that train together call this alike, each with all rows; the first of them keeps
    checkpoints and is the only one to call the listener.
    """
    rates = [group["lr"] for o in model.optimizers.values() for group in o.param_groups]
    parallel.share(batch_size, "train.batch_size")
    if steps and batch_size > len(data):
        raise EBMError(
            f"train.batch_size = {batch_size} is more than the {len(data)} training rows"
        )
    batches = Batches(len(data), batch_size, seed, data.device)
    progress = _resume(model, checkpoints) or _begin(model, data, labels, checkpoints)
    model.train()
    window: list[dict[str, Tensor]] = []
    first = parallel.rank() == 0
    started = time.monotonic() - progress.seconds
    hidden = not first or None  # None: where there is no terminal
    bar = tqdm(total=steps, initial=progress.step, disable=hidden, dynamic_ncols=True)
    with bar, parallel.shards(model):
        while progress.step < steps:
            seeds.seed("step", seed, progress.restarts, progress.step)
            _set_rates(model, rates, _rate_factor(progress.step, steps, cooldown))
            rows = parallel.mine(batches(progress.step, progress.restarts))
            y = None if labels is None else labels[rows]
            with parallel.same_draws():
                x = unit(data[rows]) if greys is None else draw(unit(greys[rows]))
                window.append(model.training_step(x, y))
            if len(window) == 1:
                watch.check(window[0])
            progress.step += 1
            if progress.step % log_every and progress.step < steps:
                continue
            scalars = _means(window)
            window.clear()
            if complaint := watch.complaint(scalars):
                with parallel.whole(model):
                    progress = _go_back(model, checkpoints, progress, watch, complaint)
                bar.reset()
                bar.update(progress.step)
                continue
            progress.seconds = time.monotonic() - started
            progress.history.append({"step": progress.step, **scalars})
            if first:
                listener(progress.step, progress.restarts, scalars)
            bar.set_postfix({name: f"{value:.3g}" for name, value in scalars.items()})
            bar.update(progress.step - bar.n)
            if progress.step % checkpoint_every == 0 or progress.step == steps:
                with parallel.whole(model):
                    _save(model, checkpoints, progress)
                if bar.disable:
                    log.info("step %d of %d: %s", progress.step, steps, _in_words(scalars))
    seeds.seed("finish", seed)
    model.finish()
    return progress


def _begin(model: EBM, data: Tensor, labels: Tensor | None, checkpoints: Checkpoints) -> Progress:
    started = time.monotonic()
    if model.initialises:
        model.initialise(unit(data), labels)
    progress = Progress(seconds=time.monotonic() - started)
    _save(model, checkpoints, progress)
    return progress


def _resume(model: EBM, checkpoints: Checkpoints) -> Progress | None:
    content = parallel.from_first(checkpoints.newest)
    if content is None:
        return None
    progress = _restore(model, content)
    log.info("resuming at step %d", progress.step)
    return progress


def _go_back(
    model: EBM, checkpoints: Checkpoints, progress: Progress, watch: Watch, complaint: str
) -> Progress:
    where = f"diverged at step {progress.step}: {complaint}"
    restarts = progress.restarts + 1
    if restarts > watch.restarts:
        advice = "lower the learning rate, or raise the limit if this is no divergence"
        raise DivergenceError(f"{where}, after {watch.restarts} restarts; {advice}")
    back = _restore(model, parallel.from_first(checkpoints.oldest))
    back.restarts, back.seconds = restarts, progress.seconds
    log.warning("%s; back to step %d with fresh noise (restart %d)", where, back.step, restarts)
    _save(model, checkpoints, back)
    return back


def _save(model: EBM, checkpoints: Checkpoints, progress: Progress) -> None:
    content: dict[str, Any] = {
        "progress": vars(progress),
        "model": model.state_dict(),
        "optimizers": {name: o.state_dict() for name, o in model.optimizers.items()},
    }
    if parallel.rank() == 0:
        checkpoints.save(progress.step, content)


def _restore(model: EBM, content: dict[str, Any]) -> Progress:
    model.load_state_dict(content["model"])
    for name, optimizer in model.optimizers.items():
        optimizer.load_state_dict(content["optimizers"][name])
    return Progress(**content["progress"])


def _set_rates(model: EBM, rates: list[float], factor: float) -> None:
    groups = (group for o in model.optimizers.values() for group in o.param_groups)
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate * factor


def _rate_factor(step: int, steps: int, cooldown: float) -> float:
    """1 until the last share `cooldown` of the steps, then linearly towards 0."""
    falling = cooldown * steps
    return min(1.0, (steps - step) / falling) if falling else 1.0


def _means(window: list[dict[str, Tensor]]) -> Logs:
    """The mean of every scalar over the window and over all processes, fetched from the device in
    one transfer."""
    table = torch.stack([torch.stack(list(row.values())) for row in window]).double().mean(0)
    parallel.average([table])
    return dict(zip(window[0], table.tolist(), strict=True))


def _in_words(scalars: Logs) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in scalars.items())
