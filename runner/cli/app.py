"""The command line: registers the commands, and turns what they raise into one line and an exit
code.

Commands import what is heavy inside their functions, so that `--help` answers at once.
"""

import contextlib
import os
import sys
import traceback

import typer

from parallel.errors import InternalError, RankLostError, ShardlineError
from parallel.launch import Failure, Interrupted, RankEnv, adopt, report
from runner.cli.bench import bench
from runner.cli.bundle import bundle
from runner.cli.compile import compile_model
from runner.cli.doctor import doctor
from runner.cli.generate import generate
from runner.cli.import_model import import_model
from runner.cli.inspect import inspect
from runner.cli.plan import plan
from runner.cli.preflight import ask_for_preflight
from runner.cli.run import run
from runner.cli.serve import health, serve

app = typer.Typer(
    name="shardline",
    help="Cut a model by a YAML file into tensor- and pipeline-parallel shards; run it offline.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich doubles the time that --help takes
    add_completion=False,
)


def _tell_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"shardline {version('shardline')}")
        raise typer.Exit


@app.callback()
def _global_options(
    debug: bool = typer.Option(
        False, "--debug", help="Print the traceback of an error, and what each rank compiled."
    ),
    preflight: bool = typer.Option(
        False, "--preflight", help="Check first whether this host has what the command needs."
    ),
    version: bool = typer.Option(
        False,
        "--version",
        help="Print the version and exit.",
        callback=_tell_version,
        is_eager=True,
    ),
) -> None:
    del version
    if preflight:
        ask_for_preflight()
    if debug:
        os.environ["SHARDLINE_DEBUG"] = "1"
    if "SHARDLINE_DEBUG" in os.environ:
        import logging

        logging.basicConfig(format="shardline: %(message)s")
        logging.getLogger("runner").setLevel(logging.DEBUG)


app.command("doctor")(doctor)
app.command("import")(import_model)
app.command("plan")(plan)
app.command("compile")(compile_model)
app.command("generate")(generate)
app.command("run")(run)
app.command("serve")(serve)
app.command("health")(health)
app.command("inspect")(inspect)
app.add_typer(bench, name="bench")
app.add_typer(bundle, name="bundle")


def main() -> None:
    """Run the command; ends with an exit code of the README's table, and a traceback only if
    asked, or where a rank met what nobody foresaw.
    """
    # Text that the terminal cannot show must not end a job.
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    env = None
    try:
        env = adopt()
        app()
    except ShardlineError as error:
        _end(env, error)
    except Interrupted as interrupted:
        _leave(interrupted.exit_code)
    except KeyboardInterrupt:
        _leave(130)
    except Exception as error:
        _end(env, InternalError(f"internal error, {type(error).__name__}: {error}"))


def _end(env: RankEnv | None, error: ShardlineError) -> None:
    """Tell the launcher, or the user where there is none."""
    is_unforeseen = isinstance(error, RankLostError) and not error.peer
    if "SHARDLINE_DEBUG" in os.environ or (is_unforeseen and error.__cause__):
        traceback.print_exc()
    if env and env.report_fd is not None:
        peer = isinstance(error, RankLostError) and error.peer
        report(env, Failure(str(error), error.exit_code, secondary=peer))
    else:
        rank = error.rank or (f"rank {env.rank}" if env else None)
        print(f"shardline: {rank}: {error}" if rank else f"shardline: {error}", file=sys.stderr)
    _leave(error.exit_code)


def _leave(exit_code: int) -> None:
    """Exit without waiting for communication threads, which may hang once a peer is gone."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(exit_code)
