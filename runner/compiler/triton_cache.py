"""`KernelCache`: what Triton asks before it compiles. Import it only where Triton is installed;
`runner.compiler.kernels` does.
"""

import os
from pathlib import Path
from typing import ClassVar

from triton import knobs
from triton.runtime.cache import FileCacheManager


class KernelCache(FileCacheManager):  # type: ignore[misc]  # Triton has no types
    """The files of one key; Triton makes one of these whenever it asks for some.

    A key is made of a kernel's source, of Triton itself, of ptxas and of the GPU's compute
    capability; that of the C module of its source, and its file is named after Python's version.
    Triton's own cache comes first: it has what was compiled here because what was brought did not
    work.

    Attributes:
        brought: has folders like those of the cache; None: there is none.
        used: the folders of all keys that were asked for; not all of them need be there.
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
        folder = self.brought and self.brought / key
        self._brought = folder if folder and folder.is_dir() else None
        if self._brought is None or override or dump:
            super().__init__(key, override, dump)
        else:  # A cache that cannot be written is enough, as long as nothing is put.
            self.key, self.lock_path = key, None
            self.cache_dir = os.path.join(knobs.cache.dir, key)
        if not (override or dump):
            self.used.add(Path(self.cache_dir))

    def get_file(self, filename: str) -> str | None:
        """Its path, if it is anywhere."""
        own: str | None = super().get_file(filename)
        if own or self._brought is None:
            return own
        file = self._brought / filename
        return str(file) if file.exists() else None

    def get_group(self, filename: str) -> dict[str, str] | None:
        """The paths of the files that were made together with one, by their names."""
        own: dict[str, str] | None = super().get_group(filename)
        if own or self._brought is None:
            return own
        files = {file.name: str(file) for file in self._brought.iterdir()}
        return files if filename in files else None

    def put(self, data: bytes | str, filename: str, binary: bool = True) -> str:
        """Keep a file in Triton's own cache."""
        if self.lock_path is None:
            super().__init__(self.key)
        path: str = super().put(data, filename, binary)
        return path
