"""The plan is DVC's own idea of the graph and of what is stale, wherever one stands."""

import contextlib
import json
import os
import pkgutil
import signal
from pathlib import Path

import psutil
import pytest
from dvc.lock import LockError
from dvc.repo import Repo
from dvc.utils.serialize import YAMLFileCorruptedError, dumps_yaml, load_yaml
from ruamel.yaml import YAML
from toy_house import House, built

from ebm import EBMError
from pipelines import dag, lockfile, repository, reproduce, run
from pipelines.supervise import Ended, Launcher

# DVC's dependency pygtrie warns DVC.
pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")

ROOT = Path(__file__).resolve().parents[1]
ALL = ("prepare", "train@a", "train@b", "evaluate@a", "evaluate@b", "report")


@pytest.fixture
def house(tmp_path, tmp_path_factory):
    """A house in which every stage has run."""
    return built(tmp_path_factory.getbasetemp())[0].copy(tmp_path / "house")


def stale(house, *targets):
    return [stage.name for stage in dag.plan(targets, house.root).stale]


def test_stages_come_after_what_they_depend_on(house):
    stages = dag.plan(root=house.root).stages
    assert tuple(stage.name for stage in stages) == ALL
    assert [stage.upstream for stage in stages] == [
        (),
        ("prepare",),
        ("prepare",),
        ("train@a",),
        ("train@b",),
        ("evaluate@a", "evaluate@b"),
    ]
    assert stages[1].cmd == "python stage.py train a"


def test_what_has_run_is_not_stale(house):
    assert stale(house) == []
    assert house.status() == {}


def test_everything_is_stale_at_first(tmp_path):
    assert tuple(stale(House.build(tmp_path / "house"))) == ALL


@pytest.mark.parametrize(
    ("path", "old", "new", "expected"),
    [
        (
            "params.yaml",
            "b:\n    train: {steps: 1}",
            "b:\n    train: {steps: 2}",
            ["train@b", "evaluate@b", "report"],
        ),
        (
            "params.yaml",
            "{samples: 1}\n  b:",
            "{samples: 2}\n  b:",
            ["evaluate@a", "report"],
        ),
        ("params.yaml", "seed: 0", "seed: 1", list(ALL)),
        ("params.yaml", "seed: 0", "seed:  0  # a comment", []),
        ("dvc.yaml", "timeout: 60", "timeout: 61", []),
        ("stage.py", "import json", "import json ", []),
    ],
    ids=["train of b", "evaluate of a", "seed", "comment", "meta", "no dependency"],
)
def test_stale_is_what_dvc_finds_changed_and_all_downstream(house, path, old, new, expected):
    house.edit(path, old, new)
    plan = dag.plan(root=house.root)
    with contextlib.chdir(house.root), Repo() as repo:
        closure = set(repo.status())
    for stage in plan.stages:
        if closure & set(stage.upstream):
            closure.add(stage.name)
    assert [stage.name for stage in plan.stale] == expected
    assert set(expected) == closure


def test_an_output_that_is_gone_or_altered_is_stale(house):
    (house.root / "out" / "evaluate@a").unlink()
    assert stale(house) == ["evaluate@a", "report"]
    (house.root / "out" / "train@b").chmod(0o644)
    house.write("out/train@b", "tampered")
    assert stale(house) == ["train@b", "evaluate@a", "evaluate@b", "report"]


def test_names_do_not_depend_on_the_current_directory(house, monkeypatch):
    (house.root / "paper").mkdir()
    house.write("paper/dvc.yaml", "stages:\n  train:\n    cmd: echo\n    deps: [../out/train@a]\n")
    expected = ["prepare", "train@a", "paper/dvc.yaml:train"]
    for folder in ("/", house.root, house.root / "paper"):
        monkeypatch.chdir(folder)
        for target in ("paper/dvc.yaml", "paper/dvc.yaml:train", "paper/*"):
            stages = dag.plan([target], house.root).stages
            assert [stage.name for stage in stages] == expected
    for targets in ([], ["*"]):
        assert tuple(stage.name for stage in dag.plan(targets, house.root).stages) == ALL


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["train@b"], ["prepare", "train@b"]),
        (["train"], ["prepare", "train@a", "train@b"]),
        (["*@a"], ["prepare", "train@a", "evaluate@a"]),
        (["evaluate@b", "prepare"], ["prepare", "train@b", "evaluate@b"]),
        (["dvc.yaml"], list(ALL)),
    ],
)
def test_targets_come_with_all_they_need(house, targets, expected):
    assert [stage.name for stage in dag.plan(targets, house.root).stages] == expected


def test_a_frozen_stage_is_cut_off_from_what_is_upstream(house):
    house.edit("dvc.yaml", "    cmd: python stage.py report", "    frozen: true\n    cmd: echo")
    house.edit("params.yaml", "seed: 0", "seed: 1")
    stages = {stage.name: stage for stage in dag.plan(root=house.root).stages}
    assert stages["report"].upstream == ()
    assert [stage.name for stage in dag.plan(["report"], house.root).stages] == ["report"]
    assert stages["evaluate@a"].stale


def test_hints_are_read(house):
    prepare, train, *_ = dag.plan(root=house.root).stages
    assert (prepare.timeout, prepare.retries) == (None, 0)
    assert (train.timeout, train.retries) == (60, 0)
    assert (prepare.gpu, train.gpu) == (False, False)
    house.edit("dvc.yaml", "retries: 0", "retries: 0, gpu: true")
    assert [stage.gpu for stage in dag.plan(root=house.root).stages][:3] == [False, True, True]
    assert stale(house) == []


@pytest.mark.parametrize(
    ("path", "old", "new", "told"),
    [
        ("dvc.yaml", "timeout: 60", "timeout: 1h", "dvc.yaml: train@a: meta.timeout: '1h'"),
        ("dvc.yaml", "retries: 0", "retries: -1", "dvc.yaml: train@a: meta.retries: -1"),
        ("dvc.yaml", "retries: 0", "gpu: 1", "dvc.yaml: train@a: meta.gpu: 1 is neither"),
        ("dvc.yaml", "foreach: ${experiments}\n    do:\n      cmd: python stage.py train",
         "foreach: ${trials}\n    do:\n      cmd: python stage.py train", "trials"),
        ("dvc.yaml", "params: [seed]", "parms: [seed]", "parms"),
        ("dvc.yaml", "params: [seed]", "params: [seed", "dvc.yaml"),
        ("dvc.yaml", "params: [seed]", "deps: [out/report]", "both a dependency and an output"),
        ("params.yaml", "seed: 0", "seed: [", "params.yaml"),
    ],
)  # fmt: skip
def test_a_broken_graph_is_told_in_one_line(house, path, old, new, told):
    house.edit(path, old, new)
    with pytest.raises(EBMError) as error:
        dag.plan(root=house.root)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_target_is_told_with_a_suggestion(house):
    with pytest.raises(EBMError, match=r"^no stage matches 'trian'; did you mean 'train'\?$"):
        dag.plan(["trian"], house.root)
    with pytest.raises(EBMError, match=r"^no stage matches 'xyz'$"):
        dag.plan(["xyz"], house.root)


def test_no_repository_and_no_graph_are_told(tmp_path, house):
    with pytest.raises(EBMError, match=r"not.* DVC repository"):
        dag.plan(root=tmp_path)
    (house.root / "dvc.yaml").unlink()
    with pytest.raises(EBMError, match=r"no stage matches 'dvc\.yaml'"):
        dag.plan(root=house.root)


def test_a_stage_that_somebody_else_runs_is_told(house):
    """As when a stage is being run by `dvc repro` in another terminal."""
    house.edit("params.yaml", "seed: 0", "seed: 1")
    somebody = {"pid": psutil.Process().ppid(), "cmd": "dvc repro"}
    lock = {"write": {str(house.root / "out" / "prepare"): somebody}, "read": {}}
    (house.root / ".dvc" / "tmp" / "rwlock").write_text(json.dumps(lock))
    with pytest.raises(EBMError, match=r"out/prepare' is busy.*PID \d+.*dvc repro") as error:
        dag.plan(root=house.root)
    assert "\n" not in str(error.value)


def test_to_wait_for_another_run_does_not_count_as_work(monkeypatch):
    """Of a stage that has only so many seconds."""
    restarts = []
    monkeypatch.setattr(repository, "restart_clock", lambda: restarts.append(None))
    monkeypatch.setattr(repository, "PATIENCE_SECONDS", 0)
    assert repository.when_free(busy(3)) == "done"
    assert len(restarts) == 3


def busy(times):
    """What does its work when others have been at it so many times."""
    others = iter(range(times))

    def work(*_):
        for _ in others:
            raise EBMError("busy") from LockError("blocked by: (PID 1)")
        return "done"

    return work


def test_a_stage_of_a_flow_on_a_cluster_waits_as_well(house, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(house.root)
    monkeypatch.setattr(repository, "PATIENCE_SECONDS", 0)
    monkeypatch.setattr(reproduce, "_prepare_process", lambda: None)
    monkeypatch.setattr(reproduce, "_check_commit", lambda *_: None)
    monkeypatch.setattr(reproduce, "_carry", busy(2))
    (job := tmp_path / "job").write_text(json.dumps({"commit": "", "entries": None}))
    assert reproduce.travel("prepare", False, str(job)) in (0, reproduce.RESTORED)
    assert (
        json.loads(job.read_text())["entry"]
        == lockfile.entries(["prepare"], house.root)["prepare"]
    )
    assert capsys.readouterr().err.count("waiting for another run") == 1


def interruptible():
    """A launcher's target."""
    reproduce.reproducer()
    return interrupted


def interrupted(root, owner, name, lost=""):
    """Reproduce `prepare`, and get SIGINT when DVC calls owner.name; the exception may be `lost`
    there."""
    os.chdir(root)
    place = pkgutil.resolve_name(owner)
    method = getattr(place, name)

    def call(*args, **kwargs):
        setattr(place, name, method)
        with contextlib.suppress(KeyboardInterrupt) if lost else contextlib.nullcontext():
            os.kill(os.getpid(), signal.SIGINT)
        return method(*args, **kwargs)

    setattr(place, name, call)
    return reproduce.reproduce("prepare", False)


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    house, _ = built(tmp_path_factory.getbasetemp())
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT / 'src'}"}
    with Launcher("test_dag:interruptible", house.root, environment) as launcher:
        yield launcher


@pytest.mark.parametrize(
    ("owner", "name", "recorded"),
    [
        ("pathlib:Path", "replace", False),
        ("dpath.segments", "fnmatchcase", False),  # within an `except` that swallows everything
        ("dvc.stage:Stage", "remove_outs", False),
        ("dvc.stage:Stage", "save", True),
        ("dvc.dvcfile:Lockfile", "dump_stages", True),
    ],
)
def test_sigint_costs_no_result_and_breaks_none_of_dvcs_files(
    house, launcher, owner, name, recorded
):
    """Before the command has run, there is nothing to lose."""
    house.edit("params.yaml", "seed: 0", "seed: 1")
    process = launcher.start(str(house.root), owner, name)
    said = list(process.lines())
    assert process.wait() == Ended(0 if recorded else 130), said
    assert (house.ran() == ["prepare"]) == recorded
    (prepare,) = dag.plan(["prepare"], house.root).stages
    assert prepare.stale != recorded


def test_sigint_whose_exception_is_lost_keeps_the_command_from_beginning(house, launcher):
    house.edit("params.yaml", "seed: 0", "seed: 1")
    process = launcher.start(str(house.root), "dvc.stage:Stage", "remove_outs", "lost")
    said = list(process.lines())
    assert process.wait() == Ended(130), said
    assert house.ran() == []


def test_sources_are_what_no_stage_makes_and_tell_of_an_edit(house):
    house.edit("dvc.yaml", "deps: [out/prepare]", "deps: [out/prepare, code, stage.py]")
    (house.root / "code").mkdir()
    house.write("code/a.py", "1")
    before = dag.sources(["train@a", "evaluate@a"], house.root)
    assert before.keys() == {"code", "stage.py"}
    assert dag.sources(["evaluate@a"], house.root) == {}
    house.write("code/a.py", "2")
    after = dag.sources(["train@a"], house.root)
    assert after["code"] != before["code"]
    assert after["stage.py"] == before["stage.py"]


def test_a_table_of_locks_that_a_killed_process_left_broken_stops_nobody(house):
    house.write(".dvc/tmp/rwlock", '{"write": {')
    assert dag.plan(root=house.root).stale == ()


@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_a_truncated_dvc_lock_loses_no_result(house, kept):
    """As a full disk may leave it. It can be removed, if one is not even told to."""
    lock = (house.root / "dvc.lock").read_text()
    house.write("dvc.lock", lock[: int(kept * len(lock))])
    if not kept:
        with pytest.raises(EBMError, match=r"dvc\.lock.*remove it or `git checkout` it"):
            dag.plan(root=house.root)
        (house.root / "dvc.lock").unlink()
    assert run.run(root=house.root)
    assert house.ran() == []
    assert YAML(typ="safe").load(house.root / "dvc.lock") == YAML(typ="safe").load(lock)


def test_wherever_a_dvc_lock_was_cut_off_it_takes_another_entry(house, tmp_path):
    lock, file = (house.root / "dvc.lock").read_text(), tmp_path / "dvc.lock"
    readable = 0
    for cut in range(len(lock) // 2, len(lock)):
        file.write_text(lock[:cut])
        try:
            expected = load_yaml(file)
        except YAMLFileCorruptedError:
            continue
        readable += 1
        expected["stages"]["new"] = {"cmd": "x"}
        with lockfile.modified(str(file)) as content:
            content["stages"]["new"] = {"cmd": "x"}
        assert load_yaml(file) == expected
    assert readable > 10


ODD = {
    "cmd": "a: 'b' # c" + " d" * 60,
    "params": {"p": [None, {"q": None}, "", "2024-01-01", "1e3", 1e-5, 1e22, True, "yes"]},
    "lines": ["one\ntwo: \n\n  three", "\n  four\n", "- ", "~", "null", "é", "x" * 200],
}


@pytest.mark.parametrize("path", ["dvc.lock", "paper/dvc.lock"])
@pytest.mark.parametrize("key", [0, -1, "more@odd", "a: b"])
def test_an_entry_of_dvc_lock_is_changed_to_the_text_that_dvc_writes(path, key, tmp_path):
    lock = load_yaml(ROOT / path)
    name = key if isinstance(key, str) else list(lock["stages"])[key]
    file = tmp_path / "dvc.lock"
    file.write_text(dumps_yaml(lock))
    with lockfile.modified(str(file)) as content:
        content["stages"].update({name: ODD})
    lock["stages"][name] = ODD
    assert file.read_text() == dumps_yaml(lock)
    with lockfile.modified(str(file)) as content:
        del content["stages"][name]
    del lock["stages"][name]
    assert file.read_text() == dumps_yaml(lock)


@pytest.mark.parametrize(
    "before",
    [
        "",
        "schema: '2.0'\nstages: {}\n",
        "schema: '2.0'\nstages: {a: {cmd: x}}\n",
        "schema: '2.0'\nstages:\n    a:\n      cmd: x\n",
        "schema: '2.0'\nstages:\n  a:\n    cmd: x\ndatasets:\n  - name: x\n",
        "stages:\n  a:\n    cmd: x\nschema: '2.0'\n",
    ],
)
def test_a_dvc_lock_of_another_layout_loses_nothing(before, tmp_path):
    file = tmp_path / "dvc.lock"
    file.write_text(before)
    expected = YAML(typ="safe").load(before) or {"schema": "2.0"}
    expected["stages"] = expected.get("stages", {}) | {"b": ODD}
    with lockfile.modified(str(file)) as content:
        content["stages"] = content.get("stages", {}) | {"b": ODD}
    assert load_yaml(file) == expected


def test_metrics_and_plots_are_declared_to_dvc():
    """`dvc metrics show` reads the numbers that stand in git; the curves are its plots."""
    with Repo(ROOT) as repo:
        data = repo.metrics.show()[""]["data"]
    assert data["metrics/rbm-digits.json"]["data"]["log_likelihood"] < 0
    stage = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]["report"]
    assert "reports/curves" in stage["plots"][0]


def test_the_stages_that_ask_for_a_device_are_those_that_say_so():
    """What asks is the module of the stage; what says so is `meta` in both graphs."""
    asking = {
        file.stem
        for file in (ROOT / "pipelines").glob("*.py")
        if "stage.claim_device(" in file.read_text()
    }
    for graph in ("dvc.yaml", "paper/dvc.yaml"):
        stages = YAML(typ="safe").load(ROOT / graph)["stages"]
        bodies = {name: stage.get("do", stage) for name, stage in stages.items()}
        assert {n for n, body in bodies.items() if body["meta"].get("gpu")} == asking & set(bodies)
