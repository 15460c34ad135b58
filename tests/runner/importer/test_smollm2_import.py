"""A real GGUF of SmolLM2-135M-Instruct, imported once: it speaks, and agrees with transformers."""

import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from parallel_jobs import peak_memory
from safetensors.torch import load_file

from parallel.errors import IntegrityError
from runner.importer import import_gguf

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def folder(smollm2_gguf, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "model"
    import_gguf(smollm2_gguf, out)
    return out


@pytest.fixture(scope="module")
def tokenizer(folder):
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def prose() -> str:
    """Source code, numbers, scripts without spaces, emoji of several code points."""
    return "\n".join(
        [
            inspect.getsource(inspect),
            "On 2024-11-23 it cost 1,234,567.89 (+12.5 %), 0xDEADBEEF,  42   times.",
            "\n".join(f"{i}:\t{' ' * i}{i * 7919}" for i in range(200)),
            "日本語と中文、한국어; ελληνικά, русский, العربية ٣٤٥, हिन्दी ४२, ½ ① Ⅷ",
            "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f389 e\u0301 \u00a0 \r\n\t end",
        ]
    )


def test_completes_prose_and_code(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def complete(prompt: str, num_tokens: int) -> str:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
        return tokenizer.decode(output[0, inputs.input_ids.shape[1] :])

    assert complete("The capital of France is", 1) == " Paris"
    assert re.search(r"return .*fibonacci\(n ?- ?1\)", complete("def fibonacci(n):", 26))


@pytest.mark.full
def test_tensors_equal_those_transformers_reads(folder, smollm2_gguf):
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    theirs = load_gguf_checkpoint(str(smollm2_gguf), return_tensors=True, model_to_load=model)
    ours = load_file(folder / "model.safetensors")
    assert ours.keys() == theirs["tensors"].keys() == model.state_dict().keys() - {"lm_head.weight"}
    for name, weight in ours.items():
        assert torch.equal(weight, theirs["tensors"][name].to(torch.bfloat16)), name


def test_config_is_that_of_the_published_model(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    assert type(config) is transformers.LlamaConfig
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100000.0}
    assert config.rms_norm_eps == 1e-5
    assert config.tie_word_embeddings
    assert config.dtype == torch.bfloat16
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


def test_every_digit_is_a_token_of_its_own(tokenizer, prose):
    assert tokenizer.encode("2024-11-23 costs 1234567.89").tokens == [
        *("2024-11-23"),
        "Ġcosts",
        "Ġ",
        *("1234567.89"),
    ]
    encoding = tokenizer.encode(prose)
    for start, end in encoding.offsets:
        piece = prose[start:end]
        assert len(piece) == 1 or not re.search(r"\d", piece), piece
    # A tokenizer that splits digits after the words leaves one of the spaces to the number.
    assert tokenizer.encode("x    7").tokens == ["x", "ĠĠĠĠ", "7"]


def test_text_comes_back_unchanged(tokenizer, prose):
    assert tokenizer.decode(tokenizer.encode(prose).ids) == prose


def test_transformers_and_tokenizers_agree(folder, tokenizer, prose):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for content in (prose, "<|im_start|>user\nHi<|im_end|>\n", ""):
        assert theirs(content).input_ids == tokenizer.encode(content).ids
    assert len(theirs) == 49152
    assert theirs.model_max_length == 8192
    assert (theirs.bos_token, theirs.eos_token) == ("<|im_start|>", "<|im_end|>")
    chat = theirs.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")


def test_control_tokens_are_whole_and_left_out_of_decoded_text(tokenizer):
    encoding = tokenizer.encode("<|im_start|>user\nHi<|im_end|>")
    assert (encoding.ids[0], encoding.ids[-1]) == (1, 2)
    assert tokenizer.decode(encoding.ids) == "user\nHi"


def test_small_files_hold_the_same_tensors(folder, smollm2_gguf, tmp_path):
    out = tmp_path / "sharded"
    report = import_gguf(smollm2_gguf, out, max_file_bytes=60_000_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    whole = load_file(folder / "model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == report.weight_bytes
    assert report.weight_bytes == sum(tensor.nbytes for tensor in whole.values())
    for filename in set(index["weight_map"].values()):
        part = load_file(out / filename)
        assert part.keys() == {n for n, file in index["weight_map"].items() if file == filename}
        assert sum(tensor.nbytes for tensor in part.values()) <= 60_000_000
        assert all(torch.equal(part[name], whole[name]) for name in part)


def test_memory_is_that_of_one_tensor(smollm2_gguf, tmp_path):
    with peak_memory() as peak:
        report = import_gguf(smollm2_gguf, tmp_path / "out", dtype="float32")
    assert [name for name in report.files if name.endswith("tensors")] == ["model.safetensors"]
    # The embedding as float32, twice: gguf joins what it dequantised. The rest is the tokenizer.
    largest = 49152 * 576 * 4
    assert largest < peak[0] < 2 * largest + 60_000_000 < 0.55 * report.weight_bytes


@pytest.mark.parametrize("length", [0, 3, 1000, 1_000_000, 1_750_000, 98_362_431])
def test_a_truncated_file_is_named(smollm2_gguf, tmp_path, length):
    cut = tmp_path / "cut.gguf"
    with smollm2_gguf.open("rb") as whole:
        cut.write_bytes(whole.read(length))
    with pytest.raises(IntegrityError, match=re.escape(str(cut))):
        import_gguf(cut, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["cut.gguf"]
