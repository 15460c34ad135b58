"""What a user may have meant by a key or value that the schema does not know."""

import difflib
from typing import Any

from pydantic import BaseModel

from runner.config.fields import section_at, walk
from runner.config.problems import Loc, dotted

# Common words whose letters are far from the right word, or near to a wrong one.
_KEYS = {
    "tp": "tensor_parallel_size",
    "tp_size": "tensor_parallel_size",
    "pp": "pipeline_parallel_size",
    "pp_size": "pipeline_parallel_size",
}
_VALUES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "gpu": "cuda",
    "half": "float16",
}


def meant_key(root: type[BaseModel], loc: Loc) -> str:
    """Advice for an unknown key: the section it belongs in, a near name, or the keys there are."""
    section = section_at(root, loc[:-1])
    siblings = list(section.model_fields) if section else []
    name = str(loc[-1])
    wanted = _KEYS.get(name, name)
    homes = sorted((path for path in walk(root) if path[-1] == wanted), key=len)
    if homes and wanted not in siblings:
        subject = "it" if wanted == name else wanted
        return f"{subject} belongs {_under(homes[0][:-1])}"
    near = _near(wanted, siblings)
    if near is not None:
        return f"did you mean {near}?"
    elsewhere = {path[-1]: path for path in walk(root)}
    near = _near(wanted, list(elsewhere))
    if near is not None:
        return f"did you mean {near}, which belongs {_under(elsewhere[near][:-1])}?"
    return f"known here: {', '.join(siblings)}"


def meant_value(value: Any, allowed: list[Any]) -> str | None:
    """The allowed word that `value` is a misspelling or a common short form of."""
    if not isinstance(value, str):
        return None
    words = [word for word in allowed if isinstance(word, str)]
    common = _VALUES.get(value.lower())
    return common if common in words else _near(value.lower(), words)


def _near(name: str, names: list[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.7)), None)


def _under(path: tuple[str, ...]) -> str:
    return f"under {dotted(path)}" if path else "at the top level"
