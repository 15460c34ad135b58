"""What the tests of several scripts share."""

from pathlib import Path

import pytest
from key_pairs import make_keys


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A private and a public one."""
    return make_keys(tmp_path)
