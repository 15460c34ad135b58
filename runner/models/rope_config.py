"""The parameters of rotary position embeddings, as a config gives them.

Pure data and its checks; the frequencies they mean are computed in `runner.models.rope`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from parallel.errors import IntegrityError
from runner.config.json_values import JsonValues

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")

_MAX_FACTOR = 1e9


@dataclass(frozen=True)
class RopeConfig:
    """One set of rotary frequencies.

    Attributes:
        parameters: transformers 5's `rope_parameters` of one layer type: `rope_type`, `rope_theta`
            and what the type needs.
        rotary_dim: how many of a head's dims are rotated; the rest pass through.
        max_positions: the config's `max_position_embeddings`.
    """

    parameters: Mapping[str, Any]
    rotary_dim: int
    max_positions: int

    @property
    def kind(self) -> str:
        return str(self.parameters["rope_type"])

    @property
    def original_positions(self) -> int:
        """The length the model was first trained at, before its frequencies were scaled."""
        return int(self.parameters.get("original_max_position_embeddings") or self.max_positions)

    @property
    def switch_length(self) -> int | None:
        """A sequence longer than this uses variant 1; None: there is one variant."""
        if self.kind == "longrope":
            return self.original_positions
        return self.max_positions if self.kind == "dynamic" else None

    @property
    def max_length(self) -> int:
        """The longest sequence that these frequencies are meant for."""
        if self.kind in ("linear", "dynamic"):
            return int(self.max_positions * self.parameters["factor"])
        if self.kind == "yarn":
            return max(self.max_positions, int(self.original_positions * self.factor))
        return self.max_positions

    @property
    def factor(self) -> float:
        """How many times longer sequences are than the model was first trained at."""
        given = self.parameters.get("factor")
        return float(given) if given else self.max_positions / self.original_positions


def check_parameters(kind: str, given: JsonValues, *, rotary_dim: int, max_positions: int) -> None:
    """Check that a config's rotary parameters are there and can be computed with.

    Raises:
        IntegrityError: one is missing, or is none that this kind can have.
    """
    if given.has("original_max_position_embeddings"):
        given.count("original_max_position_embeddings", least=2)
    for key in ("attention_factor", "beta_fast", "beta_slow"):
        if given.has(key):
            given.positive(key)
    if given.has("factor") or kind in ("linear", "dynamic", "llama3"):
        given.positive("factor", most=_MAX_FACTOR)
    if kind in _CHECKS:
        _CHECKS[kind](given, rotary_dim, max_positions)


def _check_linear(given: JsonValues, rotary_dim: int, max_positions: int) -> None:
    del rotary_dim
    if given.positive("factor") * max_positions < 1:
        raise given.wrong("factor", f"at least 1/{max_positions}, for a sequence of one token")


def _check_dynamic(given: JsonValues, rotary_dim: int, max_positions: int) -> None:
    _check_linear(given, rotary_dim, max_positions)
    if rotary_dim < 4:
        raise IntegrityError(
            f"{given.file}: rotary_dim is {rotary_dim}; it must be 4 or more for rope_type dynamic"
        )


def _check_llama3(given: JsonValues, rotary_dim: int, max_positions: int) -> None:
    del rotary_dim, max_positions
    given.positive("high_freq_factor", above=given.positive("low_freq_factor"))


def _check_yarn(given: JsonValues, rotary_dim: int, max_positions: int) -> None:
    del rotary_dim, max_positions
    if not given.has("original_max_position_embeddings"):
        given.positive("factor")
    given.flag("truncate", default=True)
    for key in ("mscale", "mscale_all_dim"):
        # 0 means the same as none.
        if given.values.get(key):
            given.positive(key)


def _check_longrope(given: JsonValues, rotary_dim: int, max_positions: int) -> None:
    del max_positions
    for key in ("short_factor", "long_factor"):
        given.positives(key, length=rotary_dim // 2)


_CHECKS: Mapping[str, Callable[[JsonValues, int, int], None]] = {
    "linear": _check_linear,
    "dynamic": _check_dynamic,
    "llama3": _check_llama3,
    "yarn": _check_yarn,
    "longrope": _check_longrope,
}
