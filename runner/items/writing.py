"""`OutputFolder`: the results of an offline run, one file an item, each whole or absent.

A result under its final name is on the disk and is not written again, so a run that was killed
goes on with the items that have none.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.errors import ConfigError, InternalError
from runner.bundle.durable import rename, writing
from runner.items.failures import Failures
from runner.items.formats import Format, check_format, encode
from runner.items.item import Item, ItemError
from runner.items.run_record import RECORD, check_run_folder, hold_run_folder, partial_of
from runner.items.spec import Array, ArraySpec


@dataclass(frozen=True)
class Summary:
    """Where a folder stands: every item is counted once.

    Attributes:
        failed: {item: why}, for those that have no result and were tried.
        untried: items with neither a result nor a recorded error.
    """

    finished: int
    failed: dict[str, str]
    untried: int


class OutputFolder:
    """The folder of one run, held locked. Made by `open_output_folder`."""

    def __init__(self, folder: Path, chosen: Format, outputs: Sequence[ArraySpec]) -> None:
        self._folder = folder
        self._format = chosen
        self._outputs = [spec.name for spec in outputs]
        self._failures = Failures(folder)

    def path_of(self, item: Item) -> Path:
        """Where the result of an item lies once it is whole."""
        return self._folder / f"{item.name}.{self._format}"

    def finished(self, item: Item) -> bool:
        return self.path_of(item).exists()

    def remaining(self, items: Sequence[Item]) -> list[Item]:
        """The items that have no result, those that failed before among them.

        Raises:
            ConfigError: the result of an item would have the name of the run's own record.
        """
        for item in items:
            if self.path_of(item) == self._folder / RECORD:
                raise ConfigError(
                    f"the result of {item.path} would be {RECORD}, which describes the run; "
                    f"rename the item, or use --format npz"
                )
        return [item for item in items if not self.finished(item)]

    def write(self, item: Item, outputs: Mapping[str, Array]) -> None:
        """Write the result of an item; it is on the disk when this returns.

        Args:
            outputs: by name, without the batch dimension.

        Raises:
            ItemError, ConfigError: the format cannot hold these values.
            PreflightError: the disk is full, for example.
        """
        if list(outputs) != self._outputs:
            raise InternalError(f"outputs {list(outputs)} were declared as {self._outputs}")
        path = self.path_of(item)
        aside = partial_of(path)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with aside.open("wb") as stream:
                    encode(self._format, item, outputs, stream)
                rename(aside, path)
            finally:
                aside.unlink(missing_ok=True)

    def record_failure(self, item: Item, error: ItemError) -> None:
        """Say in errors.jsonl why an item has no result."""
        with writing(self._folder):
            self._failures.record(item, error)

    def summary(self, items: Sequence[Item]) -> Summary:
        """Count the items of a run by what the folder says of each."""
        left = [item.name for item in self.remaining(items)]
        said = self._failures.last()
        failed = {name: said[name] for name in left if name in said}
        return Summary(len(items) - len(left), failed, len(left) - len(failed))


def check_output_folder(
    folder: Path,
    outputs: Sequence[ArraySpec],
    *,
    chosen: Format,
    settings: Callable[[], Mapping[str, Any]],
    overwrite: bool = False,
) -> None:
    """Look whether `open_output_folder` would take a folder, before anything is loaded for it.

    Args:
        settings: asked for only where the folder is of a run already.

    Raises:
        ConfigError: as there.
    """
    check_format(chosen, outputs)
    check_run_folder(folder, lambda: _described(settings(), chosen, outputs), overwrite=overwrite)


@contextmanager
def open_output_folder(
    folder: Path,
    outputs: Sequence[ArraySpec],
    *,
    chosen: Format,
    settings: Mapping[str, Any],
    overwrite: bool = False,
) -> Iterator[OutputFolder]:
    """Hold a folder for one run, and sweep what a killed one left half written.

    Args:
        outputs: the model's, for one sample.
        settings: JSON values that decide what a result is: the model's identity, the preprocessing.
            A later run must have the same; the format and the outputs are added here.
        overwrite: empty a folder of another run first.

    Raises:
        ConfigError: the format cannot hold the outputs, or the folder is of something else.
        PreflightError: another run writes this folder, or it cannot be written.
    """
    check_format(chosen, outputs)
    with hold_run_folder(folder, _described(settings, chosen, outputs), overwrite=overwrite):
        with writing(folder):
            Failures(folder).cut_torn_line()
        yield OutputFolder(folder, chosen, outputs)


def _described(
    settings: Mapping[str, Any], chosen: Format, outputs: Sequence[ArraySpec]
) -> dict[str, Any]:
    return {**settings, "format": chosen, "outputs": [str(spec) for spec in outputs]}
