"""A flow on a Dask cluster does what one machine does: once, somewhere, and it is known here."""

import contextlib
import os
import signal
import subprocess
import sys

import httpx
import psutil
import pytest
from dvc.repo import Repo
from toy_house import House, alive, built, free_port, wait_for

from ebm import EBMError
from pipelines import dag, lockfile, reproduce, run, worker
from pipelines.run import NOTHING_TO_DO, StageFailed

# DVC's dependency pygtrie warns DVC.
pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")

ALL = ["evaluate@a", "evaluate@b", "prepare", "report", "train@a", "train@b"]
slow = pytest.mark.slow


@pytest.fixture(params=["folder"])
def home(tmp_path, request):
    """A house in which no stage has run, all committed, with a remote. DVC does not cache its
    report."""
    house = House.build(tmp_path / "home")
    house.edit("dvc.yaml", "outs: [out/report]", "outs: [out/report: {cache: false}]")
    settings = {"url": str(tmp_path / "remote")}
    if request.param == "s3":
        settings = request.getfixturevalue("bucket")
    lines = "".join(f"    {name} = {value}\n" for name, value in settings.items())
    house.write(".dvc/config", f"[core]\n    remote = store\n['remote \"store\"']\n{lines}")
    house.commit()
    return house


@pytest.fixture
def bucket(monkeypatch):
    """The settings of a remote in a bucket of a server that speaks S3 and keeps nothing."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "nobody")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    address = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for(lambda: put(f"{address}/ebm"), 60)
            yield {"url": "s3://ebm/remote", "endpointurl": address}
        finally:
            server.kill()


def put(url):
    try:
        return httpx.put(url).is_success
    except httpx.TransportError:
        return False


class Cluster:
    """A scheduler, and workers in clones of a house."""

    def __init__(self, house, environment, stack):
        self.address = f"tcp://127.0.0.1:{free_port()}"
        self._house, self._environment, self._stack = house, environment, stack
        port = self.address.rpartition(":")[2]
        self._start(
            house.root,
            *("dask", "scheduler", "--preload", "pipelines.flows", "--host", "127.0.0.1"),
            *("--port", port, "--dashboard-address", "127.0.0.1:0"),
        )

    def workers(self, *names):
        """Clones with a worker in each, when these are ready, and the workers' nannies."""
        clones = [self._house.clone(self._house.root.parent / name) for name in names]
        nannies = [self._start(c.root, "pipelines.worker", self.address) for c in clones]
        for clone in clones:
            log = clone.root.with_suffix(".pipelines.worker.log")
            wait_for(lambda log=log: "Registered to" in log.read_text(), 120)
        return dict(zip(clones, nannies, strict=True))

    def _start(self, root, *module):
        with (root.parent / f"{root.name}.{module[0]}.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *module],
                cwd=root,
                env={**os.environ, **self._environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._stack.callback(end, process)
        return process

    def run(self, *arguments):
        """What the flow says, and its exit code."""
        return self._house.run(
            "--dask", self.address, *arguments, module="flows", **self._environment
        )

    def start(self, *arguments):
        return self._house.start(
            "--dask", self.address, *arguments, module="flows", **self._environment
        )


def end(process):
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def cluster(home, prefect):
    _, environment = prefect
    with contextlib.ExitStack() as stack:
        yield Cluster(home, environment, stack)


def on_one_machine(home):
    """The lock of another clone, in which the runner has run everything."""
    clone = home.clone(home.root.parent / "single")
    assert run.run(root=clone.root)
    return clone.lock()


def ran(*clones):
    return sorted(stage for clone in clones for stage in clone.ran())


def starts(*clones):
    return [event for clone in clones for event in clone.events("start", "child")]


def newest(client):
    """The newest flow run."""
    return max(client.post("/flow_runs/filter", json={}).json(), key=lambda run: run["created"])


@slow
@pytest.mark.parametrize("home", ["folder", "s3"], indirect=True)
def test_two_clones_make_together_what_one_machine_makes(home, cluster):
    """And what no remote can carry is made where the flow runs, from what they made."""
    one, two = cluster.workers("one", "two")
    code, output = cluster.run()
    assert code == 0, output
    assert ran(one, two) == sorted({*ALL} - {"report"})
    assert one.ran()
    assert two.ran()
    assert home.ran() == ["report"]
    assert home.lock() == on_one_machine(home)
    for clone in (one, two):
        assert not (clone.root / "dvc.lock").exists()
    assert NOTHING_TO_DO in cluster.run()[1].splitlines()
    with contextlib.chdir(home.root), Repo() as repo:
        repo.pull()
    assert home.status() == {}


@slow
@pytest.mark.parametrize("victim", ["worker", "nanny"])
def test_the_stage_of_a_killed_worker_runs_again_and_no_other(home, cluster, victim):
    clones = cluster.workers("one", "two")
    for clone in clones:
        clone.tell("train@a", seconds=600, child=True)
    with cluster.start() as flow:
        wait_for(lambda: starts(*clones) and "train@a" in str(starts(*clones)), 120)
        (busy,) = [clone for clone in clones if "train@a" in str(clone.events("start"))]
        lost = [pid for _, stage, _, pid in busy.events() if stage == "train@a"]
        for clone in clones:
            clone.tell("train@a")
        nanny = psutil.Process(clones[busy].pid)
        dask = [p for p in nanny.children() if "spawn_main" in " ".join(p.cmdline())]
        (dask[0] if victim == "worker" else nanny).kill()
        output, _ = flow.communicate(timeout=240)
    assert flow.returncode == 0, output
    assert not any(map(alive, lost))
    assert ran(*clones) == sorted({*ALL} - {"report"})
    assert [stage for _, stage, *_ in starts(*clones)].count("train@a") == 3  # and its child
    assert home.lock() == on_one_machine(home)


@slow
def test_a_failed_stage_is_told_as_on_one_machine_and_what_is_done_is_kept(home, cluster):
    one, two = cluster.workers("one", "two")
    for clone in (one, two):
        clone.tell("train@a", failures=1)
    code, output = cluster.run()
    assert code == 1
    assert "    ValueError: the dog ate it" in output.splitlines()
    assert "3 done, 1 failed, 2 skipped" in output
    assert sorted(home.lock()) == ["evaluate@b", "prepare", "train@b"]
    one.git("commit", "-q", "--allow-empty", "-m", "One more")
    two.git("commit", "-q", "--allow-empty", "-m", "And here")
    code, output = cluster.run()
    assert code == 1
    assert f"at commit {one.git('rev-parse', 'HEAD')[:10]}, the flow at" in output or (
        f"at commit {two.git('rev-parse', 'HEAD')[:10]}, the flow at" in output
    )


@slow
@pytest.mark.parametrize("end", ["cancel", "SIGINT", "SIGKILL"])
def test_stages_elsewhere_end_with_their_flow(home, cluster, prefect, end):
    ((clone, nanny),) = cluster.workers("one").items()
    clone.tell("prepare", seconds=600, child=True)
    with cluster.start() as flow:
        wait_for(lambda: len(starts(clone)) == 2, 120)
        if end == "cancel":
            client, _ = prefect
            run = f"/flow_runs/{newest(client)['id']}"
            state = {"state": {"type": "CANCELLING"}}
            client.post(f"{run}/set_state", json=state).raise_for_status()
        else:
            flow.send_signal(signal.Signals[end])
        wait_for(lambda: not any(alive(pid) for *_, pid in starts(clone)), 30)
        output, _ = flow.communicate(timeout=60)
    assert flow.returncode == {"cancel": 1, "SIGINT": 130, "SIGKILL": -9}[end], output
    assert nanny.poll() is None
    if end == "cancel":
        assert client.get(run).json()["state_type"] == "CANCELLED"


@slow
def test_a_cluster_without_a_worker_is_told_in_one_line(home, cluster):
    code, output = cluster.run()
    assert code == 1
    assert f"no worker at {cluster.address}; in a clone: python -m pipelines.worker" in output
    assert "Traceback" not in output


def carried(clone, name, commit, entries):
    """What becomes of a stage in a clone, as a worker runs it."""
    (stage,) = [s for s in dag.plan([name], clone.root).stages if s.name == name]
    with worker.start_launcher(clone.root, "a-flow-run") as launcher:
        job = {"commit": commit, "entries": entries}
        return worker.reproduce(stage, launcher, clone.root, print, False, job)


def test_what_one_clone_has_pushed_no_other_runs_again(home, tmp_path):
    """As when a worker is killed before it can say what it has made."""
    one, two = home.clone(tmp_path / "one"), home.clone(tmp_path / "two")
    commit = reproduce.commit(home.root)
    first = carried(one, "prepare", commit, {"prepare": None})
    second = carried(two, "prepare", commit, {"prepare": None})
    assert (first.restored, second.restored) == (False, True)
    assert first.entry == second.entry
    assert ran(one, two) == ["prepare"]


def test_a_clone_is_lent_the_entries_of_others_for_one_stage(home, tmp_path):
    """Also in another folder, with a lock of its own; what lies in the way is replaced."""
    (home.root / "paper").mkdir()
    graph = "stages:\n  train:\n    cmd: cp ../out/prepare copy\n    deps: [../out/prepare]\n"
    home.write("paper/dvc.yaml", f"{graph}    outs: [copy]\n")
    home.commit()
    one, two = home.clone(tmp_path / "one"), home.clone(tmp_path / "two")
    (two.root / "out").mkdir()
    two.write("out/prepare", "left over by a killed stage")
    commit, name = reproduce.commit(home.root), "paper/dvc.yaml:train"
    made = carried(one, "prepare", commit, {"prepare": None})
    copied = carried(two, name, commit, {name: None, "prepare": made.entry})
    assert two.git("status", "--porcelain", "--untracked-files=no", "--", "dvc.lock") == ""
    assert not list(two.root.rglob("dvc.lock"))
    for stage, entry in (("prepare", made.entry), (name, copied.entry)):
        lockfile.record(stage, entry, home.root)
    assert lockfile.entries([name, "report"], home.root) == {name: copied.entry, "report": None}
    assert dag.plan([name], home.root, made_elsewhere=True).stale == ()
    assert copied.entry["deps"][0]["md5"] == made.entry["outs"][0]["md5"]


def test_a_clone_at_another_commit_or_with_changes_refuses(home, tmp_path):
    one, commit = home.clone(tmp_path / "one"), reproduce.commit(home.root)
    one.edit("params.yaml", "seed: 0", "seed: 1")
    assert refusal(one, commit) == f"{one.root}: params.yaml is changed and not committed"
    one.commit("Another seed")
    there = one.git("rev-parse", "HEAD")[:10]
    assert refusal(one, commit) == f"{one.root} is at commit {there}, the flow at {commit[:10]}"
    assert one.ran() == []


def test_what_nobody_has_pushed_is_told(home, tmp_path):
    entry = {"cmd": "python stage.py prepare", "outs": [{"path": "out/prepare", "md5": "0" * 32}]}
    one = home.clone(tmp_path / "one")
    told = refusal(one, reproduce.commit(home.root), "train@a", prepare=entry)
    assert told == "not in the remote: out/prepare; `dvc push` where it was made"


def refusal(clone, commit, name="prepare", **entries):
    with pytest.raises(StageFailed) as refused:
        carried(clone, name, commit, {name: None, **entries})
    return refused.value.lines[-1].removeprefix("error: ")


def test_a_house_that_no_clone_could_work_for_is_told(home):
    home.edit("stage.py", "import json", "import  json")
    with pytest.raises(EBMError, match=r"^stage\.py is changed and not committed"):
        reproduce.commit(home.root)
    home.git("add", "stage.py")
    with pytest.raises(EBMError, match=r"^stage\.py is changed and not committed"):
        reproduce.commit(home.root)
    home.git("reset", "-q", "--hard")
    (home.root / "src").mkdir(exist_ok=True)
    home.write("notes.txt", "of no stage")
    home.write("src/forgotten.py", "")
    with pytest.raises(EBMError, match=r"^src/forgotten\.py is changed and not committed"):
        reproduce.commit(home.root)
    (home.root / "src" / "forgotten.py").unlink()
    home.write("dvc.lock", "schema: '2.0'\nstages: {}\n")
    assert reproduce.commit(home.root) == home.git("rev-parse", "HEAD").strip()
    home.write(".dvc/config", "")
    with pytest.raises(EBMError, match="remote") as error:
        reproduce.commit(home.root)
    assert "\n" not in str(error.value)


def test_a_table_that_no_other_clone_would_have_is_told(home):
    home.edit("dvc.yaml", "deps: [out/prepare]", "deps: [out/prepare, tables]")
    home.commit()
    (home.root / "tables").mkdir()
    home.write("tables/mine.csv", "a,b\n")
    with pytest.raises(EBMError, match=r"^tables/mine\.csv is changed and not committed"):
        reproduce.commit(home.root)


@pytest.fixture
def clone(tmp_path, tmp_path_factory):
    """A clone of a house in which every stage has run: its lock without its outputs."""
    house = built(tmp_path_factory.getbasetemp())[0].copy(tmp_path / "house")
    house.commit()
    return house.clone(tmp_path / "clone")


def stale(house):
    return [s.name for s in dag.plan(root=house.root, made_elsewhere=True).stale]


def test_outputs_that_are_not_here_make_nothing_stale(clone):
    assert len(dag.plan(root=clone.root).stale) == len(ALL)
    assert stale(clone) == []
    (clone.root / "out" / "train@a").write_text("of another time")
    assert stale(clone) == []


def test_what_the_lock_and_the_sources_say_makes_stale(clone):
    clone.edit("params.yaml", "b:\n    train: {steps: 1}", "b:\n    train: {steps: 2}")
    assert stale(clone) == ["train@b", "evaluate@b", "report"]
    clone.git("checkout", "-q", "params.yaml")
    lock = lockfile.entries(["train@a", "report"], clone.root)
    newer = {**lock["train@a"], "outs": [{**lock["train@a"]["outs"][0], "md5": "0" * 32}]}
    lockfile.record("train@a", newer, clone.root)
    assert stale(clone) == ["evaluate@a", "report"]
    clone.git("checkout", "-q", "dvc.lock")
    text = (clone.root / "dvc.lock").read_text()
    start = text.index("  report:")
    clone.write("dvc.lock", text[:start])  # the last one that ran
    assert stale(clone) == ["report"]
    lockfile.record("report", lock["report"], clone.root)
    assert (clone.root / "dvc.lock").read_text() == text


@pytest.mark.parametrize("always", ["always_changed: true", "outs: [never]"])
def test_what_has_to_run_every_time_or_has_never_run_is_stale(clone, always):
    graph = (clone.root / "dvc.yaml").read_text()
    clone.write("dvc.yaml", f"{graph}  fetch:\n    cmd: echo > never\n    {always}\n")
    assert stale(clone) == ["fetch"]


def test_what_holds_outputs_is_judged_by_what_lies_here(clone):
    """A folder of outputs has a checksum in no entry but that of its reader."""
    graph = (clone.root / "dvc.yaml").read_text()
    reader = "  page:\n    cmd: echo > page\n    deps: [out]\n    outs: [page]\n"
    clone.write("dvc.yaml", f"{graph}{reader}")
    assert stale(clone) == ["page"]


def test_only_what_dvc_caches_is_portable_and_what_reads_nothing_else(home):
    graph = (home.root / "dvc.yaml").read_text()
    reader = "  page:\n    cmd: echo > page\n    deps: [out/report]\n    outs: [page]\n"
    sender = "  send:\n    cmd: echo\n    deps: [out/prepare]\n"  # makes nothing to carry
    home.write("dvc.yaml", f"{graph}{reader}{sender}")
    stages = dag.plan(root=home.root).stages
    assert {s.name for s in stages if not s.portable} == {"report", "page", "send"}
