"""The whole chain as a user runs it: a fresh clone, small settings, real DVC, real kills."""

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML
from toy_house import wait_for

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ("rbm-digits", "meg-25gaussians")
KILLS = int(os.environ.get("EBM_TEST_KILLS", "20"))


def shrink(params):
    """Keep two experiments, with so few steps that a rebuild takes seconds."""
    params["experiments"] = {name: params["experiments"][name] for name in EXPERIMENTS}
    for experiment in params["experiments"].values():
        experiment["train"] |= {"steps": 600, "log_every": 10, "checkpoint_every": 20}
    params["samplers"] |= {"chains": 4, "evaluations": 1000, "warmup": 10}
    rbm, meg = (params["experiments"][name] for name in EXPERIMENTS)
    rbm["evaluate"] = {"chains": 20, "temperatures": 50, "burn_in": 50, "flagged": None}
    meg["evaluate"] = {"grid": 160, "flagged": None}


def edit(clone, change):
    yaml = YAML()
    params = yaml.load(clone / "params.yaml")
    change(params)
    yaml.dump(params, clone / "params.yaml")


def dvc(clone, *arguments):
    environment = os.environ | {
        "EBM_TRACKING": "0",
        "DVC_NO_ANALYTICS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    return subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def repro(clone, *arguments):
    """Run `dvc repro`; the names of the stages that really ran."""
    result = dvc(clone, "repro", *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return set(re.findall(r"Running stage '(.*?)'", result.stdout))


def checksum(clone, experiment):
    file = clone / "models" / experiment / "weights.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone of the work tree, rebuilt once."""
    folder = tmp_path_factory.mktemp("clone") / "ebm"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    edit(folder, shrink)
    repro(folder)
    return folder


def test_a_second_run_does_nothing(clone):
    assert repro(clone) == set()


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("rbm-digits", "seed"), 7, {"train", "sample", "evaluate"}),
        (("rbm-digits", "sample", "steps"), 33, {"sample", "evaluate"}),
        (("meg-25gaussians", "evaluate", "grid"), 170, {"evaluate"}),
    ],
)
def test_a_changed_number_reruns_its_experiment_and_the_report(clone, path, value, expected):
    def change(params):
        *parents, key = path
        section = params["experiments"]
        for parent in parents:
            section = section[parent]
        section[key] = value

    edit(clone, change)
    assert repro(clone) == {f"{stage}@{path[0]}" for stage in expected} | {"report"}


def test_editing_one_variant_retrains_no_other(clone):
    source = clone / "src/ebm/variants/meg.py"
    source.write_text(source.read_text() + "\n")
    ran = repro(clone)
    assert "train@meg-25gaussians" in ran
    assert not [name for name in ran if "rbm" in name]


def training_process(clone):
    """The pid of the stage that trains in `clone` (a shell that starts it does not count)."""
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            if b"pipelines.train" in command and (entry / "cwd").resolve() == clone:
                return int(entry.name)
        except OSError:
            continue
    return None


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_training_killed_at_random_moments_ends_with_the_same_bits(clone, experiment):
    target = f"train@{experiment}"
    started = time.monotonic()
    repro(clone, "-f", "--single-item", target)
    duration = time.monotonic() - started
    expected = checksum(clone, experiment)
    moments = random.Random(experiment)
    killed = 0
    for _ in range(KILLS // len(EXPERIMENTS)):
        command = [sys.executable, "-m", "dvc", "repro", "-f", "--single-item", target]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"EBM_TRACKING": "0", "PATH": path}
        run = subprocess.Popen(command, cwd=clone, env=environment, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(0.2, 0.95) * duration)
        if (pid := training_process(clone)) is not None:
            os.kill(pid, signal.SIGKILL)
            killed += 1
        run.wait()
        repro(clone, "--single-item", target)
        assert checksum(clone, experiment) == expected
    print(f"{experiment}: {killed} of {KILLS // len(EXPERIMENTS)} runs were killed while training")
    assert killed > 0


def train_together(clone, experiment, **options):
    """Start a training in two processes."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.train", experiment],
        cwd=clone,
        env=os.environ | {"EBM_TRACKING": "0", "EBM_PROCESSES": "2", "DVC_ROOT": str(clone)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def ranks(process):
    """The processes that train together: first that of rank 0."""
    commands = [(child, child.cmdline()) for child in psutil.Process(process.pid).children(True)]
    return [child for child, command in commands if "pipelines.train" in command]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_those_that_train_with_it_and_the_rerun_ends_with_the_same_bits(
    clone, rank
):
    repro(clone, "prepare@digits")
    with train_together(clone, "rbm-digits") as undisturbed:
        assert undisturbed.wait(120) == 0, undisturbed.stderr.read()
    expected = checksum(clone, "rbm-digits")
    shutil.rmtree(clone / "models/rbm-digits")
    with train_together(clone, "rbm-digits") as victim:
        wait_for(lambda: [*clone.glob(".checkpoints/rbm-digits/*/step-*40.ckpt")], 60)
        together = ranks(victim)
        together[rank].kill()
        assert victim.wait(30) == 1
        told = victim.stderr.read().splitlines()[-1]
    assert told == f"error: process {rank} of 2 was killed by signal 9; all have ended"
    assert not any(map(psutil.Process.is_running, together))
    assert [*clone.glob(".checkpoints/rbm-digits/*/step-*.ckpt")]
    with train_together(clone, "rbm-digits") as again:
        assert again.wait(120) == 0
        assert "resuming at step" in again.stderr.read()
    assert checksum(clone, "rbm-digits") == expected


@pytest.mark.parametrize("ends", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_training_that_is_ended_leaves_none_of_its_processes(clone, ends):
    shutil.rmtree(clone / ".checkpoints/rbm-digits", ignore_errors=True)
    with train_together(clone, "rbm-digits") as victim:
        wait_for(lambda: [*clone.glob(".checkpoints/rbm-digits/*/step-*40.ckpt")], 60)
        together = ranks(victim)
        victim.send_signal(ends)
        assert victim.wait(30) in (-ends, 128 + ends)
    wait_for(lambda: not any(map(psutil.Process.is_running, together)), 10)


def test_processes_that_cannot_share_a_batch_say_so_once(clone):
    edit(clone, lambda params: params["experiments"]["rbm-digits"]["train"].update(batch_size=51))
    with train_together(clone, "rbm-digits") as refused:
        assert refused.wait(60) == 1
        told = refused.stderr.read().splitlines()
    assert told.count("error: train.batch_size = 51 cannot be shared equally by 2 processes") == 1
    edit(clone, lambda params: params["experiments"]["rbm-digits"]["train"].update(batch_size=128))
