"""Small Llama models written as GGUF and imported back: weights, config, and what is refused."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

from parallel.errors import ConfigError, IntegrityError, PreflightError
from runner.cli.import_model import import_model
from runner.importer import import_gguf
from runner.importer.gguf_config import generation_config
from runner.importer.gguf_file import GgufFile
from runner.importer.gguf_rope import llama3_factors
from runner.importer.gguf_weights import restore_rotary_order

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, VOCAB = 6, 2, 8, 48, 64, 32
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_llama(**changes) -> torch.nn.Module:
    """A random Llama whose weights are exact in float16; 6 query heads on 2 KV heads."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
        "initializer_range": 0.3,
        **changes,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
        weight.data = weight.data.half().float()
    return model


def gguf_name(name: str) -> str:
    parts = name.split(".")
    if parts[1] == "layers":
        return f"blk.{parts[2]}.{NAMES['.'.join(parts[3:-1])]}.{parts[-1]}"
    return f"{NAMES['.'.join(parts[:-1])]}.{parts[-1]}"


def llama_cpp_order(values: np.ndarray) -> np.ndarray:
    """Row by row: channel i of a head's first half goes to 2i, of its second half to 2i + 1."""
    moved = values.copy()
    half = HEAD_DIM // 2
    for row in range(len(values)):
        head, channel = divmod(row, HEAD_DIM)
        place = 2 * channel if channel < half else 2 * (channel - half) + 1
        moved[head * HEAD_DIM + place] = values[row]
    return moved


def tensors_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The model's tensors under the names and in the row order of llama.cpp, matrices as fp16."""
    tensors = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        values = weight.numpy()
        if ".q_proj." in name or ".k_proj." in name:
            values = llama_cpp_order(values)
        tensors[gguf_name(name)] = values.astype(np.float16) if values.ndim == 2 else values
    return tensors


LETTERS = [chr(ord("a") + i) for i in range(26)]
TOKENS = ["<s>", "</s>", *LETTERS, "ab", "abc", "<|eot|>", "cd"]
TYPES = [3, 3, *[1] * 28, 3, 1]


def add_letters(
    writer: "gguf.GGUFWriter",
    *,
    kind: str = "gpt2",
    tokens: list[str] = TOKENS,
    merges: tuple[str, ...] = ("a b", "ab c", "c d"),
) -> None:
    """A tokenizer of letters, as many tokens as the tiny model's embedding has rows."""
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(TYPES)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def add_sentencepiece(writer: "gguf.GGUFWriter") -> None:
    """The letters a to w, the two bytes of é, and merges in the order of their scores."""
    tokens = ["<unk>", "<s>", "</s>", "<0xC3>", "<0xA9>", "\N{LOWER ONE EIGHTH BLOCK}"]
    tokens += [*LETTERS[:23], "ab", "bc", "abc"]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([2, 3, 3, 6, 6, *[1] * 27])
    writer.add_token_scores([0.0] * 29 + [-2.0, -1.0, -3.0])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray],
    *,
    architecture: str = "llama",
    tokenizer: Callable[["gguf.GGUFWriter"], None] = add_letters,
    extend: Callable[["gguf.GGUFWriter"], None] = lambda _: None,
) -> Path:
    """Write a GGUF of the tiny model's sizes."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(20000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    tokenizer(writer)
    extend(writer)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_same_model(folder: Path, model: torch.nn.Module) -> None:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    ids = torch.arange(VOCAB).repeat(3)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}],
    ids=["plain", "tied", "biased"],
)
def test_gqa_model_comes_back_exactly(tmp_path, changes):
    model = tiny_llama(**changes)
    path = write_gguf(tmp_path / "tiny.gguf", tensors_of(model))
    report = import_gguf(path, tmp_path / "out", dtype="float32")
    assert_same_model(tmp_path / "out", model)
    assert report.num_parameters == sum(weight.numel() for weight in model.parameters())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is changes.get("tie_word_embeddings", False)


def test_tensors_equal_those_transformers_reads(tmp_path):
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = tiny_llama()
    path = write_gguf(tmp_path / "tiny.gguf", tensors_of(model))
    import_gguf(path, tmp_path / "out", dtype="float16")
    theirs = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].half()) for name in ours)


def test_rotary_order_of_one_head():
    rows = np.arange(4)
    assert restore_rotary_order(rows, 1).tolist() == [0, 2, 1, 3]
    assert restore_rotary_order(np.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0", "Q5_1", "BF16"])
def test_quantised_tensors_are_dequantised_before_they_move(tmp_path, quant):
    model = tiny_llama()
    quant_type = gguf.GGMLQuantizationType[quant]
    tensors = tensors_of(model)
    # Rows of 64 are whole blocks of each type; only ffn_down has them in this model.
    down = tensors["blk.1.ffn_down.weight"].astype(np.float32)
    packed = gguf.quants.quantize(down, quant_type)
    del tensors["blk.1.ffn_down.weight"]
    path = write_gguf(
        tmp_path / "tiny.gguf",
        tensors,
        extend=lambda w: w.add_tensor("blk.1.ffn_down.weight", packed, raw_dtype=quant_type),
    )
    report = import_gguf(path, tmp_path / "out", dtype="float32")
    written = load_file(tmp_path / "out" / "model.safetensors")[
        "model.layers.1.mlp.down_proj.weight"
    ]
    assert report.quantization[quant] == 1
    np.testing.assert_array_equal(written, gguf.quants.dequantize(packed, quant_type))
    assert np.abs(written.numpy() - down).max() < 0.2


def test_llama3_rope_is_recovered_from_its_divisors(tmp_path):
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 20000.0,
    }
    model = tiny_llama(rope_parameters=rope)
    default = tiny_llama().model.rotary_emb.inv_freq
    divisors = (default / model.model.rotary_emb.inv_freq).numpy()
    assert divisors.max() > divisors.min()
    path = write_gguf(
        tmp_path / "tiny.gguf",
        tensors_of(model) | {"rope_freqs.weight": divisors},
        extend=lambda w: w.add_rope_scaling_orig_ctx_len(64),
    )
    import_gguf(path, tmp_path / "out", dtype="float32")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_parameters"] == rope
    assert_same_model(tmp_path / "out", model)


def test_llama3_divisors_are_those_of_transformers():
    rope = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    }
    config = transformers.LlamaConfig(
        rope_parameters=rope, head_dim=64, max_position_embeddings=131072
    )
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config)
    plain = 500000.0 ** -(torch.arange(0, 64, 2) / 64)
    ours = llama3_factors(head_dim=64, theta=500000.0, factor=32.0, original_context=8192)
    np.testing.assert_allclose(ours, plain / scaled, rtol=1e-4)


def test_linear_rope_scaling_is_kept(tmp_path):
    model = tiny_llama(
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 20000.0}
    )

    def scale(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    path = write_gguf(tmp_path / "tiny.gguf", tensors_of(model), extend=scale)
    import_gguf(path, tmp_path / "out", dtype="float32")
    assert_same_model(tmp_path / "out", model)


def test_every_token_that_ends_a_turn_is_an_eos(tmp_path):
    path = write_gguf(
        tmp_path / "tiny.gguf", tensors_of(tiny_llama()), extend=lambda w: w.add_eot_token_id(30)
    )
    assert generation_config(GgufFile(path)) == {"bos_token_id": 0, "eos_token_id": [1, 30]}


def add_yarn(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)


def add_linear_rope_and_a_table(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)
    writer.add_tensor("rope_freqs.weight", np.array([1, 1, 2, 9], np.float32))


@pytest.mark.parametrize(
    ("extend", "message"),
    [
        (add_yarn, "RoPE scaling 'yarn'"),
        (add_linear_rope_and_a_table, r"both rope_freqs\.weight and linear RoPE"),
        (lambda w: w.add_expert_count(8), r"llama\.expert_count is 8"),
        (lambda w: w.add_key_length(16), "all three equal"),
        (lambda w: w.add_uint16("split.count", 3), "llama-gguf-split --merge"),
        (lambda w: w.add_tensor("blk.0.attn_rot.weight", np.ones(4, np.float32)), "attn_rot"),
        (
            lambda w: w.add_tensor("rope_freqs.weight", np.array([1, 1, 2, 9], np.float32)),
            "not those of Llama 3",
        ),
        (lambda w: w.add_tensor("blk.0.attn_q.bias", np.ones(48, np.float32)), "or on none"),
    ],
    ids=[
        "yarn",
        "two scalings",
        "experts",
        "head dim",
        "split",
        "extra tensor",
        "rope table",
        "one bias",
    ],
)
def test_variants_that_llama_cannot_express_are_refused(tmp_path, extend, message):
    path = write_gguf(tmp_path / "tiny.gguf", tensors_of(tiny_llama()), extend=extend)
    with pytest.raises(ConfigError, match=message):
        import_gguf(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_architecture_is_named(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", {}, architecture="qwen2")
    with pytest.raises(ConfigError, match="'qwen2'; `import` takes 'llama' only"):
        import_gguf(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("blk.1.attn_k.weight", None, r"blk\.1\.attn_k\.weight is missing"),
        ("blk.1.attn_k.weight", np.ones((24, 48), np.float32), r"shape \(24, 48\)"),
        ("output_norm.weight", np.full(48, np.nan, np.float32), "NaN or infinity"),
        ("token_embd.weight", np.ones((31, 48), np.float32), "32 entries.*31 rows"),
    ],
    ids=["missing", "shape", "nan", "vocabulary"],
)
def test_contradictions_are_integrity_errors(tmp_path, name, values, message):
    tensors = tensors_of(tiny_llama(tie_word_embeddings=True)) | {name: values}
    kept = {name: values for name, values in tensors.items() if values is not None}
    path = write_gguf(tmp_path / "tiny.gguf", kept)
    with pytest.raises(IntegrityError, match=message):
        import_gguf(path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


@pytest.mark.parametrize(
    ("tokenizer", "error", "message"),
    [
        (lambda w: add_letters(w, kind="t5"), ConfigError, "'t5'; supported are 'gpt2'.*'llama'"),
        (
            lambda w: add_letters(w, tokens=[*TOKENS[:-1], "ab"]),
            IntegrityError,
            "ids 28 and 31 are both the token 'ab'",
        ),
        (lambda w: add_letters(w, merges=("a z",)), IntegrityError, "merge 'a z'"),
        (lambda w: add_letters(w, merges=("ab",)), IntegrityError, "merge 'ab'"),
        (
            lambda w: add_letters(w, kind="llama"),
            IntegrityError,
            "scores has 0 entries; the embedding has 32 rows",
        ),
    ],
    ids=["kind", "duplicate", "unknown merge", "half a merge", "no scores"],
)
def test_tokenizers_that_cannot_be_right_are_refused(tmp_path, tokenizer, error, message):
    path = write_gguf(tmp_path / "tiny.gguf", tensors_of(tiny_llama()), tokenizer=tokenizer)
    with pytest.raises(error, match=message):
        import_gguf(path, tmp_path / "out")


def test_sentencepiece_folder_loads_in_transformers(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", tensors_of(tiny_llama()), tokenizer=add_sentencepiece)
    import_gguf(path, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    pieces = ["\u2581", "ab", "d", "\u2581", "abc", "\u2581", "<0xC3>", "<0xA9>"]
    assert tokenizer.tokenize("abd abc \u00e9") == pieces
    ids = tokenizer("abd abc \u00e9").input_ids
    assert ids[0] == tokenizer.bos_token_id == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "abd abc \u00e9"
    assert (tokenizer.unk_token, tokenizer.eos_token) == ("<unk>", "</s>")


def test_values_too_large_for_float16_are_refused(tmp_path):
    large = {"output_norm.weight": np.full(48, 1e6, np.float32)}
    path = write_gguf(tmp_path / "tiny.gguf", tensors_of(tiny_llama()) | large)
    with pytest.raises(ConfigError, match="too large for float16; use --dtype bfloat16"):
        import_gguf(path, tmp_path / "out", dtype="float16")
    import_gguf(path, tmp_path / "out", dtype="bfloat16")


def test_a_file_cut_anywhere_is_refused_with_its_name(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", tensors_of(tiny_llama()))
    whole, cut = path.read_bytes(), tmp_path / "cut.gguf"
    lengths = [*range(0, 3000, 97), *range(3000, len(whole), 4999)]
    for length in lengths:
        cut.write_bytes(whole[:length])
        with pytest.raises(IntegrityError, match=r"cut\.gguf"):
            GgufFile(cut)


def test_absent_and_foreign_files_are_refused_with_their_name(tmp_path):
    with pytest.raises(IntegrityError, match=r"absent\.gguf: No such file"):
        import_gguf(tmp_path / "absent.gguf", tmp_path / "out")
    with pytest.raises(IntegrityError, match="Is a directory"):
        import_gguf(tmp_path, tmp_path / "out")
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04 not a model")
    with pytest.raises(IntegrityError, match=r"x\.gguf is not a whole GGUF"):
        import_gguf(tmp_path / "x.gguf", tmp_path / "out")


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(PreflightError, match=r"pip install 'shardline\[import\]'"):
        import_gguf(tmp_path / "x.gguf", tmp_path / "out")


@pytest.fixture
def command() -> typer.Typer:
    app = typer.Typer()
    app.command("import")(import_model)
    return app


def test_command_prints_one_json_object(tmp_path, command):
    path = write_gguf(tmp_path / "tiny.gguf", tensors_of(tiny_llama()))
    out = tmp_path / "out"
    arguments = [str(path), str(out), "--dtype", "float16", "--json"]
    report = json.loads(CliRunner().invoke(command, arguments).stdout)
    assert report["dtype"] == "float16"
    assert report["weight_bytes"] == 2 * report["num_parameters"]
    assert report["files"] == sorted(path.name for path in out.iterdir())
    again = CliRunner().invoke(command, arguments)
    assert isinstance(again.exception, ConfigError)
    summary = CliRunner().invoke(command, [*arguments[:-1], "--overwrite"]).stdout
    assert "gpt2/smollm, 32 tokens" in summary


@pytest.mark.parametrize("option", [["--dtype", "int8"], ["--shard-mb", "0"]])
def test_command_refuses_bad_options(tmp_path, command, option):
    result = CliRunner().invoke(command, [str(tmp_path / "x.gguf"), str(tmp_path / "o"), *option])
    assert isinstance(result.exception, ConfigError)
    assert option[0] in str(result.exception)
