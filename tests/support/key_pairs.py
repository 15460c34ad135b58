"""Keys that folders are signed with, made by openssl."""

import subprocess
from pathlib import Path


def make_keys(folder: Path) -> tuple[Path, Path]:
    """A private and a public one."""
    private, public = folder / "private.pem", folder / "public.pem"
    make = ["openssl", "genpkey", "-algorithm", "ed25519", "-out", private]
    subprocess.run(make, check=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    return private, public
