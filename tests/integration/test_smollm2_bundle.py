"""SmolLM2-135M-Instruct compiled for four ranks of unequal shares, and run where nothing can be
compiled: the same tokens as uncompiled. Takes three to five minutes on two cores, most of them in
inductor.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import build_jobs
import pytest
from barren import barren, left_in
from processes import run_command
from typer.testing import CliRunner

from runner.bundle.manifest import Manifest
from runner.cli.app import app

pytestmark = [pytest.mark.full, pytest.mark.dist, pytest.mark.timeout(1200)]

SETTINGS: dict[str, Any] = {
    "compile.buckets": [1, 16],
    "scheduler.max_num_seqs": 2,
    "scheduler.max_num_batched_tokens": 16,
    "compile.parity.num_tokens": 64,
}
NUM_TOKENS = 40
PROMPTS = (
    "The capital of France is",
    "In 1969, Neil Armstrong and Buzz Aldrin landed on the Moon; 650 million people watched. "
    "The third astronaut,",
)
ASKED = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
ASKED += ["--temperature", "0", "--max-tokens", str(NUM_TOKENS), "--json"]


@pytest.fixture(scope="module")
def uncompiled(smollm2: Path) -> list[dict[str, Any]]:
    """What one rank makes of the prompts without a bundle."""
    model = ["--device", "cpu", "--model", str(smollm2), "--dtype", "float32"]
    done = CliRunner().invoke(app, ["generate", *model, *ASKED])
    assert done.exception is None, done.exception
    completions = [json.loads(line) for line in done.stdout.splitlines()]
    assert completions[0]["text"].startswith(" Paris.")
    assert max(completion["completion_tokens"] for completion in completions) == NUM_TOKENS
    return completions


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_the_same_tokens_from_a_bundle_of_unequal_shares(
    backend: str,
    smollm2: Path,
    uncompiled: list[dict[str, Any]],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Nine query and three KV heads: six and two on one rank, three and one on the other."""
    out = tmp_path / "out"
    settings = SETTINGS | {"compile.backend": backend}
    arguments = build_jobs.arguments(smollm2, out, [2, 2], settings)
    made = run_command(*arguments, "--json", timeout_s=900)
    assert made.returncode == 0, made.stderr
    told = json.loads(made.stdout)
    record_property("build_s", sum(built["seconds"] for built in told["built"]))
    assert told["parity"]["passed"] is True
    layers = {unit["name"] for unit in told["parity"]["units"]} - {"embedding", "head"}
    assert len(layers) == 30
    manifest = Manifest.read(out)
    heads = [rank["heads"] for rank in manifest.plan["ranks"]]
    assert [end - start for start, end in (h["query"] for h in heads)] == [6, 3, 6, 3]
    assert manifest.backends == {backend}

    done = run_command(
        "generate",
        *("--bundle", str(out), *ASKED),
        environment=barren(tmp_path / "barren"),
        timeout_s=200,
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == uncompiled
    nothing = [f"shardline: rank {rank} compiled: nothing" for rank in range(4)]
    assert sorted(done.stderr.splitlines())[-4:] == nothing
    assert left_in(tmp_path / "barren") == []
