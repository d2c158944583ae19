"""The model that MLflow serves: points in, energies out.

MLflow runs this file itself, from a copy beside the weights ("models from code"): nothing is ever
unpickled, and nothing of the checkout is needed, since `ebm` travels along.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

BATCH = 4096  # points in one forward pass


class Energy(PythonModel):
    """E(x) of a trained energy-based model, on the CPU: the lower, the more likely."""

    def load_context(self, context: PythonModelContext) -> None:
        from ebm import variants

        weights, config = Path(context.artifacts["weights"]), Path(context.artifacts["config"])
        self.ebm = variants.load(weights, config).eval()
        self.shape = tuple(json.loads(config.read_text(encoding="utf-8"))["shape"])

    def predict(
        self,
        context: PythonModelContext,
        model_input: np.ndarray,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """`energy` [B], in nats, of an array or a table of numbers [B, *shape], or [B, n] if a
        point consists of n numbers.

        From the hint np.ndarray MLflow concludes nothing: the logged signature decides what it
        lets through.
        """
        import torch

        points = np.asarray(model_input, dtype=np.float32)
        if len(points) and points[0].size != np.prod(self.shape):
            raise ValueError(f"a point has shape {self.shape}, not {points.shape[1:]}")
        with torch.no_grad():
            batches = torch.from_numpy(points.reshape(-1, *self.shape)).split(BATCH)
            energy = torch.cat([self.ebm.energy(batch) for batch in batches])
        return pd.DataFrame({"energy": energy.double().numpy()})


set_model(Energy())
