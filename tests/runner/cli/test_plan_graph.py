"""`plan` of a tensor model as a user calls it: what it prints, measures, refuses and draws."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import yaml
from typer.testing import CliRunner, Result

from parallel.errors import ConfigError, DoesNotFitError
from parallel.fit import format_bytes
from runner.cli.app import app

SUPPORT = Path(__file__).parents[2] / "support"
SVG = "{http://www.w3.org/2000/svg}"

TIED = """
from torch import nn

class Tied(nn.Module):
    '''Its head has the weight of its embedding.'''

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return {"logits": self.head(self.body(self.embed(ids)).relu())}
"""

Plan = Callable[..., Result]


@pytest.fixture
def plan_of(tmp_path: Path) -> Callable[..., Plan]:
    """`plan` with a configuration of a factory's module on the CPU."""
    (tmp_path / "tied_model.py").write_text(TIED)

    def make(factory: str, inputs: list[object], **sections: Any) -> Plan:
        folder = SUPPORT if factory.startswith("graph_models") else tmp_path
        model = {"path": str(tmp_path), "factory": factory, "factory_path": str(folder)}
        model |= {"load_format": "dummy", "inputs": inputs} | sections.pop("model", {})
        values = {
            "version": 1,
            "model": model,
            "security": {"factories": [factory]},
            "parallel": {"device": "cpu"} | sections.pop("parallel", {}),
            **sections,
        }
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml"
        file.write_text(yaml.safe_dump(values))
        command = ["plan", "--config", str(file)]
        return lambda *args: CliRunner().invoke(app, [*command, *map(str, args)])

    return make


@pytest.fixture
def unet(plan_of: Callable[..., Plan]) -> Callable[..., Plan]:
    """The configuration of a U-Net with six buckets; `parallel` as given."""
    return lambda **parallel: plan_of(
        "graph_models:UNet",
        [{"name": "image", "shape": ["batch", 2, "side", 32]}],
        model={"dims": {"side": [32, 64]}},
        scheduler={"max_batch_size": 4},
        parallel=parallel,
    )


def text_of(plan: Plan, *args: object) -> str:
    result = plan(*args)
    assert result.exception is None, result.exception
    return result.stdout


def json_of(plan: Plan, *args: object) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(text_of(plan, "--json", *args))
    return values


def refusal(plan: Plan, *args: object) -> str:
    result = plan(*args)
    assert isinstance(result.exception, ConfigError), result.stdout
    assert "\n" not in str(result.exception)
    return str(result.exception)


def rows_below(text: str, title: str) -> list[dict[str, str]]:
    """The rows of the first table that has such a column, as {title: cell}."""
    lines = text.splitlines()
    titles = [re.split(r" {2,}", line.strip()) for line in lines]
    start = next(i for i, cells in enumerate(titles) if title in cells and len(cells) > 3)
    table = lines[start : lines.index("", start)]
    grid = [re.split(r" {2,}", line.strip()) for line in table]
    return [dict(zip([*grid[0], "note"], row, strict=False)) for row in grid[1:]]


def test_a_line_a_rank_says_what_it_runs_and_holds(unet: Callable[..., Plan]) -> None:
    plan = unet(split_points=["down.2", "up.1"])
    text, values = text_of(plan), json_of(plan)
    first = text.splitlines()[0]
    for fact in ("graph_models:UNet", "float32", "3 stages", "6 buckets", values["digest"][:12]):
        assert fact in first
    rows = rows_below(text, "modules")
    stages, ranks = values["plan"]["stages"], values["plan"]["ranks"]
    assert [row["modules"] for row in rows] == [
        f"down.0.0 .. down.1.2 ({stages[0]['num_ops']} operations)",
        f"down.2.0 .. up.0.2 ({stages[1]['num_ops']} operations)",
        f"up.1.0 .. head ({stages[2]['num_ops']} operations)",
    ]
    assert [row["weights"] for row in rows] == [format_bytes(r["weight_bytes"]) for r in ranks]
    assert [row["activations"] for row in rows] == [
        format_bytes(rank["activation_bytes"]) for rank in ranks
    ]
    assert [row["est. time"] for row in rows] == [f"{s['time_s'] * 1e6:g} us" for s in stages]
    assert sum(float(row["FLOPs"].rstrip(" %")) for row in rows) == pytest.approx(100, abs=0.2)


def test_shapes_are_told_once_with_all_their_sizes(unet: Callable[..., Plan]) -> None:
    lines = text_of(unet()).splitlines()
    assert "6 buckets: image float32 [1|2|4, 2, 32|64, 32]; the first dim counts samples" in lines
    assert "Outputs: output float32 [4, 3, 64, 32]" in lines


def test_a_skip_connection_is_told_to_pass_the_stages_between(unet: Callable[..., Plan]) -> None:
    text = text_of(unet(split_points=["down.1", "middle", "up.1"]))
    rows = rows_below(text, "tensor")
    assert {row["stages"] for row in rows} == {"0 -> 1", "1 -> 2", "2 -> 3"}
    skips = [row for row in rows if row["tensor"] == "relu"]
    assert [(row["shape"], row["size"]) for row in skips] == [
        ("[4, 4, 64, 32]", format_bytes(4 * 4 * 64 * 32 * 4))
    ] * 3
    assert [row.get("note") for row in skips] == [
        None,
        "passes through stage 1",
        "passes through stages 1 and 2",
    ]
    fresh = [row for row in rows if row["stages"] == "2 -> 3" and "note" not in row]
    assert len(fresh) == 1, "of what the last boundary sends, one tensor was made before it"
    assert "Pipeline: with 16 micro-batches" in text
    assert "the 4 stages wait" in text


def test_one_stage_sends_nothing(unet: Callable[..., Plan]) -> None:
    text = text_of(unet())
    assert "Between" not in text
    assert "Pipeline" not in text


def test_shared_weights_and_warnings_are_told(plan_of: Callable[..., Plan]) -> None:
    inputs = [{"name": "ids", "dtype": "int64", "shape": ["batch", 5]}]
    plan = plan_of("tied_model:Tied", inputs, parallel={"split_points": ["body", "head"]})
    text = text_of(plan)
    assert "Shared: embed.weight is held by stages 0 and 2." in text
    assert len(re.findall("^Warning: the cut before", text, re.MULTILINE)) == 2
    assert "Outputs: logits float32 [8, 5, 12]" in text


def test_memory_is_judged_without_a_kv_cache(unet: Callable[..., Plan]) -> None:
    plan = unet(pipeline_parallel_size=2)
    fits = text_of(plan, "--gpu-memory-gb", 1)
    assert "900.0 MB of it may be used" in fits
    assert "KV" not in fits
    assert [row["verdict"] for row in rows_below(fits, "verdict")] == ["fits", "fits"]
    result = plan("--gpu-memory-gb", 0.0001)
    assert isinstance(result.exception, DoesNotFitError)
    assert str(result.exception).startswith("the plan does not fit: rank ")
    assert "does not fit" in result.stdout


def test_json_is_the_plan_its_fit_and_config(unet: Callable[..., Plan]) -> None:
    values = json_of(unet(pipeline_parallel_size=2), "--gpu-memory-gb", 1, "--show-config")
    assert values["plan"]["kind"] == "graph"
    assert values["fit"]["fits"] is True
    assert values["candidates"] is None
    assert values["measured"] is None
    assert values["config"]["config"]["parallel"]["pipeline_parallel_size"] == 2


def test_a_rank_in_full_lists_its_slices(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(
        "graph_models:Mlp",
        [{"name": "x", "shape": ["batch", 8]}],
        parallel={
            "tensor_parallel_size": 2,
            "tp_plan": {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"},
        },
    )
    text = text_of(plan, "--rank", 1)
    assert "rank 1 (stage 0, tp rank 1), device 1: 8 tensors" in text
    assert "runs blocks.0.up" in text
    rows = {row["tensor"]: row for row in rows_below(text, "local shape")}
    up, down = rows["blocks.0.up.weight"], rows["blocks.1.down.weight"]
    assert (up["local shape"], up["dim"], up["slice"]) == ("(8, 8)", "0", "[8:16)")
    assert (down["local shape"], down["dim"], down["slice"]) == ("(8, 8)", "1", "[8:16)")
    assert rows["head.weight"]["slice"] == "whole"
    shares = [float(row["FLOPs"].rstrip(" %")) for row in rows_below(text_of(plan), "modules")]
    assert shares == [50.0, 50.0]
    assert "the plan has 2 ranks" in refusal(plan, "--rank", 2)


def test_auto_takes_the_fewest_stages_that_fit(unet: Callable[..., Plan]) -> None:
    needed = {
        n: max(
            rank["weight_bytes"] + rank["activation_bytes"]
            for rank in json_of(unet(pipeline_parallel_size=n))["plan"]["ranks"]
        )
        for n in (1, 2, 3)
    }
    assert needed[2] < needed[1]
    memory_gb = (needed[1] - 1) / 0.9 / 1e9
    plan = unet()
    text = text_of(plan, "--auto", "--gpus", 4, "--gpu-memory-gb", memory_gb)
    assert "Chosen: pipeline_parallel_size=2, the smallest that fits." in text
    assert [row["fits"] for row in rows_below(text, "needs of the fullest rank")] == ["no", "yes"]
    block = re.search(r"^parallel:\n(  .*\n)+", text, re.MULTILINE)
    assert block is not None
    again = unet(**yaml.safe_load(block[0])["parallel"])
    auto = json_of(plan, "--auto", "--gpus", 4, "--gpu-memory-gb", memory_gb, "--show-config")
    assert auto["digest"] == json_of(again)["digest"]
    assert [c["chosen"] for c in auto["candidates"]] == [False, True]
    assert auto["config"]["origins"]["parallel.pipeline_parallel_size"] == "--auto"


def test_auto_that_finds_nothing_names_the_closest(unet: Callable[..., Plan]) -> None:
    result = unet()("--auto", "--gpus", 2, "--gpu-memory-gb", 0.0001)
    assert isinstance(result.exception, DoesNotFitError)
    assert "no number of stages for up to 2 GPUs fits; the closest is" in str(result.exception)
    assert "<- closest" in result.stdout


def test_auto_refuses_what_it_would_choose(unet: Callable[..., Plan]) -> None:
    options = ["--auto", "--gpus", 2, "--gpu-memory-gb", 1]
    assert "pipeline_parallel_size is given" in refusal(unet(pipeline_parallel_size=2), *options)
    assert "split_points is given" in refusal(unet(split_points=["up"]), *options)
    stages = [{"devices": [0]}, {"devices": [1]}]
    assert "parallel.stages is given" in refusal(unet(stages=stages), *options)
    assert "--auto needs --gpus and --gpu-memory-gb" in refusal(unet(), "--auto")
    assert "exceeds the 2 GPUs" in refusal(unet(tensor_parallel_size=3), *options)


def test_measured_split_points_make_the_plan_that_is_shown(unet: Callable[..., Plan]) -> None:
    plan = unet(pipeline_parallel_size=3)
    result = plan("--measure", "--gpu-memory-gb", 1)
    assert result.exception is None, result.exception
    text = result.stdout
    block = re.search(r"^parallel:\n(  .*\n)+", text, re.MULTILINE)
    assert block is not None
    again = unet(**yaml.safe_load(block[0])["parallel"])
    assert json_of(again)["digest"][:12] in text.splitlines()[0]
    rows = rows_below(text, "modules")
    assert all(re.fullmatch(r"[\d.e+]+ (us|ms|s)", row["measured"]) for row in rows)
    assert "by measured times" in text
    assert "by estimated times" not in text
    assert "on the CPU" in text


def test_json_of_measured_times_adds_up(unet: Callable[..., Plan]) -> None:
    measured = json_of(unet(pipeline_parallel_size=2), "--measure")["measured"]
    assert len(measured["unit_names"]) == len(measured["unit_times_s"]) > 20
    assert sum(measured["stage_times_s"]) == pytest.approx(sum(measured["unit_times_s"]))
    assert len(measured["split_points"]) == 1
    assert 0 < measured["bubble"] < 1


def test_a_measured_single_stage_has_nothing_to_balance(unet: Callable[..., Plan]) -> None:
    text = text_of(unet(), "--measure")
    assert "nothing to balance" in text
    assert "split_points" not in text


def test_measuring_refuses_a_cut_that_is_given(
    unet: Callable[..., Plan], checkpoint: Callable[[str], Path]
) -> None:
    assert "--measure chooses the cut, but parallel.split_points is given" in refusal(
        unet(split_points=["up"]), "--measure"
    )
    stages = [{"modules": ["down.*"]}, {"modules": ["middle", "up.*", "head"]}]
    assert "parallel.stages.0.modules is given" in refusal(unet(stages=stages), "--measure")
    options = ["--measure", "--auto", "--gpus", 2, "--gpu-memory-gb", 1]
    assert "run --auto first" in refusal(unet(), *options)
    command = ["plan", "--model", str(checkpoint("llama")), "--device", "cpu", "--measure"]
    error = CliRunner().invoke(app, command).exception
    assert isinstance(error, ConfigError)
    assert "--measure is for tensor models" in str(error)


def test_the_drawing_has_a_card_a_rank_and_names_what_crosses(
    unet: Callable[..., Plan], tmp_path: Path
) -> None:
    file = tmp_path / "plan.svg"
    plan = unet(split_points=["down.1", "middle", "up.1"])
    text_of(plan, "--svg", file)
    root = ET.fromstring(file.read_text())
    cards = root.findall(f".//{SVG}g[@class='rank']")
    ranks = json_of(plan)["plan"]["ranks"]
    assert len(cards) == len(ranks) == 4
    assert len(root.findall(f".//{SVG}path[@class='carry']")) == 3
    scales = []
    for card, rank in zip(cards, ranks, strict=True):
        bars = {
            bar.get("class"): float(bar.get("width", "nan")) for bar in card if bar.get("class")
        }
        assert set(bars) == {"weights", "activations"}
        scales.append(bars["activations"] / rank["activation_bytes"])
    assert scales == pytest.approx([scales[0]] * 4, rel=1e-3)
    shown = [element.text or "" for element in root.iter(f"{SVG}text")]
    assert "relu 131.1 kB" in shown
    assert shown.count("relu 131.1 kB, from stage 0") == 2
    assert not any(line.endswith("...") for line in shown), "nothing had to be shortened"
    width, height = (float(root.get(key, "nan")) for key in ("width", "height"))
    for element in root.iter(f"{SVG}text"):
        assert 0 <= float(element.get("x", "nan")) <= width
        assert 0 <= float(element.get("y", "nan")) <= height
