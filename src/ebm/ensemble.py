"""Several models of one variant, trained side by side in one run, and how each was lately.

What one training says can be luck, so tables give a mean over several. `snapshots` are the last
states of every member, taken every so many steps: the released code of MEG averages the scores of
its last ten epochs, because those of a critic that still moves are a matter of the moment.
`without` names a class for each member that it never sees: a detector of that class. Of members
that draw samples, the ensemble draws as their mixture does.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ebm import EBMError
from ebm.parallel import parts, world
from ebm.variants.base import EBM, WAYS, joined


class Ensemble(EBM):
    """`members` models that `make` builds, each with a part of every batch, noise and initial
    weights of its own; its energy is the mean of theirs. Logs are means over the members."""

    steps: Tensor

    def __init__(
        self,
        make: Callable[[], EBM],
        members: int,
        snapshots: int,
        every: int,
        without: Sequence[int],
    ) -> None:
        super().__init__()
        if without and world() > 1:
            raise EBMError("ensemble.without: such an ensemble is trained by one process only")
        self.every, self.without = every, list(without)
        self.members = nn.ModuleList(make() for _ in range(members))
        if without and any(member.compiled for member in self._members()):
            raise EBMError(
                "model.compile: batches without a class are of too many sizes; set it to false"
            )
        self.classes = self._members()[0].classes
        self.snapshots = nn.ModuleList(
            nn.ModuleList(make() for _ in range(snapshots)) for _ in range(members)
        ).requires_grad_(False)
        self.register_buffer("steps", torch.tensor(0))

    def configure_optimizers(self) -> dict[str, Optimizer]:
        return {
            f"{number}.{name}": optimizer
            for number, member in enumerate(self._members())
            for name, optimizer in member.optimizers.items()
        }

    @property
    def needs_labels(self) -> bool:
        return bool(self.without) or any(member.needs_labels for member in self._members())

    def energy(self, x: Tensor) -> Tensor:
        return torch.stack([member.energy(x) for member in self._members()]).mean(0)

    @property
    def initialises(self) -> bool:
        return bool(self.without) or self._members()[0].initialises

    def initialise(self, data: Tensor, labels: Tensor | None = None) -> None:
        """Each member with what it may see; EBMError if there is none of a class of `without`, or
        nothing else."""
        for m, member in enumerate(self._members()):
            x, y = data, labels
            if self.without and labels is not None:
                seen = self._seen(m, labels)
                if seen.all() or not seen.any():
                    problem = f"{'no' if seen.all() else 'every'} training row is of class"
                    raise EBMError(f"ensemble.without: {problem} {self.hidden(m)}")
                x, y = data[seen], labels[seen]
            member.initialise(x, y if member.needs_labels else None)

    def training_step(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        rows = parts(torch.arange(len(x), device=x.device), len(self.members))
        logs = [self._step(m, x, y, part) for m, part in enumerate(rows)]
        self.steps += 1
        if self.steps % self.every == 0:
            self._take_snapshots()
        return {name: torch.stack([log[name] for log in logs]).mean() for name in logs[0]}

    def _step(self, m: int, x: Tensor, y: Tensor | None, rows: Tensor) -> dict[str, Tensor]:
        """A step of member `m` on its `rows`, without those of the class that it must not see; on
        what it may see of all rows if these are all of that class."""
        if self.without and y is not None:
            seen = self._seen(m, y)
            rows = rows[seen[rows]] if seen[rows].any() else seen.nonzero().squeeze(1)
            if not len(rows):
                raise EBMError("train.batch_size: too small for ensemble.without: no row is left")
        classes = y[rows] if y is not None and self.classes else None
        return self._members()[m].training_step(x[rows], classes)

    def finish(self) -> None:
        for member, kept in zip(self._members(), self._snapshots(), strict=True):
            for model in (member, *kept):
                model.finish()

    def hidden(self, m: int) -> int:
        """The class that member `m` must not see."""
        return self.without[m % len(self.without)]

    def _seen(self, m: int, labels: Tensor) -> Tensor:
        """Which rows of classes `labels` [N] member `m` may see: bool [N]."""
        return labels != self.hidden(m)

    def _take_snapshots(self) -> None:
        """The oldest snapshot of every member gives way to its present state."""
        for member, kept in zip(self.members, self._snapshots(), strict=True):
            if kept:
                slot = (int(self.steps) // self.every - 1) % len(kept)
                kept[slot].load_state_dict(member.state_dict())

    def sample(self, n: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws of the members in turn, n in all; the way there, where it is kept, of the first
        alone."""
        drawing = self._members()[: max(n, 1)]
        turns = [torch.arange(n)[m :: len(drawing)] for m in range(len(drawing))]
        drawn = [m.sample(len(t), *args, **kwargs) for m, t in zip(drawing, turns, strict=True)]
        order = torch.cat(turns).argsort()
        found = joined(drawn).items()
        return {k: v[order] if len(v) == n and k not in WAYS else v for k, v in found}

    def histories(self) -> list[list[EBM]]:
        """For each member its snapshots, or itself where there are none."""
        pairs = zip(self._snapshots(), self._members(), strict=True)
        return [kept or [member] for kept, member in pairs]

    def _members(self) -> list[EBM]:
        return [cast(EBM, member) for member in self.members]

    def _snapshots(self) -> list[list[EBM]]:
        return [[cast(EBM, s) for s in cast(nn.ModuleList, kept)] for kept in self.snapshots]


def histories(model: EBM) -> list[list[EBM]]:
    """Histories of an ensemble's members; any other model is its own only member."""
    return model.histories() if isinstance(model, Ensemble) else [[model]]
