"""Write `docs/configuration.md` from the schema, so that the two cannot differ."""

import json
from collections.abc import Iterator
from typing import Any

from runner.config.schema import RunnerConfig

EXAMPLE = """\
version: 1
model:
  path: ./llama-3-70b-instruct
  dtype: bfloat16
  max_model_len: 8192
parallel:
  tensor_parallel_size: 4
  stages:
    - {modules: ["model.embed_tokens", "model.layers.{0..40}"], devices: [0, 1, 2, 3]}
    - {modules: ["model.layers.{41..79}", "model.norm", "lm_head"], devices: [4, 5, 6, 7]}
scheduler:
  max_num_seqs: 64
"""
"""The file that the page shows for a language model; a test loads it."""

TENSOR_EXAMPLE = """\
version: 1
model:
  path: ./segmenter.safetensors
  factory: "hospital.models:make_segmenter"
  factory_path: ./src
  factory_args: {channels: [32, 64, 128], num_classes: 5}
  inputs:
    - {name: image, dtype: float32, shape: [batch, 1, height, width]}
  dims:
    height: [256, 512]
    width: [256, 512]
  dtype: float16
parallel:
  tensor_parallel_size: 2
  split_points: ["decoder"]
  tp_plan:
    "encoder.blocks.*.up": colwise
    "encoder.blocks.*.down": rowwise
compile:
  buckets: [1, 4, 8]
scheduler:
  max_batch_size: 8
  preferred_batch_size: [4]
  max_queue_delay_ms: 2
tiling:
  roi_size: [512, 512]
  mode: gaussian
security:
  factories: ["hospital.models:make_segmenter"]
"""
"""The file that the page shows for a tensor model; a test loads it."""

_INTRODUCTION = f"""\
# Configuration

This page is made from the schema by `scripts/docs-config`; do not edit it.

A job is described by one YAML file. For example, a language model:

```yaml
{EXAMPLE}```

Any other model, here one that a function makes, names its inputs:

```yaml
{TENSOR_EXAMPLE}```

- `version` and `model.path` are required; every other key has the default given below.
- `--set a.b=value` wins over a flag, a flag over the file, the file over the default. The value of
  `--set` is YAML, and an entry of a list is named by its index:
  `--set parallel.stages.0.tensor_parallel_size=2`. So is an entry of a mapping by its name, such as
  `--set model.dims.height=[320,640]`, unless that holds dots: then set the whole mapping,
  `--set 'parallel.tp_plan={{"blocks.*.up": colwise}}'`.
- `shardline plan --show-config` prints each value in effect and where it came from.
- Nothing is converted or ignored. An unknown key, a key given twice, `"4"` for `4` and `yes` for
  `true` are errors; each is reported with file, line and column, all of them at once.
- YAML aliases (`*name`) and tags (`!name`) are not read.
- Put quotes around a pattern that holds braces: `"model.layers.{{0..40}}"`.
"""


def markdown() -> str:
    """The whole page: the rules of the language, then a table of keys for each section."""
    schema = RunnerConfig.model_json_schema()
    parts = [_INTRODUCTION]
    for title, section in _sections(schema, "", schema):
        parts.append(f"## {title}\n\n{section['description']}\n\n{_table(section)}\n")
    return "\n".join(parts)


def _sections(
    section: dict[str, Any], above: str, schema: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every section with the heading of its keys, an outer one before those that it holds."""
    yield f"`{above}`" if above else "Top level", section
    for name, prop in section["properties"].items():
        reference = _reference(prop)
        if reference:
            key = f"{above}.{name}" if above else name
            entries = "[]" if _is_list(prop) else ""
            yield from _sections(schema["$defs"][reference], key + entries, schema)


def _reference(prop: dict[str, Any]) -> str | None:
    """The name of the section that a property holds, directly, nullable or as entries of a list."""
    if "$ref" in prop:
        return str(prop["$ref"]).rpartition("/")[2]
    nested = [*prop.get("anyOf", []), *([prop["items"]] if "items" in prop else [])]
    return next((name for name in map(_reference, nested) if name), None)


def _is_list(prop: dict[str, Any]) -> bool:
    return "items" in prop or any(map(_is_list, prop.get("anyOf", [])))


def _table(section: dict[str, Any]) -> str:
    """The keys of one section; one that is itself a section has a table further down."""
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    required = section.get("required", [])
    for name, prop in section["properties"].items():
        if "$ref" in prop:
            rows.append(f"| `{name}` | section | | see below |")
            continue
        default = "required" if name in required else f"`{json.dumps(prop['default'])}`"
        meaning = " ".join(prop.get("description", "see below").split())
        rows.append(f"| `{name}` | {_value(prop)} | {default} | {meaning} |")
    return "\n".join(rows)


def _value(prop: dict[str, Any]) -> str:
    """What may stand as the value, in words."""
    if "anyOf" in prop:
        return " or ".join(_value(choice) for choice in prop["anyOf"])
    if "const" in prop:
        return f"`{prop['const']}`"
    if "enum" in prop:
        return ", ".join(f"`{choice}`" for choice in prop["enum"])
    if "$ref" in prop:
        return "section"
    if "type" not in prop:
        return "any value"
    if prop["type"] == "array":
        return f"list{_lengths(prop)} ({_value(prop['items'])})"
    if prop["type"] == "object":
        entries = prop["additionalProperties"]
        return f"mapping of names ({'any value' if entries is True else _value(entries)})"
    names = {
        "boolean": "true or false",
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "null": "`null`",
    }
    return names[prop["type"]] + _bounds(prop)


def _bounds(prop: dict[str, Any]) -> str:
    bounds = {
        "minimum": ">= {}",
        "exclusiveMinimum": "> {}",
        "maximum": "<= {}",
        "exclusiveMaximum": "< {}",
    }
    given = [text.format(f"{prop[key]:g}") for key, text in bounds.items() if key in prop]
    return f" {', '.join(given)}" if given else ""


def _lengths(prop: dict[str, Any]) -> str:
    """How many entries, where there is more to say than that some are needed."""
    if "maxItems" not in prop:
        return ""
    return f" of {prop['minItems']} to {prop['maxItems']}"
