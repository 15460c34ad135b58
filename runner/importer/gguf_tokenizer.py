"""The vocabulary of a GGUF file as tokenizer.json and tokenizer_config.json.

A GGUF names the rule that splits text before BPE instead of holding it, so the rules of the Llama
family are written here. Not here: reading the vocabulary from the file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from parallel.errors import ConfigError
from runner.importer.gguf_vocabulary import TokenType, Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

# Words with one leading character, numbers of up to three digits, punctuation, spaces.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_PRE_TOKENIZERS = (*_LLAMA3_NAMES, "smollm", "gpt-2")

# SentencePiece's mark for a space.
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def build_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer, ready to be saved as tokenizer.json; its ids are those of the GGUF.

    Raises:
        ConfigError: a way of splitting text that is not known here, or BOS wanted and not named.
    """
    if vocabulary.kind == "gpt2":
        tokenizer = _byte_level_bpe(vocabulary)
    else:
        tokenizer = _sentencepiece_bpe(vocabulary)
    _add_tokens(tokenizer, vocabulary)
    _add_template(tokenizer, vocabulary)
    return tokenizer


def tokenizer_config(vocabulary: Vocabulary, *, max_length: int) -> dict[str, Any]:
    """The contents of tokenizer_config.json; `max_length` is the model's context in tokens.

    The class is the plain one: transformers' LlamaTokenizer would build its own way to split text
    instead of reading the one in tokenizer.json.
    """
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    for name, role in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = vocabulary.special_ids.get(role)
        # transformers makes each of these special, which must not befall an ordinary token.
        if index is not None and vocabulary.is_special(index):
            config[f"{name}_token"] = vocabulary.tokens[index]
    if vocabulary.chat_template is not None:
        config["chat_template"] = vocabulary.chat_template
    return config


def merges_by_score(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """SentencePiece's scores as an ordered list of merges.

    SentencePiece joins the two neighbours whose union has the highest score. BPE joins the pair
    that stands first, so every way to cut a token in two is a merge of its score's rank. Only
    ordinary tokens are made by merging; of equal scores the lower id goes first, then the cut
    with the longer left part.
    """
    ordinary = {
        token
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind == TokenType.NORMAL
    }
    by_score = sorted(range(len(vocabulary.tokens)), key=lambda index: -vocabulary.scores[index])
    tokens = (vocabulary.tokens[index] for index in by_score)
    return [
        (token[:cut], token[cut:])
        for token in tokens
        if token in ordinary
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in ordinary and token[cut:] in ordinary
    ]


def _byte_level_bpe(vocabulary: Vocabulary) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models

    model = models.BPE(
        vocab=_ids(vocabulary),
        merges=vocabulary.merges,
        # Llama 3's vocabulary holds words that its merges do not reach.
        ignore_merges=vocabulary.pre in _LLAMA3_NAMES,
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = _pre_tokenizer(vocabulary)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(vocabulary: Vocabulary) -> PreTokenizer:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    pre, add_space = vocabulary.pre, vocabulary.add_space_prefix or False
    if pre not in _PRE_TOKENIZERS:
        # "default" is what llama.cpp falls back to for a name it was not given: a guess.
        raise ConfigError(
            f"the GGUF splits text by the rule {pre or '(none named)'!r} (tokenizer.ggml.pre); "
            f"supported are {', '.join(_PRE_TOKENIZERS)}; if the model is of one of these "
            "families, convert it again with a current llama.cpp"
        )
    if pre == "gpt-2":
        return ByteLevel(add_prefix_space=add_space)
    if add_space:
        raise ConfigError(f"the GGUF wants a space before the text, which {pre!r} never has")
    if pre == "smollm":
        return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    split = Split(Regex(_LLAMA3_SPLIT), behavior="isolated")
    return Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentencepiece_bpe(vocabulary: Vocabulary) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    model = models.BPE(
        vocab=_ids(vocabulary),
        merges=merges_by_score(vocabulary),
        unk_token=vocabulary.token("unknown"),
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    mark_spaces: list[Any] = [normalizers.Replace(" ", _SPACE)]
    restore_spaces: list[Any] = [
        decoders.Replace(_SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    # As SentencePiece and llama.cpp do unless told otherwise.
    if vocabulary.add_space_prefix is not False:
        mark_spaces.insert(0, normalizers.Prepend(_SPACE))
        restore_spaces.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(mark_spaces)
    tokenizer.decoder = decoders.Sequence(restore_spaces)
    return tokenizer


def _ids(vocabulary: Vocabulary) -> dict[str, int]:
    return {token: index for index, token in enumerate(vocabulary.tokens)}


def _add_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Have control and user-defined tokens found whole, before the text is split."""
    from tokenizers import AddedToken

    for index, token in enumerate(vocabulary.tokens):
        if vocabulary.is_special(index):
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif vocabulary.types[index] == TokenType.USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])


def _add_template(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Put BOS before and EOS after each text, where the file asks for them."""
    from tokenizers.processors import TemplateProcessing

    add_bos = vocabulary.add_bos
    if add_bos is None:
        # llama.cpp's own defaults.
        add_bos = vocabulary.kind == "llama" or vocabulary.pre in _LLAMA3_NAMES
    bos, eos = vocabulary.token("bos"), vocabulary.token("eos")
    if (add_bos and bos is None) or (vocabulary.add_eos and eos is None):
        raise ConfigError("the GGUF wants BOS or EOS around each text and names no such token")
    before = [bos] if add_bos and bos else []
    after = [eos] if vocabulary.add_eos and eos else []
    if before or after:
        tokenizer.post_processor = TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *(f"{t}:1" for t in before), "$B:1", *after],
            special_tokens=[(t, tokenizer.token_to_id(t)) for t in before + after],
        )
