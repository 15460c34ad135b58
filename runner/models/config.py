"""A decoder's configuration, and the reading of Hugging Face's `config.json` that all families
share.

Configs written by transformers 4 (`rope_scaling`, `torch_dtype`) and 5 (`rope_parameters`, `dtype`)
are read alike. What a family does differently is in `runner.models.families`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from parallel.errors import ConfigError, IntegrityError
from parallel.plan import DTYPE_BYTES
from runner.models.rope_config import ROPE_KINDS, RopeConfig

Norm = Literal["rms", "rms_plus_one", "layer"]
"""RMSNorm, RMSNorm that multiplies by 1 + weight (Gemma), LayerNorm with bias."""

Activation = Literal["silu", "gelu", "gelu_tanh"]

_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True)
class DecoderConfig:
    """Everything the decoder needs to know.

    Attributes:
        max_positions: longest sequence the model is made for, in tokens.
        gated_mlp: down(act(gate(x)) * up(x)) rather than down(act(up(x))).
        qk_norm: query and key heads are normalized before they are rotated.
        post_norms: attention and MLP outputs are normalized before they are added.
        query_scale: factor on the attention scores.
        embedding_scale: factor on the embeddings.
        logit_softcap: logits become cap * tanh(logits / cap); None: they stay.
        windows: for each layer how many tokens a token sees, itself included; None: all before it.
        ropes: the sets of rotary frequencies; empty where positions are learned.
        rope_of_layer: index into `ropes` for each layer.
        tied: the head is the embedding.
        dtype: of the checkpoint, as the config says.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm: Norm
    norm_eps: float
    activation: Activation
    query_scale: float
    windows: tuple[int | None, ...]
    ropes: tuple[RopeConfig, ...]
    rope_of_layer: tuple[int, ...]
    tied: bool
    dtype: str
    gated_mlp: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    embedding_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def learned_positions(self) -> bool:
        return not self.ropes

    @property
    def switch_length(self) -> int | None:
        """A sequence longer than this uses the second variant of its rotary frequencies."""
        lengths = [rope.switch_length for rope in self.ropes if rope.switch_length]
        return min(lengths, default=None)


class HFConfig:
    """`config.json`, read key by key with clear errors."""

    def __init__(self, file: Path, values: Mapping[str, Any]) -> None:
        self.file = file
        self.values = values

    @classmethod
    def open(cls, model_dir: Path) -> "HFConfig":
        """Raises IntegrityError: the file is absent or not a JSON object."""
        file = model_dir / "config.json"
        try:
            values = json.loads(file.read_text())
        except FileNotFoundError:
            raise IntegrityError(
                f"{file}: absent; give a folder with config.json and safetensors"
            ) from None
        except (OSError, ValueError) as error:
            raise IntegrityError(f"{file}: cannot be read ({error}); copy it again") from None
        if not isinstance(values, dict):
            raise IntegrityError(f"{file}: holds no JSON object; copy it again")
        return cls(file, values)

    @property
    def architecture(self) -> str:
        names = self.values.get("architectures") or ["(none)"]
        return str(names[0])

    @property
    def dtype(self) -> str:
        given = self.values.get("dtype") or self.values.get("torch_dtype") or "float32"
        return given if given in DTYPE_BYTES else "float32"

    def get(self, *keys: str, default: Any = None) -> Any:
        """The first of `keys` that is there and not null."""
        return next((self.values[k] for k in keys if self.values.get(k) is not None), default)

    def number(self, *keys: str, default: Any = None) -> Any:
        """A required number, under the first of `keys` that is there."""
        value = self.get(*keys, default=default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise IntegrityError(
                f"{self.file}: {keys[0]} is {'missing' if value is None else repr(value)}; it "
                f"must be a number"
            )
        return value

    @property
    def activation(self) -> Activation:
        given = self.get("hidden_activation", "hidden_act", "activation_function")
        if given not in _ACTIVATIONS:
            raise ConfigError(
                f"{self.file}: activation {given!r} is not supported; "
                f"supported are {', '.join(_ACTIVATIONS)}"
            )
        return _ACTIVATIONS[given]

    def refuse(self, key: str, *allowed: Any) -> None:
        """Raises ConfigError: a key that changes the arithmetic has a value we cannot compute."""
        value = self.values.get(key)
        if value is not None and value not in allowed:
            supported = " and ".join(["null", *map(json.dumps, allowed)])
            raise ConfigError(
                f"{self.file}: {key}={json.dumps(value)} is not supported; supported: {supported}"
            )

    def rope(
        self, head_dim: int, *, layer_type: str | None = None, theta: float = 10000.0
    ) -> RopeConfig:
        """The rotary frequencies of one layer type, or of all layers.

        Args:
            theta: the base where the config names none.
        """
        given = dict(self.get("rope_parameters", "rope_scaling", default={}))
        if layer_type and layer_type in given:
            given = dict(given[layer_type] or {})
        given["rope_type"] = self._rope_kind(given)
        given.setdefault("rope_theta", self.number("rope_theta", default=theta))
        if original := self.get("original_max_position_embeddings"):
            given["original_max_position_embeddings"] = original
        partial = given.pop("partial_rotary_factor", None)
        partial = partial or self.number("partial_rotary_factor", default=1.0)
        return RopeConfig(given, int(head_dim * partial), self.number("max_position_embeddings"))

    def _rope_kind(self, given: dict[str, Any]) -> str:
        """The kind that `given` names, which must have all that this kind needs."""
        older = given.pop("type", None)
        kind = given.get("rope_type") or older or "default"
        # The first Phi-3 called longrope "su"; "yarn" with its two lists of factors is the same.
        if kind == "su" or (kind == "yarn" and "long_factor" in given):
            kind = "longrope"
        if kind not in ROPE_KINDS:
            raise ConfigError(
                f"{self.file}: rope_type {kind!r} is not supported; "
                f"supported are {', '.join(ROPE_KINDS)}"
            )
        missing = [key for key in ROPE_KINDS[kind] if given.get(key) is None]
        if missing:
            raise IntegrityError(f"{self.file}: rope_type {kind} needs {', '.join(missing)}")
        return str(kind)

    def layer_types(self, num_layers: int, default: list[str]) -> list[str]:
        """`layer_types`, one of sliding_attention and full_attention for each layer."""
        types = self.get("layer_types", default=default)
        known = {"sliding_attention", "full_attention"}
        if len(types) != num_layers or not set(types) <= known:
            raise IntegrityError(
                f"{self.file}: layer_types must name {num_layers} layers, each one of "
                f"{sorted(known)}"
            )
        return list(types)
