"""Cards for stages: how many there are, and one for each process, that nobody else has meanwhile.

A stage may be started by `dvc repro`, the runner, a flow or a worker of a cluster, in any clone of
the project: none of them knows of the others. So the process that computes takes a lock of its
card, which the whole machine sees, and which the system releases when the process ends, however it
does. Of processes that train one model together (`torchrun`) the first one takes the cards of all
of them, all or none, so that two such groups never wait for each other's.
"""

import contextlib
import errno
import itertools
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from ebm import EBMError, files
from pipelines.supervise import restart_clock

log = logging.getLogger(__name__)

LOCKS = Path("/tmp")
"""One folder for the machine: that of TMPDIR may be another for each job or user."""
POLL_SECONDS = 0.5

DEVICES = "cpu, cuda or cuda:N"

_held: list[int] = []  # descriptors of the locks, open until this process ends
_claimed: list[int] = []  # the index of the card that this process has, once it has one


def known_device(name: str) -> bool:
    """Whether `name`, as EBM_DEVICE has it, is of one of the forms in DEVICES."""
    return re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]?))?", name) is not None


def count() -> int:
    """How many cards stages may use, without the seconds that torch takes to say so."""
    kind, _, index = (os.environ.get("EBM_DEVICE") or "cuda").partition(":")
    if kind != "cuda":
        return 0
    present = _present()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        cards = len(present)
    else:  # CUDA ignores what follows a name that it does not know
        exists = partial(_exists, present)
        cards = len(list(itertools.takewhile(exists, map(str.strip, chosen.split(",")))))
    return min(cards, 1) if index else cards


def _present() -> list[str]:
    """The UUIDs of this machine's cards, but for those that this process may not open."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver, no card
        return []
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            with contextlib.suppress(pynvml.NVMLError):
                found.append(pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(index)))
        return found
    finally:
        pynvml.nvmlShutdown()


def _exists(present: list[str], name: str) -> bool:
    """Whether `name`, an entry of CUDA_VISIBLE_DEVICES, is that of a card that is `present`: its
    index, its UUID or the beginning of that. Names of parts of a card (MIG) are not looked up."""
    if name.isdecimal():
        return int(name) < len(present)
    return name.startswith("MIG-") or (
        bool(name) and any(uuid.startswith(name) for uuid in present)
    )


def claim(cards: Mapping[int, str], wait: bool = True) -> int | None:
    """Take the first free card and keep it until this process ends.

    Args:
        cards: a name that is the same for the whole machine (UUID), by the index of the card.
        wait: until there is one.

    Returns:
        the index, the same one whenever this process asks; None if none is free and it is not to
        wait.

    Raises:
        EBMError: there is no such card, or fewer than processes that train together.
    """
    if not _claimed:
        rank, ranks = _environment("LOCAL_RANK", 0), _environment("LOCAL_WORLD_SIZE", 1)
        if ranks > len(cards):
            raise EBMError(f"GPUs needed: {ranks}; that may be used: {len(cards)}")
        waits = False
        while (index := _given(cards, rank) if rank else _take(cards, ranks)) is None:
            if not wait:
                return None
            if not waits:
                log.info("waiting for a GPU: others use all that it may")
            waits = True
            restart_clock()
            time.sleep(POLL_SECONDS)
        _claimed.append(index)
    return _claimed[0]


def _environment(name: str, default: int) -> int:
    """A number that torchrun tells each of its processes."""
    return int(os.environ.get(name, default))


def _take(cards: Mapping[int, str], ranks: int) -> int | None:
    """Lock the first free cards, one for each rank, or none at all; the index of the first."""
    with _turn():
        free = {index: lock for index, card in cards.items() if (lock := _lock(card))}
        mine = list(free)[:ranks] if len(free) >= ranks else []
        for index in free.keys() - set(mine):
            os.close(free[index])
        for rank, index in enumerate(mine):
            os.ftruncate(free[index], 0)
            os.pwrite(free[index], _told(rank), 0)
            _held.append(free[index])
    return mine[0] if mine else None


def _given(cards: Mapping[int, str], rank: int) -> int | None:
    """The index of the card that the first process of our group has locked for us."""
    with _turn():
        for index, card in cards.items():
            if lock := _lock(card):  # nobody has it: what its file says is the past
                os.close(lock)
            elif _path(card).read_bytes() == _told(rank):
                return index
    return None


def _told(rank: int) -> bytes:
    """For whom a card is taken: for a rank of the group that meets at this address."""
    address = ":".join(os.environ.get(f"MASTER_{name}", "") for name in ("ADDR", "PORT"))
    return f"{address} {rank}".encode()


@contextlib.contextmanager
def _turn() -> Iterator[None]:
    """Within this context, for a moment, nobody else tries locks."""
    descriptor = _open("turn")
    try:
        files.lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _lock(card: str) -> int | None:
    """The descriptor of the card's lock, now ours; None if somebody has it."""
    descriptor = _open(card)
    if files.lock(descriptor, wait=False):
        return descriptor
    os.close(descriptor)
    return None


def _open(name: str) -> int:
    """A file that every user of the machine can lock; EBMError if somebody put a link there."""
    path, flags = _path(name), os.O_RDWR | os.O_NOFOLLOW
    try:
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, flags)
        descriptor = os.open(path, flags | os.O_CREAT)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise EBMError(f"{path}: a link, where stages lock a GPU; remove it") from None
    os.fchmod(descriptor, 0o666)
    return descriptor


def _path(name: str) -> Path:
    return LOCKS / f"ebm-gpu-{name}.lock"
