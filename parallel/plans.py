"""Which plan a JSON object is."""

from typing import Any

from parallel.decoder_plan import DecoderPlan
from parallel.errors import IntegrityError
from parallel.graph_plan import GraphPlan

_KINDS: dict[Any, type[DecoderPlan] | type[GraphPlan]] = {
    "decoder": DecoderPlan,
    "graph": GraphPlan,
}


def read_plan(values: Any) -> DecoderPlan | GraphPlan:
    """The plan whose `to_dict` was written as JSON.

    Raises:
        IntegrityError: it is no plan; see `ShardPlan.from_dict`.
    """
    kind = values.get("kind") if isinstance(values, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise IntegrityError(f"plan.kind is {kind!r}; it must be one of {', '.join(_KINDS)}")
    return _KINDS[kind].from_dict(values)
