"""What a stage has to say to MLflow, written down at once and delivered by somebody else.

A stage never imports mlflow (seconds) and waits for no server, but for up to five seconds at the
end of a training, whose record names the run. Its `Run` appends events to a spool
(`pipelines.spool`) and starts a courier (`pipelines.courier`), a process of low priority that
reads all spools and sends them on. What cannot be delivered stays where it is, for any later
courier or for `flush`; `python -m pipelines.tracking` does that by hand. Events survive the death
of the process, not that of the machine.

Environment: EBM_TRACKING=0 writes nothing; MLFLOW_TRACKING_URI names another store than mlflow.db
in the root; DVC_ROOT, which DVC sets, is that root (in a queued experiment the main checkout);
EBM_RUN is the key of the run that a stage continues, whatever it asks for (a trial of a sweep).
"""

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ebm.params import dotted
from pipelines import ROOT
from pipelines.commands import guarded
from pipelines.places import main_checkout, tracking_uri
from pipelines.spool import Echo, Spool, State

log = logging.getLogger(__name__)

CODE = ROOT / "src" / "ebm"
SERVED = ROOT / "pipelines" / "mlflow_model.py"
SETTLE = 2.0  # seconds for a courier to end when all is delivered, unless it waits behind another
LISTEN_EVERY = 2.0  # seconds between two looks of a busy stage at what the courier says

_couriers: list[subprocess.Popen[bytes]] = []  # kept, or Python warns about children still running


class Run:
    """One tracked run, as a stage sees it. Nothing is raised because tracking fails: a full disk
    is worth one line, and the stage goes on.

    As a context manager it closes itself: FINISHED, FAILED after an exception, KILLED after
    KeyboardInterrupt or SystemExit. If the process dies without a word, a courier says KILLED.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._spool = Spool(key)
        self._descriptor: int | None = None  # None: tracking is off, or the run is closed
        self._echo: Echo | None = None
        self._listen_at = 0.0
        self._torn = self._warned = False
        self._resumed_after, self._last = (-1, 0), (0, 0)  # (restarts, step)

    @classmethod
    def start(
        cls,
        experiment: str,
        *,
        key: str | None = None,
        params: dict[str, Any],
        tags: dict[str, str],
        dataset: dict[str, str] | None,
        parent: str | None = None,
    ) -> Self:
        """Begin a run named `experiment`, or continue the run `key`, even one of another machine.

        `params` may be nested: they arrive as `model.width`. `dataset` has name, source and digest
        (MLflow keeps 36 characters of it). A continued run keeps its first params and tags; what
        differs arrives as a tag that begins with the stage, such as `evaluate.git.commit`.
        `parent` is the key of the run under which this one is shown.
        """
        run = cls(os.environ.get("EBM_RUN") or key or uuid.uuid4().hex)
        if os.environ.get("EBM_TRACKING") == "0" or not run._guarded("begin a run", run._open):
            return run
        run._append(
            "start",
            experiment=experiment,
            uri=tracking_uri(),
            stage=os.environ.get("DVC_STAGE", "").partition("@")[0] or "later",
            params=dotted(params),
            tags={"ebm.experiment": experiment, **_environment(), **tags},
            dataset=dataset,
            parent=parent,
        )
        if run._torn:  # without their beginning, events could not be delivered
            run._release()
        run._guarded("start a courier", lambda: _courier(run.key))
        return run

    def log(self, metrics: dict[str, float], step: int, restarts: int = 0) -> None:
        """One row of scalars; `restarts` counts how often training went back to a checkpoint.

        Rows at or before the last (restarts, step) that the spool held when the run was continued
        are dropped, so a resumed training repeats none. NaN stays NaN; MLflow's database keeps an
        infinity as the largest double of its sign.
        """
        if (restarts, step) <= self._resumed_after:
            return
        self._last = max(self._last, (restarts, step))
        values = _floats(metrics) | ({"restarts": float(restarts)} if restarts else {})
        self._append("row", step=step, restarts=restarts, values=values)
        if time.monotonic() >= self._listen_at:
            self._listen()

    def log_final(self, metrics: dict[str, float]) -> None:
        """Results, at the last step of the training, so that they are the latest values."""
        self._append("final", step=self._last[1], values=_floats(metrics))

    def tag(self, tags: dict[str, str]) -> None:
        """Set tags; a later value replaces an earlier one."""
        self._append("tags", tags=tags)

    def artifact(self, path: Path, folder: str = "") -> None:
        """Have a copy of the file `path` uploaded into `folder` of the run's artifacts."""
        if place := self._keep(path):
            self._append("artifact", files=place, name=path.name, folder=folder)

    def model(
        self, weights: Path, config: Path, serving: dict[str, Any], example: dict[str, Any]
    ) -> None:
        """Have the model logged as an MLflow model: its weights and config, the code of `ebm` as
        it is now, what `serving` needs beside them (`pipelines.mlflow_model` has it), and the
        `example` of a request. Results that are logged afterwards are also those of this model."""
        if place := self._keep(weights, config, CODE, SERVED, request=example):
            names = {"weights": weights.name, "config": config.name}
            self._append("model", files=place, **names, serving=serving)

    def close(self, status: str = "FINISHED") -> None:
        """End the run as FINISHED, FAILED or KILLED; the courier delivers the rest by itself."""
        self._append("close", status=status)
        self._listen()
        self._release()

    def mlflow_run_id(self, wait: float = 0) -> str | None:
        """MLflow's id of this run as soon as it is known, or None: after `wait` seconds, and at
        once if tracking is off or the store does not answer."""
        deadline = time.monotonic() + wait
        while True:
            state = self._spool.state() or State()
            hopeless = self._echo is None or self._echo.problem(state)
            if state.mlflow_run_id or hopeless or time.monotonic() >= deadline:
                return state.mlflow_run_id
            time.sleep(0.1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        failed = "FAILED" if kind and issubclass(kind, Exception) else "KILLED"
        self.close(failed if kind else "FINISHED")

    def _open(self) -> None:
        descriptor = self._spool.open()
        for event, _ in self._spool.read():
            if event.get("op") == "row":
                self._last = max(self._last, (event["restarts"], event["step"]))
                self._resumed_after = self._last
        self._echo = Echo(self._spool)
        self._descriptor = descriptor

    def _append(self, op: str, **content: object) -> None:
        event = {"op": op, "time": time.time_ns() // 1_000_000, **content}
        line = b"\n" * self._torn + json.dumps(event, default=str).encode() + b"\n"
        self._torn = not self._guarded("keep what it logs", lambda: self._write(line))

    def _write(self, line: bytes) -> None:
        if self._descriptor is not None and os.write(self._descriptor, line) < len(line):
            raise OSError("the disk took only a part")

    def _keep(self, *sources: Path, request: dict[str, Any] | None = None) -> str | None:
        """Copy files and folders beside the events, and the example of a `request` as JSON; the
        name of the folder that holds them."""
        place = self._spool.files / uuid.uuid4().hex
        kept = self._descriptor is not None and self._guarded(
            f"keep {sources[0].name}", lambda: _copy(sources, request, place)
        )
        return place.name if kept else None

    def _guarded(self, what: str, act: Callable[[], object]) -> bool:
        """Whether `act` worked. Its first failure is said, and none goes any further."""
        try:
            act()
        except Exception as error:
            if not self._warned:
                log.warning("tracking: cannot %s (%s); the stage goes on without", what, error)
            self._warned = True
            return False
        return True

    def _listen(self) -> None:
        self._listen_at = time.monotonic() + LISTEN_EVERY
        for line in self._echo.news() if self._echo else ():
            log.warning("tracking: %s", line)

    def _release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None


def flush(timeout: float = 120.0, to: str | None = None) -> bool:
    """Deliver everything that waits now; whether nothing of it is left. Says what went wrong. Runs
    that have not begun in their store begin in the one at `to`.

    While a stage runs, its courier may be at it, and the one that is started here waits behind it:
    it is enough that one of them has delivered what there was.
    """
    waiting = {spool: spool.end() for spool in Spool.all() if spool.pending()}
    if not waiting:
        return True
    echoes = [Echo(spool) for spool in waiting]
    courier = _courier(*(["--to", to] if to else []))
    until, done = time.monotonic() + timeout, False
    try:
        while courier.poll() is None and any(s.pending(end) for s, end in waiting.items()):
            if time.monotonic() > until:
                log.warning("tracking: not everything could be delivered in %g seconds", timeout)
                break
            time.sleep(0.1)
        else:
            with suppress(subprocess.TimeoutExpired):
                courier.wait(SETTLE)
            done = courier.returncode in (0, None)
    finally:
        courier.kill()
        courier.wait()
    for line in dict.fromkeys(line for echo in echoes for line in echo.news()):
        log.warning("tracking: %s", line)
    return done


def _courier(*arguments: str) -> subprocess.Popen[bytes]:
    """Start a courier: for the run that is named, or without a name for all that waits now. What
    it and MLflow print goes to .tracking/courier.log."""
    command = [sys.executable, "-m", "pipelines.courier", *arguments]
    with (main_checkout() / ".tracking" / "courier.log").open("ab") as output:
        courier = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    _couriers[:] = [one for one in _couriers if one.poll() is None] + [courier]
    return courier


def _copy(sources: tuple[Path, ...], request: dict[str, Any] | None, place: Path) -> None:
    try:
        place.mkdir()
        if request is not None:
            (place / "example.json").write_text(json.dumps(request), encoding="utf-8")
        for source in sources:
            if source.is_dir():
                ignore = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, place / source.name, ignore=ignore)
            else:
                shutil.copy(source, place)
    except OSError:
        shutil.rmtree(place, ignore_errors=True)
        raise


def _floats(metrics: dict[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _environment() -> dict[str, str]:
    """What DVC and Prefect tell a stage about itself, as tags."""
    variables = os.environ
    tags = {
        "dvc.stage": variables.get("DVC_STAGE"),
        "dvc.exp_name": variables.get("DVC_EXP_NAME"),
        "prefect.flow_run_id": variables.get("EBM_FLOW_RUN_ID")
        or variables.get("PREFECT__FLOW_RUN_ID"),
    }
    return {tag: value for tag, value in tags.items() if value}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.tracking",
        description="Deliver to MLflow what waits in .tracking; exit 1 if not all of it arrives.",
    )
    runs = "runs that have not begun in the store that they were started for"
    parser.add_argument("--to", metavar="URI", help=f"another store for {runs}: a wrong address")
    options = parser.parse_args()

    sys.exit(guarded(lambda: flush(to=options.to)))
