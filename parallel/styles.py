"""The styles in which the layers of any nn.Module are divided, and which layer a plan gives which.

Nothing is made or changed here; that is `parallel.apply`. The parameters of our own decoder have
their styles in `parallel.rules`.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from parallel.drop_in_attention import HeadwiseAttention
from parallel.drop_ins import (
    ColwiseEmbedding,
    ColwiseLinear,
    DropIn,
    RowwiseEmbedding,
    RowwiseLinear,
)
from parallel.errors import ConfigError
from parallel.partition import RANGE, covers

REPLICATE = "replicate"


@dataclass(frozen=True)
class Style:
    """A way to divide a layer.

    Attributes:
        kind: of layer that it takes.
        make: called with the layer and its `Place`.
    """

    kind: type[nn.Module]
    make: Callable[..., DropIn]


_GATHERED = Style(nn.Linear, partial(ColwiseLinear, gather=True))
_SPLIT_INPUT = Style(nn.Linear, partial(RowwiseLinear, split_input=True))

STYLES: dict[str, Style] = {
    "colwise": Style(nn.Linear, partial(ColwiseLinear, gather=False)),
    "colwise_gather_output": _GATHERED,
    "colwise_rep": _GATHERED,
    "rowwise": Style(nn.Linear, partial(RowwiseLinear, split_input=False)),
    "rowwise_split_input": _SPLIT_INPUT,
    "rowwise_rep": _SPLIT_INPUT,
    "embedding_rowwise": Style(nn.Embedding, RowwiseEmbedding),
    "embedding_colwise": Style(nn.Embedding, ColwiseEmbedding),
    "heads": Style(nn.MultiheadAttention, HeadwiseAttention),
}
"""All but `replicate`; the names that end in `_rep` are transformers' older ones."""

_CUT_INSTEAD = "cut the model into pipeline stages instead: parallel.pipeline_parallel_size"

_NEVER_SPLIT: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((_ConvNd,), f"convolutions are not split; {_CUT_INSTEAD}"),
    ((nn.RNNBase, nn.RNNCellBase), f"recurrent layers are not split; {_CUT_INSTEAD}"),
    (
        (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm),
        "normalization is not split; leave it out, what no pattern names is replicated",
    ),
    (
        (fx.GraphModule,),
        f"exported graphs and ONNX models are not split; {_CUT_INSTEAD}",
    ),
)


@dataclass(frozen=True)
class Match:
    """A layer that a plan names.

    Attributes:
        name: its first name in the module; empty for the module itself.
    """

    name: str
    pattern: str
    style: str
    layer: nn.Module

    @property
    def called(self) -> str:
        return _called(self.name)

    @property
    def start_of_message(self) -> str:
        return f"parallel.tp_plan: {self.pattern!r} matches {self.called}"


def match_layers(module: nn.Module, plan: Mapping[str, str]) -> list[Match]:
    """Every layer that `plan` names, each once.

    Args:
        plan: pattern -> style; see `parallel.apply.apply`.

    Raises:
        ConfigError: a style that does not exist, a pattern that matches nothing, a layer that is
            matched twice or lies in another, or one that cannot be divided as its style says.
    """
    named = dict(named_modules(module))
    found: dict[int, Match] = {}
    for pattern, style in plan.items():
        if style != REPLICATE and style not in STYLES:
            raise ConfigError(
                f"parallel.tp_plan: {pattern!r} has the style {style!r}; use one of "
                f"{', '.join(STYLES)}, {REPLICATE}"
            )
        for name in _names_of(pattern, named):
            match = Match(name, pattern, style, named[name])
            first = found.setdefault(id(match.layer), match)
            if first.pattern != pattern:
                raise ConfigError(
                    f"{match.start_of_message}, which {first.pattern!r} matches too"
                    + (f" as {first.called}" if first.name != name else "")
                    + "; list it once"
                )
    for match in found.values():
        _check_parents(match, named, found)
        if match.style != REPLICATE:
            _check_layer(match)
    return list(found.values())


def named_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules in order, each under all of its names; the first is `module` itself, without one."""
    yield from module.named_modules(remove_duplicate=False)


def _names_of(pattern: str, named: Mapping[str, nn.Module]) -> list[str]:
    names = [name for name in named if _matches(pattern, name)]
    if not names:
        near = difflib.get_close_matches(pattern, filter(None, named), n=1, cutoff=0.0)
        raise ConfigError(
            f"parallel.tp_plan: {pattern!r} matches no module of the model; "
            + (f"the nearest is {near[0]}" if near else "it has only itself, named ''")
        )
    end_of_range = RANGE.sub(lambda numbers: numbers[2], pattern)
    if not any(_matches(end_of_range, name) for name in names):
        raise ConfigError(
            f"parallel.tp_plan: {pattern!r} goes beyond {names[-1]}, the last module of that name; "
            "end the range there"
        )
    return names


def _matches(pattern: str, name: str) -> bool:
    """The model itself has an empty name, which `*` does not match."""
    return covers(pattern, name) if name else not pattern


def _check_parents(
    match: Match, named: Mapping[str, nn.Module], found: Mapping[int, Match]
) -> None:
    """What lies around a layer calls it as it is called now: it is neither swapped itself, nor a
    graph, nor does it read the layer's weights.
    """
    segments = match.name.split(".") if match.name else []
    for name in (".".join(segments[:depth]) for depth in range(len(segments))):
        parent = named[name]
        if id(parent) in found:
            raise ConfigError(
                f"{match.start_of_message}, which lies in {_called(name)}, and that is matched by "
                f"{found[id(parent)].pattern!r}; keep one of the two"
            )
        if match.style == REPLICATE:
            continue
        if isinstance(parent, fx.GraphModule):
            raise ConfigError(
                f"{match.start_of_message}, a part of an exported graph; exported graphs and ONNX "
                f"models are not split; {_CUT_INSTEAD}"
            )
        if isinstance(parent, nn.MultiheadAttention):
            raise ConfigError(
                f"{match.start_of_message}, whose weights {_called(name)} reads by itself; give "
                f"{_called(name)} the style heads"
            )


def _check_layer(match: Match) -> None:
    """The layer is of the kind that its style takes, and does nothing but what that kind does."""
    layer, kind = match.layer, STYLES[match.style].kind
    what = f"{match.start_of_message}, a {type(layer).__name__}"
    for kinds, reason in _NEVER_SPLIT:
        if isinstance(layer, kinds):
            raise ConfigError(f"{what}; {reason}")
    if not isinstance(layer, kind):
        styles = [name for name, style in STYLES.items() if isinstance(layer, style.kind)]
        raise ConfigError(
            f"{what}; {match.style} takes an nn.{kind.__name__}, "
            + (f"use one of {', '.join(styles)}" if styles else "leave it out to replicate it")
        )
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    if type(layer).forward is not kind.forward or hooked or is_parametrized(layer):
        raise ConfigError(
            f"{what} with a forward, hooks or a parametrization of its own; only a plain "
            f"nn.{kind.__name__} is split, leave it out to replicate it"
        )


def _called(name: str) -> str:
    return name or "the model"
