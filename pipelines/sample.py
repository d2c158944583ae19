"""Stage `sample@<experiment>`: draw from a trained model into a file that numpy opens by
itself."""

from pathlib import Path
from typing import Any

from ebm import params
from pipelines import stage


def sample(name: str) -> None:
    experiment = params.experiment(stage.PARAMS, name)
    import numpy as np  # torch: only once the parameters are known to be right

    from ebm import seeds, variants

    folder = Path("models", name)
    device = stage.claim_device(experiment.threads)
    model = variants.load(folder / "weights.safetensors", folder / "config.json").to(device)
    seeds.seed("sample", experiment.seed)
    settings = experiment.sample.model_dump()
    drawn = model.sample(settings.pop("count"), **settings)
    arrays: dict[str, Any] = {key: value.cpu().numpy() for key, value in drawn.items()}
    np.savez(folder / "samples.npz", **arrays)


if __name__ == "__main__":
    stage.main(sample, "experiment")
