"""A decoder's configuration, and the reading of Hugging Face's `config.json` that all families
share.

Configs written by transformers 4 (`rope_scaling`, `torch_dtype`) and 5 (`rope_parameters`, `dtype`)
are read alike. What a family does differently is in `runner.models.families`.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from parallel.errors import ConfigError, IntegrityError
from parallel.plan import DTYPE_BYTES
from runner.config.json_file import read_json_object
from runner.config.json_values import JsonValues
from runner.models.rope_config import ROPE_KINDS, RopeConfig, check_parameters

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
        dtype: of the checkpoint, as the config says; None: it does not.
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
    dtype: str | None
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


class HFConfig(JsonValues):
    """`config.json`, read key by key with clear errors."""

    @classmethod
    def open(cls, model_dir: Path) -> "HFConfig":
        """Raises IntegrityError: the file is absent or not a JSON object."""
        file = model_dir / "config.json"
        try:
            return cls(file, read_json_object(file))
        except IntegrityError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
        raise IntegrityError(f"{file}: absent; give a folder with config.json and safetensors")

    @property
    def architecture(self) -> str:
        return next(iter(self.texts("architectures", default=[])), "(none)")

    @property
    def dtype(self) -> str | None:
        """Of the checkpoint; None where the config does not say."""
        if not (self.has("dtype") or self.has("torch_dtype")):
            return None
        return self._one_of("dtype", self.text("dtype", "torch_dtype"), DTYPE_BYTES)

    @property
    def activation(self) -> Activation:
        given = self.text("hidden_activation", "hidden_act", "activation_function")
        return _ACTIVATIONS[self._one_of("activation", given, _ACTIVATIONS)]

    def _one_of(self, what: str, given: str, supported: Iterable[str]) -> str:
        """`given`, if it is one that we can compute with."""
        if given not in supported:
            raise ConfigError(
                f"{self.file}: {what} {given!r} is not supported; "
                f"supported are {', '.join(supported)}"
            )
        return given

    def refuse(self, key: str, *allowed: Any) -> None:
        """Raises ConfigError: a key that changes the arithmetic has a value we cannot compute."""
        value = self.values.get(key)
        if value is not None and value not in allowed:
            supported = " and ".join(["null", *map(json.dumps, allowed)])
            raise ConfigError(
                f"{self.file}: {key}={json.dumps(value)} is not supported; supported: {supported}"
            )

    def head_dim(self, hidden_size: int, num_heads: int) -> int:
        """The size of a head; where it is not given, the heads share out the hidden size.

        Raises:
            IntegrityError: they do not divide.
        """
        if self.has("head_dim"):
            return self.count("head_dim")
        if hidden_size % num_heads:
            raise IntegrityError(
                f"{self.file}: hidden_size is {hidden_size}; it must be a multiple of the "
                f"{num_heads} heads where head_dim is not given"
            )
        return hidden_size // num_heads

    def window(self, *, default: int | None) -> int | None:
        """`sliding_window`, in tokens; null means none, and `default` holds where it is absent."""
        if "sliding_window" not in self.values:
            return default
        return self.count("sliding_window") if self.has("sliding_window") else None

    def layer_types(self, num_layers: int, default: list[str]) -> list[str]:
        """`layer_types`, one of sliding_attention and full_attention for each layer."""
        types = self.texts("layer_types", default=default)
        known = {"sliding_attention", "full_attention"}
        if len(types) != num_layers or not set(types) <= known:
            raise IntegrityError(
                f"{self.file}: layer_types must name {num_layers} layers, each one of "
                f"{sorted(known)}"
            )
        return types

    def rope(
        self, head_dim: int, *, layer_type: str | None = None, theta: float = 10000.0
    ) -> RopeConfig:
        """The rotary frequencies of one layer type, or of all layers.

        Args:
            theta: the base where the config names none.

        Raises:
            ConfigError: a kind that is not supported.
            IntegrityError: a parameter is missing, or is none that its kind can have.
        """
        given = self._rope_section(layer_type)
        max_positions = self.count("max_position_embeddings")
        rotary_dim = self._rotary_dim(given, head_dim)
        kind = self._rope_kind(given)
        check_parameters(kind, given, rotary_dim=rotary_dim, max_positions=max_positions)
        theta = self.positive("rope_theta", default=theta, above=1)
        theta = given.positive("rope_theta", default=theta, above=1)
        kept = {k: v for k, v in given.values.items() if k not in ("type", "partial_rotary_factor")}
        parameters = kept | {"rope_type": kind, "rope_theta": theta}
        return RopeConfig(parameters, rotary_dim, max_positions)

    def _rope_section(self, layer_type: str | None) -> JsonValues:
        """What the config says of a layer type's frequencies, the original length included."""
        given = self.section("rope_parameters", "rope_scaling")
        if layer_type and layer_type in given.values:
            given = given.section(layer_type)
        key = "original_max_position_embeddings"
        if not self.has(key):
            return given
        return replace(given, values={**given.values, key: self.count(key, least=2)})

    def _rotary_dim(self, given: JsonValues, head_dim: int) -> int:
        """How many of a head's dims are rotated."""
        outer = self.positive("partial_rotary_factor", default=1.0, most=1)
        part = given.positive("partial_rotary_factor", default=outer, most=1)
        rotary_dim = int(head_dim * part)
        if rotary_dim < 2 or rotary_dim % 2:
            raise IntegrityError(
                f"{self.file}: head_dim x partial_rotary_factor is {head_dim} x {part:g} = "
                f"{rotary_dim}; it must be an even number from 2"
            )
        return rotary_dim

    def _rope_kind(self, given: JsonValues) -> str:
        kind = given.text("rope_type", "type", default="default")
        # The first Phi-3 called longrope "su"; "yarn" with its two lists of factors is the same.
        if kind == "su" or (kind == "yarn" and "long_factor" in given.values):
            kind = "longrope"
        return self._one_of("rope_type", kind, ROPE_KINDS)
