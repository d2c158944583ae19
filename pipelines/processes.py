"""Several processes for one training, on this machine or on several; torchrun starts them.

`EBM_PROCESSES=2` in the environment of a stage has it start so many on this machine. Where there
are more machines, torchrun is called on each of them, `torchrun ... -m pipelines.train NAME`. How
many there are changes no result but for rounding (`ebm.parallel`).
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ebm import EBMError
from pipelines.polling import end_with_parent

if TYPE_CHECKING:
    import torch

STARTED = "LOCAL_RANK"
"""The variable by which a process knows that torchrun has started it."""


def wanted() -> int:
    """How many processes are to be started: 1, none besides this one, in one that was started."""
    text = os.environ.get("EBM_PROCESSES") or "1"
    if not text.isdecimal() or int(text) < 1:
        raise EBMError(f"EBM_PROCESSES = {text}: expected how many processes train a model")
    return 1 if STARTED in os.environ else int(text)


def start(module: str, name: str) -> None:
    """Run `python -m module name` in as many processes as are wanted, to their end."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # of failures we tell
    try:
        torchrun(["--standalone", f"--nproc-per-node={wanted()}", "-m", module, name])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            reason = f"killed by signal {-failure.exitcode}"
            raise EBMError(f"process {rank} of {wanted()} was {reason}; all have ended") from None
        sys.exit(failure.exitcode)  # it has said why
    except SignalException as interrupt:
        sys.exit(128 + interrupt.sigval)


def end_with_torchrun() -> None:
    """From now on a process that torchrun has started ends when that is gone. It has a session of
    its own: no signal to the stage reaches it."""
    if STARTED in os.environ:
        end_with_parent(seconds=0.5)


def share(threads: int) -> int:
    """How many of the threads of a training each process on this machine has."""
    return max(1, threads // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


@contextmanager
def joined(device: "torch.device") -> Iterator[None]:
    """Within this context, the processes that torchrun has started are one group; of them, the
    first alone says what happens. A process that was started alone is left alone."""
    if STARTED not in os.environ:
        yield
        return
    import torch.distributed as dist

    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    first = dist.get_rank() == 0
    if not first:
        logging.disable()
    try:
        yield
    except EBMError:
        if first:
            raise
        sys.exit(1)
    dist.destroy_process_group()
