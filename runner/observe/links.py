"""How two GPUs of one host reach each other: peer-to-peer status, NVLink and topology, as words.

Not here: the calls that ask the driver (`nvml`), nor the judgement (`gpu_checks`).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Path = Literal["NVLink", "PCIe", "no", "?"]

_P2P_STATUS = {
    0: "ok",
    1: "chipset not supported",
    2: "GPU not supported",
    3: "topology not supported",
    4: "disabled by a driver setting",
    5: "not supported",
    6: "unknown",
}

_TOPOLOGY = {
    0: "same board",
    10: "one PCIe switch",
    20: "several PCIe switches",
    30: "PCIe host bridge",
    40: "same NUMA node",
    50: "across NUMA nodes",
}


@dataclass(frozen=True)
class GpuPair:
    """What the driver says of the way between GPU `first` and GPU `second`; None = not told.

    `read`, `write` and `nvlink` are words of `decode_p2p_status`, `topology` of `decode_topology`.
    """

    first: int
    second: int
    read: str | None = None
    write: str | None = None
    nvlink: str | None = None
    topology: str | None = None

    @property
    def path(self) -> Path:
        """The way that data take: "no" means through host memory, "?" that the driver is silent."""
        if self.read is None or self.write is None:
            return "?"
        if self.read != "ok" or self.write != "ok":
            return "no"
        return "NVLink" if self.nvlink == "ok" else "PCIe"


def decode_p2p_status(code: int) -> str:
    """The word for an `nvmlGpuP2PStatus_t`; "ok" alone means that peers reach each other."""
    return _P2P_STATUS.get(code, f"status {code}")


def decode_topology(level: int) -> str:
    """The word for an `nvmlGpuTopologyLevel_t`: the nearest thing that two GPUs share."""
    return _TOPOLOGY.get(level, f"level {level}")


def format_matrix(indices: Iterable[int], *, pairs: Iterable[GpuPair]) -> str:
    """A square table of `GpuPair.path`, one line a GPU, without trailing blanks.

    Args:
        indices: the GPUs' indices, in the order of rows and columns.
        pairs: each unordered pair once; a pair that is missing shows as "?".
    """
    order = list(indices)
    paths: dict[tuple[int, int], Path] = {}
    for pair in pairs:
        paths[pair.first, pair.second] = paths[pair.second, pair.first] = pair.path
    rows = [["", *(f"GPU{column}" for column in order)]]
    for row in order:
        cells = ("-" if row == column else paths.get((row, column), "?") for column in order)
        rows.append([f"GPU{row}", *cells])
    width = max(len(cell) for cells in rows for cell in cells) + 2
    return "\n".join("".join(cell.ljust(width) for cell in cells).rstrip() for cells in rows)
