"""What every stage shares: errors in one line, checkpoints that outlive what cannot matter."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ebm import EBMError
from pipelines import evaluate, places, train

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("module", "same"),
    [("ebm.variants.toy_config", True), ("ebm.schema", True), ("ebm.toy", False)],
)
def test_code_that_cannot_change_a_result_throws_no_checkpoint_away(
    tmp_path, monkeypatch, module, same
):
    file = tmp_path / "module.py"
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(__file__=str(file)))
    prepared = SimpleNamespace(manifest={"sha256": "0"})
    folders = []
    for text in ("1", "2"):
        file.write_text(text)
        folders.append(train._checkpoint_folder("toy", {}, prepared, "cpu"))
    assert (folders[0] == folders[1]) == same


def test_a_stage_by_hand_has_its_checkpoints_in_the_checkout(tmp_path, monkeypatch):
    (tmp_path / "paper").mkdir()
    monkeypatch.chdir(tmp_path / "paper")
    monkeypatch.delenv("DVC_ROOT", raising=False)
    assert places.scratch() == tmp_path / "paper"
    (tmp_path / ".dvc").mkdir()
    assert places.scratch() == places.checkout() == tmp_path
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "paper"))
    assert places.scratch() == tmp_path / "paper"
    monkeypatch.setenv("EBM_SCRATCH", str(tmp_path / "trial"))
    assert places.scratch() == tmp_path / "trial"
    assert places.checkout() == tmp_path


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "another"])
def test_a_damaged_sample_file_is_one_line(tmp_path, damage):
    path = tmp_path / "samples.npz"
    np.savez_compressed(path, samples=np.arange(10_000.0))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    half = path.read_bytes()[: len(raw) // 2]
    path.write_bytes({"empty": b"", "truncated": half, "flipped": raw, "another": b"#"}[damage])
    with pytest.raises(EBMError, match=r"samples\.npz: not a usable sample file .*; sample again"):
        evaluate._samples(path)


def test_checkpoints_are_of_one_configuration_one_data_set_and_one_kind_of_device(monkeypatch):
    cards = iter(["one", "another"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: next(cards))

    def folder(steps=1, sha256="0", device="cpu"):
        prepared = SimpleNamespace(manifest={"sha256": sha256})
        return train._checkpoint_folder("toy", {"steps": steps}, prepared, device)

    assert folder() == folder()
    on_cards = [folder(device="cuda") for _ in range(2)]
    assert len({folder(), folder(steps=2), folder(sha256="1"), *on_cards}) == 5


@pytest.mark.parametrize("name", ["report", "samplers", "train"])
@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("--hlep", 2)])
def test_who_asks_a_stage_what_it_does_does_not_run_it(tmp_path, name, argument, code):
    asked = [sys.executable, "-m", f"pipelines.{name}", argument]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        asked, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == code, found.stderr
    assert f"Stage `{name}" in found.stdout if code == 0 else "usage" in found.stderr
    assert not list(tmp_path.iterdir())
