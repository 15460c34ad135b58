"""Keys that folders are signed with."""

import subprocess
from pathlib import Path

import pytest


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A private and a public one."""
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    make = ["openssl", "genpkey", "-algorithm", "ed25519", "-out", private]
    subprocess.run(make, check=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    return private, public
