"""What a division needs to know about a decoder: its units, its rules, and the sizes that are
split.

Pure data, made by a model family; nothing here knows a file or a rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from parallel.rules import Rule, expand
from parallel.slicing import HeadShare, Range, padded_split, split_heads, width_split


@dataclass(frozen=True)
class Split:
    """The ranges of one dimension over the ranks of a stage.

    Attributes:
        total: size of the full dim.
        ranges: for each tp_rank its start and stop in the full dim.
        padded: local size on every rank, where that is larger than the range; None: no padding.
    """

    total: int
    ranges: tuple[Range, ...]
    padded: int | None = None


@dataclass(frozen=True)
class ModelLayout:
    """A decoder as its division sees it.

    Attributes:
        embeddings: (checkpoint module, stage module) pairs that run before the layers.
        layer: checkpoint name of a layer, with `*` for its index.
        norm, head: checkpoint names of the last norm and of the output head.
        rules: unexpanded, for the whole model.
        ignored: glob patterns of checkpoint tensors that are not loaded.
    """

    embeddings: tuple[tuple[str, str], ...]
    layer: str
    norm: str
    head: str
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...]
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def heads(self, tp_size: int) -> tuple[HeadShare, ...]:
        return split_heads(self.num_heads, self.num_kv_heads, tp_size)

    def splits(self, tp_size: int) -> Mapping[str, Split]:
        """The ranges that rules refer to by name, for a stage of `tp_size` ranks.

        Raises:
            ConfigError: more ranks than heads, or than columns of the MLP.
        """
        heads = self.heads(tp_size)
        vocab, padded = padded_split(self.vocab_size, tp_size)
        return {
            "query": self._heads_split(self.num_heads, [share.query for share in heads]),
            "kv": self._heads_split(self.num_kv_heads, [share.kv for share in heads]),
            "mlp": Split(self.intermediate_size, width_split(self.intermediate_size, tp_size)),
            "vocab": Split(self.vocab_size, vocab, padded),
        }

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor that the rules read, as the checkpoint must hold it."""
        totals = {name: split.total for name, split in self.splits(1).items()}
        return {
            source.name: rule.stored_shape(source, totals)
            for rule in expand(self.rules, self.num_layers)
            for source in rule.sources
        }

    def _heads_split(self, num_heads: int, shares: list[Range]) -> Split:
        ranges = tuple((start * self.head_dim, stop * self.head_dim) for start, stop in shares)
        return Split(num_heads * self.head_dim, ranges)
