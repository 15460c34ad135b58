"""config.json in the dialects of transformers 4 and 5, and the errors of what cannot be read.

The judge is transformers 5 itself: what it makes of an old file must be read like the old file.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from parallel.errors import ConfigError, IntegrityError
from runner.models.config import DecoderConfig, HFConfig
from runner.models.families import FAMILIES, family_of

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
    assert config.dtype == OLD[name].get("torch_dtype", "float32")


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


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size"])
@pytest.mark.parametrize("value", [None, "many", True, [4096]])
def test_a_number_that_is_none_is_named(key: str, value: Any) -> None:
    with pytest.raises(IntegrityError, match=f"config.json: {key} is .*; it must be a number$"):
        read(LLAMA_1 | {key: value})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (LLAMA_1 | {"architectures": ["BertModel"]}, ["BertModel", *FAMILIES]),
        (LLAMA_1 | {"architectures": None}, ["(none)", *FAMILIES]),
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


@pytest.mark.parametrize(
    ("scaling", "missing"),
    [
        ({"type": "linear"}, "linear needs factor"),
        ({"rope_type": "dynamic", "factor": None}, "dynamic needs factor"),
        ({"rope_type": "llama3", "factor": 8.0}, "llama3 needs low_freq_factor, high_freq_factor"),
        ({"type": "su", "short_factor": SHORT}, "longrope needs long_factor"),
    ],
)
def test_a_rope_without_its_parameters_is_corrupt(scaling: Values, missing: str) -> None:
    with pytest.raises(IntegrityError, match=f"config.json: rope_type {missing}$"):
        read(LLAMA_1 | {"rope_scaling": scaling})


@pytest.mark.parametrize("types", [["full_attention"] * 23, ["chunked_attention"] * 24])
def test_layer_types_must_name_every_layer(types: list[str]) -> None:
    with pytest.raises(IntegrityError, match="layer_types must name 24 layers, each one of"):
        read(OLD["qwen-2-window"] | {"layer_types": types})


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        (lambda _: None, "absent; give a folder with config.json"),
        (lambda file: file.mkdir(), "cannot be read"),
        (lambda file: file.write_text("{"), "cannot be read"),
        (lambda file: file.write_bytes(b"\xff\xfe{}"), "cannot be read"),
        (lambda file: file.write_text("[]"), "holds no JSON object"),
    ],
    ids=["absent", "a-folder", "not-json", "not-text", "a-list"],
)
def test_a_file_that_cannot_be_read_is_named(
    write: Callable[[Path], Any], problem: str, tmp_path: Path
) -> None:
    write(tmp_path / "config.json")
    with pytest.raises(IntegrityError, match=problem) as error:
        HFConfig.open(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: ")
