"""The CPU cores that lie next to a GPU, as the kernel tells them.

Not here: pinning anything to them.
"""

from pathlib import Path


def cores_near(pci_bus_id: str, *, root: Path = Path("/")) -> set[int]:
    """The cores of the NUMA node that a PCI device belongs to; empty where the kernel tells none.

    Args:
        pci_bus_id: such as "0000:1b:00.0".
        root: where /sys is; another directory than "/" in tests.
    """
    file = root / "sys/bus/pci/devices" / pci_bus_id.lower() / "local_cpulist"
    try:
        return parse_cpu_list(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return set()


def parse_cpu_list(text: str) -> set[int]:
    """A list as the kernel writes it: `parse_cpu_list("0-2,8") == {0, 1, 2, 8}`.

    Raises:
        ValueError: it is none.
    """
    cores: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cores |= set(range(int(first), int(last or first) + 1))
    return cores
