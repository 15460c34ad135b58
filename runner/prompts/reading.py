"""The lines of JSONL files, one at a time: a file of millions of them is never held in memory.

Not here: what a line may say (`schema`).
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from parallel.errors import ConfigError
from runner.prompts.prompt import BadLine, Place, Prompt, RequestId
from runner.prompts.schema import id_of, parse
from runner.prompts.seen_ids import SeenIds

MAX_LINE_BYTES = 16 * 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MAX_TOKENS = re.compile(rb'"max_(?:completion_)?tokens"\s*:\s*([0-9]{1,9})')


class Survey(NamedTuple):
    """What a look at the files tells.

    Attributes:
        num_lines: those that are not blank.
        max_length: about the most tokens that a prompt and its completion can come to; a token
            stands for a byte or more, and a chat template may add some.
    """

    num_lines: int
    max_length: int


class PromptFiles:
    """The input of a run; the files may not change while it lasts."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Look at the files, without reading more than their beginning.

        Raises:
            ConfigError: one is absent or cannot be read, two have one name, or all are empty.
        """
        self._paths: dict[str, Path] = {}
        for path in paths:
            if other := self._paths.get(path.name):
                raise ConfigError(
                    f"{other} and {path} are both named {path.name}, and results name their file; "
                    "rename one, or run them into two folders"
                )
            self._paths[path.name] = path
        # Every file is opened, also behind one that has lines.
        if not [path for path in paths if next(_lines(path), None)]:
            raise ConfigError(
                f"there are no prompts in {', '.join(map(str, paths))}; give JSONL files of lines "
                'like {"prompt": "..."}'
            )

    def digests(self) -> dict[str, str]:
        """{name: sha256}, in the order of the files."""
        digests = {}
        for name, path in self._paths.items():
            with path.open("rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
        return digests

    def survey(self, max_tokens: int) -> "Survey":
        """Read the files once, without looking at what the lines mean.

        Args:
            max_tokens: where a line does not say.
        """
        num_lines = max_length = 0
        for path in self._paths.values():
            for _, line in _lines(path):
                said = _MAX_TOKENS.search(line)
                num_lines += 1
                max_length = max(max_length, len(line) + int(said[1] if said else max_tokens))
        return Survey(num_lines, max_length)

    def __iter__(self) -> Iterator[Prompt | BadLine]:
        """Every line that is not blank; that of an id that a line before it has is a bad one."""
        with SeenIds() as seen:
            for name, path in self._paths.items():
                for number, data in _lines(path):
                    yield _read(data, Place(name, number), seen)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbers, from 1, and contents of the lines that are not blank; of one that is too long, the
    beginning.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(_BYTE_ORDER_MARK)) != _BYTE_ORDER_MARK:
                file.seek(0)
            yield from ((n, line) for n, line in enumerate(_cut(file), 1) if not line.isspace())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give a JSONL file") from error


def _cut(file: IO[bytes]) -> Iterator[bytes]:
    """The lines, each with no more bytes than show that it is too long."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        yield line
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES)


def _read(data: bytes, place: Place, seen: SeenIds) -> Prompt | BadLine:
    request_id: RequestId | None = None
    try:
        values = _object(data)
        request_id = id_of(values)
        prompt = parse(values, place)
    except ConfigError as error:
        return BadLine(place, request_id, str(error))
    if prompt.id is not None and not seen.add(prompt.id):
        return BadLine(place, request_id, f"the id {prompt.id!r} is that of an earlier line")
    return prompt


def _object(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_LINE_BYTES:
        raise ConfigError(f"it has more than the {MAX_LINE_BYTES} bytes that a line may have")
    try:
        values = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"it is not UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"it is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"it is a JSON {type(values).__name__}; it must be an object")
    return values
