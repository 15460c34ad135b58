"""config.json in the dialects of transformers 4 and 5, and the errors of what cannot be read.

The judge is transformers 5 itself: what it makes of an old file must be read like the old file.
"""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from checkpoints import FAMILIES as VARIANTS

from parallel.errors import ConfigError, IntegrityError, ShardlineError
from parallel.plan import DTYPE_BYTES
from runner.models.config import DecoderConfig, HFConfig
from runner.models.families import FAMILIES, family_of
from runner.models.layout import layout_of
from runner.models.rope import frequencies

Values = dict[str, Any]

SHORT, LONG = [1.0 + i / 50 for i in range(48)], [1.5 + i for i in range(48)]

# As transformers 4, or whoever published the model, wrote them; keys without meaning here left out.
LLAMA_1: Values = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
LLAMA_3_1 = LLAMA_1 | {
    "attention_bias": False,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
MISTRAL = LLAMA_1 | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 8,
    "rope_theta": 10000.0,
}
QWEN_2 = LLAMA_1 | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}
QWEN_3 = QWEN_2 | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "rope_scaling": None,
    "sliding_window": None,
}
GEMMA_3: Values = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "vocab_size": 262144,
}
PHI_3 = LLAMA_1 | {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"long_factor": LONG, "short_factor": SHORT, "type": "longrope"},
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "vocab_size": 32064,
}
GPT_2: Values = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}

OLD: dict[str, Values] = {
    "llama-1": LLAMA_1,
    "llama-linear": LLAMA_1 | {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama-dynamic": LLAMA_1 | {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "llama-null-rope": LLAMA_1 | {"rope_scaling": None, "head_dim": None, "rope_theta": 10000},
    "llama-3.1": LLAMA_3_1,
    "llama-both-names": LLAMA_3_1
    | {"rope_scaling": LLAMA_3_1["rope_scaling"] | {"type": "llama3"}},
    "mistral-without-window-key": MISTRAL,
    "mistral-null-window": MISTRAL | {"sliding_window": None},
    "mistral-nemo": MISTRAL | {"hidden_size": 5120, "head_dim": 128, "sliding_window": None},
    "mistral-window": MISTRAL | {"sliding_window": 1024},
    "qwen-2.5": QWEN_2,
    "qwen-2-window": QWEN_2 | {"use_sliding_window": True},
    "qwen-3": QWEN_3,
    "gemma-3-1b": GEMMA_3,
    "gemma-3-4b": GEMMA_3
    | {
        "max_position_embeddings": 131072,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "rope_local_base_freq": 12345.0,
        "sliding_window_pattern": 4,
    },
    "gemma-3-defaults": {
        k: v
        for k, v in GEMMA_3.items()
        if k not in ("rope_theta", "rope_local_base_freq", "sliding_window_pattern")
    },
    "phi-3": PHI_3,
    "phi-3-yarn": PHI_3 | {"rope_scaling": PHI_3["rope_scaling"] | {"type": "yarn"}},
    "phi-4-mini": PHI_3
    | {
        "partial_rotary_factor": 0.5,
        "rope_scaling": {
            "long_factor": LONG[:24],
            "short_factor": SHORT[:24],
            "type": "longrope",
        },
    },
    "phi-3-short": PHI_3 | {"max_position_embeddings": 4096, "rope_scaling": None},
    "gpt-2": GPT_2,
}


def read(values: Values) -> DecoderConfig:
    config = HFConfig(Path("config.json"), values)
    return family_of(config).read(config)


def rewritten(values: Values) -> Values:
    """The same config as transformers 5 saves it."""
    given = json.loads(json.dumps(values))
    config = transformers.CONFIG_MAPPING[given["model_type"]].from_dict(given)
    written: Values = json.loads(config.to_json_string())
    return written


@pytest.mark.parametrize("name", OLD)
def test_transformers_5_reads_the_old_file_like_we_do(name: str) -> None:
    new = rewritten(OLD[name])
    assert "rope_scaling" not in new
    assert "torch_dtype" not in new
    assert read(new) == read(OLD[name])


@pytest.mark.parametrize("name", OLD)
def test_sizes_are_those_of_transformers(name: str) -> None:
    config, new = read(OLD[name]), rewritten(OLD[name])
    known = {"num_kv_heads": "num_key_value_heads", "num_heads": "num_attention_heads"}
    for field in ("head_dim", "hidden_size", "intermediate_size", "vocab_size", *known):
        if known.get(field, field) in new:
            assert getattr(config, field) == new[known.get(field, field)]
    assert config.tied == new["tie_word_embeddings"]
    assert config.dtype == OLD[name].get("torch_dtype")


def test_the_oldest_phi_3_says_su() -> None:
    """transformers 5 cannot read such a file unless it gives the original length twice."""
    oldest = PHI_3 | {"rope_scaling": PHI_3["rope_scaling"] | {"type": "su"}}
    assert read(oldest) == read(PHI_3)
    twice = oldest["rope_scaling"] | {"original_max_position_embeddings": 4096}
    assert read(rewritten(oldest | {"rope_scaling": twice})) == read(oldest)


def test_windows() -> None:
    assert set(read(OLD["mistral-without-window-key"]).windows) == {4096}
    assert set(read(OLD["mistral-null-window"]).windows) == {None}
    assert set(read(OLD["qwen-2.5"]).windows) == {None}
    assert read(OLD["qwen-2-window"]).windows == (None,) * 21 + (32768,) * 3
    assert read(OLD["gemma-3-4b"]).windows == ((512,) * 3 + (None,)) * 6 + (512,) * 2
    assert set(read(OLD["phi-3"]).windows) == {262144}


def test_gemma_3_has_a_rope_for_each_kind_of_layer() -> None:
    config = read(OLD["gemma-3-4b"])
    full, sliding = config.ropes
    assert (full.kind, full.parameters["rope_theta"]) == ("linear", 1e6)
    assert (sliding.kind, sliding.parameters["rope_theta"]) == ("default", 12345.0)
    assert config.rope_of_layer == (1, 1, 1, 0) * 6 + (1, 1)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("llama-linear", 4096),
        ("llama-dynamic", 4096),
        ("llama-3.1", 131072),
        ("qwen-2.5", 131072),
        ("gemma-3-4b", 131072),  # counts its factor of 8 already
        ("phi-3", 131072),
        ("gpt-2", 1024),
    ],
)
def test_longest_sequence(name: str, tokens: int) -> None:
    assert read(OLD[name]).max_positions == tokens


def test_length_at_which_frequencies_change() -> None:
    assert read(OLD["phi-3"]).switch_length == 4096
    assert read(OLD["llama-dynamic"]).switch_length == 2048
    assert read(OLD["llama-3.1"]).switch_length is None
    assert read(OLD["gpt-2"]).switch_length is None


LINEAR, DYNAMIC, YARN = ({"rope_type": kind} for kind in ("linear", "dynamic", "yarn"))
LLAMA_3_ROPE, PHI_3_ROPE = LLAMA_3_1["rope_scaling"], PHI_3["rope_scaling"]
COUNT = "a whole number from 1 to 2147483647"
FLAG = "true or false"
MISSING = object()

# (config, key, values that it cannot have, what it must be); "rope_scaling.factor" is one inside.
WRONG: list[tuple[Values, str, list[Any], str]] = [
    *(
        (QWEN_3, key, [0, -1, 2.5, 300.0, True, "x", [4096], 2**31], COUNT)
        for key in (
            "hidden_size",
            "intermediate_size",
            "head_dim",
            "max_position_embeddings",
            "num_attention_heads",
            "num_hidden_layers",
            "num_key_value_heads",
            "vocab_size",
        )
    ),
    *((GPT_2, key, [0, 2.5, "x"], COUNT) for key in ("n_embd", "n_head", "n_layer")),
    (LLAMA_1, "hidden_size", [None, MISSING], COUNT),
    (LLAMA_1, "hidden_size", [4097], "a multiple of the 32 heads where head_dim is not given"),
    (GPT_2, "n_inner", [0, "x"], COUNT),
    (LLAMA_1, "rms_norm_eps", [0, -1e-6, "x", math.nan, math.inf, 10**400], "a number above 0"),
    (GPT_2, "layer_norm_epsilon", [-1e-6, True], "a number above 0"),
    (LLAMA_1, "tie_word_embeddings", [0, "false", []], FLAG),
    (LLAMA_1, "attention_bias", [1, "x"], FLAG),
    (LLAMA_1, "mlp_bias", ["x"], FLAG),
    (QWEN_2, "use_sliding_window", ["x"], FLAG),
    (
        QWEN_2 | {"use_sliding_window": True},
        "max_window_layers",
        [-1, 2.5],
        "a whole number from 0",
    ),
    *((config, "sliding_window", [0, -1, "x", 2.5], COUNT) for config in (MISTRAL, PHI_3, GEMMA_3)),
    (GEMMA_3, "sliding_window_pattern", [0, "x"], COUNT),
    (GEMMA_3, "query_pre_attn_scalar", [0, -1, "x"], "a number above 0"),
    (GEMMA_3, "final_logit_softcapping", [0, -1, "x"], "a number above 0"),
    (GEMMA_3, "rope_local_base_freq", [0, "x"], "a number above 1"),
    (GEMMA_3, "layer_types", ["x", {}, [1]], "a list of strings"),
    (LLAMA_1, "architectures", ["LlamaForCausalLM", {}, [["x"]]], "a list of strings"),
    (LLAMA_1, "hidden_act", [["silu"], 1], "a string"),
    (LLAMA_1, "torch_dtype", [16, ["float16"]], "a string"),
    (LLAMA_1, "dtype", [16], "a string"),
    (LLAMA_1, "rope_scaling", [[], "linear", 2.0], "an object"),
    (LLAMA_1, "rope_parameters", [[], "linear", 2.0], "an object"),
    (LLAMA_1, "rope_theta", [0, 1, -1, "x", True, math.inf], "a number above 1"),
    (LLAMA_1, "partial_rotary_factor", [0, -0.5, 1.5, "x"], "a number above 0 and at most 1"),
    (LLAMA_3_1, "rope_scaling.rope_type", [["llama3"], 3], "a string"),
    (LLAMA_3_1, "rope_scaling.rope_theta", [0, "x"], "a number above 1"),
    (LLAMA_3_1, "rope_scaling.partial_rotary_factor", [0, 2], "a number above 0 and at most 1"),
    *(
        (LLAMA_1 | {"rope_scaling": rope}, "rope_scaling.factor", [None, MISSING, 0, -1, "x"], need)
        for rope in (LINEAR, DYNAMIC, LLAMA_3_ROPE, YARN)
        for need in ("a number above 0",)
    ),
    (LLAMA_1 | {"rope_scaling": LINEAR}, "rope_scaling.factor", [1e-4], "at least 1/2048"),
    (QWEN_2, "rope_scaling.factor", [0, "x", 1e300], "a number above 0 and at most 1e+09"),
    (QWEN_2, "rope_scaling.beta_fast", [0, "x"], "a number above 0"),
    (QWEN_2, "rope_scaling.mscale", [-1, "x"], "a number above 0"),
    (QWEN_2, "rope_scaling.truncate", ["x"], FLAG),
    (QWEN_2, "rope_scaling.original_max_position_embeddings", [0, 2.5], "a whole number from 2"),
    (PHI_3, "original_max_position_embeddings", [0, 2.5, "x"], "a whole number from 2"),
    (LLAMA_3_1, "rope_scaling.low_freq_factor", [None, MISSING, 0, "x"], "a number above 0"),
    (LLAMA_3_1, "rope_scaling.high_freq_factor", [None, MISSING, 0, 1, "x"], "a number above 1"),
    *(
        (PHI_3, f"rope_scaling.{key}", wrong, "a list of 48 numbers above 0")
        for key in ("short_factor", "long_factor")
        for wrong in ([None, MISSING, 2.0, "x", {}, [], SHORT[1:], [*SHORT[1:], "x"], [0] * 48],)
    ),
]


def changed(values: Values, key: str, value: Any) -> Values:
    """A copy in which one key, perhaps of an inner object, has another value or is gone."""
    first, _, inner = key.partition(".")
    if inner:
        return values | {first: changed(values[first], inner, value)}
    rest = {k: v for k, v in values.items() if k != key}
    return rest if value is MISSING else rest | {key: value}


@pytest.mark.parametrize(
    ("values", "key", "value", "need"),
    [
        pytest.param(values, key, value, need, id=f"{key}-{i}")
        for values, key, wrong, need in WRONG
        for i, value in enumerate(wrong)
    ],
)
def test_a_value_that_cannot_be_right_is_named(
    values: Values, key: str, value: Any, need: str
) -> None:
    with pytest.raises(IntegrityError) as error:
        read(changed(values, key, value))
    line = str(error.value)
    shown = "missing" if value is None or value is MISSING else json.dumps(value)[:60]
    assert line.startswith(f"config.json: {key} is {shown}")
    assert f"; it must be {need}" in line
    assert "\n" not in line
    assert len(line) < 200


def test_a_missing_key_is_named_in_each_spelling() -> None:
    line = f"config.json: n_layer or num_hidden_layers is missing; it must be {COUNT}"
    with pytest.raises(IntegrityError, match=f"^{line}$"):
        read(changed(GPT_2, "n_layer", MISSING))


@pytest.mark.parametrize("part", [0.01, 0.995])
def test_the_rotated_part_of_a_head_is_even(part: float) -> None:
    with pytest.raises(IntegrityError, match=f"head_dim x .* is 128 x {part} = .* an even number"):
        read(LLAMA_1 | {"partial_rotary_factor": part})


def test_dynamic_needs_more_than_one_pair() -> None:
    with pytest.raises(IntegrityError, match="rotary_dim is 2; it must be 4 or more"):
        read(LLAMA_1 | {"rope_scaling": DYNAMIC | {"factor": 2.0}, "head_dim": 2})


def test_null_means_absent() -> None:
    nulls = ("rope_scaling", "rope_theta", "head_dim", "num_key_value_heads", "mlp_bias")
    assert read(LLAMA_1 | dict.fromkeys(nulls)) == read(LLAMA_1)
    assert read(LLAMA_1 | {"torch_dtype": None}).dtype is None


def test_yarn_needs_no_factor_where_the_original_length_is_given() -> None:
    outer = LLAMA_1 | {"rope_scaling": YARN, "original_max_position_embeddings": 512}
    inner = LLAMA_1 | {"rope_scaling": YARN | {"original_max_position_embeddings": 512}}
    assert read(outer) == read(inner)
    assert read(outer).ropes[0].factor == 4.0


ODD_VALUES = [None, 0, -1, 2.5, "x", [], {}, True, float("1e400")]


def keys_of(values: Values) -> list[str]:
    """Every key, those of inner objects as "outer.inner"."""
    inner = [f"{k}.{i}" for k, v in values.items() if isinstance(v, dict) for i in keys_of(v)]
    return [*values, *inner]


@pytest.mark.parametrize("name", VARIANTS)
def test_any_value_of_any_key_is_computed_with_or_refused(
    name: str, checkpoint: Callable[[str], Path]
) -> None:
    values = HFConfig.open(checkpoint(name)).values
    refusals = []
    for key, value in itertools.product(keys_of(dict(values)), ODD_VALUES):
        given = HFConfig(Path("config.json"), changed(dict(values), key, value))
        try:
            family = family_of(given)
            config = family.read(given)
            layout_of(config, family.names).splits(1)
        except ShardlineError as error:
            refusals.append(str(error))
        else:
            tables = [frequencies(rope, config.max_positions)[0] for rope in config.ropes]
            assert all(bool(table.isfinite().all()) for table in tables), (key, value)
    assert len(refusals) > 50
    assert not any("\n" in line for line in refusals)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (LLAMA_1 | {"architectures": ["BertModel"]}, ["BertModel", *FAMILIES]),
        (LLAMA_1 | {"architectures": None}, ["(none)", *FAMILIES]),
        (LLAMA_1 | {"torch_dtype": "float8"}, ["dtype 'float8'", *DTYPE_BYTES]),
        (LLAMA_1 | {"hidden_act": "relu"}, ["activation 'relu'", "silu", "gelu_new"]),
        (
            LLAMA_1 | {"rope_scaling": {"rope_type": "proportional"}},
            ["'proportional'", "longrope"],
        ),
        (LLAMA_1 | {"quantization_config": {"bits": 4}}, ["quantization_config", "null"]),
        (GEMMA_3 | {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping=50.0", "null"]),
        (GEMMA_3 | {"use_bidirectional_attention": True}, ["attention=true", "null and false"]),
        (GPT_2 | {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
        (GPT_2 | {"scale_attn_weights": False}, ["scale_attn_weights=false", "null and true"]),
        (GPT_2 | {"add_cross_attention": True}, ["add_cross_attention=true"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_we_cannot_compute_is_refused(values: Values, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        read(values)
    line = str(refusal.value)
    assert line.startswith("config.json: ")
    assert "\n" not in line
    assert [word for word in words if word not in line] == []


@pytest.mark.parametrize("types", [["full_attention"] * 23, ["chunked_attention"] * 24])
def test_layer_types_must_name_every_layer(types: list[str]) -> None:
    with pytest.raises(IntegrityError, match="layer_types must name 24 layers, each one of"):
        read(OLD["qwen-2-window"] | {"layer_types": types})


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        (lambda _: None, "absent; give a folder with config.json"),
        (lambda file: file.mkdir(), "cannot read .*Is a directory"),
        (lambda file: file.write_text("{"), "is not valid JSON"),
        (lambda file: file.write_bytes(b"\xff\xfe{}"), "is not UTF-8"),
        (lambda file: file.write_text("[]"), "holds a JSON list; it must be an object"),
    ],
    ids=["absent", "a-folder", "not-json", "not-text", "a-list"],
)
def test_a_file_that_cannot_be_read_is_named(
    write: Callable[[Path], Any], problem: str, tmp_path: Path
) -> None:
    write(tmp_path / "config.json")
    with pytest.raises(IntegrityError, match=problem) as error:
        HFConfig.open(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)
