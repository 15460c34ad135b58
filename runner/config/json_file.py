"""Read one JSON object of a model folder, with errors that name the file.

Not here: what the keys mean; each reader checks its own.
"""

import json
from pathlib import Path
from typing import Any

from parallel.errors import IntegrityError


def read_json_object(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """The object in `path`; an absent file reads as an empty one if it is `optional`.

    Raises:
        IntegrityError: the file is absent, unreadable, not UTF-8, not JSON, or not an object.
    """
    if optional and not path.exists():
        return {}
    value = _parse(path, read_text(path))
    if not isinstance(value, dict):
        raise IntegrityError(f"{path} holds a JSON {type(value).__name__}; it must be an object")
    return value


def read_text(path: Path) -> str:
    """The UTF-8 text of `path`.

    Raises:
        IntegrityError: the file is absent, unreadable or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise IntegrityError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise IntegrityError(
            f"{path} is not UTF-8 (byte {error.start}); copy the file again"
        ) from error


def _parse(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} is not valid JSON ({error}); copy the file again") from error
