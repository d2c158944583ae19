"""The courier: a process that takes events from the spools and brings them to MLflow.

`python -m pipelines.courier KEY` delivers for all runs while the stage that writes KEY lives, or
any other (whose courier would have to import MLflow first, which takes seconds), and then what is
left; `python -m pipelines.courier` delivers what waits now (`--to URI`: into that store, what has
not begun in its own). There is one courier at a time, by a lock on the checkout: so an event is in
one pair of hands, and a database is made once.

A courier may be killed at any point. It notes an event as delivered after MLflow has it, and one
that is sent twice has the same effect as once (see `pipelines.mlflow_store`).

It also tells every run whose stage is at work how busy the machine is (`pipelines.machine`), each
MEASURE seconds and at the end of a stage that is over sooner. What of this cannot be sent is lost.
MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=false turns it off.
"""

import os
import shutil
import signal
import sqlite3
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import psutil

from ebm import files
from pipelines.places import main_checkout, public
from pipelines.spool import Event, Spool, State, UnfitError

if TYPE_CHECKING:
    from pipelines.machine import Machine
    from pipelines.mlflow_store import Store

POLL, RETRY = 2.0, 10.0  # seconds to the next round after a good one, after a bad one
LINGER = 15.0  # seconds that a courier may outlive the last stage, its own while it only waits;
# not counted are those in which it imports MLflow and opens a store: minutes on a busy machine
MEASURE = 10.0  # seconds between two looks at how busy the machine is
BATCH = 1000  # values in a request: MLflow's limit
REFUSALS = {"INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST"}
SYSTEM_METRICS = "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"
SETTINGS = {  # unless the user has set them
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "OMP_NUM_THREADS": "1",
}


class Courier:
    """Delivers what lies in the spools. Only the holder of the lock may make one.

    Runs begin in the store that they were started for, or in the one at `to`.
    """

    def __init__(self, to: str | None = None) -> None:
        self._to = to
        self._stores: dict[str, Store] = {}
        self._down: dict[str, Exception] = {}  # the stores that failed in this round
        self._machine: Machine | None = None
        self._measure_at = 0.0

    def round(self) -> bool:
        """Deliver all that can be read; whether nothing is left."""
        self._down.clear()
        served = [self._serve(spool) for spool in Spool.all() if spool.pending()]
        if time.monotonic() >= self._measure_at:
            self._measure_at = time.monotonic() + MEASURE
            for spool in Spool.all():
                state = spool.state()
                if state and state.open and spool.written():
                    self._measure(spool, state)
        return all(served)

    def _serve(self, spool: Spool) -> bool:
        state = spool.state() or _afresh(spool)
        alive = spool.written()  # asked first: what a dead writer wrote can all be read
        try:
            for events, offset in batches(spool.read(state.offset)):
                self._deliver(spool, state, events)
                state.offset, state.problem = offset, None
                spool.save(state)
            if state.open and not alive:
                self._bury(spool, state)
        except Exception as error:
            self._postpone(spool, state, error)
            return False
        return True

    def _deliver(self, spool: Spool, state: State, events: list[Event]) -> None:
        op = events[0].get("op")
        if op == "start":  # a run that cannot begin can wait
            self._hand_over(spool, state, events)
        else:
            with _left_out_if_hopeless(state, f"run {spool.key}: a {op}"):
                self._hand_over(spool, state, events)

    def _hand_over(self, spool: Spool, state: State, events: list[Event]) -> None:
        event = events[0]
        match event.get("op"):
            case "start":
                state.tracking_uri, state.mlflow_run_id = self._to or event["uri"], None
                state.mlflow_run_id = self._store(state).begin(spool.key, event)
                state.open = True
            case "row" | "final":
                self._store(state).log(_run_id(state), events)
            case "tags":
                self._store(state).tag(_run_id(state), event["tags"])
            case "artifact" | "model" as op:
                folder = spool.files / event["files"]
                if folder.exists():  # or else it is delivered, and only the note of it is lost
                    getattr(self._store(state), op)(_run_id(state), folder, event)
                    shutil.rmtree(folder)
            case "close":
                if not state.measured and time.time() - event["time"] / 1000 < LINGER:
                    self._measure(spool, state)
                self._store(state).end(_run_id(state), event["status"], event["time"])
                state.open = False
            case _:
                _note(state, f"{spool.events}: a line is unreadable and was left out")

    def _measure(self, spool: Spool, state: State) -> None:
        """Log how busy the machine is, if there is somebody who takes it."""
        if os.environ.get(SYSTEM_METRICS, "true").lower() in ("false", "0"):
            return
        try:
            store = self._store(state)
            if self._machine is None:
                from pipelines.machine import Machine

                self._machine = Machine()
            store.load(_run_id(state), self._machine.load(), state.measured)
            state.measured += 1
            spool.save(state)
        except Exception as error:
            self._down.setdefault(state.tracking_uri or "", error)

    def _bury(self, spool: Spool, state: State) -> None:
        died = int(spool.events.stat().st_mtime * 1000)
        with _left_out_if_hopeless(state, f"run {spool.key}: its end"):
            self._store(state).end(_run_id(state), "KILLED", died)
        state.open, state.problem = False, None
        spool.save(state)

    def _store(self, state: State) -> "Store":
        uri = state.tracking_uri or ""
        if uri in self._down:
            raise self._down[uri]
        if uri not in self._stores:
            self._stores[uri] = _opened(uri)
        return self._stores[uri]

    def _postpone(self, spool: Spool, state: State, error: Exception) -> None:
        uri = state.tracking_uri or ""
        if isinstance(error, OSError) or (_code(error) and not _hopeless(error)):
            self._down[uri] = error
        problem = f"{public(uri)} does not take what is logged ({reason(error)})"
        if state.problem is None or not state.problem.startswith(problem):
            traceback.print_exception(error)
        state.problem = f"{problem}; it is kept in .tracking and delivered later"
        state.failed_at = time.time()
        with suppress(OSError):
            spool.save(state)


OPENING = threading.Event()
"""Set while a store is being opened."""


def _opened(uri: str) -> "Store":
    OPENING.set()
    try:
        from pipelines.mlflow_store import Store

        return Store(uri)
    finally:
        OPENING.clear()


def batches(events: Iterable[tuple[Event, int]]) -> Iterator[tuple[list[Event], int]]:
    """Neighbouring rows of scalars together, as far as one request takes them, any other event by
    itself; with the offset behind them."""
    rows: list[Event] = []
    size = end = 0
    for event, offset in events:
        values = len(event.get("values", ()))
        if rows and (not values or size + values > BATCH):
            yield rows, end
            rows, size = [], 0
        if values:
            rows.append(event)
            size, end = size + values, offset
        else:
            yield [event], offset
    if rows:
        yield rows, end


def reason(error: BaseException) -> str:
    """Why, in one line: the failure of the system at the bottom of it, if there is one."""
    chain = [error]
    while deeper := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(deeper)
    causes = [e for e in chain if isinstance(e, OSError | sqlite3.Error)]
    cause = causes[-1] if causes else error
    return " ".join(str(cause).split())[:200] or type(cause).__name__


def _code(error: Exception) -> str | None:
    """MLflow's code, if it is MLflow that fails."""
    return getattr(error, "error_code", None)


@contextmanager
def _left_out_if_hopeless(state: State, what: str) -> Iterator[None]:
    """Within this context, what MLflow will never take is noted and not raised."""
    try:
        yield
    except Exception as error:
        if not _hopeless(error):
            raise
        _note(state, f"{what} was left out: {reason(error)}")


def _hopeless(error: Exception) -> bool:
    """Whether the event itself is at fault, so that no later try would go better."""
    return isinstance(error, UnfitError) or _code(error) in REFUSALS


def _afresh(spool: Spool) -> State:
    return State(notes=[f"{spool.key}/state.json is damaged; the run is delivered anew"])


def _note(state: State, note: str) -> None:
    if note not in state.notes:
        state.notes.append(note)


def _run_id(state: State) -> str:
    if state.mlflow_run_id is None:
        raise UnfitError("the run has no beginning")
    return state.mlflow_run_id


def tail(own: Spool, delivers: threading.Event) -> bool:
    """Wait for the lock, which sets `delivers`; deliver until the writer of `own` and all others
    are gone, and then what is left; whether nothing is."""
    if not _lock(lambda: own.written() or any(spool.pending() for spool in Spool.all())):
        return True
    delivers.set()
    courier = Courier()
    while True:
        alive = _any_written(own)
        clean = courier.round()
        if not alive:
            return clean
        until = time.monotonic() + (POLL if clean else RETRY)
        while _any_written(own) and time.monotonic() < until:
            time.sleep(0.25)


def _any_written(own: Spool) -> bool:
    """Whether there is a writer still, most likely of `own`."""
    return own.written() or any(spool.written() for spool in Spool.all())


def _lock(wanted: Callable[[], bool]) -> bool:
    """Wait for the checkout's lock as long as it is `wanted`; held to the end of the process."""
    descriptor = os.open(main_checkout() / ".tracking" / "lock", os.O_RDONLY | os.O_CREAT, 0o600)
    while not files.lock(descriptor, wait=False):
        if not wanted():
            return False
        time.sleep(0.25)
    (main_checkout() / ".tracking" / "courier.log").write_bytes(b"")  # what the last one said
    return True


def _leave_in_time(own: Spool, delivers: threading.Event) -> None:
    """End the process, in the middle of whatever it does, when the last stage is long gone, or its
    own while another courier delivers."""
    needed = time.monotonic()
    while True:
        if own.written() or (delivers.is_set() and (OPENING.is_set() or _any_written(own))):
            needed = time.monotonic()
        elif time.monotonic() - needed > LINGER:
            os._exit(1)
        time.sleep(0.5)


def main(arguments: list[str]) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the stage; its end ends this
    os.environ.update({name: value for name, value in SETTINGS.items() if name not in os.environ})
    os.chdir(main_checkout())  # MLflow puts artifacts into ./mlruns
    if not arguments or arguments[0] == "--to":
        _lock(lambda: True)
        return 0 if Courier(*arguments[1:]).round() else 1
    os.nice(19)
    psutil.cpu_percent()  # so that the first look at the CPUs is at their load since now
    own, delivers = Spool(arguments[0]), threading.Event()
    threading.Thread(target=_leave_in_time, args=[own, delivers], daemon=True).start()
    return 0 if tail(own, delivers) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
