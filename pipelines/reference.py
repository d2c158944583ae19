"""Stage `reference@<dataset>`: what the images of one data set are measured with."""

from pathlib import Path

from ebm import params
from pipelines import stage


def reference(name: str) -> None:
    dataset = params.dataset(stage.PARAMS, name)
    folder, settings = Path("models/reference", name), dataset.reference
    if settings.kind == "coordinates":  # nothing to learn, so nothing to import
        folder.mkdir(parents=True, exist_ok=True)
        stage.write_json(folder / "config.json", settings.model_dump())
        return

    from ebm import data, reference, seeds

    device = stage.claim_device(settings.threads)
    prepared = data.read(Path("data", name))
    seeds.seed("reference", dataset.seed)
    reference.write(reference.make(settings, prepared, device), folder)


if __name__ == "__main__":
    stage.main(reference, "data set")
