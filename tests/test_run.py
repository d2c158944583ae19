"""The runner does what `dvc repro` would, side by side, and however it ends leaves nothing."""

import errno
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML
from toy_house import House, alive, built, wait_for

from pipelines import dag, gpu, repository, run
from pipelines.dag import Stage
from pipelines.timeline import Result

# DVC's dependency pygtrie warns DVC.
pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")

ALL = ["prepare", "train@a", "train@b", "evaluate@a", "evaluate@b", "report"]
slow = pytest.mark.slow


@pytest.fixture
def house(tmp_path, tmp_path_factory):
    """A house in which both trainings, and what is downstream, are stale."""
    house = built(tmp_path_factory.getbasetemp())[0].copy(tmp_path / "house")
    params = (house.root / "params.yaml").read_text()
    house.write("params.yaml", params.replace("steps: 1", "steps: 2"))
    return house


def stage(name, *upstream, **hints):
    return Stage(name, "true", upstream, stale=True, **hints)


def scheduled(stages, jobs, failing=(), keep_going=True, seconds=float, gpus=0):
    """Results by stage, and [start, end] by stage of those that ran, in the order they started."""
    ran = {}

    def work(stage):
        ran[stage.name] = [time.monotonic()]
        time.sleep(seconds())
        ran[stage.name].append(time.monotonic())
        return Result(stage.name, "failed" if stage.name in failing else "done")

    with ThreadPoolExecutor(jobs) as pool:
        results = list(run.schedule(stages, work, pool, jobs, keep_going, gpus))
    assert sorted(result.stage for result in results) == sorted(stage.name for stage in stages)
    return {result.stage: result for result in results}, ran


def most_at_once(intervals):
    intervals = list(intervals)
    return max(sum(s <= moment < e for s, e in intervals) for moment, _ in intervals)


@pytest.mark.parametrize("seed", range(25))
def test_any_graph_runs_in_order_side_by_side_and_as_far_as_failures_let_it(seed):
    rng = random.Random(seed)
    names = [f"s{number}" for number in range(30)]
    stages = [
        stage(name, *rng.sample(names[:index], rng.randint(0, min(index, 2))))
        for index, name in enumerate(names)
    ]
    failing, jobs = set(rng.sample(names, rng.randint(0, 3))), rng.randint(1, 5)
    results, ran = scheduled(stages, jobs, failing, seconds=lambda: rng.random() / 500)
    for one in stages:
        hopeless = any(results[name].outcome != "done" for name in one.upstream)
        expected = "skipped" if hopeless else "failed" if one.name in failing else "done"
        assert results[one.name].outcome == expected
        assert (one.name in ran) == (not hopeless)
        if not hopeless:
            assert all(ran[name][1] <= ran[one.name][0] for name in one.upstream)
    assert most_at_once(ran.values()) <= jobs


def test_no_place_is_left_empty_and_none_is_taken_by_waiting():
    chains = [[stage(f"{c}1"), stage(f"{c}2", f"{c}1"), stage(f"{c}3", f"{c}2")] for c in "abcd"]
    stages = [chain[level] for level in range(3) for chain in chains]
    started = time.monotonic()
    _, ran = scheduled(stages, jobs=4, seconds=lambda: 0.2)
    assert time.monotonic() - started < 0.9
    assert most_at_once(ran.values()) == 4


@pytest.mark.parametrize(("gpus", "at_once"), [(1, 1), (2, 2), (0, 4)])
def test_as_many_stages_use_a_gpu_as_there_are_and_others_run_beside_them(gpus, at_once):
    """Without a GPU they are stages like the others."""
    learn = [stage(f"train{number}", gpu=True) for number in range(4)]
    other = [stage(f"prepare{number}") for number in range(4)]
    _, ran = scheduled([*learn, *other], jobs=4, seconds=lambda: 0.1, gpus=gpus)
    assert most_at_once(ran[one.name] for one in learn) == at_once
    assert most_at_once(ran.values()) == 4


def test_what_comes_first_in_the_plan_starts_first():
    stages = [stage("a"), stage("b"), stage("c"), stage("after a", "a")]
    assert list(scheduled(stages, jobs=1)[1]) == ["a", "b", "c", "after a"]


def test_a_skipped_stage_names_the_failure_that_is_to_blame():
    results, _ = scheduled([stage("a"), stage("b", "a"), stage("c", "b")], 2, failing=["a"])
    assert [str(result) for result in results.values()][1:] == [
        "skipped b: a failed",
        "skipped c: a failed",
    ]


def test_without_keep_going_nothing_starts_after_a_failure():
    stages = [stage("a"), stage("b"), stage("c", "b")]
    results, ran = scheduled(stages, 1, failing=["a"], keep_going=False)
    assert list(ran) == ["a"]
    assert [results[name].outcome for name in "bc"] == ["skipped", "skipped"]


def test_upstream_stages_that_are_up_to_date_are_not_waited_for():
    assert list(scheduled([stage("b", "a")], 1)[1]) == ["b"]


def test_a_run_says_what_happens(tmp_path_factory):
    house, output = built(tmp_path_factory.getbasetemp())
    lines = output.splitlines()
    assert lines[0] == "6 of 6 stages to run, 2 at a time"
    assert lines.index("start prepare") < lines.index("start train@a")
    assert "train@b | 100%" in lines
    assert sum("done" in line and line.startswith("[") for line in lines) == 6
    assert lines[-1].startswith("6 done, 0 failed, 0 skipped in ")
    assert "git add" not in output, "DVC's advice after every stage"
    assert "100%" in (house.root / ".checkpoints/logs/train@b.log").read_text().splitlines()


def test_what_dvc_restores_from_its_cache_is_said_to_be_restored(house, capsys):
    assert run.run(["train@a"], root=house.root)
    (house.root / "out" / "train@a").unlink()
    house.forget()
    assert run.run(["evaluate@a"], root=house.root)
    assert house.ran() == ["evaluate@a"]
    done = [line for line in capsys.readouterr().out.splitlines() if " done " in line]
    assert [line.endswith(": restored, not run") for line in done] == [False, True, False]


def test_a_result_says_when_and_where_it_began():
    begun, before = run.begin(stage("a")), time.time()
    time.sleep(0.05)
    result = begun("done")
    assert result.started == pytest.approx(before, abs=0.04)
    assert result.seconds >= 0.05
    assert result.worker == socket.gethostname()
    assert begun("done", worker="elsewhere").worker == "elsewhere"


def test_what_is_up_to_date_ends_soon(tmp_path_factory):
    house, _ = built(tmp_path_factory.getbasetemp())
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code, output = house.run()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (code, output) == (0, f"{run.NOTHING_TO_DO}\n")
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert cpu_seconds < 4, "so that it takes less than five, start to end"


def test_a_failure_ends_what_depends_on_it_and_the_next_run_mends_it(house):
    house.tell("train@a", failures=1)
    code, output = house.run("-j2")
    assert code == 1
    assert house.ran() == ["train@b", "evaluate@b"]
    last = output[output.rindex("failed train@a after") :].splitlines()
    assert "    ValueError: the dog ate it" in last
    assert last[-1].startswith("2 done, 1 failed, 2 skipped in ")
    for name in ("evaluate@a", "report"):
        assert f"skipped {name}: train@a failed" in output
    house.forget()
    house.tell("train@a")
    assert run.run(root=house.root)
    assert house.ran() == ["train@a", "evaluate@a", "report"]
    kept = (house.root / ".checkpoints/logs/train@a.log").read_text()
    assert kept.count("ValueError: the dog ate it") == 1


def test_checkpoints_of_a_training_stay_until_dvc_has_recorded_what_came_of_it(house):
    house.tell("train@a", ends=True, breaks_cache=True)
    kept, cache = house.root / ".checkpoints/a/0/ended", house.root / ".dvc/cache"
    assert not run.run(["train@a"], root=house.root)
    assert house.ran() == ["train@a"]
    assert kept.exists()
    cache.unlink()
    (house.root / ".dvc/away").rename(cache)
    house.tell("train@a", ends=True)
    assert run.run(["train@a"], root=house.root)
    assert not kept.exists()


def test_a_log_that_cannot_be_written_ends_no_stage(house, capsys):
    log = run.log_path(stage("train@a"), house.root)
    log.unlink(missing_ok=True)
    log.symlink_to("/dev/full")
    house.tell("train@a", prints="one\ntwo")
    assert run.run(["train@a"], root=house.root)
    shown = capsys.readouterr().out
    assert "train@a | two" in shown
    assert shown.count("train@a | the log ends here: [Errno 28]") == 1


@pytest.mark.parametrize("force", [False, True])
def test_what_is_edited_while_a_stage_runs_makes_it_stale(house, force):
    """DVC itself would take the new parameters for those that the old results were made with."""
    if force:
        assert run.run(["train@a"], root=house.root)
        house.forget()
    house.tell("train@a", seconds=1.5)

    def edit():
        wait_for(lambda: "train@a" in [name for _, name, *_ in house.events("start")], 60)
        house.edit("params.yaml", "  a:\n    train: {steps: 2}", "  a:\n    train: {steps: 3}")

    with ThreadPoolExecutor(1) as pool:
        edited = pool.submit(edit)
        assert run.run(["train@a"], force=force, root=house.root)
    edited.result()
    (entered,) = house.lock()["train@a"]["params"].values()
    assert entered == {"experiments.a.train": {"steps": 2}}
    assert dag.plan(["train@a"], house.root).stages[-1].stale
    house.edit("params.yaml", "{steps: 3}", "{steps: 2}")
    assert not dag.plan(["train@a"], house.root).stages[-1].stale


def test_a_full_disk_leaves_the_table_of_locks_as_it_was(tmp_path, monkeypatch):
    """What others are at work on stands there; in the middle of a stage nobody mends it."""
    from dvc.fs import localfs

    table = tmp_path / "rwlock"
    with repository.edited_rwlock(str(tmp_path), localfs, False) as lock:
        lock["read"]["/a"] = [{"pid": 1, "cmd": "x"}]
    before = table.read_bytes()
    monkeypatch.setattr(Path, "replace", full_disk)
    again = repository.edited_rwlock(str(tmp_path), localfs, False)
    with pytest.raises(OSError, match="No space"), again as lock:
        lock["read"].clear()
    assert table.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} <= {"rwlock", "rwlock.lock"}


@pytest.mark.parametrize("table", ["[]", '{"write": {"/a": {"cmd": "dvc"}}}', "{"])
def test_a_table_of_locks_that_is_none_is_told_in_dvc_s_words(tmp_path, table):
    from dvc.exceptions import DvcException
    from dvc.fs import localfs

    (tmp_path / "rwlock").write_text(table)
    edited = repository.edited_rwlock(str(tmp_path), localfs, False)
    with pytest.raises(DvcException, match="RWLock-file"), edited:
        pass


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_params_are_checked_that_the_targets_read(tmp_path):
    """And no others: what is wrong with those concerns nobody now."""
    for folder in (tmp_path, tmp_path / "paper"):
        folder.mkdir(exist_ok=True)
        (folder / "params.yaml").touch()
    own, paper = tmp_path / "params.yaml", tmp_path / "paper/params.yaml"
    assert run._params_of([], tmp_path) == {own}
    assert run._params_of(["train", "*@meg-*"], tmp_path) == {own}
    assert run._params_of(["paper/dvc.yaml"], tmp_path) == {paper}
    both = ["paper/dvc.yaml:train@a", "train@b", "nowhere/dvc.yaml"]
    assert run._params_of(both, tmp_path) == {own, paper}


def test_only_what_the_targets_need_runs_but_forced_even_if_up_to_date(house):
    assert run.run(["train@b"], force=True, root=house.root)
    assert house.ran() == ["prepare", "train@b"]


def test_hints_limit_the_time_and_allow_other_attempts(house, capsys):
    house.edit("dvc.yaml", "timeout: 60, retries: 0", "timeout: 2, retries: 1")
    house.tell("train@a", failures=1)
    house.tell("train@b", seconds=600, child=True)
    assert not run.run(["train"], jobs=2, root=house.root)
    output = capsys.readouterr().out
    assert "retry train@a: exit code 1" in output
    assert "failed train@b" in output
    assert "time limit reached" in output
    assert house.ran() == ["train@a"]
    assert len(house.events("child")) == 2
    assert not any(alive(pid) for *_, pid in house.events())


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        (signal.SIGINT, 130),
        (signal.SIGKILL, -9),
        pytest.param(signal.SIGTERM, 143, marks=slow),
        pytest.param(signal.SIGHUP, 129, marks=slow),
    ],
)
def test_a_runner_that_is_ended_leaves_nothing_and_the_next_run_works(house, ends, code):
    for name in ("train@a", "train@b"):
        house.tell(name, seconds=600, child=True)
    with house.start("-j2") as runner:
        wait_for(lambda: len(house.events("start")) == 2, 30)
        everything = [process.pid for process in psutil.Process(runner.pid).children(True)]
        runner.send_signal(ends)
        output, _ = runner.communicate(timeout=15)
    assert runner.returncode == code
    assert not any(line.startswith("Traceback") for line in output.splitlines())
    pids = [*everything, *(pid for *_, pid in house.events())]
    wait_for(lambda: not any(map(alive, pids)), 15)
    for name in ("train@a", "train@b"):
        house.tell(name)
    assert run.run(root=house.root)
    assert sorted(house.ran()) == sorted(ALL[1:])
    assert not dag.plan(root=house.root).stale


def test_ctrl_c_while_dvc_starts_lets_no_stage_begin(house):
    with house.start("-j2") as runner:
        wait_for(lambda: "start train@a" in runner.stdout.readline(), 30)
        started = time.monotonic()
        runner.send_signal(signal.SIGINT)
        runner.communicate(timeout=15)
    assert runner.returncode == 130
    assert time.monotonic() - started < 5, "it had to be forced"
    assert not house.events()


@slow
def test_interruptions_at_any_moment_break_nothing(tmp_path):
    """DVC rewrites files of its own at the start and at the end of every stage."""
    house = House.build(tmp_path / "house", [f"e{number}" for number in range(12)])
    rng = random.Random(0)
    for attempt in range(12):
        house.edit("params.yaml", f"seed: {attempt}", f"seed: {attempt + 1}")
        with house.start("-j4") as runner:
            wait_for(lambda: "start prepare" in runner.stdout.readline(), 30)
            time.sleep(rng.uniform(0.5, 8))
            runner.send_signal(rng.choice([signal.SIGINT, signal.SIGKILL]))
            runner.communicate(timeout=15)
        pids = [pid for *_, pid in house.events()]
        wait_for(lambda pids=pids: not any(map(alive, pids)), 15)
    assert run.run(root=house.root)
    assert house.status() == {}


@slow
def test_stubborn_stages_are_gone_15_seconds_after_ctrl_c(house):
    house.tell("train@a", seconds=600, stubborn=True)
    with house.start() as runner:
        wait_for(lambda: house.events("start"), 30)
        runner.send_signal(signal.SIGINT)
        runner.send_signal(signal.SIGINT)
        runner.communicate(timeout=15)
    assert not any(alive(pid) for *_, pid in house.events())


@slow
def test_a_killed_supervisor_fails_its_stage_and_leaves_nothing(house):
    house.tell("train@a", seconds=600, child=True)
    with house.start() as runner:
        (pid,) = wait_for(
            lambda: [pid for _, name, _, pid in house.events("start") if name == "train@a"], 30
        )
        leader = psutil.Process(pid).parent()
        leader.parent().kill()
        output, _ = runner.communicate(timeout=30)
    assert runner.returncode == 1
    assert "failed train@a" in output
    assert "its supervisor was killed" in output
    assert not any(alive(pid) for *_, pid in house.events())
    assert house.ran() == ["train@b", "evaluate@b"]


@slow
def test_sigint_ends_a_runner_in_the_background_of_a_script(house):
    """Where the shell has it ignored."""
    house.tell("train@a", seconds=600)
    script = f"{sys.executable} -m pipelines.run & echo $!; wait"
    with subprocess.Popen(
        ["bash", "-c", script], cwd=house.root, stdout=subprocess.PIPE, text=True
    ) as shell:
        runner = psutil.Process(int(shell.stdout.readline()))
        wait_for(lambda: house.events("start"), 30)
        runner.send_signal(signal.SIGINT)
        shell.communicate(timeout=15)
    assert not any(alive(pid) for *_, pid in house.events())


def test_a_second_runner_waits_for_whoever_is_at_work_and_says_who(house):
    house.tell("train@a", seconds=5)
    with house.start("-j1") as runner:
        wait_for(lambda: house.events("start"), 30)
        with house.start("-j1") as second:
            outputs = [process.communicate(timeout=120)[0] for process in (runner, second)]
    assert (runner.returncode, second.returncode) == (0, 0), outputs
    assert "waiting for another run at work on the same files: (PID " in outputs[1]
    assert sorted(house.ran()) == sorted(set(house.ran()))
    assert not dag.plan(root=house.root).stale


@pytest.mark.parametrize(
    ("experiments", "jobs"), [(12, 6), pytest.param(100, 8, marks=slow)]
)  # fmt: skip
def test_no_entry_of_dvc_lock_is_lost(tmp_path, experiments, jobs):
    names = [f"e{number}" for number in range(experiments)]
    house = House.build(tmp_path / "house", names)
    for name in names:
        house.tell(f"train@{name}", seconds=1.0)
    assert run.run(["train"], jobs=jobs, root=house.root)
    lock = YAML(typ="safe").load((house.root / "dvc.lock").read_text())
    assert set(lock["stages"]) == {"prepare", *(f"train@{name}" for name in names)}
    assert not dag.plan(["train"], house.root).stale
    starts = {name: t for _, name, t, _ in house.events("start")}
    ends = {name: t for _, name, t, _ in house.events("end")}
    assert 1 < most_at_once((starts[name], ends[name]) for name in starts) <= jobs


@slow
def test_runners_for_different_stages_run_at_the_same_time(house):
    with house.start("train@a") as one, house.start("train@b") as other:
        outputs = [runner.communicate(timeout=60)[0] for runner in (one, other)]
    assert (one.returncode, other.returncode) == (0, 0), outputs
    assert not dag.plan(["train"], house.root).stale


@pytest.mark.parametrize(
    ("arguments", "edit", "told"),
    [
        ([], ("params.yaml", "seed: 0", "sede: 0"), "error: params.yaml: seed: missing\n"),
        (["trian"], None, "error: no stage matches 'trian'; did you mean 'train'?\n"),
    ],
)
def test_a_mistake_is_told_in_one_line(house, arguments, edit, told):
    if edit:
        house.edit(*edit)
    assert house.run(*arguments) == (1, told)


def test_what_a_user_has_set_counts_for_stages_too(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "Launcher", lambda target, root, environment: environment)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    environment = run.start_launcher(tmp_path, EBM_FLOW_RUN_ID="flow")
    assert environment["MALLOC_TRIM_THRESHOLD_"] == "1"
    assert environment["MALLOC_MMAP_THRESHOLD_"] == run.KEPT_BYTES
    assert environment["EBM_FLOW_RUN_ID"] == "flow"
    assert environment["PATH"].split(os.pathsep)[0] == os.path.dirname(sys.executable)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="not Linux")
def test_a_job_that_may_use_one_core_runs_one_stage_at_a_time():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert run.cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_no_more_stages_use_a_gpu_than_the_machine_has(house, monkeypatch):
    asked = []
    monkeypatch.setattr(run, "schedule", lambda *arguments: asked.append(arguments) or [])
    monkeypatch.setattr(gpu, "count", lambda: 3)
    run.run(["train"], jobs=2, keep_going=False, root=house.root)
    [(stages, _, _, *limits)] = asked
    assert [stage.name for stage in stages] == ["train@a", "train@b"]
    assert limits == [2, False, 3]


def test_no_number_of_jobs_below_one_is_taken(house):
    code, output = house.run("-j0")
    assert code == 2
    assert "argument -j/--jobs: invalid" in output
