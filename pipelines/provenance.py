"""Where results come from: the commit, the parameters, the seed, the machine."""

import logging
import platform
import subprocess
from datetime import UTC, datetime
from typing import Any

from pipelines import stage

CODE = "src", "pipelines"
"""Folders whose files make results, whether or not git was told of them."""

_RECORDS = [  # what a run itself changes
    f":(top,exclude,glob)**/{name}" for name in ("dvc.lock", "metrics/**", "reports/**")
]


def git_state() -> dict[str, Any]:
    """Commit of the checkout, and whether tracked files or any of the code differ from it; without
    a word of git's no commit says what the code is."""
    status = "status", "--porcelain"
    try:
        commit = _git("rev-parse", "--verify", "HEAD")
        changed = _git(*status, "--untracked-files=no", "--", ":/", *_RECORDS)
        new = _git(*status, "--untracked-files=normal", "--", *(f":/{folder}" for folder in CODE))
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().partition("\n")[0]
        logging.getLogger(__name__).warning("results are traced to no commit: %s", said)
        return {"git_commit": "none", "git_dirty": True}
    return {"git_commit": commit, "git_dirty": bool(changed or new)}


def git_tags(state: dict[str, Any]) -> dict[str, str]:
    """What `git_state` says, as the tags of a tracked run."""
    return {"git.commit": state["git_commit"], "git.dirty": str(state["git_dirty"]).lower()}


def record(settings: dict[str, Any], device: str) -> dict[str, Any]:
    """Where results that are made of `settings` on `device` from now on come from."""
    import torch

    return {
        "seed": settings["seed"],
        "threads": settings["threads"],
        **git_state(),
        "device": hardware(device),
        "params_sha256": stage.digest(settings),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def hardware(device: str) -> str:
    """The name of the GPU, or the instructions of the CPU, on which the last bits depend."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu ({torch.backends.cpu.get_cpu_capability()})"


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    return result.stdout.strip()
