"""Stage `train@<experiment>`: train one model, resumable at any moment, tracked as one MLflow
run; in several processes where they are asked for (`pipelines.processes`)."""

import re
import sys
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebm import EBMError, params
from pipelines import ended, places, processes, provenance, stage, tracking

if TYPE_CHECKING:
    import torch

    from ebm.data import Prepared
    from ebm.train import Logs, Progress
    from ebm.variants.base import EBM

SECTIONS = {"dataset", "variant", "seed", "threads", "model", "ensemble", "train"}
"""What of an experiment a training depends on."""

DECLARES = re.compile(r"ebm\.(params|schema|variants|variants\.\w+_config)")
"""Modules that say which parameters there may be: what these are is in the configuration."""


def train(name: str) -> None:
    experiment = params.experiment(stage.PARAMS, name)
    if processes.wanted() > 1:
        processes.start("pipelines.train", name)
        return
    processes.end_with_torchrun()

    from ebm import data, seeds, variants
    from ebm.data import GREYS
    from ebm.train import Watch, fit

    prepared = data.read(Path("data", experiment.dataset))
    device = stage.claim_device(processes.share(experiment.threads))
    with processes.joined(device):
        seeds.seed("model", experiment.seed)
        settings = experiment.model_dump(include=SECTIONS)
        how = settings["model"], settings["ensemble"]
        model = variants.build(experiment.variant, prepared.shape, *how).to(device)
        options = experiment.train.model_dump()
        greys = prepared.tensors.get(GREYS)
        work = partial(
            fit,
            model,
            prepared.tensors["train"].to(device),
            _labels(model, prepared, experiment.dataset, device),
            None if greys is None else greys.to(device),
            **options | {"watch": Watch(**options["watch"])},
            seed=experiment.seed,
        )
        _recorded(name, settings, prepared, str(device), model, work)


def _recorded(
    name: str,
    settings: dict[str, Any],
    prepared: "Prepared",
    device: str,
    model: "EBM",
    work: Callable[..., "Progress"],
) -> None:
    """Do the work with checkpoints, and in the first process keep and track what comes of it."""
    from ebm import parallel
    from ebm.checkpoint import Checkpoints

    checkpoints = Checkpoints(_checkpoint_folder(name, settings, prepared, device))
    if parallel.rank():
        work(checkpoints=checkpoints)
        return
    folder = Path("models", name)
    with checkpoints.locked():
        ended.clear_for(checkpoints.folder)
        record = _provenance(name, settings, prepared, device)
        with _tracked(name, settings, record, prepared, checkpoints.folder / "run") as run:
            progress = work(
                checkpoints=checkpoints,
                listener=lambda step, restarts, scalars: run.log(scalars, step, restarts),
            )
            cost = {"seconds": round(progress.seconds, 3), "restarts": progress.restarts}
            _write(folder, model, settings, prepared, progress.history)
            run.log_final(cost)
            tracked = {"tracking_key": run.key, "mlflow_run_id": run.mlflow_run_id(wait=5)}
            stage.write_json(folder / "run.json", record | cost | tracked)
        ended.mark(checkpoints.folder, folder / "weights.safetensors")


def _labels(model: "EBM", prepared: "Prepared", name: str, device: "torch.device") -> Any:
    """The classes of the training split, for a model that needs them."""
    if not model.needs_labels:
        return None
    labels = prepared.tensors.get("train_labels")
    if labels is None:
        key = "ensemble.without" if getattr(model, "without", None) else "model.classes"
        raise EBMError(f"{key}: data set {name} has no classes")
    found = int(labels.max()) + 1
    if model.classes not in (0, found):
        raise EBMError(f"model.classes = {model.classes}: data set {name} has {found} classes")
    return labels.to(device)


def _checkpoint_folder(
    name: str, settings: dict[str, Any], prepared: "Prepared", device: str
) -> Path:
    """Checkpoints of another configuration, data set, hardware or code are never resumed from: one
    kind of card draws other numbers than another."""
    modules = sorted(
        m.__file__
        for name, m in sys.modules.items()
        if name.startswith("ebm.") and m.__file__ and not DECLARES.fullmatch(name)
    )
    code = [sha256(Path(file).read_bytes()).hexdigest() for file in modules]
    key = stage.digest([settings, prepared.manifest["sha256"], provenance.hardware(device), code])
    return places.checkpoints(name) / key[:16]


def _provenance(
    name: str, settings: dict[str, Any], prepared: "Prepared", device: str
) -> dict[str, Any]:
    from ebm import parallel

    return provenance.record(settings, device) | {
        "experiment": name,
        "variant": settings["variant"],
        "dataset": settings["dataset"],
        "processes": parallel.world(),
        "data_sha256": prepared.manifest["sha256"],
    }


def _tracked(
    name: str, settings: dict[str, Any], record: dict[str, Any], prepared: "Prepared", memo: Path
) -> tracking.Run:
    """A new tracked run, or the one that a killed predecessor began: `memo` remembers its key."""
    run = tracking.Run.start(
        name,
        key=memo.read_text() if memo.exists() else None,
        params=settings,
        tags={
            "dvc.stage": f"train@{name}",
            **provenance.git_tags(record),
            "ebm.variant": record["variant"],
            "params.sha256": record["params_sha256"],
            "data.sha256": record["data_sha256"],
        },
        dataset={
            "name": record["dataset"],
            "source": prepared.manifest["source"],
            "digest": record["data_sha256"],
        },
    )
    memo.write_text(run.key)
    return run


def _write(
    folder: Path,
    model: "EBM",
    settings: dict[str, Any],
    prepared: "Prepared",
    history: "list[Logs]",
) -> None:
    import csv

    from safetensors.torch import save  # whose sister, which writes, has errors of its own

    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.cpu().contiguous() for k, v in model.state_dict().items()}
    (folder / "weights.safetensors").write_bytes(save(weights))
    config = {key: settings[key] for key in ("variant", "model", "ensemble", "dataset")}
    transform = prepared.transform()  # of a table: what a row has to go through to be scored
    about: dict[str, Any] = {"transform": transform} if transform else {}
    if (how := prepared.manifest["settings"].get("binarize", "none")) != "none":
        about["binarize"] = how
    stage.write_json(folder / "config.json", config | {"shape": list(prepared.shape)} | about)
    with open(folder / "history.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[0]) if history else ["step"])
        writer.writeheader()
        writer.writerows(history)


if __name__ == "__main__":
    stage.main(train, "experiment")
