"""The header parser on bytes laid out by hand, whole, cut and damaged."""

import struct

import pytest

from parallel.errors import ConfigError, IntegrityError
from runner.importer.gguf_header import parse_header


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(*, version: int = 3, entries: bytes = b"", num_keys: int = 0) -> bytes:
    """A header with `entries` and one tensor "t" of shape (3, 2), float32, at data offset 64."""
    counts = struct.pack("<IQQ", version, 1, num_keys)
    tensor = text("t") + struct.pack("<IQQIQ", 2, 2, 3, 0, 64)
    return b"GGUF" + counts + entries + tensor


def test_values_of_every_kind_come_back():
    entries = b"".join(
        [
            text("a.count") + struct.pack("<II", 4, 7),
            text("a.small") + struct.pack("<If", 6, 1e-5),
            text("a.flag") + struct.pack("<I?", 7, True),
            text("a.name") + struct.pack("<I", 8) + text("naïve"),
            text("a.ids") + struct.pack("<IIQ3i", 9, 5, 3, -1, 0, 5),
            text("a.words") + struct.pack("<IIQ", 9, 8, 2) + text("one") + text("two"),
        ]
    )
    metadata = parse_header(header(entries=entries, num_keys=6)).metadata
    assert metadata == {
        "a.count": 7,
        "a.small": 1e-5,
        "a.flag": True,
        "a.name": "naïve",
        "a.ids": [-1, 0, 5],
        "a.words": ["one", "two"],
    }


@pytest.mark.parametrize("alignment", [32, 256])
def test_tensors_lie_after_the_aligned_header_in_torch_order(alignment):
    entries = text("general.alignment") + struct.pack("<II", 4, alignment)
    data = header(entries=entries, num_keys=1)
    tensor = parse_header(data).tensors["t"]
    assert tensor.shape == (3, 2)
    assert tensor.offset == -(-len(data) // alignment) * alignment + 64


def test_a_header_cut_anywhere_is_refused():
    entries = text("a.words") + struct.pack("<IIQ", 9, 8, 1) + text("one")
    whole = header(entries=entries, num_keys=1)
    parse_header(whole)
    for length in range(len(whole)):
        with pytest.raises(IntegrityError):
            parse_header(whole[:length])


@pytest.mark.parametrize(
    "entries",
    [
        text("k") + struct.pack("<IIQ", 9, 0, 2**60),
        text("k") + struct.pack("<IIQ", 9, 8, 2**60),
        text("k") + struct.pack("<IQ", 8, 2**63),
        text("k") + struct.pack("<I", 99),
        text("k") + struct.pack("<IQ", 8, 2) + b"\xff\xff",
    ],
    ids=["long array", "long array of texts", "long text", "unknown type", "not UTF-8"],
)
def test_damaged_lengths_and_types_are_refused_at_once(entries):
    with pytest.raises(IntegrityError):
        parse_header(header(entries=entries, num_keys=1))


def test_a_key_that_stands_twice_is_refused():
    entry = text("k") + struct.pack("<II", 4, 7)
    with pytest.raises(IntegrityError, match="key 'k' stands there twice"):
        parse_header(header(entries=entry * 2, num_keys=2))


def test_other_versions_and_byte_orders_are_named():
    with pytest.raises(ConfigError, match="GGUF version 1"):
        parse_header(header(version=1))
    with pytest.raises(ConfigError, match="big-endian"):
        parse_header(header(version=0x03000000))
    with pytest.raises(IntegrityError, match="'GGUF'"):
        parse_header(b"PK\x03\x04" + b"\0" * 64)
