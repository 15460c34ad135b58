"""What a wheelhouse holds: everything of the lock, by its hash, with licences and an SBOM."""

import json
import re
import shutil
import subprocess
from pathlib import Path

from bundles import flip
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from processes import ROOT


def verify(wheelhouse: Path) -> subprocess.CompletedProcess[str]:
    command = [ROOT / "scripts" / "wheelhouse", "verify", wheelhouse]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_wheel_is_one_of_the_lock(wheelhouse: Path) -> None:
    allowed = set(re.findall(r"sha256:([0-9a-f]{64})", (wheelhouse / "lock.txt").read_text()))
    allowed |= set(re.findall(r"sha256:([0-9a-f]{64})", (wheelhouse / "pip.txt").read_text()))
    sums = (wheelhouse / "SHA256SUMS").read_text().splitlines()
    wheels = [line.split("  ") for line in sums if "  ./wheels/" in line]
    assert len(wheels) > 40
    assert [name for digest, name in wheels if digest not in allowed] == []


def test_the_sbom_is_valid_and_names_every_package(wheelhouse: Path) -> None:
    text = (wheelhouse / "sbom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    components = json.loads(text)["components"]
    by_digest = {c["hashes"][0]["content"]: c for c in components}
    sums = [line.split("  ") for line in (wheelhouse / "SHA256SUMS").read_text().splitlines()]
    packages = {
        digest: name for digest, name in sums if name.endswith((".whl", ".deb", "/base.tar"))
    }
    assert set(by_digest) == set(packages)
    kinds = {c["purl"].partition("/")[0] for c in components}
    assert kinds == {"pkg:pypi", "pkg:deb", "pkg:docker"}
    torch = next(c for c in components if c["name"] == "torch")
    assert torch["licenses"]


def test_licences_are_beside_it(wheelhouse: Path) -> None:
    names = {path.name.partition("-")[0].lower() for path in (wheelhouse / "licences").iterdir()}
    assert {"torch", "numpy", "safetensors", "pydantic", "debs"} <= names
    assert (wheelhouse / "licences" / "debs" / "python3.11-minimal").read_text()


def test_what_was_changed_on_the_way_is_named(wheelhouse: Path, tmp_path: Path) -> None:
    assert verify(wheelhouse).returncode == 0
    copy = tmp_path / "wheelhouse"
    shutil.copytree(wheelhouse, copy, copy_function=lambda a, b: Path(b).hardlink_to(a))
    wheel = next((copy / "wheels").glob("jinja2-*.whl"))
    data = wheel.read_bytes()
    wheel.unlink()  # or the original would change, too
    wheel.write_bytes(data)
    flip(wheel, 1000)
    done = verify(copy)
    assert done.returncode == 4
    assert f"./wheels/{wheel.name}: was changed" in done.stderr


def test_no_index_or_place_of_this_host_is_in_a_lock() -> None:
    for lock in (ROOT / "docker" / "locks").glob("*.txt"):
        text = lock.read_text()
        assert "://" not in text
        assert "--index" not in text
        pinned = re.findall(r"^[a-z0-9-]+==\S+", text, re.MULTILINE)
        assert pinned
        assert len(pinned) == len(re.findall(r"^[a-z]", text, re.MULTILINE))
