"""Where things lie in a bundle, and beside one that is being built. Names only."""

from pathlib import Path

MANIFEST = "manifest.json"
REPORT = "report.json"
SIGNATURE = "manifest.json.sig"
MODEL = "model"
WEIGHTS = "weights"
ARTEFACTS = "artefacts"
CACHES = "caches"

CONTENTS = (MODEL, WEIGHTS, ARTEFACTS, CACHES)
"""The folders whose files are all in the manifest."""

FINISHED = "finished"
"""Only while a bundle is built: a record of every part that is whole."""
BUILDING = "building"
"""Only while a bundle is built: parts that are not whole yet."""


def weights_file(rank: int) -> str:
    return f"{WEIGHTS}/rank{rank}.safetensors"


def artefact_folder(key: str) -> str:
    return f"{ARTEFACTS}/{key}"


def cache_folder(rank: int) -> str:
    return f"{CACHES}/rank{rank}"


def partial_of(out: Path) -> Path:
    """The folder in which the bundle `out` is built."""
    return out.with_name(f"{out.name}.partial")


def lock_of(out: Path) -> Path:
    """The file that the one who builds `out` holds locked."""
    return out.with_name(f"{out.name}.lock")


def replaced_of(out: Path) -> Path:
    """Where the old bundle waits for its end, if the file system cannot exchange two folders."""
    return out.with_name(f"{out.name}.replaced")


def rebuild_command(bundle: Path) -> str:
    """What mends a bundle that cannot be used."""
    return f"shardline compile --config PLAN.YAML --output {bundle} --overwrite"
