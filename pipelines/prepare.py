"""Stage `prepare@<dataset>`: bring one data set into the form that all later stages read."""

from pathlib import Path

from ebm import params
from pipelines import stage


def prepare(name: str) -> None:
    settings = params.dataset(stage.PARAMS, name)

    from ebm import data  # torch: only once the parameters are known to be right

    data.write(data.prepare(settings), Path("data", name))


if __name__ == "__main__":
    stage.main(prepare, "data set")
