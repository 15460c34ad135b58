"""Turn model files of other formats into folders that we load.

Not here: loading such a folder.
"""

from runner.importer.gguf_import import ImportReport, import_gguf

__all__ = ["ImportReport", "import_gguf"]
