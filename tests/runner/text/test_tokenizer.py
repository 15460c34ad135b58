import json
import shutil
import subprocess
import sys

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.errors import ConfigError, IntegrityError
from runner.text.tokenizer import Tokenizer

FAMILIES = ["byte-level", "llama-2", "gemma"]
TEXTS = [
    "",
    "The quick brown fox.",
    "  two spaces,\n\n\tand a tab ",
    "Zażółć gęślą jaźń 数字 😀",
    "<s>[INST] hi [/INST] hello</s>",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "a <tool> b <extra>c<image> <pad>",
    "not <|im_start a token",
]


@pytest.fixture(scope="module")
def folders(backends, tmp_path_factory):
    """A model folder of each family as transformers saves it, with tokens that only it adds."""
    paths = {}
    for name in FAMILIES:
        paths[name] = tmp_path_factory.mktemp(name)
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=backends[name],
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            image_token="<image>",
            extra_special_tokens=["<|im_start|>", "<extra>"],
        ).save_pretrained(paths[name])
        (paths[name] / "config.json").write_text('{"model_type": "llama"}')
    return paths


@pytest.fixture
def folder(folders, tmp_path):
    """One folder to change at will."""
    path = tmp_path / "model"
    shutil.copytree(folders["byte-level"], path)
    return path


def reference(path):
    return transformers.AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def pairs(folders):
    return {name: (Tokenizer.load(path), reference(path)) for name, path in folders.items()}


def edit_config(path, name="tokenizer_config.json", **changes):
    file = path / name
    old = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(old | changes))


def drop_added_tokens(path, *contents):
    """Take tokens out of tokenizer.json, as when only a config file adds them."""
    file = path / "tokenizer.json"
    state = json.loads(file.read_text())
    kept = [token for token in state["added_tokens"] if token["content"] not in contents]
    assert len(kept) == len(state["added_tokens"]) - len(contents)
    file.write_text(json.dumps(state | {"added_tokens": kept}))


def assert_same(tokenizer, expected, text):
    for flag in (True, False):
        ids = tokenizer.encode(text, add_special_tokens=flag)
        assert ids == expected(text, add_special_tokens=flag).input_ids
        assert tokenizer.decode(ids) == expected.decode(ids, skip_special_tokens=True)
        whole = tokenizer.decode(ids, skip_special_tokens=False)
        assert whole == expected.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_encodes_and_decodes_as_transformers_does(pairs, name, text):
    assert_same(*pairs[name], text)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.text(max_size=8) | st.sampled_from(["<s>", "</s>", "<tool>", "<extra>"])))
def test_any_text_with_any_special_tokens_as_transformers_does(pairs, name, parts):
    assert_same(*pairs[name], "".join(parts))


@pytest.mark.parametrize("name", FAMILIES)
def test_special_tokens_are_those_of_transformers(pairs, name):
    tokenizer, expected = pairs[name]
    assert tokenizer.special_tokens == expected.special_tokens_map
    assert tokenizer.special_tokens["image_token"] == "<image>"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (expected.bos_token_id, expected.eos_token_id)
    assert set(expected.all_special_ids) <= tokenizer.special_ids
    added = expected.added_tokens_decoder
    assert tokenizer.special_ids == {i for i, token in added.items() if token.special}


def test_the_post_processor_adds_bos_unless_told_not_to(pairs):
    tokenizer, _ = pairs["llama-2"]
    with_bos = tokenizer.encode("fox")
    assert with_bos == [tokenizer.bos_id, *tokenizer.encode("fox", add_special_tokens=False)]


def test_tokens_that_only_added_tokens_decoder_lists(folder):
    first_free = len(reference(folder))
    entries = {"</s>": 2, "<think>": first_free, "<end>": first_free + 1}
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    decoder = {
        str(i): {"content": content, "special": content != "<think>", **flags}
        for content, i in reversed(entries.items())
    }
    edit_config(folder, added_tokens_decoder=decoder)
    drop_added_tokens(folder, "</s>")
    tokenizer = Tokenizer.load(folder)
    assert_same(tokenizer, reference(folder), "a<think>b</s><end> c")
    ids = tokenizer.encode("<think></s><end>")
    assert ids == [first_free, 2, first_free + 1]
    assert tokenizer.decode(ids) == "<think>"


def test_a_named_token_of_the_vocabulary_is_special_although_not_listed(folder):
    drop_added_tokens(folder, "</s>")
    tokenizer = Tokenizer.load(folder)
    assert_same(tokenizer, reference(folder), "a</s> b")
    assert tokenizer.eos_id in tokenizer.special_ids


def test_special_tokens_map_is_read_as_transformers_reads_it(folder):
    roles = {"eos_token": {"content": "<|im_end|>", "lstrip": False}, "unk_token": "<unk>"}
    edit_config(folder, "special_tokens_map.json", **roles)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.special_tokens == reference(folder).special_tokens_map


def test_a_token_written_as_an_object(folder):
    edit_config(folder, eos_token={"__type": "AddedToken", "content": "<|im_end|>"})
    assert Tokenizer.load(folder).eos_token == "<|im_end|>"


def test_flags_and_nulls_name_no_token(folder):
    edit_config(folder, bos_token=None, add_bos_token=True, add_eos_token=True)
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.bos_token, tokenizer.bos_id) == (None, None)
    assert set(tokenizer.special_tokens) == {"eos_token", "pad_token", "image_token"}
    # tokenizer.json alone says what stands around a text, for transformers too.
    assert_same(tokenizer, reference(folder), "fox")


def test_split_special_tokens_is_obeyed(folder):
    edit_config(folder, split_special_tokens=True)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.eos_id not in tokenizer.encode("</s>")
    assert_same(tokenizer, reference(folder), "a</s>")


def test_truncation_and_padding_of_the_file_are_not_applied(folder):
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(folder / "tokenizer.json"))
    assert_same(Tokenizer.load(folder), reference(folder), "The quick brown fox.")


def test_tokenizer_json_alone_is_enough(folder):
    (folder / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.special_tokens == {}
    assert tokenizer.decode(tokenizer.encode("The fox.</s>")) == "The fox."


def test_no_such_folder(tmp_path):
    with pytest.raises(IntegrityError, match=r"no model folder at .*absent"):
        Tokenizer.load(tmp_path / "absent")


def test_a_folder_without_tokenizer_json_says_what_to_copy(tmp_path):
    with pytest.raises(IntegrityError, match=rf"no tokenizer\.json in {tmp_path}; copy"):
        Tokenizer.load(tmp_path)


def test_a_folder_with_a_sentencepiece_model_says_how_to_convert_it(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    with pytest.raises(IntegrityError, match=r"only tokenizer\.model; convert it .*AutoTokenizer"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": {"type": "BPE"}}'])
def test_a_corrupt_tokenizer_json_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(IntegrityError, match=r"tokenizer\.json is corrupt"):
        Tokenizer.load(tmp_path)


def test_a_corrupt_tokenizer_config_is_named(folder):
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"added_tokens_decoder": {"x": {"content": "<x>"}}},
        {"added_tokens_decoder": {"5": {"special": True}}},
        {"added_tokens_decoder": {"5": "<x>"}},
        {"added_tokens_decoder": [1]},
        {"extra_special_tokens": "<x>"},
        {"extra_special_tokens": 5},
    ],
)
def test_malformed_tokens_of_the_config_are_named(folder, changes):
    edit_config(folder, **changes)
    with pytest.raises(IntegrityError, match=r"tokenizer_config\.json lists a malformed token"):
        Tokenizer.load(folder)


def test_half_a_surrogate_pair_is_refused(pairs):
    with pytest.raises(ConfigError, match="surrogate pair at character 1"):
        pairs["byte-level"][0].encode("a\ud83d")


def test_loading_imports_no_transformers_and_no_torch(folders):
    code = (
        "import sys; from pathlib import Path\n"
        "import runner.text.chat, runner.text.detokenizer, runner.text.generation_config\n"
        "import runner.text.stop, runner.text.tokenizer as t\n"
        "assert not {'tokenizers', 'jinja2'} & set(sys.modules)\n"
        f"t.Tokenizer.load(Path({str(folders['llama-2'])!r})).encode('fox')\n"
        "assert not {'transformers', 'torch'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
