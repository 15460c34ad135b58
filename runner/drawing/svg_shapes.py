"""Rectangles and text of an SVG, the text shortened to the width that it has.

Text is set in a monospaced font, whose width is known without measuring.
"""

from xml.etree import ElementTree as ET

FONT = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"
ADVANCE = 0.605
"""Width of a character, in font sizes; none of the fonts above is wider."""

INK = "#1b1f24"


def rect(
    parent: ET.Element, x: float, y: float, width: float, height: float, **style: str
) -> ET.Element:
    place = {"x": x, "y": y, "width": width, "height": height}
    return ET.SubElement(parent, "rect", {k: f"{v:.6g}" for k, v in place.items()} | style)


def text(
    parent: ET.Element,
    x: float,
    y: float,
    content: str,
    width: float,
    *,
    size: float,
    bold: bool = False,
    fill: str = INK,
    anchor: str = "start",
) -> None:
    """Text with its baseline at y, shortened to `width` pixels."""
    room = max(int(width / (size * ADVANCE) + 1e-6), 1)
    shown = content if len(content) <= room else content[: max(room - 3, 0)] + "..."
    style = {"font-size": f"{size:g}", "text-anchor": anchor, "fill": fill}
    if bold:
        style["font-weight"] = "bold"
    ET.SubElement(parent, "text", {"x": f"{x:.6g}", "y": f"{y:.6g}"} | style).text = shown


def width_of(content: str, size: float) -> float:
    return len(content) * size * ADVANCE
