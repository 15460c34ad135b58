"""Show a configuration as it is in effect: each key, its value, and where the value came from."""

import json
import re
from typing import Any

from runner.config.load import LoadedConfig

_PLAIN = re.compile(r"(?!(?:null|true|false)$)[A-Za-z/][\w./-]*")


def show(loaded: LoadedConfig) -> str:
    """One aligned line a key: `parallel.tensor_parallel_size  4  plan.yaml:6:25`."""
    rows = [(key, _text(_value(loaded, key)), origin) for key, origin in loaded.origins.items()]
    key_width = max(len(key) for key, _, _ in rows)
    value_width = max(len(value) for _, value, _ in rows)
    return "\n".join(
        f"{key:{key_width}}  {value:{value_width}}  {origin}" for key, value, origin in rows
    )


def as_json(loaded: LoadedConfig) -> dict[str, Any]:
    """The same for a program: `config` as nested plain data, `origins` by dotted key."""
    return {"config": loaded.config.model_dump(mode="json"), "origins": dict(loaded.origins)}


def _value(loaded: LoadedConfig, key: str) -> Any:
    value: Any = loaded.config
    names = key.split(".")
    for index, name in enumerate(names):
        if isinstance(value, dict):
            # An entry's name may hold dots, as patterns of modules do.
            return value[".".join(names[index:])]
        value = value[int(name)] if isinstance(value, list) else getattr(value, name)
    return value


def _text(value: Any) -> str:
    """As YAML reads it back; only a string that could be taken for something else has quotes."""
    if isinstance(value, str) and _PLAIN.fullmatch(value):
        return value
    return json.dumps(value, ensure_ascii=False)
