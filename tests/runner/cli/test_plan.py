"""`plan` as a user calls it: what it prints, refuses and writes, with no GPU and no torch."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from sparse_checkpoint import LLAMA_70B, make_sparse_llama
from stand_in_driver import build_driver
from typer.testing import CliRunner, Result

from parallel.errors import ConfigError, DoesNotFitError
from parallel.fit import format_bytes
from parallel.partition import Unit, cut_by_patterns
from runner.cli.app import app
from runner.drawing.plan_words import condense

ROOT = Path(__file__).parents[3]
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture(scope="module")
def llama(checkpoint: Callable[[str], Path]) -> Path:
    """6 query heads, 3 KV heads, 3 layers, 131 tokens in the vocabulary."""
    return checkpoint("llama")


@pytest.fixture(scope="module")
def llama_70b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sparse_llama(tmp_path_factory.mktemp("llama-70b"), LLAMA_70B)


def invoke(model: Path, *args: object) -> Result:
    """On a CPU, so that the host's own GPUs change nothing."""
    command = ["plan", "--model", model, "--device", "cpu", *args]
    return CliRunner().invoke(app, [str(arg) for arg in command])


def text_of(model: Path, *args: object) -> str:
    result = invoke(model, *args)
    assert result.exception is None, result.exception
    return result.stdout


def json_of(model: Path, *args: object) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(text_of(model, "--json", *args))
    return values


def refusal(model: Path, *args: object) -> str:
    result = invoke(model, *args)
    assert isinstance(result.exception, ConfigError), result.stdout
    assert "\n" not in str(result.exception)
    return str(result.exception)


def rows_below(text: str, title: str) -> list[dict[str, str]]:
    """The rows of the first table that has such a column, as {title: cell}."""
    lines = text.splitlines()
    titles = [re.split(r" {2,}", line.strip()) for line in lines]
    start = next(i for i, cells in enumerate(titles) if title in cells and len(cells) > 4)
    table = lines[start : lines.index("", start)]
    grid = [re.split(r" {2,}", line.strip()) for line in table]
    return [dict(zip(grid[0], row, strict=False)) for row in grid[1:]]


def test_a_line_a_rank_says_what_it_holds(llama: Path) -> None:
    text = text_of(llama, "-tp", 2, "-pp", 2)
    digest = json_of(llama, "-tp", 2, "-pp", 2)["digest"]
    first = text.splitlines()[0]
    for fact in ("LlamaForCausalLM", "float32", "2 stages", "4 ranks", "len 128", digest[:12]):
        assert fact in first
    rows = rows_below(text, "modules")
    assert [(r["rank"], r["stage"], r["tp rank"], r["device"]) for r in rows] == [
        ("0", "0", "0", "0"),
        ("1", "0", "1", "1"),
        ("2", "1", "0", "2"),
        ("3", "1", "1", "3"),
    ]
    assert [(r["query heads"], r["KV heads"]) for r in rows[:2]] == [
        ("0..3", "0..1"),
        ("4..5", "2"),
    ]
    assert [r["vocabulary rows"] for r in rows[:2]] == ["0..65", "66..130"]
    assert rows[0]["modules"] == "model.embed_tokens, model.layers.{0..1}"
    assert rows[3]["modules"] == "model.layers.2, model.norm, lm_head"
    assert rows[0]["KV a token"] == "256 B", "2 layers x 2 heads x 8 values x 4 B, twice"


def test_numbers_of_the_table_are_those_of_the_plan(llama_70b: Path) -> None:
    text = text_of(llama_70b, "-tp", 4, "-pp", 2)
    ranks = json_of(llama_70b, "-tp", 4, "-pp", 2)["plan"]["ranks"]
    for row, rank in zip(rows_below(text, "modules"), ranks, strict=True):
        assert row["weights"] == f"{rank['weight_bytes'] / 1e9:.2f} GB"
        assert row["activations"] == format_bytes(rank["activation_bytes"])
        assert row["KV a token"] == f"{rank['kv_bytes_per_token']:,} B"
    assert "weights 141.12 GB in all" in text
    assert "one sequence of 8192 tokens takes 343.9 MB on rank 0" in text  # 41,984 B a token


def test_columns_are_aligned_and_lines_are_not_wrapped(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = text_of(llama, "-tp", 2, "-pp", 2)
    monkeypatch.setenv("COLUMNS", "20")
    assert text_of(llama, "-tp", 2, "-pp", 2) == text
    lines = text.splitlines()
    table = lines[2 : lines.index("", 2)]
    starts = [re.search(r"model\.|modules", line) for line in table]
    assert len({start.start() for start in starts if start}) == 1
    assert len({len(line) for line in table}) == 1, "the last column is aligned on the right"


def test_replicated_kv_heads_are_marked(llama: Path) -> None:
    text = text_of(llama, "-tp", 4)
    assert [row["KV heads"] for row in rows_below(text, "modules")] == ["0", "1", "2*", "2*"]
    assert "its 4 ranks hold 4 copies of 3 KV heads" in text
    assert "copies" not in text_of(llama, "-tp", 3)


def test_carries_say_who_takes_them_from_whom(llama: Path, tmp_path: Path) -> None:
    plan = {
        "version": 1,
        "model": {"path": str(llama)},
        "parallel": {"stages": [{"tensor_parallel_size": 2}, {"tensor_parallel_size": 3}]},
    }
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(plan))
    text = CliRunner().invoke(app, ["plan", "--config", str(file), "--device", "cpu"]).stdout
    assert "stage 0 -> 1: hidden_states (num_tokens, 48) float32, 192 B a token" in text
    assert "ranks 0 -> 2, 1 -> 3, 0 -> 4" in text
    assert "waits 50 % of the time" in text
    assert "Between" not in text_of(llama, "-tp", 2)


def test_modules_are_printed_as_the_yaml_takes_them() -> None:
    names = ["wte", *(f"h.{index}" for index in range(12)), "norm", "head"]
    units = [Unit(name, name, 1) for name in names]
    cuts = [names[:1], names[1:2], names[2:11], names[11:]]
    patterns = [condense(cut) for cut in cuts]
    assert patterns == [["wte"], ["h.0"], ["h.{1..9}"], ["h.{10..11}", "norm", "head"]]
    assert condense(["h.0", "h.2", "g.3"]) == ["h.0", "h.2", "g.3"]
    assert [[unit.name for unit in cut] for cut in cut_by_patterns(units, patterns)] == cuts


def test_rank_lists_each_tensor_and_its_slices(llama: Path) -> None:
    text = text_of(llama, "-tp", 2, "--rank", 1)
    listed = rows_below(text, "tensor")
    (plan_rank,) = (r for r in json_of(llama, "-tp", 2)["plan"]["ranks"] if r["rank"] == 1)
    assert {row["tensor"] for row in listed} >= {t["name"] for t in plan_rank["tensors"]}
    assert re.search(
        r"^layers\.2\.attention\.qkv_proj\.weight +\(32, 48\) +"
        r"model\.layers\.2\.self_attn\.q_proj\.weight +0  \[32:48\)\n"
        r" +model\.layers\.2\.self_attn\.k_proj\.weight +0  \[16:24\)\n"
        r" +model\.layers\.2\.self_attn\.v_proj\.weight +0  \[16:24\)$",
        text,
        re.MULTILINE,
    )
    assert re.search(r"^norm\.weight +\(48,\) +model\.norm\.weight +-  whole$", text, re.MULTILINE)
    assert re.search(r"\(66, 48\) +lm_head\.weight +0  \[66:131\)\n +\(padding\) +0  1 of z", text)
    order = [text.index(f"\n{name}") for name in ("embed_", "layers.0.", "layers.2.", "lm_head.")]
    assert order == sorted(order)


def test_a_matrix_that_is_stored_transposed_says_so(checkpoint: Callable[[str], Path]) -> None:
    text = text_of(checkpoint("gpt2"), "--rank", 0)
    assert re.search(r"h\.0\.mlp\.c_fc\.weight +1  \[0:95\)  stored transposed", text)
    assert "wte.weight" in text


@pytest.mark.parametrize("rank", [-1, 2, 99])
def test_a_rank_that_is_not_there_is_refused(llama: Path, rank: int) -> None:
    assert "the plan has 2 ranks" in refusal(llama, "-tp", 2, "--rank", rank)


def test_memory_given_is_judged_rank_by_rank(llama_70b: Path) -> None:
    text = text_of(llama_70b, "-tp", 4, "-pp", 2, "--gpu-memory-gb", 80)
    assert "80.00 GB (given); 72.00 GB of it may be used" in text
    rows = rows_below(text, "verdict")
    assert [row["verdict"] for row in rows] == ["fits"] * 8
    fit = json_of(llama_70b, "-tp", 4, "-pp", 2, "--gpu-memory-gb", 80)["fit"]
    assert fit["fits"] is True
    assert fit["usable_bytes"] == 72 * 10**9
    assert f"{fit['kv_tokens']:,} tokens, {fit['num_sequences']} sequences of 8192" in text


def test_what_does_not_fit_is_printed_and_then_refused(llama_70b: Path, tmp_path: Path) -> None:
    svg = tmp_path / "plan.svg"
    result = invoke(llama_70b, "-tp", 2, "--gpu-memory-gb", 80, "--svg", svg)
    assert isinstance(result.exception, DoesNotFitError)
    assert [row["rank"] for row in rows_below(result.stdout, "modules")] == ["0", "1"]
    assert result.stdout.count("does not fit") == 2
    message = str(result.exception)
    assert "rank 0 (stage 0, tp rank 0) needs 74.01 GB" in message
    assert "72.00 GB may be used" in message
    assert "\n" not in message
    assert svg.exists(), "a plan that does not fit is what one wants to look at"


def test_without_a_gpu_nothing_is_judged(llama: Path) -> None:
    text = text_of(llama)
    assert "Memory is not judged: parallel.device is cpu" in text
    assert json_of(llama)["fit"] is None


def test_auto_prints_candidates_a_reason_and_yaml_that_gives_the_same_plan(
    llama_70b: Path, tmp_path: Path
) -> None:
    text = text_of(llama_70b, "--auto", "--gpus", 8, "--gpu-memory-gb", 80)
    rows = rows_below(text, "tp")
    assert len(rows) == 20
    times = [float(row["est. ms a token"]) for row in rows]
    assert times == sorted(times)
    assert [row["fits"] for row in rows if row["ranks"] == "1"] == ["no"]
    assert "Chosen: tensor_parallel_size=8, pipeline_parallel_size=1; it fits" in text
    assert "4.3 TB/s, 10 us" in text
    written = re.search(r"^parallel:\n(?:  .+\n)+", text, re.MULTILINE)
    assert written
    file = tmp_path / "plan.yaml"
    file.write_text(f"version: 1\nmodel: {{path: {llama_70b}}}\n{written[0]}")
    again = CliRunner().invoke(app, ["plan", "--config", str(file), "--device", "cpu"]).stdout
    headline = again.splitlines()[0]
    assert "8 ranks" in headline
    assert headline in text.splitlines()


def test_auto_that_finds_nothing_names_the_closest(llama_70b: Path) -> None:
    result = invoke(llama_70b, "--auto", "--gpus", 2, "--gpu-memory-gb", 80)
    assert isinstance(result.exception, DoesNotFitError)
    assert len(rows_below(result.stdout, "tp")) == 3
    assert "tensor_parallel_size=2, pipeline_parallel_size=1: rank 0" in str(result.exception)


def test_auto_says_which_flags_it_needs(llama: Path) -> None:
    assert "--auto needs --gpus and --gpu-memory-gb" in refusal(llama, "--auto")
    assert "--auto needs --gpus here" in refusal(llama, "--auto", "--gpu-memory-gb", 80)
    assert "--auto needs --gpu-memory-gb here" in refusal(llama, "--auto", "--gpus", 2)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["-tp", 2], "parallel.tensor_parallel_size is given (--tensor-parallel-size)"),
        (["--set", "parallel.pipeline_parallel_size=1"], "pipeline_parallel_size is given (--set)"),
        (["--set", "parallel.stages=[{tensor_parallel_size: 1}]"], "stages is given (--set)"),
        (["--set", "parallel.stages=[{}]"], "parallel.stages is given"),
    ],
)
def test_auto_refuses_sizes_that_are_given(llama: Path, given: list[object], named: str) -> None:
    assert named in refusal(llama, "--auto", "--gpus", 2, "--gpu-memory-gb", 1, *given)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--gpus", 2], "--gpus counts only with --auto"),
        (["--json", "--rank", 0], "--rank is for text"),
        (["--gpu-memory-gb", "nan"], "--gpu-memory-gb=nan"),
        (["--gpu-memory-gb", 0], "--gpu-memory-gb=0"),
        (["--gpu-memory-gb", "inf"], "--gpu-memory-gb=inf"),
        (["--svg", "/nowhere/plan.svg"], "--svg /nowhere/plan.svg: No such file or directory"),
        (["-tp", 7], "use 1 to 6"),
    ],
)
def test_mistakes_are_one_clear_line(llama: Path, args: list[object], words: str) -> None:
    assert words in refusal(llama, *args)


def test_json_holds_everything(llama: Path) -> None:
    values = json_of(llama, "--auto", "--gpus", 4, "--gpu-memory-gb", 1, "--show-config")
    assert list(values) == ["plan", "digest", "fit", "candidates", "config"]
    (chosen,) = (c for c in values["candidates"] if c["chosen"])
    assert [chosen["tensor_parallel_size"]] * chosen["pipeline_parallel_size"] == (
        values["plan"]["tp_sizes"]
    )
    config = values["config"]
    assert config["origins"]["parallel.tensor_parallel_size"] == "--auto"
    size = config["config"]["parallel"]["tensor_parallel_size"]
    assert size == chosen["tensor_parallel_size"]
    plain = json_of(llama)
    assert plain["candidates"] is None
    assert plain["config"] is None


def test_show_config_comes_first(llama: Path) -> None:
    text = text_of(llama, "-tp", 2, "--show-config")
    line = next(x for x in text.splitlines() if x.startswith("parallel.tensor_parallel_size"))
    assert line.split() == ["parallel.tensor_parallel_size", "2", "--tensor-parallel-size"]
    assert text.index("parallel.tensor_parallel_size") < text.index("LlamaForCausalLM")


def run(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "runner", "plan", *map(str, args)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_nothing_imports_torch_and_no_weight_is_read(llama_70b: Path, tmp_path: Path) -> None:
    """The checkpoint claims 141 GB, more than could be read within the time limit."""
    svg = tmp_path / "plan.svg"
    done = run(
        "--model", llama_70b, "--auto", "--gpus", 2, "--gpu-memory-gb", 160, "--device", "cpu",
        "--show-config", "--svg", svg,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-300:]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"parallel.autoplan", "runner.drawing.plan_svg"} <= imported
    heavy = {"torch", "transformers", "tokenizers", "rich", "jinja2"}
    assert not heavy & {name.partition(".")[0] for name in imported}
    assert svg.read_text().startswith("<svg")


def test_exit_codes(llama_70b: Path) -> None:
    small = ("--model", llama_70b, "--gpu-memory-gb", 80)
    too_small = run(*small)
    assert too_small.returncode == 6
    assert too_small.stderr.splitlines()[-1].startswith("shardline: the plan does not fit: rank 0")
    assert run(*small, "--rank", 5).returncode == 2


# A driver library for pynvml to load: GPU 0 has 80 GB, GPU 1 has 40 GB.
DRIVER_SOURCE = r"""
typedef void *Gpu;
typedef struct { unsigned long long total, free, used; } Memory;
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, Gpu *gpu) {
    *gpu = (Gpu)(long)(index + 1);
    return 0;
}
int nvmlDeviceGetMemoryInfo(Gpu gpu, Memory *memory) {
    memory->total = (long)gpu == 1 ? 80000000000 : 40000000000;
    memory->free = memory->used = 0;
    return 0;
}
"""


@pytest.fixture(scope="module")
def driver_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_driver(tmp_path_factory.mktemp("driver"), DRIVER_SOURCE)


@needs_compiler
def test_gpus_that_are_found_are_counted_and_the_smallest_judged(
    llama: Path, driver_dir: Path
) -> None:
    environment = {"LD_LIBRARY_PATH": str(driver_dir)}
    auto = run("--model", llama, "--auto", **environment).stdout
    assert "Sizes for up to 2 GPUs" in auto
    assert "Memory of a GPU: 40.00 GB (the smallest of 2 found here)" in auto
    larger = run("--model", llama, "-tp", 3, **environment).stdout
    assert "The plan takes 3 GPUs; 2 were found here." in larger
    given = run("--model", llama, "--auto", "--gpu-memory-gb", 20, **environment).stdout
    assert "Sizes for up to 2 GPUs" in given
    assert "20.00 GB (given)" in given
    assert "not judged" in run("--model", llama, "--device", "cpu", **environment).stdout
