"""What every stage shares: errors in one line, checkpoints that outlive what cannot matter."""

import errno
import os
import sys
from types import SimpleNamespace

import pytest

from pipelines import stage, train


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


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_what_the_system_refuses_is_one_line(number):
    def run():
        raise OSError(number, os.strerror(number), "models/toy")

    with pytest.raises(SystemExit, match=f"error: models/toy: {os.strerror(number)}"):
        stage.guarded(run)
