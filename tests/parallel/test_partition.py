"""Cuts into stages: by cost they are the best there is, by hand they are checked."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.errors import ConfigError
from parallel.partition import Cut, Unit, cut_by_cost, cut_by_patterns


def layer_units(costs: list[int]) -> list[Unit]:
    return [Unit(f"model.layers.{i}", f"layers.{i}", cost) for i, cost in enumerate(costs)]


def decoder_units(num_layers: int, *, layer: int, norm: int, head: int) -> list[Unit]:
    return [
        Unit("model.embed_tokens", "embed_tokens", 0),
        *layer_units([layer] * num_layers),
        Unit("model.norm", "norm", norm),
        Unit("lm_head", "lm_head", head),
    ]


# Zeros are embeddings; the largest cost may be a head that outweighs several layers.
COSTS = st.lists(st.integers(0, 20), min_size=1, max_size=9).filter(any)


def slowest(cut: Cut, tp_sizes: list[int]) -> float:
    return max(sum(u.cost for u in stage) / tp for stage, tp in zip(cut, tp_sizes, strict=True))


def brute_force(units: list[Unit], tp_sizes: list[int]) -> float:
    """The time of the best cut, found by trying all that give every stage something to read."""
    times = []
    for inner in combinations(range(1, len(units)), len(tp_sizes) - 1):
        stages = tuple(tuple(units[a:b]) for a, b in pairwise([0, *inner, len(units)]))
        if all(sum(unit.cost for unit in stage) for stage in stages):
            times.append(slowest(stages, tp_sizes))
    return min(times)


def layers_of(cut: Cut) -> list[int]:
    return [sum(unit.module.startswith("layers.") for unit in stage) for stage in cut]


@settings(deadline=None, max_examples=200)
@given(data=st.data(), costs=COSTS)
def test_cut_by_cost_is_the_best_cut_there_is(data: st.DataObject, costs: list[int]) -> None:
    costly = sum(cost > 0 for cost in costs)
    num_stages = data.draw(st.integers(1, min(4, costly)))
    tp_sizes = data.draw(st.lists(st.integers(1, 8), min_size=num_stages, max_size=num_stages))
    units = layer_units(costs)
    cut = cut_by_cost(units, tp_sizes)
    assert [unit for stage in cut for unit in stage] == units
    assert all(sum(unit.cost for unit in stage) > 0 for stage in cut)
    assert slowest(cut, tp_sizes) == brute_force(units, tp_sizes)


def test_llama_70b_over_two_equal_stages() -> None:
    """The head weighs as much as 1.2 layers, so the last stage gets 39 layers and not 40."""
    layer_bytes = 2 * (8192 * (8192 + 2 * 1024 + 8192 + 3 * 28672) + 2 * 8192)
    head_bytes = 2 * 128256 * 8192
    units = decoder_units(80, layer=layer_bytes, norm=2 * 8192, head=head_bytes)
    cut = cut_by_cost(units, [4, 4])
    assert layers_of(cut) == [41, 39]
    assert [unit.name for unit in cut[1][-2:]] == ["model.norm", "lm_head"]


def test_a_wider_stage_gets_more_layers() -> None:
    assert layers_of(cut_by_cost(decoder_units(9, layer=10, norm=0, head=0), [2, 1])) == [6, 3]


def test_more_stages_than_modules_are_refused() -> None:
    """An embedding reads nothing, so it is no stage of its own."""
    with pytest.raises(ConfigError) as caught:
        cut_by_cost(decoder_units(2, layer=10, norm=1, head=5), [1] * 5)
    assert str(caught.value) == (
        "pipeline_parallel_size=5 exceeds the 4 modules that can be a stage; use 1 to 4"
    )


UNITS = decoder_units(4, layer=10, norm=1, head=12)
"""model.embed_tokens, model.layers.0 to model.layers.3, model.norm, lm_head"""


def names(cut: Cut) -> list[list[str]]:
    return [[unit.name for unit in stage] for stage in cut]


def test_a_cut_by_hand_names_modules_and_ranges_of_layers() -> None:
    cut = cut_by_patterns(
        UNITS,
        [
            ["model.embed_tokens", "model.layers.{0..2}"],
            ["model.layers.3", "model.norm", "lm_head"],
        ],
    )
    layers = [f"model.layers.{i}" for i in range(4)]
    assert names(cut) == [["model.embed_tokens", *layers[:3]], [layers[3], "model.norm", "lm_head"]]


def test_a_star_stands_for_one_segment_of_a_name() -> None:
    """`model.*` is the embedding and the norm, not a layer; `*` is the head alone."""
    cut = cut_by_patterns(UNITS, [["model.*", "model.layers.*"], ["*"]])
    assert names(cut) == [[unit.name for unit in UNITS[:-1]], ["lm_head"]]


def test_the_patterns_of_one_stage_may_stand_in_any_order() -> None:
    cut = cut_by_patterns(
        UNITS, [["lm_head", "model.layers.*", "model.norm", "model.embed_tokens"]]
    )
    assert cut == (tuple(UNITS),)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        pytest.param(
            [["model.embed_tokens", "model.layers.{0..2}"], ["model.layers.{2..3}", "*"]],
            "module model.layers.2 is in stage 0 and again in stage 1 (model.layers.{2..3}); list "
            "it once",
            id="twice",
        ),
        pytest.param(
            [["model.*", "model.layers.*", "model.layers.3"], ["lm_head"]],
            "module model.layers.3 is in stage 0 and again in stage 0 (model.layers.3); list it "
            "once",
            id="twice in one stage",
        ),
        pytest.param(
            [["model.embed_tokens", "model.layers.{0..1}"], ["model.layers.3", "model.norm", "*"]],
            "module model.layers.2 is in no stage; add it to one",
            id="left out",
        ),
        pytest.param(
            [["model.layers.{0..1}"], ["model.*", "model.layers.{2..3}", "lm_head"]],
            "model.layers.0 runs after model.embed_tokens but is in stage 0, before stage 1; a "
            "stage is a contiguous run of modules in the model's order",
            id="out of order",
        ),
        pytest.param(
            [["model.embed_tokens", "model.layer.{0..1}"], ["model.layers.{2..3}", "*"]],
            "'model.layer.{0..1}' of stage 0 matches no module; the modules run from "
            "model.embed_tokens to lm_head, the nearest is model.layers.1",
            id="misspelt",
        ),
        pytest.param(
            [["model.embed_tokens", "model.layers.*"], ["model.layers.{4..7}", "*"]],
            "'model.layers.{4..7}' of stage 1 matches no module; the modules run from "
            "model.embed_tokens to lm_head, the nearest is model.layers.3",
            id="beyond the last layer",
        ),
        pytest.param(
            [["model.embed_tokens", "model.layers.{0..1}"], ["model.layers.{2..7}", "*", "*.*"]],
            "'model.layers.{2..7}' of stage 1 goes beyond model.layers.3, the last module of that "
            "name; end the range there",
            id="partly beyond the last layer",
        ),
    ],
)
def test_a_cut_that_cannot_be_is_refused(stages: list[list[str]], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cut_by_patterns(UNITS, stages)
    assert str(caught.value) == f"parallel.stages: {message}"


@settings(deadline=None)
@given(data=st.data(), num_layers=st.integers(1, 12))
def test_every_module_is_in_exactly_one_stage(data: st.DataObject, num_layers: int) -> None:
    """Any way of writing the model's row of modules down, cut anywhere, gives that cut."""
    units = decoder_units(num_layers, layer=10, norm=1, head=12)
    inner = st.integers(1, len(units) - 1)
    points = sorted(data.draw(st.sets(inner, max_size=3)))
    expected = tuple(tuple(units[a:b]) for a, b in pairwise([0, *points, len(units)]))
    stages = [data.draw(st.permutations([u.name for u in stage])) for stage in expected]
    assert cut_by_patterns(units, stages) == expected
