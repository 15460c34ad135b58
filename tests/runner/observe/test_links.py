"""Peer-to-peer words and the matrix of paths."""

import pytest

from runner.observe.links import GpuPair, decode_p2p_status, decode_topology, format_matrix


@pytest.mark.parametrize(
    ("pair", "path"),
    [
        (GpuPair(0, 1, read="ok", write="ok", nvlink="ok"), "NVLink"),
        (GpuPair(0, 1, read="ok", write="ok", nvlink="not supported"), "PCIe"),
        (GpuPair(0, 1, read="ok", write="ok"), "PCIe"),
        (GpuPair(0, 1, read="ok", write="chipset not supported", nvlink="ok"), "no"),
        (GpuPair(0, 1, read=None, write="ok", nvlink="ok"), "?"),
    ],
)
def test_path_needs_both_directions(pair: GpuPair, path: str) -> None:
    assert pair.path == path


def test_codes_become_words() -> None:
    assert [decode_p2p_status(code) for code in (0, 1, 3)] == [
        "ok",
        "chipset not supported",
        "topology not supported",
    ]
    assert decode_topology(10) == "one PCIe switch"
    assert decode_topology(50) == "across NUMA nodes"


def test_codes_of_a_newer_driver_are_shown_as_numbers() -> None:
    assert decode_p2p_status(9) == "status 9"
    assert decode_topology(60) == "level 60"


def test_matrix_is_symmetric_and_aligned() -> None:
    pairs = [
        GpuPair(0, 1, read="ok", write="ok", nvlink="ok"),
        GpuPair(0, 3, read="GPU not supported", write="ok"),
    ]
    assert format_matrix([0, 1, 3], pairs=pairs).splitlines() == [
        "        GPU0    GPU1    GPU3",
        "GPU0    -       NVLink  no",
        "GPU1    NVLink  -       ?",
        "GPU3    no      ?       -",
    ]
