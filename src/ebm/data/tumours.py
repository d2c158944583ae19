"""scikit-learn's 569 breast tumours (Street, Wolberg & Mangasarian 1993), which need no download:
30 measures of the nuclei of cells, and a diagnosis. The 357 benign ones are what is learned, the
212 malignant ones are the anomalies."""

import torch

from ebm.data import table
from ebm.data.made import Made
from ebm.data.shares import by_class
from ebm.data.transform import fit
from ebm.schema import TumoursData

SOURCE = "scikit-learn load_breast_cancer"
KINDS = {0: (SOURCE, "benign tumours"), 1: (SOURCE, "malignant tumours")}


def prepare(settings: TumoursData) -> Made:
    """Splits float32 [N, 30], each diagnosis in the same shares, with rows of the collection and,
    but for train, labels; the notes say how many anomalies are where."""
    from sklearn.datasets import load_breast_cancer

    bunch = load_breast_cancer(as_frame=True)
    malignant = list(bunch.target_names).index("malignant")
    anomaly = torch.from_numpy((bunch.target == malignant).to_numpy(copy=True))
    shares = settings.validation, settings.test
    index = by_class(anomaly.long(), KINDS, *shares, settings.seed, unlearned=[1])
    transform = fit(bunch.data.iloc[index["train"].numpy()], [], settings.scale, SOURCE)
    tensors = table.splits(bunch.data, anomaly, index, transform, SOURCE)
    notes = table.counts(anomaly, index)
    return Made(SOURCE, tensors, notes=notes, transform=transform.to_json())
