"""A plan of any kind as a drawing: stages from left to right, a card a rank, its bytes as a bar.

One standalone SVG with no script and no font of its own; the bars are to one scale. What is written
into it is `plan_svg` for a language model and `graph_plan_svg` for a tensor model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from parallel.fit import format_bytes
from parallel.plan import RankPlan, ShardPlan
from runner.drawing.plan_words import headline
from runner.drawing.svg_shapes import FONT, rect, text, width_of
from runner.drawing.words import plural

# Three of Okabe and Ito's colours, told apart with any kind of colour vision and in grey.
_COLOURS = ("#0072B2", "#E69F00", "#009E73")

_FAINT, _PANEL, _EDGE, _TRACK = "#57606a", "#f3f5f7", "#c4cad1", "#e9ecef"

_MARGIN, _PAD = 28, 12
_MIN_WIDTH, _MIN_PANEL, _MAX_SHARE = 860, 290, 380
_CARD_HEIGHT, _CARD_GAP, _BAR_HEIGHT = 96, 12, 22
_TOP, _LINE, _SHARE_SIZE = 118, 17, 11.5


@dataclass(frozen=True)
class Picture:
    """What is written into the drawing of a plan.

    Attributes:
        facts: the line under the title.
        parts: what a rank's bar is made of: its name in the drawing, and what the legend says.
        sizes: bytes of the parts, for each rank.
        shares: what each rank holds of its stage, in a line.
        modules: of each stage, filled into lines.
        carries: for each boundary the lines over its arrows.
        gap: width between two stages, in pixels.
    """

    plan: ShardPlan
    facts: str
    parts: tuple[tuple[str, str], ...]
    sizes: tuple[tuple[int, ...], ...]
    shares: tuple[str, ...]
    modules: tuple[tuple[str, ...], ...]
    carries: tuple[tuple[str, ...], ...]
    gap: int = 150


@dataclass(frozen=True)
class _Frame:
    """Where things stand, in pixels."""

    picture: Picture
    panel_width: float
    header_height: float

    @classmethod
    def around(cls, picture: Picture) -> "_Frame":
        stages = len(picture.modules)
        room = _MIN_WIDTH - 2 * _MARGIN - (stages - 1) * picture.gap
        longest = max(width_of(share, _SHARE_SIZE) for share in picture.shares)
        panel_width = max(_MIN_PANEL, min(longest + 1, _MAX_SHARE) + 4 * _PAD, room / stages)
        lines = [len(_filled(words, panel_width - 2 * _PAD)) for words in picture.modules]
        # The lines over an arrow end above the middle of a card.
        lines += [len(carries) - 3 for carries in picture.carries]
        return cls(picture, panel_width, 44 + _LINE * max(lines))

    @property
    def plan(self) -> ShardPlan:
        return self.picture.plan

    @property
    def width(self) -> float:
        stages = len(self.plan.stages)
        return 2 * _MARGIN + stages * self.panel_width + (stages - 1) * self.picture.gap

    @property
    def height(self) -> float:
        return _TOP + self.panel_height(max(self.plan.tp_sizes)) + _MARGIN

    @property
    def bar_width(self) -> float:
        return self.panel_width - 4 * _PAD

    def panel_height(self, tp_size: int) -> float:
        return self.header_height + tp_size * (_CARD_HEIGHT + _CARD_GAP)

    def panel_x(self, stage: int) -> float:
        return _MARGIN + stage * (self.panel_width + self.picture.gap)

    def card(self, rank: int) -> tuple[float, float]:
        """The top left corner of a rank's card."""
        here = self.plan.topology.coordinate(rank)
        y = _TOP + self.header_height + here.tp_rank * (_CARD_HEIGHT + _CARD_GAP)
        return self.panel_x(here.stage) + _PAD, y


def draw_picture(picture: Picture) -> str:
    """The SVG document."""
    frame, plan = _Frame.around(picture), picture.plan
    size = {"width": f"{frame.width:g}", "height": f"{frame.height:g}"}
    root = ET.Element(
        "svg",
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {frame.width:g} {frame.height:g}",
        role="img",
        attrib={"font-family": FONT, **size},
    )
    ET.SubElement(root, "title").text = headline(plan)
    _arrowhead(root)
    rect(root, 0, 0, frame.width, frame.height, fill="#ffffff")
    _title(root, frame)
    for index in range(len(plan.stages)):
        _stage(root, frame, index)
    longest = max(1, *(sum(sizes) for sizes in picture.sizes))
    for rank in plan.ranks:
        _rank(root, frame, rank, scale=frame.bar_width / longest)
    for index in range(1, len(plan.stages)):
        _carries(root, frame, index)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"


def facts_of(plan: ShardPlan, limit: str) -> str:
    """The line under the title.

    Args:
        limit: how much at a time.
    """
    sizes = f" ({' + '.join(map(str, plan.tp_sizes))})" if len(plan.stages) > 1 else ""
    return (
        f"{plural(len(plan.ranks), 'rank')}{sizes}, {limit}, weights "
        f"{format_bytes(sum(rank.weight_bytes for rank in plan.ranks))} in all, "
        f"plan {plan.digest()[:12]}"
    )


def _title(root: ET.Element, frame: _Frame) -> None:
    picture, width = frame.picture, frame.width - 2 * _MARGIN
    name = f"{picture.plan.architecture}, {picture.plan.dtype}"
    text(root, _MARGIN, 40, name, width, size=20, bold=True)
    text(root, _MARGIN, 64, picture.facts, width, size=13, fill=_FAINT)
    x = float(_MARGIN)
    for (_, label), colour in zip(picture.parts, _COLOURS, strict=False):
        rect(root, x, 82, 12, 12, fill=colour)
        text(root, x + 18, 93, label, width_of(label, 12.5), size=12.5)
        x += 18 + width_of(label, 12.5) + 24
    text(root, x, 93, "bars to one scale", frame.width - _MARGIN - x, size=12.5, fill=_FAINT)


def _stage(root: ET.Element, frame: _Frame, index: int) -> None:
    words, tp_size = frame.picture.modules[index], frame.plan.tp_sizes[index]
    x, width = frame.panel_x(index), frame.panel_width
    group = ET.SubElement(root, "g", attrib={"class": "stage"})
    rect(group, x, _TOP, width, frame.panel_height(tp_size), fill=_PANEL, rx="8")
    ET.SubElement(group, "title").text = ", ".join(words)
    inner = width - 2 * _PAD
    name = f"stage {index}: {plural(tp_size, 'rank')}"
    text(group, x + _PAD, _TOP + 24, name, inner, size=14, bold=True)
    for line, content in enumerate(_filled(words, inner)):
        text(group, x + _PAD, _TOP + 44 + line * _LINE, content, inner, size=12)


def _filled(words: Sequence[str], width: float) -> list[str]:
    """Words with commas between them, filled into lines of `width` pixels."""
    lines = [""]
    for word in words:
        longer = f"{lines[-1]}, {word}" if lines[-1] else word
        if lines[-1] and width_of(longer + ",", 12) > width:
            lines[-1] += ","
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _rank(root: ET.Element, frame: _Frame, rank: RankPlan, *, scale: float) -> None:
    x, y = frame.card(rank.rank)
    width, inner = frame.panel_width - 2 * _PAD, frame.bar_width
    picture, sizes = frame.picture, frame.picture.sizes[rank.rank]
    group = ET.SubElement(root, "g", attrib={"class": "rank"})
    rect(group, x, y, width, _CARD_HEIGHT, fill="#ffffff", stroke=_EDGE, rx="5")
    ET.SubElement(group, "title").text = ", ".join(
        f"{name} {size:,} B" for (name, _), size in zip(picture.parts, sizes, strict=True)
    )
    left = x + _PAD
    name = f"rank {rank.rank}, device {rank.device}"
    text(group, left, y + 20, name, inner * 0.65, size=13, bold=True)
    total = format_bytes(sum(sizes))
    text(group, left + inner, y + 20, total, inner * 0.35, size=13, anchor="end")
    text(group, left, y + 37, picture.shares[rank.rank], inner, size=_SHARE_SIZE, fill=_FAINT)
    _bar(group, left, y + 46, picture, sizes, scale, inner)
    step = min(inner / 3, 120)
    for place, (size, colour) in enumerate(zip(sizes, _COLOURS, strict=False)):
        at = left + place * step
        rect(group, at, y + 77, 8, 8, fill=colour)
        text(group, at + 12, y + 85, format_bytes(size), step - 12, size=11)


def _bar(
    group: ET.Element,
    x: float,
    y: float,
    picture: Picture,
    sizes: Sequence[int],
    scale: float,
    width: float,
) -> None:
    rect(group, x, y, width, _BAR_HEIGHT, fill=_TRACK)
    for size, (name, _), colour in zip(sizes, picture.parts, _COLOURS, strict=False):
        part = rect(group, x, y, size * scale, _BAR_HEIGHT, fill=colour)
        part.set("class", name.replace(" ", "-"))
        x += size * scale


def _carries(root: ET.Element, frame: _Frame, stage: int) -> None:
    """The arrows into a stage, and over them what they carry."""
    plan, gap = frame.plan, frame.picture.gap
    for line, content in enumerate(frame.picture.carries[stage - 1]):
        y = _TOP + 24 + line * _LINE
        middle = frame.panel_x(stage) - gap / 2
        text(root, middle, y, content, gap - 12, size=11.5, anchor="middle")
    half = _CARD_HEIGHT / 2
    for target in plan.topology.ranks(stage):
        source = plan.topology.carry_source(target)
        assert source is not None, "only the first stage takes no carry"
        (from_x, from_y), (to_x, to_y) = frame.card(source), frame.card(target)
        start_x, end_x = from_x + frame.panel_width - 2 * _PAD + 2, to_x - 4
        bend = gap / 2 + _PAD
        curve = (
            f"M {start_x:g} {from_y + half:g} C {start_x + bend:g} {from_y + half:g} "
            f"{end_x - bend:g} {to_y + half:g} {end_x:g} {to_y + half:g}"
        )
        attributes = {"stroke-width": "1.5", "marker-end": "url(#arrowhead)", "class": "carry"}
        ET.SubElement(root, "path", d=curve, fill="none", stroke=_FAINT, attrib=attributes)


def _arrowhead(root: ET.Element) -> None:
    marker = ET.SubElement(
        ET.SubElement(root, "defs"),
        "marker",
        id="arrowhead",
        viewBox="0 0 8 8",
        refX="7",
        refY="4",
        orient="auto",
        attrib={"markerWidth": "7", "markerHeight": "7"},
    )
    ET.SubElement(marker, "path", d="M 0 0 L 8 4 L 0 8 z", fill=_FAINT)
