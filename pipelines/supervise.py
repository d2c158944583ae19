"""Starts Python functions as processes that never outlive whoever asked for them.

    caller --socket--> template --fork--> supervisor --fork--> leader, and all that it starts
                                                    --fork--> guard

The *template* imports what the function needs once and then only forks: a stage that would spend
two seconds on importing DVC starts at once. The *leader* calls the function, in a process group of
its own. Its *supervisor* ends that group when the caller closes its end of a socket or dies (which
closes it, even by `kill -9`), when the time is up, or on a signal. The *guard* ends it when the
supervisor itself is killed. This module imports the standard library only, so that the template
holds no more than its function needs, and has one thread (a fork loses the others).
"""

import contextlib
import json
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

CHECKOUT = Path(__file__).resolve().parents[1]
ESCALATION = ((signal.SIGINT, 6.0), (signal.SIGTERM, 3.0), (signal.SIGKILL, 1.0))
"""The signals for a group that has to end, and the seconds it is given after each."""

RESTART = signal.SIGUSR1
SUPERVISED = (signal.SIGCHLD, signal.SIGALRM, signal.SIGINT, signal.SIGTERM, RESTART)
SUPERVISOR = "EBM_SUPERVISOR"  # the process id of the supervisor, for what the leader starts


class Cancelled(Exception):
    """Nothing more is started: the launcher was told to end."""


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (negative: the signal), and why if it was made to."""

    code: int
    reason: str = ""

    def __str__(self) -> str:
        killed = f"killed by signal {-self.code}"
        return self.reason or (killed if self.code < 0 else f"exit code {self.code}")


class Process:
    """The caller's end of a supervised process."""

    def __init__(self, line: socket.socket, output: int) -> None:
        self._line, self._output = line, output

    def lines(self) -> Iterator[str]:
        """What the process writes, line by line, until it has ended.

        Of a line that carriage returns overwrite (a progress bar), the last state is given. What
        the process leaves running in the background on purpose keeps nobody waiting.
        """
        rest = b""
        while chunk := self._read():
            *complete, rest = map(_visible, (rest + chunk).split(b"\n"))
            yield from (line.decode(errors="replace").rstrip("\r") for line in complete)
        if rest:
            yield rest.decode(errors="replace").rstrip("\r")

    def _read(self) -> bytes:
        ready, _, _ = select.select([self._output, self._line.fileno()], [], [])
        return os.read(self._output, 1 << 16) if self._output in ready else b""

    def wait(self) -> Ended:
        """How the process ended. To be asked once, when `lines` has given the last one."""
        with self._line:
            answer = self._line.recv(1 << 12)
        os.close(self._output)
        return Ended(**json.loads(answer)) if answer else Ended(-9, "its supervisor was killed")

    def cancel(self) -> None:
        """Have the process ended. Returns at once: `wait` tells when it is done."""
        with contextlib.suppress(OSError):  # it has ended already
            self._line.shutdown(socket.SHUT_WR)


def _visible(line: bytes) -> bytes:
    """What a terminal shows of a line: nothing from before a carriage return within it."""
    return line[line.rstrip(b"\r").rfind(b"\r") + 1 :]


class Launcher:
    """Starts calls of one function as processes, and ends those that still run when it is left.

    Args:
        target: "module:name" of a function that prepares what it can (imports) and returns the
            one to be called. That one takes JSON and returns its exit code.
        cwd: the directory in which it runs.
        environment: the variables which it, and all that it starts, sees.
    """

    def __init__(self, target: str, cwd: Path, environment: Mapping[str, str]) -> None:
        self._lock = threading.Lock()
        self._started: list[Process] = []
        self.cancelled = False
        self._control, theirs = socket.socketpair()
        with theirs:
            arguments = [str(theirs.fileno()), target, str(cwd.resolve())]
            self._template = subprocess.Popen(
                [sys.executable, "-um", "pipelines.supervise", *arguments],
                cwd=CHECKOUT,
                env=environment,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C in the terminal is for the caller alone
            )

    def __enter__(self) -> "Launcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()
        self._control.close()
        self._template.terminate()  # it may still be importing
        self._template.wait()

    def start(self, *arguments: Any, timeout: float | None = None) -> Process:
        """Call the function in a new process, which has to end within `timeout` seconds.

        Raises:
            Cancelled: the launcher has been cancelled.
            ConnectionError: its template was killed.
        """
        request = json.dumps({"arguments": arguments, "timeout": timeout}).encode()
        with self._lock:
            if self.cancelled:
                raise Cancelled
            self._started.append(process := self._send(request))
        return process

    def _send(self, request: bytes) -> Process:
        ours, theirs = socket.socketpair()
        output, written = os.pipe()
        try:
            socket.send_fds(self._control, [request], [theirs.fileno(), written])
        except OSError as error:
            ours.close()
            os.close(output)
            raise ConnectionError("the process that starts the others was killed") from error
        finally:
            theirs.close()
            os.close(written)
        return Process(ours, output)

    def cancel(self) -> None:
        """Have every process ended and start no other. Returns at once."""
        with self._lock:
            self.cancelled = True
            for process in self._started:
                process.cancel()


def serve(control: socket.socket, target: str, cwd: str) -> None:
    """The template: fork a supervisor for every request, until the caller is gone."""
    prepare = pkgutil.resolve_name(target)
    os.chdir(cwd)
    function = prepare()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for supervisors
    while True:
        # A message that carries file descriptors is never merged with the next one: unix(7).
        request, descriptors, _, _ = socket.recv_fds(control, 1 << 16, 2)
        if not request:
            return
        if not os.fork():
            control.close()
            _exit_with(supervise, function, *descriptors, **json.loads(request))
        for descriptor in descriptors:
            os.close(descriptor)


def supervise(
    function: Callable[..., int],
    line: int,
    output: int,
    arguments: list[Any],
    timeout: float | None,
) -> int:
    """The supervisor: start the leader, see to its end, tell the caller."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SUPERVISED)  # until each of us can handle them
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    caller = socket.socket(fileno=line)
    leader = os.fork()
    if not leader:
        caller.close()
        _exit_with(lead, function, output, arguments)
    os.close(output)
    group = Group(leader)
    try:
        signals = _signals_as_a_file(*SUPERVISED)
        with guarded(group):
            ended = attend(group, caller, signals, timeout or 0)
    except BaseException:  # no process more is to be had, say: nobody would end the group
        group.end()
        raise
    with contextlib.suppress(OSError):  # the caller has died
        caller.send(json.dumps(asdict(ended)).encode())
    return 0


def restart_clock() -> None:
    """Have the time limit of what this process belongs to, if it has one, count from now: until
    now it only waited."""
    if supervisor := os.environ.get(SUPERVISOR):
        with contextlib.suppress(OSError):
            os.kill(int(supervisor), RESTART)


def lead(function: Callable[..., int], output: int, arguments: list[Any]) -> int:
    """The leader: the call itself, with a group, an output and signal handlers of its own."""
    os.setpgid(0, 0)
    for number in SUPERVISED:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # even if the caller ignores it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SUPERVISED)
    for standard in (1, 2):
        os.dup2(output, standard)
    os.close(output)
    os.environ[SUPERVISOR] = str(os.getppid())
    return function(*arguments)


class Group:
    """The process group of a leader, as its parent or its guard sees it."""

    def __init__(self, leader: int) -> None:
        self._leader = leader
        self._code: int | None = None
        with contextlib.suppress(OSError):  # the leader was faster, or is gone
            os.setpgid(leader, leader)

    def code(self) -> int | None:
        """The leader's exit code, None while it runs."""
        if self._code is None:
            with contextlib.suppress(ChildProcessError):  # a guard is no parent
                pid, status = os.waitpid(self._leader, os.WNOHANG)
                self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def end(self) -> None:
        """End the whole group, by force if it has to be; takes ten seconds at most."""
        any(self._gone_after(number, patience) for number, patience in ESCALATION)

    def _gone_after(self, number: int, patience: float) -> bool:
        deadline = time.monotonic() + patience
        self._signal(number)
        while self._signal(0):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def _signal(self, number: int) -> bool:
        """Signal all members; whether there are any."""
        self.code()  # a dead leader that nobody has waited for still counts as one
        try:
            os.killpg(self._leader, number)
        except OSError:
            return False
        return True


def attend(group: Group, caller: socket.socket, signals: int, timeout: float) -> Ended:
    """Wait until the leader ends, or has to be ended: then end the whole group.

    What a leader leaves running when it ends by itself, it leaves on purpose; but not if it was
    killed from outside.
    """
    signal.setitimer(signal.ITIMER_REAL, timeout)
    reason = ""
    while (code := group.code()) is None and not reason:
        ready, _, _ = select.select([caller.fileno(), signals], [], [])
        arrived = os.read(signals, 64) if signals in ready else b""
        if caller.fileno() in ready or signal.SIGINT in arrived or signal.SIGTERM in arrived:
            reason = "cancelled"
        elif RESTART in arrived:
            signal.setitimer(signal.ITIMER_REAL, timeout)
        elif signal.SIGALRM in arrived:
            reason = "time limit reached"
    if code is None or code < 0:
        group.end()
        code = group.code()
    if code is None:
        code = -signal.SIGKILL  # not even that ended it within a second
    return Ended(code, reason if code else "")


@contextlib.contextmanager
def guarded(group: Group) -> Iterator[None]:
    """Within this context, a process waits to end the group in case that we are killed.

    It holds our end of the caller's socket open too: the caller learns of our death when the
    group has ended, not before.
    """
    waiting, ours = os.pipe()
    guard = os.fork()
    if not guard:
        os.close(ours)
        _exit_with(_guard, group, waiting)
    os.close(waiting)
    yield
    with contextlib.suppress(OSError):  # the guard was killed
        os.write(ours, b".")
    os.waitpid(guard, 0)


def _guard(group: Group, waiting: int) -> int:
    os.setsid()
    if not os.read(waiting, 1):
        group.end()
    return 0


def _signals_as_a_file(*numbers: int) -> int:
    """A file descriptor from which the numbers of the signals that arrive can be read."""
    received, written = os.pipe()
    os.set_blocking(written, False)
    signal.set_wakeup_fd(written)
    for number in numbers:
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    return received


def _exit_with(function: Callable[..., int], *args: Any, **kwargs: Any) -> NoReturn:
    """Call a function as the whole of this forked process, whose exit code it returns."""
    code = 1
    try:
        code = function(*args, **kwargs)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), *sys.argv[2:])
