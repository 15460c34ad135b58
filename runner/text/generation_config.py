"""What a model folder says about ending and sampling: stop token ids and sampling defaults.

Not here: what a request asks for; the engine lets a request override these.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from parallel.errors import IntegrityError
from runner.config.json_file import read_json_object

# Each key of the file: its value where it is not written, its range, the range in words.
RULES: dict[str, tuple[float, Callable[[float], bool], str]] = {
    "max_new_tokens": (0, lambda n: isinstance(n, int) and n >= 1, "a whole number of at least 1"),
    "temperature": (1.0, lambda t: 0 <= t < inf, "a number of at least 0"),
    "top_k": (0, lambda k: isinstance(k, int) and k >= -1, "a whole number; 0 or -1 keeps all"),
    "top_p": (1.0, lambda p: 0 < p <= 1, "a number above 0 and at most 1"),
    "min_p": (0.0, lambda p: 0 <= p <= 1, "a number from 0 to 1"),
    "repetition_penalty": (1.0, lambda r: 0 < r < inf, "a number above 0"),
}


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """Sampling when a request does not say otherwise; the values here are greedy and unfiltered.

    Attributes:
        stop_token_ids: any of these ends a sequence.
        max_new_tokens: most tokens to generate; None: the folder does not say.
        temperature: 0 takes the likeliest token.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens that make up this probability; 1 keeps all.
        min_p: keep tokens with at least this share of the likeliest one's probability; 0 keeps all.
        repetition_penalty: divides the scores of tokens already seen; 1 leaves them.
    """

    stop_token_ids: frozenset[int] = frozenset()
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def load(cls, model_dir: Path) -> "GenerationDefaults":
        """Read generation_config.json and the end token of config.json, both optional.

        Sampling values count only where `do_sample` is true, as in transformers. Its unwritten
        default of top_k=50 is not applied.

        Raises:
            IntegrityError: a file is corrupt, or holds a value of the wrong type or range.
        """
        model_path = model_dir / "config.json"
        path = model_dir / "generation_config.json"
        model = read_json_object(model_path, optional=True)
        values = read_json_object(path, optional=True)
        stops = _token_ids(model, model_path) | _token_ids(values, path)
        length = int(_number(values, "max_new_tokens", path)) or None
        penalty = _number(values, "repetition_penalty", path)
        if values.get("do_sample") is not True:
            return cls(stop_token_ids=stops, max_new_tokens=length, repetition_penalty=penalty)
        return cls(
            stop_token_ids=stops,
            max_new_tokens=length,
            temperature=_number(values, "temperature", path),
            top_k=max(0, int(_number(values, "top_k", path))),
            top_p=_number(values, "top_p", path),
            min_p=_number(values, "min_p", path),
            repetition_penalty=penalty,
        )


def _token_ids(values: Mapping[str, Any], path: Path) -> frozenset[int]:
    """`eos_token_id`: one id, a list of ids, or nothing."""
    given = values.get("eos_token_id")
    ids = [] if given is None else given if isinstance(given, list) else [given]
    if any(type(i) is not int or i < 0 for i in ids):
        raise IntegrityError(
            f"{path}: eos_token_id={given!r} must be a token id or a list of token ids"
        )
    return frozenset(ids)


def _number(values: Mapping[str, Any], key: str, path: Path) -> float:
    default, in_range, words = RULES[key]
    value = values.get(key)
    if value is None:
        return default
    # By exact type: to Python a bool is an int. NaN fails every comparison.
    if type(value) not in (int, float) or not in_range(value):
        raise IntegrityError(f"{path}: {key}={value!r} must be {words}")
    return float(value)
