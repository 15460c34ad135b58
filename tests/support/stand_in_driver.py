"""A compiled stand-in for NVIDIA's libnvidia-ml.so.1, for machines without a driver.

Real pynvml loads it in a subprocess whose LD_LIBRARY_PATH names its directory.
"""

import subprocess
from pathlib import Path


def build_driver(directory: Path, source: str) -> Path:
    """Compile C source into `directory`, and return the directory."""
    file = directory / "driver.c"
    file.write_text(source)
    library = directory / "libnvidia-ml.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, file], check=True)
    return directory
