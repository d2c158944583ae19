"""Stage `evaluate@<experiment>`: measure a model and its samples; numbers, references, figures,
the threshold from which on an energy flags a point. With that, MLflow can serve the model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebm import EBMError, params
from pipelines import stage, tracking

if TYPE_CHECKING:
    from torch import Tensor

    from ebm.data import Prepared
    from ebm.evaluation import Evaluation

EXAMPLES = 8  # test points in the example of a request


def evaluate(name: str) -> None:
    experiment = params.experiment(stage.PARAMS, name)

    from ebm import data, reference, seeds, variants
    from ebm.evaluation import evaluate

    folder = Path("models", name)
    device = stage.claim_device(experiment.threads)
    model = variants.load(folder / "weights.safetensors", folder / "config.json").to(device)
    samples = {k: v.to(device) for k, v in _samples(folder / "samples.npz").items()}
    prepared = data.read(Path("data", experiment.dataset))
    measure = reference.read(Path("models/reference", experiment.dataset), prepared, device)
    seeds.seed("evaluate", experiment.seed)
    result = evaluate(model, samples, prepared, measure, experiment.evaluate.model_dump())
    _write(folder, result)
    drawing = experiment.sample.model_dump(exclude={"count"})
    serving = {"threshold": result.thresholds.get("energy"), "sample": drawing}
    measured_by = experiment.model_dump(include={"sample", "evaluate"})
    _track(name, folder, measured_by, result, serving, _example(prepared))


def _samples(path: Path) -> "dict[str, Tensor]":
    import zipfile
    import zlib

    import numpy as np
    import torch

    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise EBMError(f"{path}: not a usable sample file ({error}); sample again") from None


def _write(model: Path, result: "Evaluation") -> None:
    """What was found, beside the model; a threshold with the checksum of the weights that it
    belongs to."""
    folder = model / "evaluation"
    stage.write_figures(folder, result.figures)
    stage.write_json(folder / "metrics.json", result.metrics)
    stage.write_json(folder / "references.json", result.references)
    if result.thresholds:
        weights = {"weights_sha256": stage.file_digest(model / "weights.safetensors")}
        stage.write_json(folder / "threshold.json", result.thresholds | weights)


def _example(prepared: "Prepared") -> dict[str, Any]:
    """A request to the served model: the first test points, those of a table as its rows."""
    from ebm.data.transform import Transform

    points = prepared.points("test")[:EXAMPLES]
    transform = prepared.transform()
    if transform is None:
        return {"inputs": points.tolist()}
    rows = Transform.from_json(transform, "transform.json").decode(points).to_dict("split")
    return {"dataframe_split": {"columns": rows["columns"], "data": rows["data"]}}


def _track(
    name: str,
    folder: Path,
    settings: dict[str, Any],
    result: "Evaluation",
    serving: dict[str, Any],
    example: dict[str, Any],
) -> None:
    """Continue the MLflow run of the training with the model, what was measured and drawn, and the
    `settings` of that."""
    record = stage.read_json(folder / "run.json", f"train@{name}")
    key = record["tracking_key"]
    with tracking.Run.start(name, key=key, params={}, tags={}, dataset=None) as run:
        about = {"data.sha256": record["data_sha256"]}  # a trial that trained nothing has none
        run.tag(about | params.dotted(settings))  # no params, which would stay as they were
        run.model(folder / "weights.safetensors", folder / "config.json", serving, example)
        run.log_final(result.metrics)
        for picture in sorted((folder / "evaluation" / "figures").iterdir()):
            run.artifact(picture, "figures")
        run.artifact(folder / "samples.npz", "samples")


if __name__ == "__main__":
    stage.main(evaluate, "experiment")
