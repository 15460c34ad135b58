"""`KernelCache`: what Triton asks before it compiles. Import it only where Triton is installed;
`runner.compiler.kernels` does.
"""

from pathlib import Path
from typing import ClassVar

from triton import knobs
from triton.runtime.cache import FileCacheManager


class KernelCache(FileCacheManager):  # type: ignore[misc]  # Triton has no types
    """The files of one key; Triton makes one of these whenever it asks for some.

    A key is made of a kernel's source, of Triton itself, of ptxas and of the GPU's compute
    capability.

    Attributes:
        brought: has a folder for each key that is looked for there first; None: there is none.
        used: the folders of all keys that were asked for.
    """

    brought: ClassVar[Path | None] = None
    used: ClassVar[set[Path]] = set()

    @classmethod
    def install(cls, brought: Path | None) -> None:
        """Have Triton ask it from now on, unless its user wants another cache."""
        if knobs.cache.manager_class in (None, cls):
            cls.brought = brought
            knobs.cache.manager_class = cls

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        brought = self.brought / key if self.brought else None
        if override or dump:  # What its user is about to change, or to look at.
            super().__init__(key, override, dump)
            return
        if brought and brought.is_dir():
            self.key, self.cache_dir, self.lock_path = key, str(brought), None
        else:
            super().__init__(key)
        self.used.add(Path(self.cache_dir))

    def get_group(self, filename: str) -> dict[str, str] | None:
        """The files that were made together with one, by their names."""
        if self.lock_path is not None:
            return super().get_group(filename)
        files = {file.name: str(file) for file in Path(self.cache_dir).iterdir()}
        return files if filename in files else None

    def put(self, data: bytes | str, filename: str, binary: bool = True) -> str:
        """Keep a file on this host, also where one was brought that does not work here."""
        if self.lock_path is None:
            super().__init__(self.key)
        path: str = super().put(data, filename, binary)
        return path
