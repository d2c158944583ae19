"""Results are traced to a commit, or it is said that they are not."""

import subprocess
from functools import partial
from pathlib import Path

import pytest

from pipelines import provenance


@pytest.mark.parametrize("path", [None, "/nowhere"])
def test_where_git_says_nothing_no_commit_is_believed(tmp_path, monkeypatch, caplog, path):
    """No repository, one that git does not trust, or no git at all."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    if path:
        monkeypatch.setenv("PATH", path)
    assert provenance.git_state() == {"git_commit": "none", "git_dirty": True}
    assert "traced to no commit: " + ("[Errno 2]" if path else "fatal: not a git") in caplog.text


@pytest.mark.parametrize("place", [".", "paper"])
def test_a_checkout_is_dirty_by_what_a_run_does_not_write(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    git = partial(subprocess.run, check=True, capture_output=True)
    git(["git", "init"])
    for name in ("dvc.lock", "metrics/a.json", "reports/figures/a.png", "params.yaml"):
        path = Path(place, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")
    git(["git", "add", "."])
    git(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "all"])
    for name in ("dvc.lock", "metrics/a.json", "reports/figures/a.png"):
        Path(place, name).write_text("2")
    Path("src").mkdir()
    assert not provenance.git_state()["git_dirty"]
    Path("src/forgotten.py").write_text("1")
    assert provenance.git_state()["git_dirty"]
    Path("src/forgotten.py").unlink()
    Path(place, "params.yaml").write_text("2")
    assert provenance.git_state()["git_dirty"]
