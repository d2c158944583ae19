"""Stage `sample@<experiment>`: draw from a trained model into a file that numpy opens by itself."""

from pathlib import Path

from ebm import params
from pipelines import stage


def sample(name: str) -> None:
    experiment, _ = params.experiment(stage.PARAMS, name)
    import numpy as np  # torch: only once the parameters are known to be right
    import torch

    from ebm import seeds, variants

    folder = Path("models", name)
    device = stage.device(experiment.threads)
    model = variants.load(folder / "weights.safetensors", folder / "config.json").to(device)
    seeds.seed("sample", experiment.seed)
    settings = experiment.sample.model_dump()
    arrays = model.sample(settings.pop("count"), **settings)
    np.savez(folder / "samples.npz", **{key: value.cpu().numpy() for key, value in arrays.items()})


if __name__ == "__main__":
    stage.main(sample, "experiment")
