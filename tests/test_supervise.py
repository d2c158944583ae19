"""Processes end with whoever asked for them, however that one ends; and not before they should."""

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from toy_house import alive, wait_for

from pipelines import supervise
from pipelines.polling import polling
from pipelines.supervise import Cancelled, Ended, Launcher

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(HERE)}
STUBBORN = "trap '' INT TERM; "
FAMILY = "echo $$; sleep 600; true"
"""A shell that has a child, and prints its own process id."""


def prepare():
    """The launcher's target: what it calls is a shell command line."""
    return shell


def prepare_impatiently():
    """The same, in a tenth of the time for each signal."""
    import __main__ as template

    template.ESCALATION = tuple((number, s / 10) for number, s in template.ESCALATION)
    return shell


def shell(command):
    signal.signal(signal.SIGINT, lambda *_: None)  # as DVC does, it leaves that to the command
    return subprocess.run(["bash", "-c", command], check=False).returncode


def launch(cwd):
    return Launcher("test_supervise:prepare", cwd, ENVIRONMENT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("supervise")


@pytest.fixture(scope="module")
def launcher(folder):
    with launch(folder) as launcher:
        yield launcher


def finish(process):
    """All its lines, and how it ended."""
    return list(process.lines()), process.wait()


def family(process):
    """The process ids of a `FAMILY`: child, shell, leader, supervisor, guard."""
    shell = psutil.Process(int(next(process.lines())))
    (child,) = wait_for(shell.children, 2)
    leader, supervisor = shell.parents()[:2]
    (guard,) = wait_for(lambda: [p for p in supervisor.children() if p != leader], 2)
    return [member.pid for member in (child, shell, leader, supervisor, guard)]


def none_alive(pids, seconds=15):
    wait_for(lambda: not any(map(alive, pids)), seconds)


def test_a_process_tells_what_it_prints_and_how_it_ended(launcher):
    assert finish(launcher.start("echo out; echo err >&2; exit 3")) == (["out", "err"], Ended(3))
    assert finish(launcher.start("true")) == ([], Ended(0))
    assert str(Ended(3)) == "exit code 3"
    assert str(Ended(-9)) == "killed by signal 9"


@pytest.mark.parametrize(
    ("written", "lines"),
    [
        (r"one\ntwo", ["one", "two"]),
        (r"\n\n", ["", ""]),
        (r" 1%%\r 2%%\r 3%%\ndone\n", [" 3%", "done"]),
        (r"windows\r\n", ["windows"]),
        (r"bar\r", ["bar"]),
        (r"\377\n", ["\N{REPLACEMENT CHARACTER}"]),
    ],
)
def test_lines_are_those_that_a_terminal_would_show(launcher, written, lines):
    assert finish(launcher.start(f"printf '{written}'")) == (lines, Ended(0))
    slowly = f"printf '{written}' | while IFS= read -rN1 c; do printf '%s' \"$c\"; done"
    if "377" not in written:
        assert finish(launcher.start(slowly)) == (lines, Ended(0))


def test_much_output_is_told_whole(launcher):
    lines, _ = finish(launcher.start("head -c 3000000 /dev/zero | tr '\\0' x; echo; seq 100000"))
    assert lines == ["x" * 3_000_000, *map(str, range(1, 100_001))]


def test_it_runs_where_and_with_what_it_is_told(launcher, folder):
    lines, _ = finish(launcher.start("pwd; echo $PYTHONPATH; cat"))  # no input either
    assert lines == [str(folder), str(HERE)]


def test_the_time_limit_ends_all(launcher):
    process = launcher.start(FAMILY, timeout=0.5)
    pids = family(process)
    _, ended = finish(process)
    assert ended.reason == str(ended) == "time limit reached"
    none_alive(pids, 1)


def test_where_no_other_process_is_to_be_had_the_one_that_was_ends(tmp_path):
    """The guard is the second that a supervisor starts; without it nobody would end the first."""
    ours, theirs = socket.socketpair()
    fork, forks = os.fork, []

    def exhausted():
        forks.append(1)
        if len(forks) == 2:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        if leader := fork():
            told.write_text(str(leader))
        return leader

    told = tmp_path / "leader"
    if not (supervisor := os.fork()):
        with contextlib.suppress(BaseException):
            ours.close()
            os.fork = exhausted
            with open(os.devnull, "w") as output:
                line, copy = theirs.detach(), os.dup(output.fileno())
                supervise.supervise(shell, line, copy, ["sleep 60"], None)
        os._exit(9)
    theirs.close()
    assert os.waitstatus_to_exitcode(os.waitpid(supervisor, 0)[1]) == 9
    none_alive([int(told.read_text())])
    ours.close()


def test_within_the_time_limit_nothing_happens(launcher):
    assert finish(launcher.start("sleep 0.2", timeout=60)) == ([], Ended(0))


def test_the_time_limit_counts_from_when_the_process_says_so(launcher):
    told = "kill -USR1 $EBM_SUPERVISOR; sleep 0.5; "
    assert finish(launcher.start(told * 4 + "echo done", timeout=1.5)) == (["done"], Ended(0))
    assert finish(launcher.start(told + "sleep 600", timeout=1))[1].reason == "time limit reached"


def test_cancelling_one_ends_it_and_no_other(launcher):
    process, other = launcher.start(FAMILY), launcher.start("sleep 1; echo done")
    pids = family(process)
    process.cancel()
    assert finish(process)[1].reason == "cancelled"
    none_alive(pids, 1)
    assert finish(other) == (["done"], Ended(0))


def test_leaving_the_launcher_ends_all_and_starts_no_other(tmp_path):
    with launch(tmp_path) as launcher:
        processes = [launcher.start(FAMILY) for _ in range(3)]
        pids = [pid for process in processes for pid in family(process)]
    assert [finish(process)[1].reason for process in processes] == ["cancelled"] * 3
    none_alive(pids, 1)
    with pytest.raises(Cancelled):
        launcher.start("true")


def test_a_process_may_use_its_last_seconds_to_end_well(launcher):
    process = launcher.start("trap 'sleep 0.3; echo saved; exit 0' INT; " + FAMILY)
    family(process)
    process.cancel()
    assert finish(process) == (["saved"], Ended(0))


def test_sigint_reaches_a_process_whose_caller_ignores_it(tmp_path):
    """As it does in the background of a shell script."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with launch(tmp_path) as launcher:
            process = launcher.start("kill -INT $$; echo not reached")
            assert finish(process)[0] == []
    finally:
        signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize(
    ("target", "patience"),
    [("prepare_impatiently", 1.5), pytest.param("prepare", 14, marks=pytest.mark.slow)],
)
def test_those_who_ignore_signals_are_killed(tmp_path, target, patience):
    """Whether the time is up, or the leader or the supervisor was killed."""
    with Launcher(f"test_supervise:{target}", tmp_path, ENVIRONMENT) as launcher:
        kill_stubborn_ones(launcher, patience)


def kill_stubborn_ones(launcher, patience):
    processes = [launcher.start(STUBBORN + FAMILY, timeout=t) for t in (1, None, None)]
    families = [family(process) for process in processes]
    os.kill(families[1][2], signal.SIGKILL)
    os.kill(families[2][3], signal.SIGKILL)
    started = time.monotonic()
    reasons = [str(finish(process)[1]) for process in processes]
    assert reasons == ["time limit reached", "killed by signal 9", "its supervisor was killed"]
    none_alive([pid for pids in families for pid in pids], 1)
    assert time.monotonic() - started < patience + 1


def test_a_killed_caller_leaves_nothing(tmp_path):
    script = (
        "import pathlib, sys, test_supervise as t\n"
        "with t.launch(pathlib.Path.cwd()) as launcher:\n"
        "    print(*t.family(launcher.start(t.FAMILY)), launcher._template.pid, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    caller = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**ENVIRONMENT, "PYTHONPATH": f"{HERE}:{HERE.parent}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with caller:
        pids = [int(pid) for pid in caller.stdout.readline().split()]
        assert all(map(alive, pids))
        caller.kill()
    none_alive(pids, 5)


def test_a_signal_to_the_supervisor_ends_the_process(launcher):
    process = launcher.start(FAMILY)
    pids = family(process)
    os.kill(pids[3], signal.SIGTERM)
    assert finish(process)[1].reason == "cancelled"
    none_alive(pids, 1)


def test_a_killed_guard_changes_nothing(launcher):
    process = launcher.start(FAMILY + "; exit 4")
    child, *_, guard = family(process)
    os.kill(guard, signal.SIGKILL)
    os.kill(child, signal.SIGTERM)
    assert finish(process)[1] == Ended(4)


def test_a_killed_template_starts_no_other_but_what_runs_goes_on(tmp_path):
    with launch(tmp_path) as launcher:
        process = launcher.start("echo started; sleep 0.5; echo done")
        assert next(process.lines()) == "started"
        launcher._template.kill()
        launcher._template.wait()
        with pytest.raises(ConnectionError, match="was killed"):
            launcher.start("true")
        assert finish(process) == (["done"], Ended(0))


def test_a_function_that_cannot_be_prepared_is_no_silent_success(tmp_path, capfd):
    with Launcher("test_supervise:missing", tmp_path, ENVIRONMENT) as launcher:
        assert finish(launcher.start("true"))[1].code != 0
    assert "missing" in capfd.readouterr().err


def test_what_is_left_in_the_background_on_purpose_lives_on(launcher):
    started = time.monotonic()
    lines, ended = finish(launcher.start("sleep 3 & echo $!"))
    assert ended == Ended(0)
    assert time.monotonic() - started < 2.5, "it kept us waiting"
    assert alive(int(lines[0]))


def test_many_processes_leave_no_descriptor_and_no_process(launcher):
    def only_the_template():
        return len(psutil.Process().children(recursive=True)) == 1

    wait_for(only_the_template, 2)
    before = os.listdir("/proc/self/fd")
    processes = [launcher.start(f"exit {number}") for number in range(40)]
    assert [finish(process)[1].code for process in processes] == list(range(40))
    wait_for(only_the_template, 2)
    assert os.listdir("/proc/self/fd") == before


def test_the_template_of_dvc_forks_from_a_single_thread(tmp_path):
    """A lock that another thread holds while the process forks is never released in the child."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "dvc.yaml").write_text(json.dumps({"stages": {"one": {"cmd": "echo it runs"}}}))
    with Launcher("pipelines.reproduce:reproducer", tmp_path, ENVIRONMENT) as launcher:
        lines, ended = finish(launcher.start("one", False))
        assert ended == Ended(0), lines
        assert "it runs" in lines
        assert len(os.listdir(f"/proc/{launcher._template.pid}/task")) == 1


def test_nobody_looks_any_more_when_the_context_is_left():
    begun, ended = threading.Event(), []

    def look():
        begun.set()
        time.sleep(0.1)
        ended.append(True)

    with polling(look, 0.01):
        begun.wait()
    assert ended
    looks = len(ended)
    time.sleep(0.2)
    assert len(ended) == looks
