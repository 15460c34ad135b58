"""From a family's names and a decoder's config to the `ModelLayout` that `parallel` divides.

The targets are the parameter names of `runner.models.decoder`.
"""

from collections.abc import Iterator

from parallel.layout import ModelLayout
from parallel.rules import Rule, Source, Style
from runner.models.config import DecoderConfig
from runner.models.families import Names


def layout_of(config: DecoderConfig, names: Names) -> ModelLayout:
    """What `parallel` needs to know of a model."""
    modules = ("embed_tokens", "embed_positions")
    return ModelLayout(
        embeddings=tuple(zip(names.embeddings, modules, strict=False)),
        layer=names.layer,
        norm=names.norm,
        head=names.head,
        rules=(*_outer_rules(config, names), *_layer_rules(config, names)),
        ignored=(*names.ignored, *((f"{names.head}.weight",) if config.tied else ())),
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )


def _outer_rules(config: DecoderConfig, names: Names) -> Iterator[Rule]:
    """Embeddings, the last norm and the head."""
    matrix = (None, config.hidden_size)
    embedding = Source(f"{names.embeddings[0]}.weight", ("vocab",))
    yield Rule("embed_tokens.weight", "embedding_rowwise", matrix, (embedding,))
    if config.learned_positions:
        shape = (config.max_positions, config.hidden_size)
        positions = Source(f"{names.embeddings[1]}.weight")
        yield Rule("embed_positions.weight", "replicate", shape, (positions,))
    yield from _norm("norm", names.norm, config.hidden_size, config)
    head = embedding if config.tied else Source(f"{names.head}.weight", ("vocab",))
    yield Rule("lm_head.weight", "colwise", matrix, (head,), tied=config.tied)


def _layer_rules(config: DecoderConfig, names: Names) -> Iterator[Rule]:
    """One decoder layer; `*` stands for its index."""
    attention, mlp = "layers.*.attention", "layers.*.mlp"
    yield from _layer_norm("attention_norm", names.attention_norm, config, names)
    yield from _linear(
        f"{attention}.qkv_proj", "colwise", names.qkv, config.qkv_bias, config, names
    )
    if config.qk_norm:
        for norm, source in (("q_norm", names.q_norm), ("k_norm", names.k_norm)):
            yield from _norm(
                f"{attention}.{norm}", f"{names.layer}.{source}", config.head_dim, config
            )
    o_proj = (Source(names.o_proj, ("query",)),)
    yield from _linear(f"{attention}.o_proj", "rowwise", o_proj, config.o_bias, config, names)
    yield from _layer_norm("mlp_norm", names.mlp_norm, config, names)
    yield from _linear(f"{mlp}.up_proj", "colwise", names.up, config.mlp_bias, config, names)
    down = (Source(names.down, ("mlp",)),)
    yield from _linear(f"{mlp}.down_proj", "rowwise", down, config.mlp_bias, config, names)
    if config.post_norms:
        yield from _layer_norm("attention_post_norm", names.attention_post_norm, config, names)
        yield from _layer_norm("mlp_post_norm", names.mlp_post_norm, config, names)


def _linear(
    target: str,
    style: Style,
    sources: tuple[Source, ...],
    bias: bool,
    config: DecoderConfig,
    names: Names,
) -> Iterator[Rule]:
    """A weight, and a bias that is split with the output or, after a reduce, held whole."""

    def stored(parameter: str, *, sections: bool = True) -> tuple[Source, ...]:
        return tuple(
            Source(f"{names.layer}.{s.name}.{parameter}", s.sections if sections else ())
            for s in sources
        )

    shape = (None, config.hidden_size) if style == "colwise" else (config.hidden_size, None)
    yield Rule(f"{target}.weight", style, shape, stored("weight"), transposed=names.transposed)
    if bias and style == "colwise":
        yield Rule(f"{target}.bias", style, (None,), stored("bias"))
    elif bias:
        whole = stored("bias", sections=False)
        yield Rule(f"{target}.bias", "replicate", (config.hidden_size,), whole)


def _layer_norm(target: str, source: str, config: DecoderConfig, names: Names) -> Iterator[Rule]:
    yield from _norm(f"layers.*.{target}", f"{names.layer}.{source}", config.hidden_size, config)


def _norm(target: str, source: str, size: int, config: DecoderConfig) -> Iterator[Rule]:
    for parameter in ("weight", "bias") if config.norm == "layer" else ("weight",):
        yield Rule(
            f"{target}.{parameter}", "replicate", (size,), (Source(f"{source}.{parameter}"),)
        )
