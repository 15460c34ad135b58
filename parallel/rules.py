"""From the tensors of a checkpoint to the parameters of a shard: which belongs to which, and how
it is split.

A model family states its rules as data; matching is strict, so that no tensor is dropped, used
twice or guessed. The ranges that a rule refers to by name come from `parallel.slicing`; reading
files is `parallel.weights`.
"""

import difflib
import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from parallel.errors import IntegrityError

Style = Literal["colwise", "rowwise", "embedding_rowwise", "replicate"]
"""How a weight of shape (out, in) is held, in the words of transformers' `tp_plan`.

colwise and embedding_rowwise split the output dim (rows of the stored matrix), rowwise the input
dim.
"""

LAYER = "*"
"""Stands for the layer index in the names of a rule."""


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint that feeds a parameter.

    Attributes:
        name: its name, with `*` for the layer index.
        sections: names of the splits whose blocks lie one after the other along the split dim; a
            fused QKV tensor has three. Empty for a replicated tensor.
    """

    name: str
    sections: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rule:
    """One parameter of a shard (or one a layer), made by concatenating the rank's blocks of its
    sources.

    Attributes:
        target: the parameter's name in the stage module, with `*` for the layer index.
        style: how it is held.
        shape: of the whole parameter, (out, in) for a matrix; None stands for the dim that is
            split.
        sources: what it is read from.
        transposed: the checkpoint stores (in, out), as GPT-2's Conv1D does.
        tied: the source belongs to another rule too; used for a head that shares the embedding.
    """

    target: str
    style: Style
    shape: tuple[int | None, ...]
    sources: tuple[Source, ...]
    transposed: bool = False
    tied: bool = False

    @property
    def dim(self) -> int:
        """The dim that is split; 0 for a replicated parameter."""
        return 1 if self.style == "rowwise" else 0

    def at(self, layer: int) -> "Rule":
        """This rule for one layer."""
        sources = tuple(Source(_at(s.name, layer), s.sections) for s in self.sources)
        return replace(self, target=_at(self.target, layer), sources=sources)

    def stored_shape(self, source: Source, totals: Mapping[str, int]) -> tuple[int, ...]:
        """The shape that a source must have in the checkpoint, given the full size of each
        section.
        """
        stacked = sum(totals[section] for section in source.sections)
        shape = tuple(stacked if extent is None else extent for extent in self.shape)
        return shape[::-1] if self.transposed else shape


def expand(rules: Sequence[Rule], num_layers: int) -> list[Rule]:
    """The rules with every `*` replaced by each layer index in turn, layer by layer."""
    outer = [rule for rule in rules if LAYER not in rule.target]
    inner = [rule for rule in rules if LAYER in rule.target]
    return [*outer, *(rule.at(layer) for layer in range(num_layers) for rule in inner)]


def check_strict(
    rules: Sequence[Rule], names: Collection[str], *, ignored: Sequence[str], where: str
) -> None:
    """Every tensor feeds exactly one rule, and every rule finds its tensors.

    Args:
        rules: expanded rules.
        names: the tensor names of the checkpoint.
        ignored: glob patterns of tensors that hold nothing to load, such as cached rotary
            frequencies.
        where: the checkpoint, for messages.

    Raises:
        IntegrityError: names a tensor that is missing, that no rule takes, or that two rules take.
    """
    owners: dict[str, Rule] = {}
    for rule in rules:
        for source in rule.sources:
            if source.name not in names:
                raise IntegrityError(
                    f"{where}: tensor {source.name} is missing; {rule.target} is made of it "
                    f"({_nearest(source.name, names, 'the checkpoint has')})"
                )
            if rule.tied:
                continue
            if source.name in owners:
                raise IntegrityError(
                    f"{where}: tensor {source.name} is taken by two rules, "
                    f"{owners[source.name].target} and {rule.target}"
                )
            owners[source.name] = rule
    tied = {source.name for rule in rules if rule.tied for source in rule.sources}
    for name in sorted(set(names) - owners.keys() - tied):
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignored):
            raise IntegrityError(
                f"{where}: tensor {name} is matched by no rule of this architecture "
                f"({_nearest(name, owners.keys(), 'the nearest rule takes')})"
            )


def _at(name: str, layer: int) -> str:
    return name.replace(LAYER, str(layer))


def _nearest(name: str, candidates: Collection[str], phrase: str) -> str:
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.0)
    return f"{phrase} {close[0]}" if close else "the checkpoint has no tensors"
