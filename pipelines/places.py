"""Where things lie: which folder or store is meant, and what decides it.

ROOT             the checkout that this code is of: the place of the code itself
checkout()       the repository around the current folder: ROOT, or the copy of it that DVC
                 made for an experiment
main_checkout()  where runs are recorded, in mlflow.db, mlruns/ and .tracking/: DVC_ROOT, which
                 DVC sets to where it was called, also for stages in a copy; else ROOT
checkpoints()    where those of an experiment lie, each training's in a folder of its own
scratch()        what holds .checkpoints/: EBM_SCRATCH, which each trial of a
                 sweep has of its own; else DVC_ROOT; else checkout()
tracking_uri()   the store of runs: MLFLOW_TRACKING_URI; else mlflow.db in main_checkout()
"""

import os
import re
from pathlib import Path

from pipelines import ROOT


def checkout() -> Path:
    """The repository, or the copy of it that DVC made, around the current folder."""
    here = Path().resolve()
    return next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), here)


def main_checkout() -> Path:
    """The folder that holds mlflow.db, mlruns/ and .tracking/."""
    return Path(os.environ.get("DVC_ROOT") or ROOT)


def scratch() -> Path:
    """The folder that holds .checkpoints/."""
    named = os.environ.get("EBM_SCRATCH") or os.environ.get("DVC_ROOT")
    return Path(named).resolve() if named else checkout()


def checkpoints(experiment: str) -> Path:
    """The folder of the folders of checkpoints of an experiment's trainings."""
    return scratch() / ".checkpoints" / experiment


def tracking_uri() -> str:
    """The address of the store that runs go to."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{main_checkout()}/mlflow.db"


def misread(uri: str) -> str | None:
    """Why MLflow would take the database at `uri` for another, and what to do, if so."""
    if not uri.startswith("sqlite:///") or not {"%", "?"} & set(uri):
        return None
    own = os.environ.get("MLFLOW_TRACKING_URI") == uri
    advice = "name another path in MLFLOW_TRACKING_URI" if own else "move the checkout"
    return f"a path with % or ?, which MLflow reads as something else; {advice}"


def public(uri: str) -> str:
    """`uri` without this machine's paths, and without the user and the password it may hold."""
    return re.sub(r"//[^/@]*@", "//", uri).replace(f"{main_checkout()}/", "")
