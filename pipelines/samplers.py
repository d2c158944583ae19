"""Stage `samplers`: compare the kernels on targets of which everything is known; numbers, a table,
figures."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebm import params
from ebm.params import ParamsError
from pipelines import provenance, stage, tracking

if TYPE_CHECKING:
    from ebm.comparison import Comparison

FOLDER = Path("models", "samplers")


def main() -> None:
    section = params.load(stage.PARAMS).samplers
    if section is None:
        raise ParamsError(f"{stage.PARAMS.name}: samplers: missing key")

    import torch  # only once the parameters are known to be right

    from ebm.comparison import compare

    torch.set_num_threads(section.threads)
    settings, begun = section.model_dump(), time.perf_counter()
    record = provenance.record(settings, "cpu")  # a few numbers: no work for a GPU
    result = compare(settings)
    _write(result)
    _track(settings, result, record | {"seconds": round(time.perf_counter() - begun, 3)})


def _write(result: "Comparison") -> None:
    stage.write_figures(FOLDER, result.figures)
    stage.write_json(FOLDER / "metrics.json", result.metrics)
    stage.write_json(FOLDER / "table.json", result.table)


def _track(settings: dict[str, Any], result: "Comparison", record: dict[str, Any]) -> None:
    tags = {
        "dvc.stage": "samplers",
        **provenance.git_tags(record),
        "params.sha256": record["params_sha256"],
    }
    with tracking.Run.start("samplers", params=settings, tags=tags, dataset=None) as run:
        run.log_final(result.metrics)
        for picture in sorted((FOLDER / "figures").iterdir()):
            run.artifact(picture, "figures")
        tracked = {"tracking_key": run.key, "mlflow_run_id": run.mlflow_run_id(wait=5)}
        stage.write_json(FOLDER / "run.json", record | tracked)


if __name__ == "__main__":
    stage.main_alone(main)
