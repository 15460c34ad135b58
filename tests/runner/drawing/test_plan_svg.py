"""The drawing of a plan: to scale, complete, standalone, and no text beyond where it stands."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from xml.etree import ElementTree as ET

import pytest
from sparse_checkpoint import LLAMA_70B, make_sparse_llama

from parallel.decoder_plan import DecoderPlan, DecoderRankPlan
from parallel.planner import Limits, make_plan
from parallel.topology import Topology
from runner.drawing.plan_svg import draw
from runner.models.spec import ModelSpec

SVG = "{http://www.w3.org/2000/svg}"
ADVANCE = 0.6  # of DejaVu Sans Mono and its like, in font sizes
TP_SIZES = [(1,), (8,), (2, 2), (1, 4, 2), (4, 1), (8,) * 8]

Box = tuple[float, float, float, float]
"""left, top, right, bottom"""


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[int, ...]], DecoderPlan]:
    """A plan of llama-70B by its tensor-parallel sizes."""
    spec = ModelSpec.open(make_sparse_llama(tmp_path_factory.mktemp("llama-70b"), LLAMA_70B))

    @cache
    def plan(tp_sizes: tuple[int, ...], stages: tuple[tuple[str, ...], ...] = ()) -> DecoderPlan:
        return make_plan(
            spec.layout,
            spec.checkpoint,
            Topology.of(tp_sizes, tuple(reversed(range(sum(tp_sizes))))),
            architecture="LlamaForCausalLM",
            dtype="bfloat16",
            limits=Limits(8192, max_num_seqs=32, max_num_batched_tokens=8192),
            stages=stages or None,
        )

    return plan


def cards(root: ET.Element) -> list[ET.Element]:
    return root.findall(f".//{SVG}g[@class='rank']")


def box(rect: ET.Element) -> Box:
    x, y, width, height = (float(rect.get(key, "nan")) for key in ("x", "y", "width", "height"))
    return x, y, x + width, y + height


def text_box(text: ET.Element) -> Box:
    size = float(text.get("font-size", "nan"))
    width = len(text.text or "") * size * ADVANCE
    x, y = float(text.get("x", "nan")), float(text.get("y", "nan"))
    left = {"start": x, "middle": x - width / 2, "end": x - width}[text.get("text-anchor", "")]
    return left, y - 0.8 * size, left + width, y + 0.25 * size


def is_within(inner: Box, outer: Box) -> bool:
    return all(inner[i] >= outer[i] and inner[i + 2] <= outer[i + 2] for i in (0, 1))


def overlap(one: Box, other: Box) -> bool:
    return all(one[i] < other[i + 2] and other[i] < one[i + 2] for i in (0, 1))


def texts(element: ET.Element) -> list[str]:
    return [text.text or "" for text in element.iter(f"{SVG}text")]


def part_bytes(plan: DecoderPlan, rank: DecoderRankPlan) -> list[int]:
    kv_bytes = rank.kv_bytes_per_token * plan.max_model_len
    return [rank.weight_bytes, rank.activation_bytes, kv_bytes]


@pytest.mark.parametrize("tp_sizes", TP_SIZES, ids=str)
def test_no_text_leaves_its_box_or_covers_another(
    planned: Callable[..., DecoderPlan], tp_sizes: tuple[int, ...]
) -> None:
    root = ET.fromstring(draw(planned(tp_sizes)))
    page = (0.0, 0.0, float(root.get("width", "nan")), float(root.get("height", "nan")))
    every = [text_box(text) for text in root.iter(f"{SVG}text")]
    assert all(is_within(text, page) for text in every)
    assert not any(overlap(one, other) for i, one in enumerate(every) for other in every[i + 1 :])
    for group in (*cards(root), *root.findall(f".//{SVG}g[@class='stage']")):
        outline = group.find(f"{SVG}rect")
        assert outline is not None
        assert is_within(box(outline), page)
        for text in group.findall(f"{SVG}text"):
            assert is_within(text_box(text), box(outline)), text.text


@pytest.mark.parametrize("tp_sizes", TP_SIZES, ids=str)
def test_bars_are_to_one_scale(
    planned: Callable[..., DecoderPlan], tp_sizes: tuple[int, ...]
) -> None:
    plan = planned(tp_sizes)
    drawn = cards(ET.fromstring(draw(plan)))
    assert len(drawn) == len(plan.ranks)
    scales, fullness = [], []
    for card, rank in zip(drawn, plan.ranks, strict=True):
        bars = [
            box(bar)
            for name in ("weights", "activations", "KV-cache")
            for bar in card.findall(f"{SVG}rect[@class='{name}']")
        ]
        widths = [right - left for left, _, right, _ in bars]
        scales += [w / b for w, b in zip(widths, part_bytes(plan, rank), strict=True)]
        for before, after in pairwise(bars):
            assert after[0] == pytest.approx(before[2], abs=0.01), "parts are stacked"
        track = card.findall(f"{SVG}rect")[1]
        fullness.append(sum(widths) / float(track.get("width", "nan")))
    assert max(fullness) == pytest.approx(1.0, rel=1e-3), "the longest fills its card"
    assert scales == pytest.approx([scales[0]] * len(scales), rel=1e-3)


def test_a_card_names_rank_device_heads_and_bytes(planned: Callable[..., DecoderPlan]) -> None:
    plan = planned((2, 2))
    card = cards(ET.fromstring(draw(plan)))[3]
    rank = plan.ranks[3]
    shown = texts(card)
    assert shown[0] == "rank 3, device 0"
    assert shown[1] == f"{sum(part_bytes(plan, rank)) / 1e9:.2f} GB"
    assert shown[2] == "heads 32..63, KV 4..7, MLP 14336..28671"
    assert shown[3] == f"{rank.weight_bytes / 1e9:.2f} GB"
    exact = card.find(f"{SVG}title")
    assert exact is not None
    assert f"weights {rank.weight_bytes:,} B" in (exact.text or "")


def test_a_stage_names_its_modules(planned: Callable[..., DecoderPlan]) -> None:
    root = ET.fromstring(draw(planned((4, 4))))
    stages = root.findall(f".//{SVG}g[@class='stage']")
    assert [" ".join(texts(stage)) for stage in stages] == [
        "stage 0: 4 ranks model.embed_tokens, model.layers.{0..40}",
        "stage 1: 4 ranks model.layers.{41..79}, model.norm, lm_head",
    ]
    assert "LlamaForCausalLM, bfloat16" in texts(root)


def test_stage_without_layers_shows_its_vocabulary(planned: Callable[..., DecoderPlan]) -> None:
    stages = (("model.embed_tokens", "model.layers.*"), ("model.norm", "lm_head"))
    root = ET.fromstring(draw(planned((1, 2), stages)))
    assert texts(cards(root)[2])[2] == "vocabulary 64128..128255"


@pytest.mark.parametrize("tp_sizes", TP_SIZES, ids=str)
def test_an_arrow_runs_from_each_carry_to_its_taker(
    planned: Callable[..., DecoderPlan], tp_sizes: tuple[int, ...]
) -> None:
    plan = planned(tp_sizes)
    root = ET.fromstring(draw(plan))
    outlines = [box(card[0]) for card in cards(root)]
    drawn = []
    for path in root.findall(f".//{SVG}path[@class='carry']"):
        numbers = [float(n) for n in re.findall(r"-?[\d.]+", path.get("d", ""))]
        ends = (numbers[0] - 5, numbers[1]), (numbers[-2] + 5, numbers[-1])
        drawn.append(tuple(_at(point, outlines) for point in ends))
    takers = range(tp_sizes[0], sum(tp_sizes))
    assert sorted(drawn) == sorted((plan.topology.carry_source(r), r) for r in takers)
    labels = [text for text in texts(root) if text == "16,384 B a token"]
    assert len(labels) == len(tp_sizes) - 1


def _at(point: tuple[float, float], outlines: list[Box]) -> int:
    """The card that a point lies on."""
    x, y = point
    (found,) = (i for i, (a, b, c, d) in enumerate(outlines) if a <= x <= c and b <= y <= d)
    return found


def test_it_is_standalone_on_white_with_a_legend(planned: Callable[..., DecoderPlan]) -> None:
    document = draw(planned((2, 2)))
    root = ET.fromstring(document)
    assert {element.tag for element in root.iter()} == {
        f"{SVG}{tag}" for tag in ("svg", "title", "defs", "marker", "path", "g", "rect", "text")
    }
    assert (
        re.findall(r"(?:https?:|url\(|href)[^\"]*", document.replace(SVG[1:-1], ""))
        == ["url(#arrowhead)"] * 2
    )
    ground = root.find(f"{SVG}rect")
    assert ground is not None
    assert ground.get("fill") == "#ffffff"
    assert ground.get("width") == root.get("width")
    labels = {"weights", "activations", "KV cache of one sequence of 8192 tokens"}
    assert labels <= set(texts(root))
    legend = [rect.get("fill") for rect in root.findall(f"{SVG}rect")[1:]]
    bars = cards(root)[0].findall(f"{SVG}rect[@class]")
    assert legend == [bar.get("fill") for bar in bars]
    assert len(set(legend)) == 3


def test_long_names_are_shortened(planned: Callable[..., DecoderPlan]) -> None:
    plan = planned((2, 2))
    stage = replace(plan.stages[0], modules=("a_module_with_a_long_name." * 20, "<&>"))
    changed = replace(plan, architecture="Architecture" * 20, stages=(stage, plan.stages[1]))
    root = ET.fromstring(draw(changed))
    page = (0.0, 0.0, float(root.get("width", "nan")), float(root.get("height", "nan")))
    assert all(is_within(text_box(text), page) for text in root.iter(f"{SVG}text"))
    panel = root.find(f"{SVG}g[@class='stage']")
    assert panel is not None
    shortened = [text for text in panel.findall(f"{SVG}text") if (text.text or "").endswith("...")]
    assert len(shortened) == 1
    assert is_within(text_box(shortened[0]), box(panel[0]))
    assert "<&>" in texts(panel)
