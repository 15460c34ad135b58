"""One token by itself, as the bytes that it adds to a text. Not here: the text of a sequence."""

from runner.text.tokenizer import Tokenizer

_BYTE_DIGITS = slice(len("<0x"), len("<0x00"))


def bytes_of(tokenizer: Tokenizer, token_id: int) -> bytes:
    """What a token adds in the middle of a text; of a special one its name, unknown ids have none.

    It need not be UTF-8: a token may hold a part of a character.
    """
    if token_id in tokenizer.special_ids:
        return tokenizer.decode([token_id], skip_special_tokens=False).encode()
    if tokenizer.is_byte_level:
        return tokenizer.token_bytes(token_id)
    spelled = tokenizer.token_text(token_id)
    if spelled is None:
        return b""
    if token_id in tokenizer.byte_fallback_ids:
        return bytes.fromhex(spelled[_BYTE_DIGITS])
    # At the beginning of a text a decoder may drop its space.
    once, twice = tokenizer.decode([token_id]), tokenizer.decode([token_id, token_id])
    return twice[len(once) :].encode()
