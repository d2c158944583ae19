"""The packed model answers energies, in a process that has nothing but what was packed."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tracking_store import MLFLOW_WARNS, start

from ebm import variants
from pipelines import tracking
from pipelines.spool import Spool

pytestmark = MLFLOW_WARNS

MODELS = {
    "rbm": (
        (8, 8),
        {
            "hidden": 5,
            "k": 1,
            "chains": 4,
            "learning_rate": 0.1,
            "momentum": 0.5,
            "weight_decay": 0.0,
        },
    ),
    "meg": (
        (2,),
        {
            "network": "mlp",
            "energy": [8],
            "generator": [8],
            "statistics": [8],
            "latent": 2,
            "energy_steps": 1,
            "score_penalty": 0.1,
            "entropy": 0.5,
            "energy_learning_rate": 1e-3,
            "generator_learning_rate": 1e-3,
            "betas": [0.5, 0.9],
            "ema": 0.0,
            "energy_ema": 0.0,
            "precision": "float32",
        },
    ),
}

CLIENT = """
import json, sys
import mlflow.pyfunc, numpy as np, pandas as pd

def complaint(predict, points):
    try:
        predict(points)
    except Exception as error:
        return str(error)

answers = {}
for folder in sys.argv[1:]:
    model = mlflow.pyfunc.load_model(folder)
    example = np.asarray(model.input_example)
    flat = example.reshape(len(example), -1)
    raw = lambda points: model.unwrap_python_model().predict(None, points)
    inputs = {"example": example, "again": np.repeat(example, 1000, axis=0)}
    if example.ndim == 2:
        inputs |= {"table": pd.DataFrame(example, columns=["x", "y"])}
    answers[folder] = {name: model.predict(x)["energy"].tolist() for name, x in inputs.items()}
    answers[folder]["rows"] = raw(flat.astype(np.float32))["energy"].tolist()
    answers[folder]["wrong"] = complaint(model.predict, np.ones((4, 3)))
    answers[folder]["raw wrong"] = complaint(raw, np.ones((2, flat.shape[1] * 2)))
modules = [m.__file__ for name, m in sys.modules.items() if name.partition(".")[0] == "ebm"]
print(json.dumps({"answers": answers, "modules": modules}))
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory, empty_database):
    """Both models as MLflow packs them: {variant: (folder, energies of the example)}."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(tmp_path_factory.mktemp("root")))
        patch.setattr(tracking, "_courier", lambda key: None)
        return {variant: pack(variant, tmp_path_factory.mktemp(variant)) for variant in MODELS}


def pack(variant, folder):
    from mlflow.models import Model

    from pipelines.mlflow_store import save_model

    shape, settings = MODELS[variant]
    torch.manual_seed(0)
    model = variants.build(variant, shape, settings)
    points = torch.rand(20, *shape).round()
    weights, config, data = (
        folder / name for name in ("w.safetensors", "c.json", "d.safetensors")
    )
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, weights)
    save_file({"test": points}, data)
    config.write_text(json.dumps({"variant": variant, "shape": shape, "model": settings}))
    with start() as run:
        run.model(weights, config, data)
    [event] = [event for event, _ in Spool(run.key).read() if event["op"] == "model"]
    files = Spool(run.key).files / event["files"]
    save_model(files, event, Model())
    energy = model.eval().energy(points[: tracking.EXAMPLES]).tolist()
    packed = (files / "model").rename(folder / "packed")
    shutil.rmtree(files)
    return packed, energy


@pytest.fixture(scope="module")
def client(packed, tmp_path_factory):
    """What a process answers that finds neither the checkout nor an installed ebm first."""
    folders = [str(folder) for folder, _ in packed.values()]
    result = subprocess.run(
        [sys.executable, "-I", "-c", CLIENT, *folders],
        cwd=tmp_path_factory.mktemp("elsewhere"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("variant", MODELS)
def test_the_served_energy_is_the_model_s_energy(packed, client, variant):
    folder, energy = packed[variant]
    answer = client["answers"][str(folder)]
    assert answer["example"] == pytest.approx(energy, rel=1e-5)
    assert answer["rows"] == pytest.approx(energy, rel=1e-5)
    assert answer["again"] == pytest.approx(np.repeat(energy, 1000), rel=1e-5)


def test_vectors_are_served_from_tables(packed, client):
    folder, energy = packed["meg"]
    assert client["answers"][str(folder)]["table"] == pytest.approx(energy, rel=1e-5)


@pytest.mark.parametrize("variant", MODELS)
def test_points_of_a_wrong_shape_are_refused(packed, client, variant):
    answer = client["answers"][str(packed[variant][0])]
    assert "does not match expected" in answer["wrong"]
    assert "a point has shape" in answer["raw wrong"]


def test_the_code_comes_from_the_model_and_its_requirements_are_complete(packed, client):
    from pipelines.mlflow_store import REQUIREMENTS

    folders = tuple(str(folder / "code") for folder, _ in packed.values())
    assert all(file.startswith(folders) for file in client["modules"])
    imported = {name for file in client["modules"] for name in imports(Path(file))}
    assert imported - sys.stdlib_module_names - {"ebm"} <= set(REQUIREMENTS)


def imports(file):
    """The top-level packages that a source file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("variant", MODELS)
def test_no_pickle_is_packed(packed, variant):
    folder, _ = packed[variant]
    files = [file for file in folder.rglob("*") if file.is_file()]
    suffixes = {file.suffix for file in files if file.parent.name != "__pycache__"}  # a client's
    assert suffixes <= {"", ".py", ".json", ".safetensors", ".txt", ".yaml"}
