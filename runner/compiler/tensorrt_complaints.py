"""What Torch-TensorRT says while it builds: kept from the user, or made into one line."""

import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field

_TENSORRT_LOGGER = "torch_tensorrt [TensorRT Conversion Context]"


@dataclass
class Complaints:
    """What Torch-TensorRT said while a network was built."""

    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def lacks_workspace(self) -> bool:
        """Whether more scratch memory for a layer might be all that is missing."""
        return any(re.search("OutOfMemory|workspace limit", line) for line in self.errors)


def explain(error: Exception, said: Complaints) -> str:
    """Why no engine came of a network, in one line: the operators that have no converter, or what
    TensorRT said of the first that it refused.
    """
    missing = set(re.findall(r"call_function torch\.ops\.([\w.]+)", "\n".join(said.warnings)))
    if missing:
        return f"TensorRT has no converter for {', '.join(sorted(missing))}"
    causes = _messages(error)
    at = re.search(r"target=torch\.ops\.([\w.]+)", "\n".join(causes))
    reason = shorten([*said.errors, *causes][0])
    return f"TensorRT refused {at[1] if at else 'its network'} ({reason})"


def shorten(text: str) -> str:
    """One line of at most 300 characters."""
    return " ".join(text.split())[:300]


def _messages(error: BaseException | None) -> list[str]:
    """Of an error and its causes, the first cause first."""
    return [] if error is None else [*_messages(error.__cause__ or error.__context__), str(error)]


class _ErrorLines(logging.Handler):
    """Keeps the errors that TensorRT itself logs."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == _TENSORRT_LOGGER:
            self._lines.append(record.getMessage())


@contextmanager
def quiet() -> Iterator[Complaints]:
    """Keep Torch-TensorRT's log lines, warnings and prints from the user, and collect them."""
    said = Complaints()
    handler = _ErrorLines(said.errors)
    loggers = [logging.getLogger(name) for name in ("torch_tensorrt", _TENSORRT_LOGGER)]
    before = [(logger.propagate, logger.handlers) for logger in loggers]
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: said.warnings.append(str(message))
        for logger in loggers:
            logger.propagate, logger.handlers = False, [handler]
        try:
            yield said
        finally:
            for logger, (propagate, handlers) in zip(loggers, before, strict=True):
                logger.propagate, logger.handlers = propagate, handlers
