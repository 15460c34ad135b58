"""Configurations: a file in the current directory, and what a factory in a folder needs."""

from pathlib import Path
from typing import Any


def plan(text: str) -> Path:
    path = Path("plan.yaml")
    path.write_text(text, encoding="utf-8")
    return path


def factory_plan(folder: Path, factory: str, given: dict[str, Any], **model: Any) -> dict[str, Any]:
    """The values of a plan whose model a module in `folder` makes, with random weights.

    Args:
        given: its input.
        model: more keys of that section.
    """
    return {
        "version": 1,
        "model": {
            "path": str(folder),
            "factory": factory,
            "factory_path": str(folder),
            "load_format": "dummy",
            "inputs": [given],
            **model,
        },
        "security": {"factories": [factory]},
    }
