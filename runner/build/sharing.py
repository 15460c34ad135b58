"""What the ranks of a compile tell one another: records as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from parallel.collectives import Group, all_gather_bytes, minimum
from parallel.records import read_record

Record = TypeVar("Record")


def gather(kind: type[Record], mine: Sequence[Record], group: Group) -> list[Record]:
    """The dataclasses of all ranks, in the order of the ranks, on every rank."""
    values: Any = [asdict(record) for record in mine]  # type: ignore[call-overload]
    messages = all_gather_bytes(json.dumps(values).encode(), group)
    return [
        read_record(kind, value, kind.__name__)
        for message in messages
        for value in json.loads(message)
    ]


def barrier(group: Group) -> None:
    """Wait for all ranks, as long as start-up may take."""
    minimum(0, group)
