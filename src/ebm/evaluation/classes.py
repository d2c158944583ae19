"""What a model knows of classes."""

import torch
from torch import Tensor

from ebm.evaluation.result import Case, Evaluation

SLICE = 1024
"""Points that are classified at once."""


@torch.no_grad()
def measure_classes(result: Evaluation, case: Case) -> None:
    """Accuracy on the test split, beside a network that saw the labelled points alone; of a model
    that saw all labels, beside the reference's classifier."""
    if (labels := case.labels("test")) is None:
        return
    parts = [case.model.classify(part) for part in case.points("test").split(SLICE)]
    if not parts[0]:
        return
    right = {name: agreement(torch.cat([p[name] for p in parts]), labels) for name in parts[0]}
    result.metrics |= right
    if "accuracy_supervised" in right:
        source = "the same network, trained on the same labels alone"
        result.refer("accuracy", right["accuracy_supervised"], "baseline", source)
    elif case.seen and case.seen.classes is not None:
        source = "a classifier, trained on the same labels"
        result.refer("accuracy", agreement(case.seen.classes, labels), "baseline", source)


def agreement(found: Tensor, labels: Tensor) -> float:
    """The share of classes [N] that are the same."""
    return (found == labels).double().mean().item()
