"""Random splits in which each class has the same shares."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from ebm import EBMError
from ebm.data import SPLITS


def by_class(
    classes: Tensor,
    told: Mapping[int, tuple[str, str]],
    validation: float,
    test: float,
    seed: int,
    unlearned: Collection[int] = (),
) -> dict[str, Tensor]:
    """Rows of each split, in random order: of each of the `classes` [N] the shares `validation`
    and `test`, and the rest to train on unless it is `unlearned`. EBMError if a class is too small
    for that, by what is `told` of it: where it is from, and what its members are called."""
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    part = torch.full((len(classes),), -1)
    for number, (where, what) in told.items():
        rows = order[classes[order] == number]
        sizes = [round(share * len(rows)) for share in (validation, test)]
        left = len(rows) - sum(sizes)
        learned = number not in unlearned
        if min(*sizes, left if learned else 1) < 1:
            shares = f"validation = {validation}, test = {test}"
            raise EBMError(f"{where}: {len(rows)} {what} are too few for {shares}")
        held, tested, rest = rows.split([*sizes, left])
        part[held], part[tested] = 1, 2
        if learned:
            part[rest] = 0
    return {name: order[part[order] == number] for number, name in enumerate(SPLITS)}
