"""A configuration file in the current directory."""

from pathlib import Path


def plan(text: str) -> Path:
    path = Path("plan.yaml")
    path.write_text(text, encoding="utf-8")
    return path
