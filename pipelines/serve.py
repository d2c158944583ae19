"""`python -m pipelines.serve`: Prefect's server, a worker, and the deployments of prefect.yaml.

All of it ends with this process, however that ends. The server listens on the loopback unless it
is told otherwise, and keeps its database in `.prefect/` of the checkout (PREFECT_HOME overrides).
Where PREFECT_API_URL names a server, that one is used and none is started.
"""

import argparse
import contextlib
import ipaddress
import os
import queue
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import httpx

from ebm import EBMError, files
from pipelines import ROOT
from pipelines.commands import LAST_LINES, guarded, our_python, positive, show
from pipelines.supervise import Ended, Launcher

POOL = "ebm"  # as in prefect.yaml
FOLDER = ROOT / ".prefect"
PATIENCE = 180.0  # seconds in which a server has to be up; 20 are usual
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SETTINGS = {
    "DO_NOT_TRACK": "true",
    "PREFECT_HOME": str(FOLDER),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_API_URL": "/api",  # wherever the page is opened, and whatever the port
    "PYTHONUNBUFFERED": "1",
}

Ends = queue.SimpleQueue[tuple[str, Ended]]
"""What has ended by itself, and how."""


def serve(host: str = "127.0.0.1", port: int = 4200) -> bool:
    """Serve this checkout until a signal comes; False if the server or the worker ends before.

    Raises:
        EBMError: the port is taken, the checkout is served already, or Prefect fails.
    """
    without_proxy()
    given = server_given()
    url = given or f"http://{_reachable(host)}:{port}/api"
    ends = Ends()
    with only_here(), contextlib.ExitStack() as parts:
        if not given:
            check_port(host, port)
            show(
                f"start Prefect's server, which takes half a minute; its log: {FOLDER}/server.log"
            )
            parts.enter_context(server(host, port, url, ends))
            end_dead_runs(url)
        create_pool(url)
        prefect(url, "deploy", "--all")
        parts.enter_context(worker(url, ends))
        show(f"Prefect is at {url.removesuffix('/api')} and runs what prefect.yaml says")
        show("error: {} ended: {}".format(*ends.get()))
    return False


def without_proxy() -> None:
    """Have nobody in this process or those it starts ask a proxy for what is on this machine."""
    names = ("no_proxy", "NO_PROXY")
    told = [host for name in names for host in os.environ.get(name, "").split(",") if host]
    if "*" not in told:  # which only stands alone
        os.environ |= dict.fromkeys(names, ",".join(dict.fromkeys([*told, *LOOPBACK])))


def server_given() -> str | None:
    """The address of the server that PREFECT_API_URL names, if it does; EBMError if nothing
    answers there. A refusal (HTTP 401, say) is an answer."""
    if not (url := os.environ.get("PREFECT_API_URL")):
        return None
    try:
        request(url.rstrip("/"), "health")
    except httpx.HTTPStatusError:
        pass
    except httpx.HTTPError as error:
        raise EBMError(f"PREFECT_API_URL = {url}: no server answers ({error})") from None
    return url


def check_prefect() -> None:
    """EBMError where a flow would fail at length: its server does not answer, or one of its own
    would have no place."""
    without_proxy()
    if server_given():
        return
    home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
    home.mkdir(parents=True, exist_ok=True)
    if not os.access(home, os.W_OK):
        problem = "may not be written, and a server of Prefect's keeps its database there"
        raise EBMError(f"{home}: {problem}; PREFECT_HOME names another folder")


@contextlib.contextmanager
def only_here() -> Iterator[None]:
    """Within this context, nobody else serves this checkout: two workers would meet in it."""
    FOLDER.mkdir(exist_ok=True)
    with files.locked(FOLDER / "lock", "this checkout is served already; end that one first"):
        yield


def check_port(host: str, port: int) -> None:
    """Raise an EBMError if nobody can listen there; warn if others can reach it."""
    if not 0 < port < 2**16:
        raise EBMError(f"--port {port}: no port; expected 1 to 65535")
    try:
        (family, *_, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        reason = error.strerror or error
        raise EBMError(f"{host}, port {port}: {reason}; --port takes another") from None
    if not ipaddress.ip_address(address[0]).is_loopback:
        show(f"warning: who reaches port {port} of this machine can have it run stages")


def _reachable(host: str) -> str:
    """Where to find a server here that listens on `host`."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


@contextlib.contextmanager
def server(host: str, port: int, url: str, ends: Ends) -> Iterator[None]:
    """Within this context, a server runs and answers."""
    arguments = ["server", "start", "--host", host, "--port", str(port)]
    with (
        (FOLDER / "server.log").open("w", encoding="utf-8", buffering=1) as log,
        running("the server", url, arguments, lambda line: log.write(f"{line}\n"), ends),
    ):
        deadline = time.monotonic() + PATIENCE
        while not _healthy(url):
            with contextlib.suppress(queue.Empty):
                name, ended = ends.get(timeout=0.2)
                raise EBMError(f"{name} ended: {ended}; see {FOLDER}/server.log")
            if time.monotonic() > deadline:
                raise EBMError(f"no answer from {url} within {PATIENCE:.0f} s")
        yield


def _healthy(url: str) -> bool:
    try:
        return request(url, "health") is True
    except httpx.HTTPError:
        return False


def request(url: str, path: str, content: object = None) -> Any:
    """What the server answers: to a GET, or with content to a POST.

    Servers elsewhere are asked through a proxy where the environment names one, those here are not
    (`without_proxy`).

    Raises:
        httpx.HTTPStatusError: it refuses.
        httpx.HTTPError: the address is none, or the server is not there, or not Prefect's.
    """
    method = "GET" if content is None else "POST"
    try:
        answer = httpx.request(
            method, f"{url}/{path}", json=content, timeout=30, follow_redirects=True
        )
        return answer.raise_for_status().json()
    except (httpx.InvalidURL, ValueError) as error:
        raise httpx.RequestError(str(error)) from None


def end_dead_runs(url: str) -> None:
    """Say of flow runs that a kill or a power cut ended without a word that they have crashed.

    They keep the place of the next one. None can be alive: only we serve this checkout.
    """
    busy = {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}}
    pool = {"name": {"any_": [POOL]}}
    crashed = {"type": "CRASHED", "message": "the server and its worker ended before it"}
    try:
        for dead in request(url, "flow_runs/filter", {"flow_runs": busy, "work_pools": pool}):
            request(url, f"flow_runs/{dead['id']}/set_state", {"state": crashed, "force": True})
    except httpx.HTTPError as error:
        raise EBMError(f"{url}: {error}") from None


def create_pool(url: str) -> None:
    """Have the work pool of prefect.yaml, as it is if it exists."""
    try:
        prefect(url, "work-pool", "create", POOL, "--type", "process")
    except EBMError as error:
        if "already exists" not in str(error):
            raise


def worker(url: str, ends: Ends) -> contextlib.AbstractContextManager[None]:
    """Within this context, a worker runs flows of this checkout, one at a time."""
    arguments = ["worker", "start", "--pool", POOL, "--limit", "1"]
    return running("the worker", url, arguments, lambda line: show(f"worker | {line}"), ends)


def prefect(url: str, *arguments: str) -> None:
    """Run a command of Prefect to its end; an EBMError with what it said if it fails."""
    said, ends = deque[str](maxlen=LAST_LINES), Ends()
    with running(f"prefect {arguments[0]}", url, arguments, said.append, ends):
        name, ended = ends.get()
    if ended.code:
        raise EBMError("\n".join([f"{name}: {ended}", *said]))


@contextlib.contextmanager
def running(
    name: str, url: str, arguments: Sequence[str], tell: Callable[[str], object], ends: Ends
) -> Iterator[None]:
    """Within this context, a command of Prefect runs; after it, it has ended.

    Each line that it prints is told; `ends` is told how it ended.
    """
    ours = {**our_python(), "PWD": str(ROOT), "PREFECT_API_URL": url}
    with Launcher("pipelines.serve:command", ROOT, {**SETTINGS, **os.environ, **ours}) as launcher:
        process = launcher.start(*arguments)

        def attend() -> None:
            for line in process.lines():
                with contextlib.suppress(OSError):  # on a full disk: who reads no more, blocks it
                    tell(line)
            ends.put((name, process.wait()))

        thread = threading.Thread(target=attend)
        thread.start()
        try:
            yield
        finally:
            launcher.cancel()
            thread.join()


def command() -> Callable[..., NoReturn]:
    """What becomes a command of Prefect, for the launcher."""
    return lambda *arguments: os.execv(
        sys.executable, [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Start Prefect's server, a worker and the deployments of prefect.yaml."
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="where to listen (default: %(default)s)"
    )
    parser.add_argument(
        "--port", type=positive, default=4200, help="its port (default: %(default)s)"
    )
    options = parser.parse_args()
    return guarded(lambda: serve(options.host, options.port), stages=True)


if __name__ == "__main__":
    sys.exit(main())
