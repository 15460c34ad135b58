"""Aligned columns of plain text, as wide as they need to be: never wrapped, never cut."""

from collections.abc import Sequence


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned lines under a line of titles; a title that ends with `>` is of a column of numbers,
    aligned on the right.
    """
    titles = [column.removesuffix(">") for column in columns]
    grid = [titles, *rows]
    widths = [max(len(row[index]) for row in grid) for index in range(len(columns))]
    return [
        "  ".join(
            text.rjust(width) if column.endswith(">") else text.ljust(width)
            for text, width, column in zip(row, widths, columns, strict=True)
        ).rstrip()
        for row in grid
    ]
