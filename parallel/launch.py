"""Start one process a rank on this host, or find that torchrun already did; the first failure ends
them all.

The launcher runs the same command once a rank, as torchrun does, and watches. It imports no torch.
What a rank does once it runs, and the groups it joins, are `parallel.context`.

The environment a rank is told of its place by is read and written in this file alone.
"""

import contextlib
import ctypes
import faulthandler
import gc
import json
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from parallel.errors import ConfigError, RankLostError, ShardlineError, StalledError
from parallel.progress import Doing, ProgressBoard

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_LISTEN_FD = "SHARDLINE_LISTEN_FD"
_REPORT_FD = "SHARDLINE_REPORT_FD"
_PROGRESS_FD = "SHARDLINE_PROGRESS_FD"
_PARENT_PID = "SHARDLINE_PARENT_PID"

_PR_SET_PDEATHSIG = 1
_GRACE_S = 0.5
"""How long the launcher listens on after a failure: the rank that failed first need not be the
first heard of.
"""
_TERMINATE_S = 2.0
"""How long ranks may take to go after SIGTERM, before SIGKILL."""

_STACK_SIGNAL = signal.SIGUSR1
"""Lets a rank write the stacks of its threads to its standard error."""
_STACK_S = 0.5
"""How long a rank that hangs has to do so."""

_Handlers = dict[signal.Signals, Any]
"""What `signal.getsignal` says of each."""


@dataclass(frozen=True)
class RankEnv:
    """What a process was told by whoever started it.

    Attributes:
        listen_fd: rank 0 of our own launcher: a listening socket for the rendezvous.
        report_fd: our own launcher: where a failure is reported.
        progress_fd: our own launcher: memory of the job's `ProgressBoard`.
    """

    rank: int
    world_size: int
    listen_fd: int | None = None
    report_fd: int | None = None
    progress_fd: int | None = None

    def store(self, timeout: timedelta) -> "Store":
        """The rendezvous that all ranks meet at."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]
        from torch.distributed.rendezvous import rendezvous

        if self.report_fd is None:
            meeting = rendezvous("env://", self.rank, self.world_size, timeout=timeout)
            joined: Store = next(iter(meeting))[0]
            return joined
        return TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            self.world_size,
            is_master=self.rank == 0,
            timeout=timeout,
            master_listen_fd=self.listen_fd,
        )


@dataclass(frozen=True)
class Failure:
    """Why a rank ended.

    Attributes:
        exit_code: what the job is to end with.
        secondary: the rank only lost its peers; another one failed first.
        is_sudden: the rank could not say what it was at.
    """

    message: str
    exit_code: int
    secondary: bool = False
    is_sudden: bool = False


@dataclass(frozen=True)
class _Named:
    """A rank for messages: its name, and what it was last at."""

    name: str
    doing: Doing

    @property
    def occupation(self) -> str:
        return "" if self.doing is Doing.STARTING else f" while {self.doing.words}"

    def __str__(self) -> str:
        return f"{self.name}{self.occupation}"


def adopt() -> RankEnv | None:
    """This process's place in a job, if torchrun or our launcher started it as a rank.

    A rank of our launcher asks the kernel to kill it when the launcher dies, and shows its stacks
    when it is asked to.

    Raises:
        ConfigError: RANK or WORLD_SIZE is not a number.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    try:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except ValueError:
        raise ConfigError(
            f"RANK={os.environ['RANK']!r}, WORLD_SIZE={os.environ['WORLD_SIZE']!r}: both must be "
            "numbers; unset them to start ranks from here, or let torchrun set them"
        ) from None
    if _PARENT_PID not in os.environ:
        return RankEnv(rank, world_size)
    die_with_parent(int(os.environ[_PARENT_PID]))
    faulthandler.register(_STACK_SIGNAL, file=2)
    listen_fd = os.environ.get(_LISTEN_FD)
    return RankEnv(
        rank,
        world_size,
        int(listen_fd) if listen_fd else None,
        report_fd=int(os.environ[_REPORT_FD]),
        progress_fd=int(os.environ[_PROGRESS_FD]),
    )


def report(env: RankEnv, failure: Failure) -> None:
    """Tell the launcher why this rank is about to end."""
    if env.report_fd is not None:
        os.write(env.report_fd, json.dumps(asdict(failure)).encode())


def run_ranks(
    command: Sequence[str],
    world_size: int,
    *,
    describe: Callable[[int], str],
    environment: Mapping[str, str] = MappingProxyType({}),
    drains: bool = False,
) -> None:
    """Run `command` once a rank and wait; returns when all ranks ended well.

    No process outlives this call, whatever ends it.

    Args:
        describe: a rank's name for messages, such as "rank 2 (stage 1, tp rank 0)".
        environment: what each rank gets beside this process's environment and its own place.
        drains: once rank 0 is in its loop, the first SIGINT or SIGTERM is passed on to it, and it
            ends the job in its own time; before that the job ends at once.

    Raises:
        ShardlineError: a rank failed; its message names the rank that failed first, its exit code
            is the job's.
        Interrupted: SIGINT or SIGTERM arrived.
    """
    with signals_raise(), socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        progress_fd = ProgressBoard.anonymous_fd(world_size)
        stack.callback(os.close, progress_fd)
        ranks: list[_Rank] = []
        stack.callback(_stop, ranks)
        for rank in range(world_size):
            ranks.append(_Rank.start(command, rank, world_size, listener, progress_fd, environment))
        board = ProgressBoard(progress_fd, world_size)
        if drains:
            stack.enter_context(first_signal_calls(partial(_drain, ranks[0], board)))
        # What the command has loaded is of no use to one that waits, but would be gone through by
        # the garbage collector when it ends, for a second or more.
        gc.freeze()
        _watch(ranks, partial(_describe, describe=describe, board=board))


def _drain(rank: "_Rank", board: ProgressBoard, signum: int) -> None:
    """Let rank 0 end the job, if it has begun to serve anybody."""
    if board.read(rank.rank).doing.is_starting:
        signal.raise_signal(signum)
    else:
        rank.process.terminate()


def _describe(rank: int, *, describe: Callable[[int], str], board: ProgressBoard) -> _Named:
    return _Named(describe(rank), board.read(rank).doing)


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived; not an error, so nothing that handles errors catches it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class _Rank:
    """A rank's process and the pipe it reports on."""

    def __init__(self, rank: int, process: "subprocess.Popen[bytes]", reports: int) -> None:
        self.rank = rank
        self.process = process
        self.reports = reports
        self.text = b""

    @classmethod
    def start(
        cls,
        command: Sequence[str],
        rank: int,
        world_size: int,
        listener: socket.socket,
        progress_fd: int,
        environment: Mapping[str, str],
    ) -> "_Rank":
        reports, report_fd = os.pipe()
        fds = [report_fd, progress_fd, *([listener.fileno()] if rank == 0 else [])]
        try:
            process = subprocess.Popen(
                command,
                env={
                    **_environment(rank, world_size, listener, report_fd),
                    _PROGRESS_FD: str(progress_fd),
                    **environment,
                },
                pass_fds=fds,
                start_new_session=True,  # a Ctrl-C reaches the launcher alone
                stdin=subprocess.DEVNULL,
            )
        finally:
            os.close(report_fd)
        return cls(rank, process, reports)

    def failure(self) -> Failure | None:
        """Why the process ended; None: it ended well."""
        code = self.process.wait()
        if self.text:
            return Failure(**json.loads(self.text))
        if code == -signal.SIGABRT:
            # NCCL's watchdog aborts a rank whose peers do not answer.
            return Failure("killed by SIGABRT", RankLostError.exit_code, secondary=True)
        if code < 0:
            how = f"killed by {signal.Signals(-code).name}"
            return Failure(how, RankLostError.exit_code, is_sudden=True)
        if code > 0:
            how = f"ended with exit code {code}"
            return Failure(how, RankLostError.exit_code, is_sudden=True)
        return None


def _environment(
    rank: int, world_size: int, listener: socket.socket, report_fd: int
) -> dict[str, str]:
    host, port = listener.getsockname()
    threads = max(1, len(os.sched_getaffinity(0)) // world_size)
    chosen = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        _REPORT_FD: str(report_fd),
        _PARENT_PID: str(os.getpid()),
    }
    if rank == 0:
        chosen[_LISTEN_FD] = str(listener.fileno())
    defaults = {
        "OMP_NUM_THREADS": str(threads),
        # One host, and possibly no other interface: a container started with --network none.
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        # Peers of a dead rank would each print a stack; the launcher names the one that failed.
        "TORCH_CPP_LOG_LEVEL": "FATAL",
    }
    return {**defaults, **os.environ, **chosen}


def _watch(ranks: Sequence[_Rank], name: Callable[[int], "_Named"]) -> None:
    """Wait for every rank; raise for the first one that failed."""
    failures: list[tuple[_Rank, Failure]] = []
    with selectors.DefaultSelector() as selector:
        for rank in ranks:
            selector.register(rank.reports, selectors.EVENT_READ, rank)
        deadline: float | None = None
        while selector.get_map():
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
            events = selector.select(timeout)
            for rank in _ended(events, selector):
                if failure := rank.failure():
                    failures.append((rank, failure))
                    deadline = deadline or time.monotonic() + _GRACE_S
            if not events or (deadline is not None and time.monotonic() > deadline):
                break
    if failures:
        raise _job_error(failures, [r for r in ranks if r.process.poll() is None], name)


def _job_error(
    failures: Sequence[tuple[_Rank, Failure]],
    silent: Sequence[_Rank],
    name: Callable[[int], "_Named"],
) -> ShardlineError:
    """Blame the first that failed of itself; where all waited in vain, those that are silent, which
    are made to show their stacks.
    """
    rank, failure = min(failures, key=lambda pair: pair[1].secondary)
    blamed = name(rank.rank)
    message = f"{blamed.name}: {failure.message}"
    if failure.secondary and silent:
        names = ", ".join(str(name(other.rank)) for other in silent)
        _show_stacks(silent)
        return _JobError(f"{message}; no sign of life from {names}", StalledError.exit_code)
    if failure.is_sudden:
        message = f"{blamed.name}: {failure.message}{blamed.occupation}"
    return _JobError(message, failure.exit_code)


def _show_stacks(ranks: Sequence[_Rank]) -> None:
    """Let ranks that hang say where; those that were stopped go on for that."""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            rank.process.send_signal(_STACK_SIGNAL)
            rank.process.send_signal(signal.SIGCONT)
    time.sleep(_STACK_S)


def _ended(events: Any, selector: selectors.BaseSelector) -> Iterator[_Rank]:
    """The ranks whose pipe is at its end; what others wrote is kept."""
    for key, _ in events:
        if written := os.read(key.fd, 65536):
            key.data.text += written
        else:
            selector.unregister(key.fd)
            yield key.data


class _JobError(ShardlineError):
    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def _stop(ranks: Sequence[_Rank]) -> None:
    """End every rank that still runs, and close the pipes."""
    for rank in ranks:
        if rank.process.poll() is None:
            rank.process.terminate()
    deadline = time.monotonic() + _TERMINATE_S
    for rank in ranks:
        try:
            rank.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.process.kill()
            rank.process.wait()
        os.close(rank.reports)


def signals_raise() -> contextlib.AbstractContextManager[None]:
    """SIGINT and SIGTERM raise `Interrupted`, once."""

    def interrupt(signum: int, previous: _Handlers) -> None:
        _handle(dict.fromkeys(previous, signal.SIG_IGN))
        raise Interrupted(signum)

    return _handling(interrupt)


def first_signal_calls(act: Callable[[int], object]) -> contextlib.AbstractContextManager[None]:
    """The first SIGINT or SIGTERM calls `act` with its number; the next, one of `act`'s own too,
    does what it did before.
    """

    def first(signum: int, previous: _Handlers) -> None:
        _handle(previous)
        act(signum)

    return _handling(first)


@contextlib.contextmanager
def _handling(handler: Callable[[int, _Handlers], None]) -> Iterator[None]:
    """Let SIGINT and SIGTERM call `handler` with what handled them before."""
    previous: _Handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    _handle(dict.fromkeys(previous, lambda signum, _frame: handler(signum, previous)))
    try:
        yield
    finally:
        _handle(previous)


def _handle(handlers: _Handlers) -> None:
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def die_with_parent(parent_pid: int) -> None:
    """Let the kernel kill this process when the one that started it ends, whatever ends it.

    Raises:
        RankLostError: it has ended already.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        raise RankLostError("the launcher is gone")
