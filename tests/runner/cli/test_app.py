"""What the command says of itself."""

from importlib.metadata import version

from typer.testing import CliRunner

from runner.cli.app import app


def test_the_version_is_told() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.stdout) == (0, f"shardline {version('shardline')}\n")
