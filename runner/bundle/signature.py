"""Signatures of bundles: ed25519 over the manifest, which holds the sha256 of every file.

Keys are PEM files, as `openssl genpkey -algorithm ed25519` makes them; signatures are the 64 bytes
that `openssl pkeyutl -sign -rawin` makes. Not here: whether the files are what the manifest says.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from parallel.errors import ConfigError, IntegrityError, PreflightError
from runner.bundle.durable import writing
from runner.bundle.layout import MANIFEST, SIGNATURE

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

_INSTALL = "pip install 'shardline[sign]'"


def sign_bundle(bundle: Path, key: Path) -> None:
    """Write the signature of a bundle's manifest beside it.

    Raises:
        ConfigError: the key cannot be read, or is no ed25519 private key.
        PreflightError: the package `cryptography` is not installed, or the disk is full.
    """
    signature = _private_key(key).sign((bundle / MANIFEST).read_bytes())
    with writing(bundle / SIGNATURE):
        (bundle / SIGNATURE).write_bytes(signature)


def check_signature(bundle: Path, key: Path) -> None:
    """Check that the manifest of a bundle was signed with the key that belongs to a public one.

    Raises:
        IntegrityError: it was not signed, or by another key, or was changed since.
        ConfigError: the key cannot be read, or is no ed25519 public key.
        PreflightError: the package `cryptography` is not installed.
    """
    public = _public_key(key)
    from cryptography.exceptions import InvalidSignature

    file = bundle / SIGNATURE
    if not file.is_file():
        raise IntegrityError(
            f"{bundle} is not signed, and {key} asks for it; sign it where it was made: "
            f"shardline bundle sign {bundle} --key PRIVATE.pem"
        )
    try:
        public.verify(file.read_bytes(), (bundle / MANIFEST).read_bytes())
    except InvalidSignature:
        raise IntegrityError(
            f"{file} is no signature of {MANIFEST} by {key}; the bundle was changed, or signed "
            "with another key"
        ) from None


def _private_key(file: Path) -> Ed25519PrivateKey:
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ModuleNotFoundError:
        raise PreflightError(f"signing needs cryptography; {_INSTALL}") from None
    try:
        key = load_pem_private_key(_read(file), password=None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{file} is no private key in PEM without a password: {error}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{file} is no ed25519 key; make one: openssl genpkey -algorithm ed25519")
    return key


def _public_key(file: Path) -> Ed25519PublicKey:
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ModuleNotFoundError:
        raise PreflightError(f"checking a signature needs cryptography; {_INSTALL}") from None
    try:
        key = load_pem_public_key(_read(file))
    except ValueError as error:
        raise ConfigError(f"{file} is no public key in PEM: {error}") from None
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{file} is no ed25519 key; make one: openssl pkey -in PRIVATE -pubout")
    return key


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the key {file}: {error.strerror}") from None
