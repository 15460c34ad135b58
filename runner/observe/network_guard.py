"""The network guard: Python's sockets of this process, and of those that it starts, reach nobody
but this host.

An audit hook sees every connection before it is made, whoever makes it. It does not see sockets of
native code: those are fenced by a network namespace that has nothing but loopback, as a container
started with `--network none` has. The report says whether there is that fence. Needs no torch, and
nothing but the standard library, since it runs when any Python starts.
"""

import fcntl
import ipaddress
import json
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Mode = Literal["off", "warn", "strict"]

_MODE = "SHARDLINE_NETWORK_GUARD"
_REPORT = "SHARDLINE_NETWORK_REPORT"
_JOB = "SHARDLINE_NETWORK_JOB"
_SITE = Path(__file__).parent / "guard_site"
_ASKED = "shardline.network_guard"
"""An audit event of our own, by which a process finds out whether it is guarded."""

_LOCAL_FAMILIES = {socket.AF_UNIX, socket.AF_NETLINK, socket.AF_ALG}
_STDLIB = os.path.dirname(os.path.abspath(socket.__file__))


class NetworkRefusedError(PermissionError):
    """The guard refused a connection."""


@dataclass(frozen=True)
class Counts:
    """What the guard saw in this job, all processes together."""

    refused: int = 0
    seen: int = 0


def guard_network(mode: Mode, *, report: str | None = None) -> None:
    """Guard this process from here on, and every Python that it starts from its beginning.

    Args:
        mode: off does nothing, warn tells of connections, strict refuses them.
        report: file to append to, as JSON lines; None: a temporary one, if there is anything to
            tell.

    Raises:
        OSError: the report cannot be written.
    """
    if mode == "off" or _is_guarded():
        return
    os.environ[_MODE], os.environ[_JOB] = mode, _name_job()
    os.environ[_REPORT] = report or os.path.join(
        tempfile.gettempdir(), f"shardline-network-{os.environ[_JOB]}.jsonl"
    )
    inherited = os.environ.get("PYTHONPATH")
    # A child may be another Python, which has no shardline.
    paths = [str(_SITE), str(Path(__file__).parents[2]), *([inherited] if inherited else [])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    if report:
        _begin(mode)
    sys.addaudithook(_hook(mode))


def inherit_guard() -> None:
    """Guard this process as the one that started it was."""
    mode = os.environ.get(_MODE)
    if mode in ("warn", "strict") and not _is_guarded():
        sys.addaudithook(_hook("strict" if mode == "strict" else "warn"))


def find_fence(interfaces: Mapping[str, bool] | None = None) -> str:
    """What keeps native sockets in.

    Args:
        interfaces: of the network, and whether each is up; None: those of this process's namespace.
    """
    if interfaces is None:
        interfaces = {name: _is_up(name) for _, name in socket.if_nameindex()}
    # Every new namespace is born with tunnels, which are down.
    harmless = {"lo", *(name for name in _BORN_WITH if not interfaces.get(name))}
    others = sorted(set(interfaces) - harmless)
    if not others:
        return "network namespace with loopback alone"
    return f"none: this network has {', '.join(others)}"


def _is_up(interface: str) -> bool:
    """Where the kernel does not tell, it may be."""
    try:
        flags = Path(f"/sys/class/net/{interface}/flags").read_text(encoding="ascii")
        return bool(int(flags, 16) & 1)
    except (OSError, ValueError):
        return True


_BORN_WITH = (
    "tunl0",
    "gre0",
    "gretap0",
    "erspan0",
    "ip_vti0",
    "ip6_vti0",
    "sit0",
    "ip6tnl0",
    "ip6gre0",
)


def count_events() -> Counts:
    """What has been seen so far, by every process of the job."""
    # Earlier jobs may have written into the same file.
    job = os.environ.get(_JOB)
    ours = [line for line in _lines() if line.get("job") == job and "refused" in line]
    refused = sum(line["refused"] for line in ours)
    return Counts(refused, len(ours) - refused)


def is_allowed(family: int, address: Any, peers: frozenset[str] = frozenset()) -> bool:
    """Whether a socket may send there: this host, or one of the job's peers.

    Args:
        address: as the `socket` module takes it; None: the one that the socket is connected to.
        peers: names and addresses of the job's other ranks.
    """
    if family in _LOCAL_FAMILIES or address is None:
        return True
    if family not in (socket.AF_INET, socket.AF_INET6) or not isinstance(address, tuple):
        return False
    return _is_local(address[0], peers)


def _is_local(host: Any, peers: frozenset[str]) -> bool:
    if isinstance(host, bytes):
        host = host.decode(errors="replace")
    if host in (None, "", "localhost") or host in peers or host == socket.gethostname():
        return True
    try:
        found = ipaddress.ip_address(str(host).partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None) or found
    return bool(mapped.is_loopback or mapped.is_unspecified or str(mapped) in peers)


def _asks(event: str, arguments: tuple[Any, ...], peers: frozenset[str]) -> str | None:
    """Whom an event would reach that it may not; None: nobody."""
    match event:
        case "socket.connect" | "socket.sendto" | "socket.sendmsg":
            made, address = arguments[0], arguments[1]
            return None if is_allowed(made.family, address, peers) else _shown(address)
        case "socket.getaddrinfo" | "socket.gethostbyname":
            host = arguments[0]
            # A number is not looked up; whoever connects to it is asked then.
            return None if _is_number(host) or _is_local(host, peers) else f"{_shown(host)} by DNS"
        case "socket.gethostbyaddr":
            return None if _is_local(arguments[0], peers) else f"{_shown(arguments[0])} by DNS"
        case "socket.getnameinfo":
            host = arguments[0][0]
            return None if _is_local(host, peers) else f"{_shown(host)} by DNS"
    return None


def _is_number(host: Any) -> bool:
    try:
        ipaddress.ip_address(host.decode() if isinstance(host, bytes) else str(host))
    except ValueError:
        return False
    return True


def _hook(mode: Mode) -> Callable[[str, tuple[Any, ...]], None]:
    master = os.environ.get("MASTER_ADDR")
    peers = frozenset([master] if master else [])

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not event.startswith("socket."):
            if event == _ASKED:
                arguments[0].append(mode)
            return
        whom = _asks(event, arguments, peers)
        if whom is not None:
            _tell(mode, event, whom)

    return hook


def _tell(mode: Mode, event: str, whom: str) -> None:
    """Report a connection, and refuse it if the guard is strict."""
    refused = mode == "strict"
    stack = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
    theirs = [f for f in stack if not os.path.abspath(f.filename).startswith(_STDLIB + os.sep)]
    place = (theirs or stack)[-1]
    line = {
        "job": os.environ.get(_JOB),
        "refused": refused,
        "to": whom,
        "event": event,
        "rank": os.environ.get("RANK"),
        "pid": os.getpid(),
        "time": time.time(),
        "fence": find_fence(),
        "stack": [f"{f.filename}:{f.lineno} {f.name}" for f in stack],
    }
    where = os.environ.get(_REPORT, "nowhere")
    try:
        _begin(mode)
        _append(line)
    except OSError as error:
        where = f"not written ({error.strerror})"
    done = "refused" if refused else "saw"
    said = (
        f"the network guard {done} a connection to {whom}, made in {place.filename}:{place.lineno}"
    )
    sys.stderr.write(f"shardline: {said}; report: {where}\n")
    if refused:
        raise NetworkRefusedError(f"{said}; nothing is fetched at run time")


def _head(mode: Mode) -> dict[str, Any]:
    job = os.environ.get(_JOB)
    return {
        "job": job,
        "guard": mode,
        "fence": find_fence(),
        "pid": os.getpid(),
        "time": time.time(),
    }


def _name_job() -> str:
    """A name that all processes of this job have, and no other job of this host.

    Ranks of torchrun are guarded one by one, and have it in common; every other process inherits
    the name.
    """
    pid = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    # The 22nd field is when it started; the second, the program's name, may have blanks.
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return f"{pid}-{fields[19]}"


def _begin(mode: Mode) -> None:
    """Let this job's first line in the report be its head; of several processes one writes it."""
    with _open_report() as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # It ends with the descriptor.
        if all(line.get("job") != os.environ.get(_JOB) for line in _lines()):
            os.write(descriptor, json.dumps(_head(mode)).encode() + b"\n")


def _append(line: dict[str, Any]) -> None:
    """One write, so that lines of several processes do not mix."""
    with _open_report() as descriptor:
        os.write(descriptor, json.dumps(line).encode() + b"\n")


@contextmanager
def _open_report() -> Iterator[int]:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    descriptor = os.open(os.environ[_REPORT], flags, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lines() -> Iterator[dict[str, Any]]:
    try:
        with open(os.environ.get(_REPORT, os.devnull), encoding="utf-8") as file:
            yield from (json.loads(line) for line in file if line.endswith("\n"))
    except FileNotFoundError:
        return


def _is_guarded() -> bool:
    answers: list[Mode] = []
    sys.audit(_ASKED, answers)
    return bool(answers)


def _shown(address: Any) -> str:
    if isinstance(address, tuple) and len(address) >= 2:
        return f"{address[0]} port {address[1]}"
    return address.decode(errors="replace") if isinstance(address, bytes) else str(address)
