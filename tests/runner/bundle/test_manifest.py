"""A manifest comes back as it was written; whatever is odd about it is refused."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bundles import ENGINE, make_manifest, make_plan_of, rewrite_manifest

from parallel.errors import IncompatibleError, IntegrityError, ShardlineError
from runner.bundle.files import CHUNK_BYTES
from runner.bundle.manifest import SCHEMA, FileEntry, Manifest, Place, place_of

COMMAND = "shardline compile --config PLAN.YAML --output {} --overwrite"


def refused(bundle: Path) -> ShardlineError:
    """The error of reading a manifest; it names file and remedy."""
    with pytest.raises((IntegrityError, IncompatibleError)) as caught:
        Manifest.read(bundle)
    message = str(caught.value)
    assert str(bundle / "manifest.json") in message
    assert message.endswith(COMMAND.format(bundle))
    return caught.value


def test_it_comes_back_as_it_was_written(bundle: Path, model: Path) -> None:
    read = Manifest.read(bundle)
    written = make_manifest(model, make_plan_of(model))
    assert replace(read, files={}) == written
    assert read.to_text() == (bundle / "manifest.json").read_text()
    assert read.uses[0]["qkv"].keys() == {1, 16}
    assert read.backends == {"eager", "inductor", "tensorrt"}


def test_buckets_are_in_one_order_however_they_were_given(model: Path) -> None:
    plan = make_plan_of(model)
    texts = {
        make_manifest(model, plan, uses=({"mlp": dict.fromkeys(buckets, ENGINE)},) * 3).to_text()
        for buckets in ([1, 2, 16], [16, 2, 1])
    }
    assert len(texts) == 1


def test_it_holds_neither_a_time_nor_a_place_on_a_disk(bundle: Path, model: Path) -> None:
    text = (bundle / "manifest.json").read_text()
    assert str(bundle.parent) not in text
    assert str(model) not in text


def test_every_changed_byte_is_found(bundle: Path) -> None:
    file = bundle / "manifest.json"
    data = file.read_bytes()
    # A prime step meets keys, digits, quotes, hashes and white space alike.
    for offset in range(0, len(data), 997):
        changed = bytearray(data)
        changed[offset] ^= 1 << offset % 8
        file.write_bytes(changed)
        refused(bundle)
    file.write_bytes(data)
    Manifest.read(bundle)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"passed": true', '"passed": false'),
        ('"microseconds": 52.25', '"microseconds": 12.25'),
        (' "config"', '  "config"'),
        (' "config"', '\r\n "config"'),
        (' "self": ', ' "self":'),
        ('"schema": 2,', '"schema": 2, "schema": 2,'),
    ],
)
def test_an_edit_is_found_by_the_manifest_itself(old: str, new: str, bundle: Path) -> None:
    file = bundle / "manifest.json"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    assert "it was edited or damaged: it says that its sha256 is" in str(refused(bundle))


def test_its_hash_can_be_checked_by_hand(bundle: Path) -> None:
    lines = (bundle / "manifest.json").read_bytes().splitlines(keepends=True)
    rest = b"".join(line for line in lines if not line.startswith(b' "self": '))
    assert len(lines) > 100
    said = json.loads((bundle / "manifest.json").read_text())["self"]
    assert said == hashlib.sha256(rest).hexdigest()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "\xff", '{"schema": 2}', '{"schema": NaN}']
)
def test_what_is_no_manifest_is_an_integrity_error(text: str, bundle: Path) -> None:
    (bundle / "manifest.json").write_bytes(text.encode("latin-1"))
    assert refused(bundle).exit_code == 4


def test_a_number_that_is_none_is_refused(bundle: Path) -> None:
    file = bundle / "manifest.json"
    file.write_text(file.read_text().replace("0.9997", "NaN"))
    assert refused(bundle).exit_code == 4


@pytest.mark.parametrize("schema", [0, SCHEMA - 1, SCHEMA + 1, 10**6])
def test_another_schema_is_incompatible_whatever_else_there_is(schema: int, bundle: Path) -> None:
    (bundle / "manifest.json").write_text(json.dumps({"schema": schema, "news": []}))
    error = refused(bundle)
    assert error.exit_code == 5
    assert f"has schema version {schema}, this shardline reads version {SCHEMA}" in str(error)


@pytest.mark.parametrize("schema", ["1", None, True, 1.0])
def test_a_schema_that_is_no_number_is_no_schema(schema: Any, bundle: Path) -> None:
    (bundle / "manifest.json").write_text(json.dumps({"schema": schema}))
    error = refused(bundle)
    assert error.exit_code == 4
    assert f"schema is {json.dumps(schema)}" in str(error)


def edit(values: dict[str, Any], path: str, value: Any) -> None:
    *above, last = path.split("/")
    for name in above:
        values = values[name]
    values[last] = value


ENTRY = {"size": 1, "sha256": "0" * 64, "chunks": [], "place": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("source"), "manifest.source is missing"),
        (lambda v: edit(v, "extra", 1), "manifest.extra is no key"),
        (lambda v: edit(v, "host/gpu", 5), "manifest.host.gpu is 5; it must be a string"),
        (lambda v: edit(v, "parity", {}), "parity.passed is missing"),
        (lambda v: edit(v, "parity/passed", "yes"), "parity.passed is missing"),
        (lambda v: edit(v, "artefacts/short", v["artefacts"][ENGINE]), "the key 'short'"),
        (lambda v: v["artefacts"].pop(ENGINE), r"uses\[0\].mlp\[1\] is '.*', which is no artefact"),
        (
            lambda v: v["files"].pop("weights/rank2.safetensors"),
            "weights/rank2.safetensors is missing from files; source has 1 file",
        ),
        (lambda v: v["source"].clear(), "weights/rank0.safetensors is in files; source has 0 file"),
        (lambda v: edit(v, "files/report.json", ENTRY), "'report.json', which lies in none of"),
        (lambda v: v["files"].update({"../x": ENTRY}), "'../x', which lies in none of"),
        (lambda v: v["files"].update({"/etc/passwd": ENTRY}), "'/etc/passwd', which lies in none"),
        (
            lambda v: v["files"].update({"model/x": ENTRY | {"chunks": ["0" * 64]}}),
            r"files\[model/x\] has 1 bytes and 1 chunks; that size has 0",
        ),
        (
            lambda v: v["files"].update({"model/x": ENTRY | {"size": CHUNK_BYTES + 1}}),
            "and 0 chunks; that size has 2",
        ),
        (lambda v: v["files"].update({"model/x": ENTRY | {"size": -1}}), "has -1 bytes"),
        (
            lambda v: v["choices"][0]["candidates"][0].update(microseconds="fast"),
            r"choices\[0\].candidates\[0\].microseconds is \"fast\"; it must be a finite number",
        ),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused_though_its_hash_is_right(
    change: Callable[[dict[str, Any]], object], message: str, bundle: Path
) -> None:
    rewrite_manifest(bundle, change)
    error = refused(bundle)
    assert error.exit_code == 4
    assert re.search(message, str(error)), str(error)


def test_files_below_a_folder_are_not_those_of_one_with_a_longer_name(bundle: Path) -> None:
    manifest = Manifest.read(bundle)
    entry = FileEntry(1, "0" * 64)
    files = {"caches/rank1/a": entry, "caches/rank10/a": entry}
    assert list(replace(manifest, files=files).files_below("caches/rank1")) == ["caches/rank1/a"]


def test_a_file_has_the_place_of_its_rank(model: Path) -> None:
    plan = make_plan_of(model)
    assert place_of("weights/rank2.safetensors", plan) == Place(rank=2, stage=1, tp_rank=0)
    assert place_of("caches/rank1/deep/file", plan) == Place(rank=1, stage=0, tp_rank=1)
    assert place_of("model/rank1", plan) is None
    for name in ("weights/rank3.safetensors", "caches/rank01/x", "weights/notes.txt"):
        with pytest.raises(IntegrityError, match="which is of none of 3 ranks"):
            place_of(name, plan)
