"""From a family's names and a decoder's config to the `ModelLayout` that `parallel` divides.

The targets are the parameter names of `runner.models.decoder`.
"""

from collections.abc import Iterator

from parallel.layout import ModelLayout
from parallel.rules import Rule, Source
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
    yield from _layer_norm(f"{attention}.norm", names.attention_norm, config, names)
    yield from _column(f"{attention}.qkv_proj", names.qkv, config.qkv_bias, config, names)
    if config.qk_norm:
        for norm, source in (("q_norm", names.q_norm), ("k_norm", names.k_norm)):
            yield from _norm(
                f"{attention}.{norm}", f"{names.layer}.{source}", config.head_dim, config
            )
    o_proj, residual = Source(names.o_proj, ("query",)), "layers.*.attention_residual"
    yield from _row("layers.*.o_proj", residual, o_proj, config.o_bias, config, names)
    yield from _layer_norm(f"{mlp}.norm", names.mlp_norm, config, names)
    yield from _column(f"{mlp}.up_proj", names.up, config.mlp_bias, config, names)
    down_proj, residual = Source(names.down, ("mlp",)), "layers.*.mlp_residual"
    yield from _row(f"{mlp}.down_proj", residual, down_proj, config.mlp_bias, config, names)
    if config.post_norms:
        for residual, source in (
            ("attention_residual", names.attention_post_norm),
            ("mlp_residual", names.mlp_post_norm),
        ):
            yield from _layer_norm(f"layers.*.{residual}.norm", source, config, names)


def _column(
    target: str, sources: tuple[Source, ...], bias: bool, config: DecoderConfig, names: Names
) -> Iterator[Rule]:
    """A weight, and a bias that is split with its output."""

    def stored(parameter: str) -> tuple[Source, ...]:
        return tuple(Source(f"{names.layer}.{s.name}.{parameter}", s.sections) for s in sources)

    shape = (None, config.hidden_size)
    yield Rule(f"{target}.weight", "colwise", shape, stored("weight"), transposed=names.transposed)
    if bias:
        yield Rule(f"{target}.bias", "colwise", (None,), stored("bias"))


def _row(
    target: str, residual: str, source: Source, bias: bool, config: DecoderConfig, names: Names
) -> Iterator[Rule]:
    """A weight, and a bias that is added after the reduce, so it is held whole, by the residual."""
    stored, shape = f"{names.layer}.{source.name}", (config.hidden_size, None)
    weight = Source(f"{stored}.weight", source.sections)
    yield Rule(f"{target}.weight", "rowwise", shape, (weight,), transposed=names.transposed)
    if bias:
        whole = (Source(f"{stored}.bias"),)
        yield Rule(f"{residual}.bias", "replicate", (config.hidden_size,), whole)


def _layer_norm(target: str, source: str, config: DecoderConfig, names: Names) -> Iterator[Rule]:
    yield from _norm(target, f"{names.layer}.{source}", config.hidden_size, config)


def _norm(target: str, source: str, size: int, config: DecoderConfig) -> Iterator[Rule]:
    for parameter in ("weight", "bias") if config.norm == "layer" else ("weight",):
        yield Rule(
            f"{target}.{parameter}", "replicate", (size,), (Source(f"{source}.{parameter}"),)
        )
