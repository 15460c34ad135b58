"""Words that texts of all kinds share; imports nothing, so that a command may use it at once."""


def plural(count: int, noun: str) -> str:
    """A count with its noun: `1 rank`, `8 ranks`, `2 batches`."""
    ending = "" if count == 1 else "es" if noun.endswith("ch") else "s"
    return f"{count:,} {noun}{ending}"
