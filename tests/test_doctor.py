"""The doctor names what is wrong with a machine: a fault is planted for every check."""

import fcntl
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines import doctor, gpu
from pipelines.doctor import Finding
from pipelines.spool import Spool, State

ROOT = Path(__file__).resolve().parents[1]
Usage = namedtuple("Usage", "total used free")


def kinds(check, root, **environment):
    return [finding.kind for finding in check(root, environment)]


def only(check, root, **environment):
    (finding,) = check(root, environment)
    assert finding.kind != "wrong" or finding.remedy
    assert "\n" not in str(finding)
    return finding


@pytest.fixture
def dead():
    """The number of a process that is gone."""
    with subprocess.Popen(["true"]) as process:
        pass
    return process.pid


@pytest.fixture
def project(tmp_path):
    """A root with the files that describe a project."""
    for name in ("pyproject.toml", *doctor.PARAMS):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def database(project):
    """A database as the installed MLflow makes it, as far as the doctor looks."""
    known, replaced = doctor.migrations()
    (head,) = known - replaced
    with closing(sqlite3.connect(project / "mlflow.db")) as opened, opened:
        opened.execute("CREATE TABLE alembic_version (version_num TEXT)")
        opened.execute("INSERT INTO alembic_version VALUES (?)", [head])
        opened.execute("CREATE TABLE runs (name TEXT)")
        opened.executemany("INSERT INTO runs VALUES (?)", [["x" * 500]] * 100)
    return project / "mlflow.db"


def test_the_command_says_a_line_for_each_finding_soon_and_imports_nothing_heavy():
    command = [sys.executable, "-X", "importtime", "-m", "pipelines.doctor"]
    environment = {**os.environ, "EBM_DEVICE": ""}
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert time.monotonic() - started < 5, "1.5 on an idle machine"
    lines = done.stdout.splitlines()
    assert len(lines) >= len(doctor.CHECKS)
    assert all(re.match(r"ok     |note   |wrong  ", line) for line in lines)
    assert not [line for line in lines if "cannot be checked" in line]
    assert done.returncode == any(line.startswith("wrong") for line in lines)
    imported = set(re.findall(r"\| +(\w+)", done.stderr))
    assert "ebm" in imported
    assert not imported & {"torch", "mlflow", "dvc", "prefect", "numpy", "pandas"}


def test_a_sound_project_has_nothing_wrong(project, database):
    checks = [check for check in doctor.CHECKS if check not in (doctor.git, doctor.disk)]
    findings = list(doctor.examine(project, {}, checks))
    assert {finding.kind for finding in findings} <= {"ok", "note"}


@pytest.mark.parametrize(("kind", "code"), [("ok", 0), ("note", 0), ("wrong", 1)])
def test_only_what_is_wrong_makes_the_exit_code_1(kind, code, monkeypatch, capsys):
    found = [Finding(kind, "the\ndog", "feed it"), Finding("ok", "the cat")]
    monkeypatch.setattr(doctor, "examine", lambda *_: iter(found))
    assert doctor.main() == code
    assert capsys.readouterr().out == f"{kind:5}  the dog; feed it\nok     the cat\n"


def test_a_check_that_fails_is_a_finding_and_the_others_go_on(tmp_path):
    def broken(root, environment):
        raise ModuleNotFoundError("No module named 'packaging'")

    findings = list(doctor.examine(tmp_path, {}, [broken, doctor.database]))
    assert [finding.kind for finding in findings] == ["wrong", "ok"]
    assert "broken cannot be checked" in findings[0].text
    assert "'packaging'" in findings[0].text


def test_an_old_python(project, monkeypatch):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.9.20")
    assert "3.9.20 is older than 3.11" in only(doctor.python, project).text


def test_a_version_out_of_range_and_a_missing_package(project, monkeypatch):
    def version(name, true=doctor.metadata.version):
        if name == "zuko":
            raise doctor.metadata.PackageNotFoundError(name)
        return {"fastapi": "0.151.2", "torch": "2.99.0+cu130"}.get(name) or true(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    fastapi, zuko = doctor.packages(project, {})
    assert (fastapi.kind, zuko.kind) == ("wrong", "wrong")
    assert fastapi.text == "fastapi 0.151.2 is not <0.151,>=0.139"
    assert zuko.text == "zuko is not installed"
    assert fastapi.remedy == doctor.INSTALL


def test_the_ranges_hold_what_prefect_does_not_say_of_itself():
    from packaging.specifiers import SpecifierSet

    line = re.search(r'"fastapi([^"]+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert not SpecifierSet(line).contains("0.151.0")


@pytest.mark.parametrize("name", doctor.PARAMS)
@pytest.mark.parametrize("text", ["datasets: [", "datasets: 3\n"])
def test_parameters_that_cannot_be_used(project, name, text):
    (project / name).write_text(text)
    (finding,) = [f for f in doctor.params(project, {}) if f.kind == "wrong"]
    assert finding.text.startswith(f"{name} cannot be used: params.yaml: ")


def test_no_database_or_one_that_mlflow_has_still_to_fill_is_fine(tmp_path):
    assert only(doctor.database, tmp_path).kind == "ok"
    (tmp_path / "mlflow.db").touch()
    assert only(doctor.database, tmp_path).kind == "ok"


@pytest.mark.parametrize("name", ["a%2Fb", "a?b"])
def test_a_path_that_mlflow_misreads(tmp_path, name):
    (tmp_path / name).mkdir()
    wrong, fine = doctor.database(tmp_path / name, {})
    assert (wrong.kind, fine.kind) == ("wrong", "ok")
    assert "the database has a path with % or ?" in wrong.text
    assert wrong.remedy == "move the checkout"
    (fine,) = doctor.database(tmp_path / name, {"MLFLOW_TRACKING_URI": "http://host:5000"})
    assert fine.kind == "ok"


def test_a_database_of_the_installed_mlflow_is_whole(database):
    assert only(doctor.database, database.parent).kind == "ok"


def test_a_look_at_a_database_leaves_no_trace_and_sees_what_others_write(database):
    writer = sqlite3.connect(database)
    writer.execute("PRAGMA journal_mode=WAL")
    writer.execute("UPDATE alembic_version SET version_num = 'f00d'")
    writer.commit()
    assert "f00d" in only(doctor.database, database.parent).text
    writer.close()
    before = sorted(database.parent.iterdir())
    assert "f00d" in only(doctor.database, database.parent).text
    assert sorted(database.parent.iterdir()) == before


def test_a_file_that_is_no_database(database):
    database.write_text("run 1: very good\n" * 100)
    finding = only(doctor.database, database.parent)
    assert finding.text == "mlflow.db is damaged: file is not a database"


def test_a_damaged_database(database):
    content = bytearray(database.read_bytes())
    content[-6000:] = bytes(6000)
    database.write_bytes(content)
    finding = only(doctor.database, database.parent)
    assert finding.text.startswith("mlflow.db is damaged")
    assert finding.remedy == doctor.MOVE_DATABASE


def test_a_database_that_may_not_be_opened(database):
    database.unlink()
    database.mkdir()
    assert "mlflow.db cannot be read" in only(doctor.database, database.parent).text


@pytest.mark.parametrize(
    ("statement", "text", "remedy"),
    [
        ("DROP TABLE alembic_version", "is not a database of MLflow", "move it away"),
        ("DELETE FROM alembic_version", "is unknown to MLflow", "the version that wrote it"),
        ("UPDATE alembic_version SET version_num = 'f00d'", "f00d) is unknown", "wrote it"),
        ("UPDATE alembic_version SET version_num = '451aebb31d03'", "older", "db upgrade"),
    ],
)
def test_a_database_of_another_mlflow(database, statement, text, remedy):
    with closing(sqlite3.connect(database)) as opened, opened:
        opened.execute(statement)
    finding = only(doctor.database, database.parent)
    assert finding.kind == "wrong"
    assert text in finding.text
    assert remedy in finding.remedy


def test_runs_that_were_not_delivered(tmp_path):
    spool = Spool("key", tmp_path)
    descriptor = spool.open()
    os.write(descriptor, b'{"op": "start"}\n')
    assert only(doctor.spools, tmp_path).kind == "note", "a stage is writing it"
    os.close(descriptor)
    spool.save(State(problem="http://server does not take what is logged"))
    finding = only(doctor.spools, tmp_path)
    assert (finding.kind, finding.text.count("server does not take")) == ("wrong", 1)
    with (tmp_path / ".tracking/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert only(doctor.spools, tmp_path).kind == "note", "a courier delivers it"
    spool.save(State(offset=spool.events.stat().st_size))
    assert only(doctor.spools, tmp_path).kind == "ok"


def test_checkpoints_that_are_cut_short_or_half_written(tmp_path, dead):
    folder = tmp_path / ".checkpoints/meg/0123"
    folder.mkdir(parents=True)
    whole = folder / "step-0000000010.ckpt"
    with whole.open("wb") as file:
        file.write(bytes(32))  # the checksum comes first
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr("data.pkl", "weights")
    for pid in (dead, os.getpid()):
        (folder / f".step-0000000030.ckpt.{pid}").write_bytes(bytes(10))
    (rest,) = doctor.checkpoints(tmp_path, {})
    assert (rest.kind, str(dead) in rest.text) == ("note", True)
    (folder / "step-0000000020.ckpt").write_bytes(whole.read_bytes()[:-30])
    damaged, _ = doctor.checkpoints(tmp_path, {})
    assert damaged.kind == "wrong"
    assert damaged.text == ".checkpoints/meg/0123/step-0000000020.ckpt is damaged"


@pytest.mark.slow
def test_the_checkpoints_that_training_writes_are_whole(tmp_path):
    import torch

    from ebm.checkpoint import Checkpoints

    Checkpoints(tmp_path / ".checkpoints/meg").save(7, {"weights": torch.zeros(5)})
    assert only(doctor.checkpoints, tmp_path).kind == "ok"


def table(root, **content):
    (root / doctor.TABLE).write_text(json.dumps(content))


def test_a_table_of_locks_that_names_who_is_gone_is_a_note(project, dead):
    table(project, read={"/a": [{"pid": dead, "cmd": "dvc"}]}, write={})
    finding = only(doctor.locks, project)
    assert (finding.kind, str(dead) in finding.text) == ("note", True)


def test_dvc_itself_clears_such_a_table(project, dead):
    rwlock = pytest.importorskip("dvc.rwlock")
    from dvc.fs import localfs

    table(project, read={}, write={"/a": {"pid": dead, "cmd": "dvc"}})
    with rwlock.rwlock(str(project / ".dvc/tmp"), localfs, "me", ["/a"], [], False):
        pass
    assert only(doctor.locks, project).kind == "ok"


def test_who_lives_is_busy_and_not_wrong(project):
    table(project, read={}, write={"/a": {"pid": os.getpid(), "cmd": "dvc repro"}})
    with (project / ".dvc/tmp/lock").open("w") as lock:
        lock.write(" 123\n")
        lock.flush()
        assert kinds(doctor.locks, project) == ["note", "ok"]
        fcntl.flock(lock, fcntl.LOCK_EX)
        busy, entry, _ = doctor.locks(project, {})
    assert busy.text == "DVC is busy (process 123)"
    assert entry.text == f"DVC is busy: process {os.getpid()} (dvc repro)"


@pytest.mark.parametrize("text", ["", '{"read": ', "[]", '{"write": {"/a": {"cmd": "dvc"}}}'])
def test_a_table_of_locks_that_dvc_cannot_read(project, text):
    (project / doctor.TABLE).write_text(text)
    assert only(doctor.locks, project).text.endswith("is broken, and DVC refuses to work")
    with (project / f"{doctor.TABLE}.lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        (finding,) = doctor.locks(project, {})
    assert finding == doctor.note(".dvc/tmp/rwlock is being written")


@pytest.mark.parametrize(
    ("name", "gpus", "kind"),
    [("cuda", 0, "wrong"), ("cuda", 1, "ok"), ("cuda:1", 1, "wrong"), ("cuda:1", 2, "ok")],
)
def test_a_gpu_that_is_asked_for_and_is_not_there(tmp_path, monkeypatch, name, gpus, kind):
    cuda = SimpleNamespace(is_available=lambda: gpus > 0, device_count=lambda: gpus)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda, __version__="2.11"))
    assert only(doctor.device, tmp_path, EBM_DEVICE=name).kind == kind


@pytest.mark.parametrize(("usable", "kind"), [(False, "wrong"), (True, "ok")])
def test_a_gpu_that_is_there_and_pytorch_cannot_use(tmp_path, monkeypatch, usable, kind):
    """One stage at a time would wait for it, and compute on the CPU."""
    monkeypatch.setattr(gpu, "count", lambda: 1)
    cuda = SimpleNamespace(is_available=lambda: usable, device_count=lambda: 1)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda, __version__="2.11"))
    assert only(doctor.device, tmp_path).kind == kind


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:01", "0", "mps"])
def test_what_is_no_device(tmp_path, name):
    assert only(doctor.device, tmp_path, EBM_DEVICE=name).kind == "wrong"


@pytest.mark.parametrize("environment", [{}, {"EBM_DEVICE": ""}, {"EBM_DEVICE": "cpu"}])
def test_without_cuda_torch_is_not_imported(tmp_path, monkeypatch, environment):
    monkeypatch.setattr(gpu, "count", lambda: 0)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert only(doctor.device, tmp_path, **environment).kind == "ok"


def test_a_full_disk(project, monkeypatch):
    (project / ".dvc/config").write_text("[core]\n    analytics = false\n")
    (project / ".dvc/config.local").write_text("[cache]\n    dir = ../elsewhere/cache\n")
    full = {project: 50e9, project.resolve() / "elsewhere": 1.9e9}
    (project / "elsewhere").mkdir()
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: Usage(0, 0, full[folder]))
    home, cache = doctor.disk(project, {})
    assert (home.kind, cache.kind) == ("ok", "wrong")
    assert cache.text.startswith("only 1.9 GB free for DVC's cache")


def test_a_folder_that_may_not_be_written(project, monkeypatch):
    for name in ("models", "paper/metrics"):
        (project / name).mkdir()
    assert only(doctor.permissions, project).kind == "ok"
    shut = project / "paper/metrics"
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: path != shut)
    assert only(doctor.permissions, project).text == f"{shut} may not be written"


def test_no_git_and_no_repository(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    path = os.environ["PATH"]
    assert "git is not installed" in only(doctor.git, tmp_path, PATH="/nowhere").text
    assert "not a git repository" in only(doctor.git, tmp_path, PATH=path).text
    assert only(doctor.git, ROOT, PATH=path).kind == "ok"


def test_no_browser_is_only_a_note(tmp_path):
    assert only(doctor.browser, tmp_path, PATH="/nowhere", HOME=str(tmp_path)).kind == "note"
    program = tmp_path / "chromium"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert only(doctor.browser, tmp_path, PATH=str(tmp_path)).kind == "ok"
