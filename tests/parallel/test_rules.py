"""Rules as data: what one says of shapes and layers, and that matching drops and guesses none."""

import pytest

from parallel.errors import IntegrityError
from parallel.rules import Rule, Source, check_strict, expand

EMBEDDING = Rule(
    "embed_tokens.weight",
    "embedding_rowwise",
    (None, 8),
    (Source("model.embed_tokens.weight", ("vocab",)),),
)
QKV = Rule(
    "layers.*.attention.qkv_proj.weight",
    "colwise",
    (None, 8),
    (
        Source("model.layers.*.q_proj.weight", ("query",)),
        Source("model.layers.*.k_proj.weight", ("kv",)),
        Source("model.layers.*.v_proj.weight", ("kv",)),
    ),
)
NORM = Rule("norm.weight", "replicate", (8,), (Source("model.norm.weight"),))
TIED_HEAD = Rule("lm_head.weight", "colwise", (None, 8), EMBEDDING.sources, tied=True)

RULES = expand([EMBEDDING, QKV, NORM, TIED_HEAD], num_layers=2)
NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}_proj.weight" for i in range(2) for part in "qkv"),
    "model.norm.weight",
]


def check(names: list[str], *, rules: list[Rule] = RULES, ignored: tuple[str, ...] = ()) -> None:
    check_strict(rules, names, ignored=ignored, where="/models/tiny")


def test_a_rule_for_layers_becomes_one_rule_a_layer() -> None:
    expanded = expand([NORM, QKV], num_layers=3)
    assert [rule.target for rule in expanded] == [
        "norm.weight",
        "layers.0.attention.qkv_proj.weight",
        "layers.1.attention.qkv_proj.weight",
        "layers.2.attention.qkv_proj.weight",
    ]
    assert [source.name for source in expanded[3].sources] == [
        "model.layers.2.q_proj.weight",
        "model.layers.2.k_proj.weight",
        "model.layers.2.v_proj.weight",
    ]
    assert all(rule.shape == QKV.shape and rule.style == QKV.style for rule in expanded[1:])


@pytest.mark.parametrize(
    ("style", "transposed", "sections", "stored"),
    [
        ("colwise", False, ("query",), (12, 8)),
        ("colwise", False, ("query", "kv", "kv"), (20, 8)),  # a fused QKV matrix
        ("colwise", True, ("query", "kv", "kv"), (8, 20)),  # the same as a Conv1D
        ("rowwise", False, ("query",), (8, 12)),
        ("rowwise", True, ("query",), (12, 8)),
    ],
)
def test_the_shape_a_source_must_have_in_the_file(
    style: str, transposed: bool, sections: tuple[str, ...], stored: tuple[int, int]
) -> None:
    source = Source("w", sections)
    shape = (8, None) if style == "rowwise" else (None, 8)
    rule = Rule("w", style, shape, (source,), transposed=transposed)  # type: ignore[arg-type]
    assert rule.stored_shape(source, {"query": 12, "kv": 4}) == stored


def test_each_source_of_a_merged_parameter_has_its_own_shape() -> None:
    shapes = [QKV.stored_shape(source, {"query": 12, "kv": 4}) for source in QKV.sources]
    assert shapes == [(12, 8), (4, 8), (4, 8)]


def test_a_bias_after_a_reduce_is_whole() -> None:
    rule = Rule("o_proj.bias", "replicate", (8,), (Source("o_proj.bias"),))
    assert rule.stored_shape(rule.sources[0], {}) == (8,)


def test_a_checkpoint_that_matches_is_accepted() -> None:
    check(NAMES)


def test_a_missing_tensor_is_named_with_the_nearest_there_is() -> None:
    misspelt = [name.replace("layers.1.k_proj", "layers.1.key_proj") for name in NAMES]
    with pytest.raises(IntegrityError) as caught:
        check(misspelt)
    assert str(caught.value) == (
        "/models/tiny: tensor model.layers.1.k_proj.weight is missing; "
        "layers.1.attention.qkv_proj.weight is made of it (the checkpoint has "
        "model.layers.1.key_proj.weight)"
    )


def test_an_empty_checkpoint_is_refused() -> None:
    with pytest.raises(IntegrityError, match=r"is missing; .* \(the checkpoint has no tensors\)$"):
        check([])


def test_an_unexpected_tensor_is_named_with_the_nearest_rule() -> None:
    with pytest.raises(IntegrityError) as caught:
        check([*NAMES, "model.layers.1.q_proj.bias"])
    assert str(caught.value) == (
        "/models/tiny: tensor model.layers.1.q_proj.bias is matched by no rule of this "
        "architecture (the nearest rule takes model.layers.1.q_proj.weight)"
    )


def test_a_layer_too_many_is_unexpected() -> None:
    """config.json says two layers, the checkpoint has three: nothing is dropped silently."""
    extra = [f"model.layers.2.{part}_proj.weight" for part in "qkv"]
    with pytest.raises(IntegrityError, match=r"tensor model\.layers\.2\.k_proj\.weight is matched"):
        check([*NAMES, *extra])


def test_ignored_patterns_are_for_tensors_that_hold_nothing() -> None:
    cached = "model.layers.0.rotary_emb.inv_freq"
    with pytest.raises(IntegrityError, match="inv_freq is matched by no rule"):
        check([*NAMES, cached])
    check([*NAMES, cached], ignored=("*.rotary_emb.inv_freq",))


def test_a_tensor_taken_twice_is_named_with_both_rules() -> None:
    second = Rule("final_norm.weight", "replicate", (8,), NORM.sources)
    with pytest.raises(IntegrityError) as caught:
        check(NAMES, rules=[*RULES, second])
    assert str(caught.value) == (
        "/models/tiny: tensor model.norm.weight is taken by two rules, norm.weight and "
        "final_norm.weight"
    )


def test_only_a_tied_rule_may_share_a_tensor() -> None:
    untied = Rule("lm_head.weight", "colwise", (None, 8), EMBEDDING.sources)
    with pytest.raises(IntegrityError, match="taken by two rules"):
        check(NAMES, rules=[*RULES[:-1], untied])
