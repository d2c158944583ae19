"""No two processes of a machine share a card, whoever started them."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ebm import EBMError
from pipelines import gpu, stage

ROOT = Path(__file__).resolve().parents[1]
CARDS = {0: "GPU-aa11", 1: "GPU-bb22"}

HOLDER = """
import logging, pathlib, sys
from pipelines import gpu
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
gpu.POLL_SECONDS, gpu.LOCKS = 0.05, pathlib.Path(sys.argv[2])
print(gpu.claim(eval(sys.argv[1])), flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine whose locks lie in a folder of this test, with two cards that nobody uses."""
    monkeypatch.setattr(gpu, "LOCKS", tmp_path)
    monkeypatch.setattr(gpu, "_held", held := [])
    monkeypatch.setattr(gpu, "_claimed", [])
    monkeypatch.setattr(gpu, "_present", lambda: list(CARDS.values()))
    for name in ("EBM_DEVICE", "CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    yield tmp_path
    for descriptor in held:
        os.close(descriptor)


@contextlib.contextmanager
def holder(cards=CARDS, **environment):
    """A process that claims one of `cards`, and has it until the context is left."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, repr(cards), str(gpu.LOCKS)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def said(process):
    return process.stdout.readline().strip()


def test_each_process_has_a_card_of_its_own_and_who_finds_none_waits_for_the_first_that_is_free():
    with holder() as one, holder() as other:
        assert sorted([said(one), said(other)]) == ["0", "1"]
        with holder() as third:
            assert said(third) == "waiting for a GPU: others use all that it may"
            other.kill()  # the system takes the lock from a process that is killed
            assert said(third) in ("0", "1")


def test_jobs_with_temporary_folders_of_their_own_share_no_card_either(tmp_path):
    with holder(TMPDIR=str(tmp_path / "a")) as one, holder(TMPDIR=str(tmp_path / "b")) as other:
        assert sorted([said(one), said(other)]) == ["0", "1"]


def test_who_asks_for_one_card_waits_for_that_one():
    with holder() as one:
        assert said(one) == "0"  # before the next one asks
        with holder({0: CARDS[0]}) as picky:
            assert said(picky).startswith("waiting")
            with holder() as other:
                assert said(other) == "1"
            one.kill()
            assert said(picky) == "0"


def test_the_time_limit_of_who_waits_counts_from_the_end_of_that():
    told = []
    before = signal.signal(signal.SIGUSR1, lambda *_: told.append(True))
    try:
        with holder(EBM_SUPERVISOR=str(os.getpid())) as one:
            assert said(one) == "0"
            assert not told
            with holder({0: CARDS[0]}, EBM_SUPERVISOR=str(os.getpid())) as waiting:
                assert said(waiting).startswith("waiting")
                one.kill()
                assert said(waiting) == "0"
                assert told
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_process_that_asks_twice_has_one_card():
    assert gpu.claim(CARDS) == gpu.claim(CARDS) == 0
    with holder() as other:
        assert said(other) == "1"


def rank(number, port="1", address="127.0.0.1"):
    return {
        "LOCAL_RANK": str(number),
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }


def test_processes_that_train_together_take_all_their_cards_or_none():
    """Two groups of two on two cards would otherwise wait for each other for ever."""
    with holder() as alone:
        assert said(alone) == "0"
        with holder(**rank(0)) as first, holder(**rank(1)) as second:
            assert said(first).startswith("waiting")
            assert said(second).startswith("waiting")
            with holder() as passing:
                assert said(passing) == "1", "the group has taken half of what it needs"
            alone.kill()
            assert (said(first), said(second)) == ("0", "1")
            with holder(**rank(1, "2")) as stranger:
                assert said(stranger).startswith("waiting")


def test_of_what_a_group_with_a_longer_address_wrote_nothing_is_left():
    for address in ("host" * 30, "localhost"):
        with holder(**rank(0, address=address)) as first:
            assert said(first) == "0"
            with holder(**rank(1, address=address)) as second:
                assert said(second) == "1"


def test_more_processes_than_cards_is_an_error_and_no_endless_wait(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(EBMError, match=r"^GPUs needed: 3; that may be used: 2$"):
        gpu.claim(CARDS)


def test_a_link_in_the_place_of_a_lock_is_not_followed(tmp_path):
    """Whoever put it there would have us write into a file of ours."""
    mine = tmp_path / "mine"
    mine.write_text("precious")
    (gpu.LOCKS / "ebm-gpu-turn.lock").symlink_to(mine)
    with pytest.raises(EBMError, match=r"turn\.lock: a link, where stages lock a GPU; remove it"):
        gpu._take({0: "a"}, 1)
    assert mine.read_text() == "precious"


def test_every_user_of_the_machine_can_lock_a_card(machine):
    gpu.claim(CARDS)
    assert {path.stat().st_mode & 0o777 for path in machine.iterdir()} == {0o666}


@pytest.mark.parametrize(
    ("device", "visible", "cards"),
    [
        (None, None, 2),
        ("", None, 2),
        ("cuda", None, 2),
        ("cuda:1", None, 1),
        ("cpu", None, 0),
        (None, "1", 1),
        (None, "1,0", 2),
        (None, "", 0),
        (None, "-1", 0),
        (None, "0,7,1", 1),
        (None, "GPU-bb", 1),
        (None, "GPU-xx", 0),
        (None, "MIG-1234", 1),
        ("cuda:0", "", 0),
    ],
)
def test_cards_are_counted_as_cuda_counts_them(monkeypatch, device, visible, cards):
    for name, value in {"EBM_DEVICE": device, "CUDA_VISIBLE_DEVICES": visible}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    assert gpu.count() == cards


def test_without_a_driver_there_is_no_card(monkeypatch):
    import pynvml

    def missing():
        raise pynvml.NVMLError_LibraryNotFound

    monkeypatch.undo()
    monkeypatch.delenv("EBM_DEVICE", raising=False)
    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    assert gpu.count() == 0


def test_a_card_that_may_not_be_opened_is_none(monkeypatch):
    """As of a job that was given one of several."""
    import pynvml

    def handle(index):
        if index == 1:
            raise pynvml.NVMLError_NoPermission
        return index

    monkeypatch.undo()
    monkeypatch.delenv("EBM_DEVICE", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, fake in {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 3,
        "nvmlDeviceGetHandleByIndex": handle,
        "nvmlDeviceGetUUID": lambda found: f"GPU-{found}",
    }.items():
        monkeypatch.setattr(pynvml, name, fake)
    assert gpu.count() == 2


@pytest.fixture
def cuda(one_stage, monkeypatch):
    """PyTorch, as it is on that machine; the list of the devices that it is told to use."""
    used = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=CARDS[i])
    )
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    return used


def test_a_stage_computes_on_the_card_that_it_has(cuda):
    with holder() as other:
        assert said(other) == "0"
        assert stage.claim_device(1) == torch.device("cuda")
    assert cuda == [1]


def test_who_is_not_to_wait_computes_on_the_cpu(cuda, caplog):
    caplog.set_level("INFO")
    with holder() as one, holder() as other:
        assert {said(one), said(other)} == {"0", "1"}
        assert stage.claim_device(1, wait=False) == torch.device("cpu")
    assert "others use all GPUs" in caplog.text
    assert not cuda
    assert stage.claim_device(1, wait=False) == torch.device("cuda")


def test_what_a_stage_computes_is_repeatable_and_in_full_precision(cuda, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.use_deterministic_algorithms(False)
    stage.claim_device(1)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:01", "cuda:9999999999"])
def test_what_is_no_device_is_one_line(cuda, monkeypatch, name):
    monkeypatch.setenv("EBM_DEVICE", name)
    with pytest.raises(EBMError, match=rf"^EBM_DEVICE = {name}: expected cpu, cuda or cuda:N$"):
        stage.claim_device(1)


def test_a_stage_that_is_told_a_device_takes_that_one(cuda, monkeypatch):
    monkeypatch.setenv("EBM_DEVICE", "cpu")
    assert stage.claim_device(1) == torch.device("cpu")
    monkeypatch.setenv("EBM_DEVICE", "cuda:1")
    assert stage.claim_device(1) == torch.device("cuda")
    assert cuda == [1]
