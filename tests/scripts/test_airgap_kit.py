"""`scripts/airgap-kit` by itself: what it asks of Docker, for which a script stands in."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from bundles import flip
from processes import ROOT

DOCKER = """#!/bin/sh
printf '%s\\n' "$*" >> "$TOLD"
case "$1 $2" in
  'save --output') echo layers > "$3" ;;
  'container inspect')
    # A line a call: what the container is then; an empty one: there is none.
    answer=$(head -n 1 "$STATES")
    sed -i 1d "$STATES"
    [ -n "$answer" ] || exit 1
    echo "$answer" ;;
  'info --format') echo '{"nvidia": {}}' ;;
esac
"""


@dataclass(frozen=True)
class Kit:
    """A kit and the stand-in for Docker beside it."""

    folder: Path

    def run(self, *arguments: str | Path, states: str = "", **settings: str) -> tuple[int, str]:
        """The exit code of the script, and all that it said."""
        (self.folder / "states").write_text(states)
        (self.folder / "told").write_text("")
        done = subprocess.run(
            [ROOT / "scripts" / "airgap-kit", *arguments],
            env={
                **os.environ,
                "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
                "TOLD": str(self.folder / "told"),
                "STATES": str(self.folder / "states"),
                **settings,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout

    def up(self, states: str, **settings: str) -> tuple[int, str]:
        sockets = str(self.folder / "sockets")
        return self.run("up", self.folder / "kit", states=states, SOCKETS=sockets, **settings)

    @property
    def told(self) -> list[str]:
        """The commands that Docker got in the last run."""
        return (self.folder / "told").read_text().splitlines()


@pytest.fixture
def kit(tmp_path: Path, keys: tuple[Path, Path]) -> Kit:
    """Of a bundle, and a model whose weights are a link, as in a snapshot of a hub's cache."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "docker").write_text(DOCKER)
    (tmp_path / "bin" / "docker").chmod(0o755)
    for folder in ("bundle", "blobs", "model"):
        (tmp_path / folder).mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text("{}")
    (tmp_path / "blobs" / "0123").write_bytes(b"weights")
    (tmp_path / "model" / "model.safetensors").symlink_to("../blobs/0123")
    made = Kit(tmp_path)
    given = ["--bundle", tmp_path / "bundle", "--model", tmp_path / "model", "--key", keys[0]]
    code, said = made.run("build", tmp_path / "kit", *given)
    assert code == 0, said
    return made


def test_a_kit_of_nothing_is_refused(kit: Kit, tmp_path: Path) -> None:
    for given in ([], ["--model", tmp_path / "model"], ["--builder", "shardline:builder"]):
        code, said = kit.run("build", tmp_path / "none", *given)
        assert code == 2
        assert "there is nothing to serve; give --bundle, or --model and --builder" in said
    code, said = kit.run("compile", tmp_path / "bundle2", "--model", "/models/model")
    assert code == 2
    assert "that lies in a kit" in said
    code, said = kit.up("", BUNDLE=str(tmp_path / "blobs"))
    assert code == 2
    assert "is no bundle; make one" in said
    assert kit.told == []


def test_the_sockets_folder_is_open_to_its_group_alone(kit: Kit) -> None:
    assert kit.up("\ntrue healthy\n")[0] == 0
    assert (kit.folder / "sockets").stat().st_mode & 0o777 == 0o770
    ran = next(command for command in kit.told if command.startswith("run "))
    user = os.getuid() or 10001
    assert f" --user {user}:0 " in ran


def test_links_of_a_model_are_carried_as_what_they_lead_to(kit: Kit) -> None:
    carried = kit.folder / "kit" / "models" / "model" / "model.safetensors"
    assert not carried.is_symlink()
    assert carried.read_bytes() == b"weights"


def test_a_signed_kit_is_loaded_if_the_key_is_its_own(kit: Kit, keys: tuple[Path, Path]) -> None:
    folder = kit.folder / "kit"
    for command in ("verify", "load"):
        code, said = kit.run(command, folder, "--public-key", keys[1])
        assert code == 0, said
    assert kit.told == [f"load --quiet --input {folder}/images.tar"]


@pytest.mark.parametrize("name", ["SHA256SUMS", "SHA256SUMS.sig"])
def test_a_changed_list_or_signature_is_named(kit: Kit, keys: tuple[Path, Path], name: str) -> None:
    folder = kit.folder / "kit"
    flip(folder / name, 3)
    code, said = kit.run("load", folder, "--public-key", keys[1])
    assert code == 4
    assert "SHA256SUMS.sig is no signature of it" in said
    assert kit.told == []


def test_a_changed_list_is_named_without_a_key(kit: Kit) -> None:
    flip(kit.folder / "kit" / "SHA256SUMS", 3)
    code, said = kit.run("load", kit.folder / "kit")
    assert code == 4
    assert "lines in SHA256SUMS" in said
    assert kit.told == []


def test_up_gives_docker_the_gpus_as_one_word(kit: Kit) -> None:
    code, said = kit.up("\ntrue healthy\n", GPUS="device=0,1")
    assert code == 0, said
    ran = next(command for command in kit.told if command.startswith("run "))
    assert ' --gpus "device=0,1" ' in ran
    assert "--restart" not in ran
    assert "ready: curl --unix-socket" in said
    # A server that has come up once is to come up again, after a reboot, too.
    assert kit.told[-1] == "update --restart unless-stopped shardline"


def test_up_waits_until_the_server_is_healthy(kit: Kit) -> None:
    code, _ = kit.up("\ntrue starting\ntrue starting\ntrue healthy\n")
    assert code == 0
    assert sum(command.startswith("container inspect") for command in kit.told) == 4


def test_up_takes_the_place_of_a_server_that_has_ended(kit: Kit) -> None:
    assert kit.up("false\ntrue healthy\n")[0] == 0
    assert "rm shardline" in kit.told
    code, said = kit.up("true\n", NAME="other")
    assert code == 2
    assert "other runs already; stop it: docker stop other" in said
    assert not any(command.startswith(("run ", "rm ")) for command in kit.told)


def test_up_gives_up_on_a_server_that_ends_or_is_not_healthy(kit: Kit) -> None:
    code, said = kit.up("\ntrue starting\nfalse unhealthy\n3\n")
    assert code == 3
    assert "the server has ended" in said
    assert "logs shardline" in kit.told
    code, said = kit.up("\ntrue unhealthy\n")
    assert code == 9
    assert "docker rm --force shardline" in said
    assert not any(command.startswith("update") for command in kit.told)
