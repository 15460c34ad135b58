"""Rotary embeddings equal those of transformers: frequencies, factors, rotation."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3

from runner.models.rope import cos_sin, frequencies, rotate
from runner.models.rope_config import RopeConfig

MAX_POSITIONS = 512
MAX_MODEL_LEN = 700
SHORT, LONG = [1.0, 1.05, 1.1, 1.4, 2.0, 3.0], [1.2, 1.9, 4.0, 8.5, 16.0, 33.0]


def scaled(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **values}


def llama3(factor: float, low: float, high: float, original: int) -> dict[str, Any]:
    bands = {"low_freq_factor": low, "high_freq_factor": high}
    return scaled("llama3", factor=factor, original_max_position_embeddings=original, **bands)


def yarn(factor: float | None, original: int = 64, **values: Any) -> dict[str, Any]:
    return scaled("yarn", factor=factor, original_max_position_embeddings=original, **values)


def longrope(original: int, **values: Any) -> dict[str, Any]:
    factors = {"short_factor": SHORT, "long_factor": LONG}
    return scaled("longrope", original_max_position_embeddings=original, **factors, **values)


ONE_VARIANT = {
    "default": scaled("default"),
    "default-base": scaled("default") | {"rope_theta": 5e5},
    "linear": scaled("linear", factor=2.5),
    "llama3": llama3(8.0, 1.0, 4.0, 128),
    "llama3-wide": llama3(32.0, 0.5, 16.0, 400) | {"rope_theta": 5e5},
    "yarn": yarn(4.0),
    "yarn-without-factor": yarn(None),
    "yarn-shrinks": yarn(0.5),
    "yarn-attention-factor": yarn(4.0, attention_factor=0.7),
    "yarn-mscale": yarn(40.0, mscale=1.0, mscale_all_dim=0.707),
    "yarn-one-mscale": yarn(40.0, mscale=0.9),
    "yarn-betas": yarn(8.0, 96, beta_fast=20, beta_slow=2),
    "yarn-null-betas": yarn(8.0, beta_fast=None, beta_slow=None),
    "yarn-ramp-of-no-width": yarn(8.0, 6),
    "yarn-not-truncated": yarn(32.0, 96, beta_fast=32.0, beta_slow=1.0, truncate=False),
    "yarn-base": yarn(4.0) | {"rope_theta": 1e6},
}
TWO_VARIANTS = {
    "dynamic": scaled("dynamic", factor=3.0),
    "dynamic-base": scaled("dynamic", factor=1.0) | {"rope_theta": 1e6},
    "longrope": longrope(128),
    "longrope-not-longer": longrope(MAX_POSITIONS),
    "longrope-factor": longrope(128, factor=32.0),
    "longrope-attention-factor": longrope(128, attention_factor=1.25),
}


def theirs(
    parameters: dict[str, Any], head_dim: int, length: int | None = None
) -> tuple[torch.Tensor, float]:
    """What transformers computes for a sequence of `length`."""
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters=dict(parameters),
    )
    if parameters["rope_type"] == "default":
        return modeling_llama.LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, seq_len=length)


def ours(parameters: dict[str, Any], rotary_dim: int) -> tuple[torch.Tensor, float]:
    return frequencies(RopeConfig(parameters, rotary_dim, MAX_POSITIONS), MAX_MODEL_LEN)


def close(got: tuple[torch.Tensor, float], expected: tuple[torch.Tensor, float]) -> None:
    assert_close(got[0], expected[0], rtol=1e-6, atol=0)
    assert got[1] == pytest.approx(expected[1], rel=1e-12)


@pytest.mark.parametrize("head_dim", [16, 128])
@pytest.mark.parametrize("name", ONE_VARIANT)
def test_frequencies_of_any_length(name: str, head_dim: int) -> None:
    table, factor = ours(ONE_VARIANT[name], head_dim)
    assert table.dtype == torch.float32
    assert table.shape == (1, head_dim // 2)
    close((table[0], factor), theirs(ONE_VARIANT[name], head_dim))


@pytest.mark.parametrize("name", TWO_VARIANTS)
def test_frequencies_up_to_and_beyond_the_original_length(name: str) -> None:
    parameters = TWO_VARIANTS[name]
    original = parameters.get("original_max_position_embeddings", MAX_POSITIONS)
    assert RopeConfig(parameters, 12, MAX_POSITIONS).switch_length == original
    (short, long), factor = ours(parameters, 12)
    close((short, factor), theirs(parameters, 12, original))
    close((long, factor), theirs(parameters, 12, MAX_MODEL_LEN))


def test_partial_rotation_has_frequencies_for_that_part() -> None:
    for name in ("linear", "llama3", "yarn", "yarn-not-truncated"):
        partial = ONE_VARIANT[name] | {"partial_rotary_factor": 0.75}
        table, factor = ours(ONE_VARIANT[name], 12)
        close((table[0], factor), theirs(partial, 16))


def test_only_kinds_that_depend_on_the_length_switch() -> None:
    for parameters in ONE_VARIANT.values():
        assert RopeConfig(parameters, 12, MAX_POSITIONS).switch_length is None


@pytest.mark.parametrize(
    ("parameters", "length"),
    [
        (scaled("default"), 512),
        (scaled("linear", factor=2.5), 1280),
        (scaled("dynamic", factor=3.0), 1536),
        (llama3(8.0, 1.0, 4.0, 128), 512),
        (longrope(128), 512),
        (yarn(4.0, 512), 2048),
        (yarn(4.0, 128), 512),
        (yarn(None, 128), 512),
    ],
)
def test_longest_sequence_of_each_kind(parameters: dict[str, Any], length: int) -> None:
    """Where config.json gives the length before scaling, scaling lengthens it."""
    assert RopeConfig(parameters, 12, MAX_POSITIONS).max_length == length


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_of_whole_heads(dtype: torch.dtype) -> None:
    config = LlamaConfig(
        hidden_size=48,
        num_attention_heads=3,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters=yarn(40.0, mscale=1.0, mscale_all_dim=0.5),
    )
    embedding = modeling_llama.LlamaRotaryEmbedding(config)
    table = embedding.inv_freq[None], embedding.attention_scaling
    positions = range(0, 100_000, 9_973)
    check_rotation(table, 0, positions, embedding, modeling_llama.apply_rotary_pos_emb, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", [range(100, 120), range(120, 140)], ids=["short", "long"])
def test_rotation_of_a_part_of_each_head(positions: range, dtype: torch.dtype) -> None:
    """The last position decides which variant transformers takes."""
    config = Phi3Config(
        hidden_size=48,
        num_attention_heads=3,
        max_position_embeddings=MAX_POSITIONS,
        original_max_position_embeddings=128,
        rope_parameters=longrope(128) | {"partial_rotary_factor": 0.75},
        pad_token_id=None,
    )
    embedding = modeling_phi3.Phi3RotaryEmbedding(config)
    table, variant = ours(longrope(128), 12), int(positions[-1] >= 128)
    check_rotation(table, variant, positions, embedding, modeling_phi3.apply_rotary_pos_emb, dtype)


def check_rotation(
    table: tuple[torch.Tensor, float],
    variant: int,
    positions: range,
    embedding: Any,
    apply: Any,
    dtype: torch.dtype,
) -> None:
    """q and k of random values come out of both rotations the same, to the last bit."""
    torch.manual_seed(0)
    q, k = (torch.randn(len(positions), heads, 16).to(dtype) for heads in (3, 2))
    places = torch.tensor(positions)
    expected = apply(q[None], k[None], *embedding(q, places[None]), unsqueeze_dim=2)
    rotation = cos_sin(*table, places, torch.full_like(places, variant), dtype)
    for x, wanted in zip((q, k), expected, strict=True):
        assert_close(rotate(x, *rotation), wanted[0], rtol=0, atol=0)


def test_each_token_is_rotated_by_its_own_variant() -> None:
    table, factor = ours(longrope(128), 12)
    positions, variants = torch.tensor([5, 300, 5, 300]), torch.tensor([0, 1, 1, 0])
    together = cos_sin(table, factor, positions, variants, torch.float32)
    for i in range(4):
        alone = cos_sin(table, factor, positions[i : i + 1], variants[i : i + 1], torch.float32)
        assert torch.equal(together[0][i], alone[0][0])
        assert torch.equal(together[1][i], alone[1][0])
    assert not torch.equal(together[0][0], together[0][2])
