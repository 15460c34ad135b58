"""The life of a rank of a server: rank 0 meets the clients, the others follow its steps."""

import os
import signal
import sys
import time
from contextlib import suppress

from parallel.launch import Interrupted, RankEnv, first_signal_calls
from runner.engine.rank import run_rank
from runner.graph_planning import GraphJob
from runner.pipeline.rank import run_graph_rank
from runner.planning import DecoderJob
from runner.serve.address import tell_address
from runner.serve.app import make_app
from runner.serve.guard import read_key
from runner.serve.guard_metrics import GuardMetrics
from runner.serve.health import watch
from runner.serve.http_server import address_of, forget, listen, serving
from runner.serve.language import language_service
from runner.serve.lifecycle import Front
from runner.serve.service import Service
from runner.serve.tensors.service import tensor_service


def serve_rank(job: DecoderJob | GraphJob, env: RankEnv) -> None:
    """Run this process's rank until rank 0 is told to end.

    Raises:
        ConfigError: the address or the key's file cannot be used.
        ShardlineError: see `run_rank` and `run_graph_rank`.
    """
    if env.rank != 0:
        if env.report_fd is None:
            # torchrun signals every rank; rank 0 tells the others when to leave.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        _follow(job, env)
        return
    config, service = job.config.server, _service(job)
    app = make_app(service, config)
    service.metrics.add(GuardMetrics())
    listener = listen(config)
    # A launcher of ours passes on what is meant for one that serves, however shortly.
    ends_early = env.report_fd is None
    drain = _Drain(service.front, config.shutdown_timeout_s, ends_early=ends_early)
    with serving(app, listener, grace_s=drain.left_s), first_signal_calls(drain.begin):
        address = address_of(listener)
        tell_address(address)
        print(f"shardline: serving {service.model} at {address}", file=sys.stderr, flush=True)
        watch(service.health, env, service.front.fail)
        try:
            service.run(env)
        except BaseException as error:
            service.front.fail(f"the engine has ended: {error}")
            raise
        finally:
            forget(address)


class _Drain:
    """The end of a server that was told to end."""

    def __init__(self, front: Front, timeout_s: float, *, ends_early: bool) -> None:
        """
        Args:
            timeout_s: for open requests, and for their clients to read.
            ends_early: a server that has not served anybody yet ends at once.
        """
        self._front = front
        self._timeout_s = timeout_s
        self._ends_early = ends_early
        self._ends_at = 0.0

    def begin(self, signum: int) -> None:
        """Let open requests end.

        Raises:
            Interrupted: there never were any.
        """
        if self._ends_early and self._front.state == "starting":
            raise Interrupted(signum)
        self._ends_at = time.monotonic() + self._timeout_s
        self._front.drain(self._timeout_s)
        says = f"shardline: told to end; open requests have {self._timeout_s:g} s to be answered\n"
        with suppress(OSError):  # Nobody reads it any more.
            os.write(sys.stderr.fileno(), says.encode())  # whatever `sys.stderr` was busy with

    def left_s(self) -> float:
        """How long clients may still take to read."""
        return self._ends_at - time.monotonic()


def check_server(job: DecoderJob | GraphJob) -> None:
    """Find out before there are ranks whether the server can be what it is asked to be.

    Raises:
        ConfigError: the address, the key's file, a size or a type cannot be used.
        IntegrityError: a file of the tokenizer is absent or corrupt.
    """
    read_key(job.config.server.api_key_file)
    _service(job)
    with listen(job.config.server) as listener:
        forget(address_of(listener))


def _service(job: DecoderJob | GraphJob) -> Service:
    return language_service(job) if isinstance(job, DecoderJob) else tensor_service(job)


def _follow(job: DecoderJob | GraphJob, env: RankEnv) -> None:
    if isinstance(job, DecoderJob):
        run_rank(job, env, None)
    else:
        run_graph_rank(job, env, None)
