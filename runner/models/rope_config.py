"""The parameters of rotary position embeddings, as a config gives them.

Pure data; the frequencies they mean are computed in `runner.models.rope`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ROPE_KINDS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
}
"""The kinds, each with the parameters that it cannot do without."""


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
