"""The blocks of the KV cache: who holds them, and what is in them.

A full block is known by all tokens up to its end. A sequence that begins with the same ones takes
it instead of computing it again, even when nobody holds it any more, until its room is needed.
Every rank takes and gives back in the same order, so block numbers are equal on all.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice


class BlockPool:
    """The blocks of one KV cache."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """
        Args:
            block_size: tokens of a block.
        """
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._holders = [0] * num_blocks
        # The next one to take comes first.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def usage(self) -> float:
        """Share of the blocks that somebody holds."""
        return 1 - len(self._free) / self.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def take(self, count: int) -> list[int] | None:
        """`count` blocks, whatever they hold; None, and nothing taken, where fewer are free."""
        if count > len(self._free):
            return None
        taken = list(islice(self._free, count))
        for block in taken:
            self._hold(block)
        self._forget(taken)
        return taken

    def share(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest beginning that is known, which others may hold, too.

        Args:
            keys: of a sequence's full blocks, in order; see `next_key`.
        """
        found = [self._block_of[key] for key in keys[: self.count_known(keys)]]
        for block in found:
            self._hold(block)
        return found

    def count_known(self, keys: Sequence[bytes]) -> int:
        """How many blocks the longest beginning that is known has; see `share`."""
        unknown = (index for index, key in enumerate(keys) if key not in self._block_of)
        return next(unknown, len(keys))

    def give_back(self, blocks: Sequence[int]) -> None:
        """Let blocks go. What nobody holds is free, and still known while it is not taken.

        Those that hold nothing known are taken first, then those that were let go first; of one
        sequence its end before its beginning, which others are likelier to have.
        """
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free[block] = None
                self._free.move_to_end(block, last=block in self._key_of)

    def publish(self, block: int, key: bytes) -> None:
        """Say what a full block holds; of two that hold the same, the first is kept."""
        if key not in self._block_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def forget_keys(self, keys: Iterable[bytes]) -> None:
        """Let nobody else take blocks for what they were published as."""
        self._forget([self._block_of[key] for key in keys if key in self._block_of])

    def _forget(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            if key := self._key_of.pop(block, None):
                del self._block_of[key]

    def _hold(self, block: int) -> None:
        self._free.pop(block, None)
        self._holders[block] += 1


def next_key(previous: bytes, token_ids: Sequence[int]) -> bytes:
    """What a full block is known by.

    A digest that is no accident's: two beginnings that were taken for one would mix two requests.

    Args:
        previous: key of the block before it; for the first one, what else decides its contents.
        token_ids: of the block.
    """
    return hashlib.sha256(previous + array("q", token_ids).tobytes()).digest()
