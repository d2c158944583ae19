"""Commands end in one line where a user can mend it, and in a moment where a signal says so."""

import errno
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from pipelines import ROOT, commands


@pytest.fixture
def told(capsys):
    """What a command that fails with 1 tells of an error."""

    def told(call):
        assert commands.guarded(call) == 1
        return capsys.readouterr().err

    return told


NAMES = ["ENOSPC", "EDQUOT", "EACCES", "EROFS", "ENOTDIR", "EEXIST", "ENOENT"]


@pytest.mark.parametrize("name", NAMES)
def test_what_the_system_refuses_is_one_line(told, name):
    number = getattr(errno, name)

    def run():
        raise OSError(number, os.strerror(number), "models/toy")

    assert told(run) == f"error: models/toy: {os.strerror(number)}\n"


def test_a_command_ends_as_what_it_calls_does():
    assert [commands.guarded(lambda end=end: end) for end in (True, None, False)] == [0, 0, 1]


@pytest.mark.parametrize("stages", [True, False])
def test_an_interrupted_command_tells_by_which_signal(stages):
    def run():
        raise KeyboardInterrupt(*[signal.SIGTERM] * stages)

    expected = signal.SIGTERM if stages else signal.SIGINT
    assert commands.guarded(run, stages) == 128 + expected


def test_a_gpu_that_is_too_small_is_one_line(told):
    def run():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has 1")

    assert told(run) == "error: CUDA out of memory; EBM_DEVICE=cpu computes without a GPU\n"


@pytest.mark.parametrize(
    ("allocate", "line"),
    [
        (lambda: torch.empty(2**55), "error: can't allocate memory: you tried to allocate "),
        (lambda: np.empty(2**55), "error: Unable to allocate "),
    ],
)
def test_more_memory_than_there_is_is_one_line(told, allocate, line):
    assert re.match(
        f"{line}.*; fewer points or rows, or a smaller batch, take less\n$", told(allocate)
    )


def test_an_error_of_our_own_keeps_its_traceback():
    def run():
        raise RuntimeError("a shape that does not fit")

    with pytest.raises(RuntimeError, match="a shape"):
        commands.guarded(run)


def match(signals):
    """Swallows what is raised meanwhile, as DVC's comparison of this name does."""
    try:
        for number in signals:
            os.kill(os.getpid(), number)
        time.sleep(0.05)
    except BaseException:
        pytest.fail("it was raised where it is lost")


@pytest.mark.parametrize("number", commands.INTERRUPTIONS)
def test_a_signal_that_dvc_would_swallow_comes_again_in_a_moment(number):
    def wait():
        with commands.interruptible():
            match([number])
            time.sleep(10)

    with pytest.raises(KeyboardInterrupt) as caught:
        wait()
    assert caught.value.args == (number,)


def test_nohup_is_heeded():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with commands.interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_disk_that_is_full_ends_a_command_in_one_line(told):
    def full():
        raise OSError(28, "No space left on device")

    assert told(full) == "error: No space left on device\n"


@pytest.mark.parametrize("name", ["doctor", "promote", "score", "serve", "ui"])
def test_a_command_that_needs_no_graph_does_not_wait_for_dvc(name):
    code = f"import sys, pipelines.{name}; sys.exit('dvc.repo' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
