"""Signatures by `cryptography` and by openssl are the same; a changed manifest has none."""

import subprocess
from pathlib import Path

import pytest
from bundles import flip, rewrite_manifest
from key_pairs import make_keys

from parallel.errors import ConfigError, IntegrityError
from runner.bundle.signature import check_signature, sign_bundle


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return make_keys(tmp_path)


def test_what_was_signed_is_accepted(bundle: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    sign_bundle(bundle, private)
    check_signature(bundle, public)
    verify = ["openssl", "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", public]
    files = ["-in", bundle / "manifest.json", "-sigfile", bundle / "manifest.json.sig"]
    subprocess.run([*verify, *files], check=True, capture_output=True)


def test_a_bundle_without_a_signature(bundle: Path, keys: tuple[Path, Path]) -> None:
    with pytest.raises(IntegrityError, match=r"is not signed.*shardline bundle sign"):
        check_signature(bundle, keys[1])


def test_a_bundle_that_was_changed_by_one_who_knows_its_hashes(
    bundle: Path, keys: tuple[Path, Path]
) -> None:
    sign_bundle(bundle, keys[0])
    rewrite_manifest(bundle, lambda values: values["parity"].update(passed=False))
    with pytest.raises(IntegrityError, match="was changed, or signed with another key"):
        check_signature(bundle, keys[1])


def test_another_key(bundle: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    sign_bundle(bundle, make_keys(tmp_path / "other")[0])
    with pytest.raises(IntegrityError, match="signed with another key"):
        check_signature(bundle, keys[1])


def test_a_signature_that_was_changed(bundle: Path, keys: tuple[Path, Path]) -> None:
    sign_bundle(bundle, keys[0])
    flip(bundle / "manifest.json.sig", 7)
    with pytest.raises(IntegrityError, match="is no signature"):
        check_signature(bundle, keys[1])


def test_keys_that_are_none(bundle: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    rsa = tmp_path / "rsa.pem"
    make = ["openssl", "genpkey", "-algorithm", "RSA", "-out", rsa]
    subprocess.run(make, check=True, capture_output=True)
    with pytest.raises(ConfigError, match="no ed25519 key"):
        sign_bundle(bundle, rsa)
    with pytest.raises(ConfigError, match="no private key in PEM"):
        sign_bundle(bundle, keys[1])
    with pytest.raises(ConfigError, match="no public key in PEM"):
        check_signature(bundle, bundle / "manifest.json")
    with pytest.raises(ConfigError, match="cannot read the key"):
        check_signature(bundle, tmp_path / "absent")
