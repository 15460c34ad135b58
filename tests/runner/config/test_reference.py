"""The page that is made from the schema: it is up to date, complete, and its example loads."""

import re
from pathlib import Path

import pytest

from runner.config.fields import walk
from runner.config.load import load
from runner.config.reference import EXAMPLE, TENSOR_EXAMPLE, markdown
from runner.config.schema import RunnerConfig

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(), "run scripts/docs-config"


def test_every_key_is_on_the_page_in_its_section() -> None:
    sections = re.split(r"^## `?([^`\n]*)`?$", markdown(), flags=re.MULTILINE)[1:]
    tables = dict(zip(sections[::2], sections[1::2], strict=True))
    for *above, name in walk(RunnerConfig):
        lists = {"stages": "stages[]", "inputs": "inputs[]"}
        heading = ".".join(lists.get(part, part) for part in above) or "Top level"
        assert f"\n| `{name}` | " in tables[heading]


def test_limits_and_defaults_are_in_words() -> None:
    page = markdown()
    assert "| `gpu_memory_utilization` | number > 0, <= 1 | `0.9` | Fraction" in page
    assert "| `max_model_len` | whole number >= 1 or `null` | `null` | Most" in page
    assert "| `path` | text | required | Local" in page
    assert "| `overlap` | number >= 0, < 1 | `0.25` | Share" in page
    assert "| `roi_size` | list of 2 to 3 (whole number >= 1) | required | Size" in page
    assert "| `factory_args` | mapping of names (any value) | `{}` | Keyword" in page
    assert "| `dims` | mapping of names (list (whole number >= 1)) | `{}` | Sizes" in page
    assert "| `tp_plan` | mapping of names (text) or `null` | `null` | How" in page
    assert "| `tiling` | section or `null` | `null` | see below |" in page
    assert "| `devices` | list (whole number >= 0) or `null` | `null` | Device" in page


def test_the_example_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("llama-3-70b-instruct").mkdir()
    Path("plan.yaml").write_text(EXAMPLE, encoding="utf-8")
    assert load(Path("plan.yaml")).config.parallel.tensor_parallel_sizes == [4, 4]


def test_the_example_of_a_tensor_model_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("segmenter.safetensors").touch()
    Path("plan.yaml").write_text(TENSOR_EXAMPLE, encoding="utf-8")
    assert TENSOR_EXAMPLE in markdown()
    config = load(Path("plan.yaml")).config
    assert config.model.kind == "graph"
    assert config.model.factory in config.security.factories
    assert config.parallel.tensor_parallel_sizes == [2, 2]
