"""Random splits in which each class has the same shares."""

import logging
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from ebm import EBMError
from ebm.data import SPLITS

log = logging.getLogger(__name__)


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


def repeated(tensors: Mapping[str, Tensor], source: str, what: str) -> dict[str, int]:
    """For the manifest, if there are any: how many of the test split are in the training split
    too. A warning says so, as whoever learns by heart does well on them."""
    train, test = (tensors[split].flatten(1).numpy() for split in ("train", "test"))
    known = {hash(row.tobytes()) for row in train}
    if not (count := sum(hash(row.tobytes()) in known for row in test)):
        return {}
    told = f"{count} of {len(test)} test {what} are in the training split as well"
    log.warning("%s: %s, which flatters what is measured; remove duplicates", source, told)
    return {"repeated": count}
