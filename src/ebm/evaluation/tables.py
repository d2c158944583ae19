"""Rows of a table unlike those that a model was trained on."""

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebm import EBMError, figures, metrics
from ebm.ensemble import histories
from ebm.evaluation.published import KDDCUP99, refer_to_published
from ebm.evaluation.result import Case, Evaluation
from ebm.evaluation.scores import SUFFIXES, TITLES, Numbers, scores, summarised
from ebm.variants.base import EBM

log = logging.getLogger(__name__)

CHANCE = 0.5
"""The area under the ROC curve of scores that know nothing."""


@dataclass(frozen=True)
class Rule:
    """How a score gets its threshold: by its values on `rows` [R, *], and by the `labels` [R] of
    these, 1 for an anomaly, where they may be known. It is that of the best F1 where there are
    labels of both kinds, else the share `flagged` of the rows is flagged."""

    rows: Tensor
    labels: Tensor | None
    flagged: float | None

    def threshold(self, score: Tensor) -> float:
        """The threshold of the `score` [R] of the rows."""
        if self.labels is not None:
            anomalous = self.labels == 1
            if anomalous.any() and not anomalous.all():
                return metrics.best_f1_threshold(score[~anomalous], score[anomalous])
        if self.flagged is None:
            wanted = "the share of rows to flag, as no labels set a threshold"
            raise EBMError(f"evaluate.flagged: missing; expected {wanted}")
        return metrics.share_threshold(score, self.flagged)


@dataclass(frozen=True)
class Scored:
    """Scores by name: of the rows that set a threshold [R] and of the test rows [N]."""

    known: dict[str, Tensor]
    test: dict[str, Tensor]


def evaluate_table(case: Case) -> Evaluation:
    """Every snapshot of every member as a detector of the anomalies among the test rows, and the
    threshold of the whole model; of a table without labels that threshold and the scores.

    Protocol `paper` flags a share of the test rows, as published; all others choose the threshold
    on the validation rows.
    """
    result = Evaluation()
    test, truth = case.points("test"), case.labels("test")
    paper = case.about.get("protocol") == "paper"
    flagged = case.settings["flagged"]
    if paper:
        rule = Rule(test, None, flagged)
    else:
        rule = Rule(case.points("validation"), case.labels("validation"), flagged)
    if truth is None:
        _flag(result, _scored(case.model, rule, test), rule)
        return result
    if truth.unique().numel() != 2:
        raise EBMError("test_labels: all rows are of one kind; expected normal and anomalous ones")
    _detect(result, case.model, rule, test, truth == 1)
    _refer_to_rankings(result, truth == 1, flagged if paper else None)
    if paper and case.about.get("scale", "none") == "none":  # as the published columns are
        refer_to_published(result, case.model, KDDCUP99)
    return result


def _scored(model: EBM, rule: Rule, test: Tensor) -> Scored:
    found = scores(model, test)
    _warn_of_strange(found, "test rows")
    if rule.rows is test:
        return Scored(found, found)
    known = scores(model, rule.rows)
    _warn_of_strange(known, "rows that set the threshold")
    return Scored(known, found)


def _warn_of_strange(found: dict[str, Tensor], rows: str) -> None:
    for name, score in found.items():
        if count := int((~score.isfinite()).sum()):
            log.warning("%s of %d of %d %s is not finite", TITLES[name], count, len(score), rows)


def _flag(result: Evaluation, scored: Scored, rule: Rule) -> None:
    """What can be said of rows of which nobody knows which are anomalies."""
    threshold = _set_threshold(result, scored, rule)
    energy = scored.test["energy"]
    flagged = energy >= threshold
    known = math.isfinite(threshold) and not energy.isnan().any()
    result.metrics["flagged_share"] = flagged.double().mean().item() if known else math.nan
    wanted, reached = rule.flagged or 0.0, math.nan
    if math.isfinite(threshold):
        reached = (scored.known["energy"] >= threshold).double().mean().item()
    source = f"of the validation split, whose highest {wanted:.2%} were to be flagged"
    result.refer("flagged_share", reached, "baseline", source)
    if reached > 2 * wanted:
        rows = len(scored.known["energy"])
        why = "energies are alike" if wanted * rows >= 1 else f"one of its {rows} rows is more"
        log.warning("the threshold flags %.1f %% %s: %s", 100 * reached, source, why)
    _draw_scores(result, scored, rule, {"test": torch.ones_like(flagged)}, "Test rows")


def _set_threshold(result: Evaluation, scored: Scored, rule: Rule) -> float:
    """The threshold of the energy, kept if there is one."""
    threshold = rule.threshold(scored.known["energy"])
    if math.isfinite(threshold):
        result.thresholds["energy"] = threshold
    return threshold


def _detect(result: Evaluation, model: EBM, rule: Rule, test: Tensor, truth: Tensor) -> None:
    """Detection of the rows that are anomalies by `truth` [N]: the trainings one by one, the whole
    model, pictures of the first training."""
    members = histories(model)
    first = members[0][-1]
    shown = _scored(first, rule, test)
    numbers = [
        [
            _detected(shown if one is first else _scored(one, rule, test), rule, truth)
            for one in snapshots
        ]
        for snapshots in members
    ]
    result.metrics |= summarised(numbers)
    if result.metrics["auroc"] <= CHANCE:
        told = "AUROC %.3g: by its energy this model tells anomalies no better than chance does"
        log.warning(told, result.metrics["auroc"])
    whole = shown if model is first else _scored(model, rule, test)
    _set_threshold(result, whole, rule)
    if len(members) > 1:
        found = _detected(whole, rule, truth)
        result.add({name: found[name] for name in ("f1", "auprc")}, "_ensemble")
    kinds = {"normal": ~truth, "anomalous": truth}
    rows = "Test rows"
    if len(members) > 1:
        by = "a snapshot of the first training" if len(members[0]) > 1 else "the first training"
        rows += f", by {by}"
    _draw_scores(result, shown, rule, kinds, rows)
    curves = {
        TITLES[name]: _curves(s[~truth], s[truth])
        for name, s in shown.test.items()
        if not s.isnan().any()
    }
    caption = "The same scores over all thresholds. Dashed: scores that know nothing."
    if curves:
        picture = figures.detection_curves(curves, truth.double().mean().item())
        result.draw("detection", "Detection", caption, picture)


def _detected(scored: Scored, rule: Rule, truth: Tensor) -> Numbers:
    """Each score as a detector, in numbers."""
    found: Numbers = {}
    for name, score in scored.test.items():
        inliers, outliers = score[~truth], score[truth]
        threshold = rule.threshold(scored.known[name])
        precision, recall, f1 = metrics.detection(inliers, outliers, threshold)
        numbers = {
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "auroc": metrics.auroc(inliers, outliers),
            "auprc": metrics.auprc(inliers, outliers),
        }
        found |= {key + SUFFIXES[name]: value for key, value in numbers.items()}
    return found


def _refer_to_rankings(result: Evaluation, truth: Tensor, share: float | None) -> None:
    """What rankings that know nothing, the worst one and the best one score, the last for a rule
    that flags a fixed `share` of the rows."""
    outliers = int(truth.sum())
    p = outliers / len(truth)
    result.refer("auroc", CHANCE, "chance", "scores that know nothing")
    mean = metrics.chance_auprc(len(truth) - outliers, outliers)
    result.refer("auprc", mean, "chance", "scores that know nothing, on average")
    lowest = metrics.worst(metrics.auprc, len(truth) - outliers, outliers)
    result.refer("auprc", lowest, "floor", "the worst possible ranking of the test split")
    if share is None:
        result.refer("f1", 2 * p / (1 + p), "chance", "every row is flagged")
        return
    rule = f"{share:.0%} of the rows are flagged and {p:.1%} are anomalies"
    best = {"precision": min(1.0, p / share), "recall": min(1.0, share / p)}
    for name, ceiling in (best | {"f1": metrics.f1_ceiling(p, share)}).items():
        result.refer(name, ceiling, "ceiling", f"{rule}; rows that tie could add to it")
    result.refer("f1", 2 * p * share / (p + share), "chance", f"{rule}, at random")


def _draw_scores(
    result: Evaluation, scored: Scored, rule: Rule, kinds: dict[str, Tensor], rows: str
) -> None:
    """The scores of each of several `kinds` of test rows, [N] each; those that are finite."""
    panels = {
        TITLES[name].lower(): (
            {kind: score[which].cpu().numpy() for kind, which in kinds.items()},
            rule.threshold(scored.known[name]),
        )
        for name, score in scored.test.items()
        if score.isfinite().all()
    }
    caption = (
        f"{rows}. The higher its score, the more anomalous the model finds a row; from the "
        "threshold on it is flagged. What lies beyond the frame counts in its outermost bins."
    )
    if panels:
        result.draw("scores", "Scores", caption, figures.score_histograms(panels))


def _curves(inliers: Tensor, outliers: Tensor) -> tuple[Any, Any, Any]:
    """False positive rates, recalls and precisions [K] from the highest threshold down."""
    _, true, false = metrics.operating_points(inliers, outliers)
    lines = false / len(inliers), true / len(outliers), true / (true + false)
    false_rate, recall, precision = (line.cpu().numpy() for line in lines)
    return false_rate, recall, precision
