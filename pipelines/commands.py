"""What commands share: whole lines, one line for what a user can mend, an end on signals."""

import contextlib
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from ebm import EBMError

LAST_LINES = 12
"""Of what a process said, told again when it fails."""
OUT_OF_MEMORY = (
    r"can't allocate memory(: you tried to allocate \d+ bytes)?"
    r"|Storage size calculation overflowed|numel: integer multiplication overflow"
)
"""What PyTorch says, among other things, where the machine has no more."""
LESS = "fewer points or rows, or a smaller batch, take less"
INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
IN_PLACE = {"dump"}
"""The functions in which DVC overwrites files of its own."""

DEAF = {"match"}
"""Compares the names of parameters for DVC (dpath), and swallows whatever is raised meanwhile."""


def show(text: str) -> None:
    """Print a line, whole even when several threads print."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def guarded(call: Callable[[], object], stages: bool = False) -> int:
    """A call as the whole of a command: its exit code, 1 if it returns False; of what a user can
    mend one line on stderr instead of a traceback. If it runs `stages`, the first signal ends
    them."""
    try:
        with interruptible() if stages else contextlib.nullcontext():
            return 1 if call() is False else 0
    except KeyboardInterrupt as interrupt:
        return 128 + (interrupt.args or (signal.SIGINT,))[0]
    except Exception as error:
        if (line := explained(error)) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 1


def explained(error: Exception) -> str | None:
    """What a user reads of an error that is none of ours: of the files, the memory, the network,
    or one that says so itself; None of all others."""
    match error:
        case EBMError():
            return str(error)
        case OSError(strerror=str(), filename=None):
            return error.strerror
        case OSError(strerror=str()):
            return f"{error.filename}: {error.strerror}"
        case OSError():
            return str(error)
        case MemoryError():
            return f"{str(error) or 'out of memory'}; {LESS}"
        case RuntimeError() if type(error).__name__ == "OutOfMemoryError":  # torch may not be here
            return f"{str(error).partition('. ')[0]}; EBM_DEVICE=cpu computes without a GPU"
        case RuntimeError() if asked := re.search(OUT_OF_MEMORY, str(error)):
            return f"{asked[0]}; {LESS}"
    return None


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Make the first signal that asks us to end a KeyboardInterrupt, and ignore impatient ones.

    Also where SIGINT is ignored at first, as in a background process of a shell script; but a
    hang-up that is (`nohup`) stays so.
    """
    deaf = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    caught = [n for n in INTERRUPTIONS if not (deaf and n == signal.SIGHUP)]

    def interrupt(number: int, frame: FrameType | None) -> None:
        if uninterruptible(frame):
            threading.Timer(0.001, os.kill, (os.getpid(), number)).start()  # again in a moment
            return
        for other in caught:
            signal.signal(other, signal.SIG_IGN)
        os.write(2, b"interrupted: ending the stages that run; the next run goes on from here\n")
        raise KeyboardInterrupt(number)

    before = {number: signal.signal(number, interrupt) for number in caught}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def uninterruptible(frame: FrameType | None) -> bool:
    """Whether a signal found DVC where an exception would be lost, or leave half a file."""
    names = {caller.f_code.co_name for caller, _ in traceback.walk_stack(frame)}
    return not names.isdisjoint(IN_PLACE | DEAF)


def positive(text: str) -> int:
    """A whole number above zero."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def cores() -> int:
    """How many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def our_python() -> dict[str, str]:
    """The PATH along which `python` is the one that runs us."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {"PATH": path}
