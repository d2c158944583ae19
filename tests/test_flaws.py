"""Flaws of released code that no other file would notice: seeds that are set in part only."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from small_models import MODELS

from ebm import seeds
from ebm.schema import Experiment
from pipelines import ended, evaluate, prepare, reference, sample, tracking, train
from pipelines.spool import Spool

PLANE = {"kind": "density", "density": "8gaussians", "train": 200, "validation": 50, "test": 50}
DIGITS = {"kind": "digits", "binarize": "sample", "validation": 180, "test": 360}
CLASSIFIER = {
    "kind": "classifier",
    "width": 2,
    "epochs": 1,
    "batch_size": 64,
    "learning_rate": 3e-3,
    "threads": 1,
}
PARAMS = {
    "datasets": {
        "plane": PLANE | {"seed": 0, "reference": {"kind": "coordinates"}},
        "digits": DIGITS | {"seed": 0, "reference": CLASSIFIER},
    },
    "experiments": {
        "rbm": {
            "dataset": "digits",
            "variant": "rbm",
            "seed": 0,
            "threads": 1,
            "ensemble": None,
            "model": MODELS["rbm"],
            "train": {
                "steps": 4,
                "batch_size": 20,
                "log_every": 2,
                "checkpoint_every": 2,
                "cooldown": 0.0,
                "watch": {"limits": {}, "restarts": 0},
            },
            "sample": {"count": 40, "steps": 2},
            "evaluate": {"chains": 10, "temperatures": 5, "burn_in": 5, "flagged": None},
        }
    },
}
PARAMS["experiments"]["nce"] = PARAMS["experiments"]["rbm"] | {
    "dataset": "plane",
    "variant": "nce",
    "model": MODELS["nce"] | {"warmup": 2},
    "evaluate": {"grid": 160, "flagged": None},
}
STAGES = [
    (prepare.prepare, "plane", "data/plane/splits.safetensors"),
    (prepare.prepare, "digits", "data/digits/splits.safetensors"),
    (reference.reference, "digits", "models/reference/digits/weights.safetensors"),
    (train.train, "rbm", "models/rbm/weights.safetensors"),
    (sample.sample, "rbm", "models/rbm/samples.npz"),
    (evaluate.evaluate, "rbm", "models/rbm/evaluation/metrics.json"),
]
"""Stages in the order of the graph, and a file that holds what they drew."""


@pytest.fixture
def small(fresh_root, one_stage, monkeypatch):
    """A folder with small parameters, where nothing is tracked."""
    (fresh_root / "params.yaml").write_text(json.dumps(PARAMS))  # JSON is YAML
    monkeypatch.setenv("EBM_TRACKING", "0")


def run(generator_seed):
    """What every stage leaves, whatever was drawn before it."""
    files = []
    for stage, name, output in STAGES:
        torch.manual_seed(generator_seed)
        stage(name)
        files.append(Path(output).read_bytes())
    return files


@pytest.mark.usefixtures("small")
def test_every_stage_draws_from_its_own_seed_and_no_other():
    first, second = run(1), run(2)
    for (_, name, output), a, b in zip(STAGES, first, second, strict=True):
        assert a == b, f"{name}: {output} depends on what was drawn before"


@pytest.mark.usefixtures("small")
def test_another_seed_is_another_beginning_and_other_draws_of_one_model(monkeypatch):
    """Of a model that is not trained, and of the same weights."""
    monkeypatch.setattr(Experiment, "takes_no_steps", True)

    def with_seed(seed, stage, output):
        experiment = PARAMS["experiments"]["rbm"] | {"seed": seed}
        experiment["train"] = experiment["train"] | {"steps": 0}
        Path("params.yaml").write_text(json.dumps(PARAMS | {"experiments": {"rbm": experiment}}))
        stage("rbm")
        return Path("models/rbm", output).read_bytes()

    prepare.prepare("digits")
    for stage, output in ((train.train, "weights.safetensors"), (sample.sample, "samples.npz")):
        assert with_seed(0, stage, output) != with_seed(1, stage, output)


def test_a_seed_knows_where_one_part_ends_and_of_what_type_it_is():
    names = [("ab", "c"), ("a", "bc"), ("abc",), (1, 23), (12, 3), ("1", 23), (1, 23, "")]
    found = {seeds.mix(*parts) for parts in names}
    assert len(found) == len(names)
    assert all(0 <= seed < 2**63 for seed in found)
    assert seeds.mix("train", 0) == seeds.mix("train", 0)


@pytest.mark.usefixtures("small", "no_courier")
def test_an_experiment_is_one_run_with_all_that_came_of_it_and_leaves_no_checkpoint(monkeypatch):
    monkeypatch.delenv("EBM_TRACKING")
    monkeypatch.setattr(tracking.Run, "mlflow_run_id", lambda run, wait: "f" * 32)
    for stage in (prepare.prepare, reference.reference):
        stage("plane")
    for stage in (train.train, sample.sample, evaluate.evaluate):
        stage("nce")
    [spool] = Spool.all()
    record = json.loads(Path("models/nce/run.json").read_text())
    assert (record["tracking_key"], record["mlflow_run_id"]) == (spool.key, "f" * 32)
    events = [event for event, _ in spool.read()]
    told = [event["op"] for event in events if event["op"] != "artifact"]
    trained = ["start", "row", "row", "final", "close"]
    assert told == [*trained, "start", "tags", "model", "final", "close"]
    kept = {(event["folder"], event["name"]) for event in events if event["op"] == "artifact"}
    pictures = {("figures", path.name) for path in Path("models/nce/evaluation/figures").iterdir()}
    assert kept == {("samples", "samples.npz"), *pictures}
    [model] = [event for event in events if event["op"] == "model"]
    assert model["serving"]["sample"] == {"steps": 2}
    [tags] = [event["tags"] for event in events if event["op"] == "tags"]
    assert {
        "sample.count": "40",
        "sample.steps": "2",
        "evaluate.grid": "160",
    }.items() <= tags.items()
    assert list(Path(".checkpoints").rglob("*.ckpt"))
    ended.clear(Path(".checkpoints/nce"))  # as `pipelines.reproduce` does when DVC has recorded it
    assert not list(Path(".checkpoints").rglob("*.ckpt"))


@pytest.mark.usefixtures("small")
def test_a_training_that_has_ended_is_repeated_only_if_its_result_is_recorded(caplog):
    caplog.set_level("INFO")
    prepare.prepare("plane")
    train.train("nce")
    weights = Path("models/nce/weights.safetensors")
    first = weights.read_bytes()
    for lock, resumed in (("", True), (hashlib.md5(first).hexdigest(), False)):
        Path("dvc.lock").write_text(f"outs: {lock}")
        weights.unlink()
        caplog.clear()
        train.train("nce")
        assert ("resuming at step" in caplog.text) == resumed
        assert weights.read_bytes() == first
    [folder] = Path(".checkpoints/nce").iterdir()
    old = folder.rename(folder.with_name("0123"))
    train.train("nce")
    assert not old.exists()
