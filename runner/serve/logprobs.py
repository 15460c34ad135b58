"""Probabilities of tokens in the two shapes of OpenAI's: of completions, and of chats.

What is not UTF-8 by itself is called `bytes:\\xe2\\x82`, as OpenAI's completions call it.
"""

from collections.abc import Sequence
from typing import Any

from runner.engine.completion import Completion
from runner.text.token_bytes import bytes_of
from runner.text.tokenizer import Tokenizer


def of_text(completion: Completion, tokens: Sequence[int], tokenizer: Tokenizer) -> dict[str, Any]:
    """Of a completion.

    Args:
        tokens: places of the generated tokens that are told of.
    """
    told = [(completion.token_ids[i], completion.logprobs[i]) for i in tokens]
    return {
        "tokens": [_name(tokenizer, token_id) for token_id, _ in told],
        "token_logprobs": [logprobs.chosen for _, logprobs in told],
        "top_logprobs": [
            {
                _name(tokenizer, i): value
                for i, value in (*logprobs.top, (token_id, logprobs.chosen))
            }
            for token_id, logprobs in told
        ],
        "text_offset": [completion.offsets[i] for i in tokens],
    }


def of_chat(completion: Completion, tokens: Sequence[int], tokenizer: Tokenizer) -> dict[str, Any]:
    """Of a chat; see `of_text`."""

    def entry(token_id: int, value: float) -> dict[str, Any]:
        held = bytes_of(tokenizer, token_id)
        return {"token": _name(tokenizer, token_id), "logprob": value, "bytes": list(held)}

    return {
        "content": [
            entry(completion.token_ids[i], completion.logprobs[i].chosen)
            | {"top_logprobs": [entry(*pair) for pair in completion.logprobs[i].top]}
            for i in tokens
        ],
        "refusal": None,
    }


def _name(tokenizer: Tokenizer, token_id: int) -> str:
    held = bytes_of(tokenizer, token_id)
    try:
        return held.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in held)
