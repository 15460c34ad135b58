"""`shardline serve`: a model behind an HTTP API; `shardline health`: ask how it is."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parallel.errors import ConfigError, PreflightError
from runner.cli.options import with_job_options
from runner.cli.preflight import check_socket
from runner.cli.ranks import on_ranks, say_what_runs

if TYPE_CHECKING:
    from runner.graph_planning import GraphJob
    from runner.planning import DecoderJob


@with_job_options("decoder", "graph")
def serve(
    *,
    job: "DecoderJob | GraphJob",
    host: Annotated[
        str | None, typer.Option("--host", help="Address to listen at, as server.host.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option("--port", min=0, max=65535, help="Port to listen at, as server.port."),
    ] = None,
    uds: Annotated[
        Path | None,
        typer.Option("--uds", metavar="PATH", help="Listen at a Unix socket, not at a port."),
    ] = None,
) -> None:
    """Serve a model over HTTP until SIGTERM or Ctrl-C; open requests are finished.

    A language model is behind OpenAI's API, a tensor model behind the Open Inference Protocol
    (KServe v2).

    The key and limits are keys of the configuration's section server, such as
    --set server.max_request_bytes=10000000. Starts its own ranks, or joins those that torchrun
    started.
    """
    from parallel.launch import adopt

    try:
        from runner.serve.rank import check_server, serve_rank
    except ModuleNotFoundError as error:
        raise PreflightError(
            f"serve needs {error.name}; install the extra: pip install 'shardline[serve]'"
        ) from None
    if host == "":
        raise ConfigError("--host: it is empty; use 127.0.0.1, or 0.0.0.0 for every network")
    if uds and (host or port is not None):
        raise ConfigError("--uds: a server listens at a socket or at a port; leave one of them out")
    where = {"host": host, "port": port, "uds": uds and str(uds)}
    if given := {key: value for key, value in where.items() if value is not None}:
        server = job.config.server.model_copy(update={"uds": None} | given)
        job = replace(job, config=job.config.model_copy(update={"server": server}))
    if adopt() is None:
        check_socket(job.config.server.uds)
        check_server(job)
        say_what_runs(job)
    on_ranks(job.plan.topology, partial(serve_rank, job), drains=True)


def health(
    url: Annotated[
        str | None,
        typer.Option(
            "--url",
            help="Where the server listens: http://HOST:PORT, or unix:PATH; else where the server "
            "of this container said, or http://127.0.0.1:8000.",
        ),
    ] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds to wait.")] = 5.0,
) -> None:
    """Ask a server whether it is ready; ends with 0 if it is, and 1 if not."""
    from http.client import HTTPException

    from runner.serve.address import ask, known_address

    address = url or known_address()
    try:
        status, text = ask(address, "/health/ready", timeout_s=timeout_s)
    except OSError as error:
        status, text = 0, f"no server answers at {address} ({error.strerror or error})"
    except (ValueError, HTTPException) as error:
        status, text = 0, f"{address}: {type(error).__name__}: {error}"
    typer.echo(text if status == 200 else f"not ready: {text}", err=status != 200)
    sys.exit(0 if status == 200 else 1)
