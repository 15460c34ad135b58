"""What the images are, and every command in them as the contract has it."""

import json
import re
import uuid
from pathlib import Path

import numpy as np
import pytest
from containers import CONTRACT, Served, docker, readable, run_image, without, writable

MOST_RUNTIME_BYTES = 1_200_000_000
"""Of the runtime for a CPU; what it measures is in docs/measurements.md."""


LOOK = "command -v g++ gcc cc clang tcc; find / -xdev -name torch.h -o -xdev -name Python.h"
"""Prints what compiles, and what it would include."""


def size_of(image: str, capsys: pytest.CaptureFixture[str]) -> int:
    """In bytes; told to whoever reads the log, too."""
    size = int(docker("image", "inspect", "--format", "{{.Size}}", image).stdout)
    with capsys.disabled():
        print(f"\n{image}: {size} bytes", end="")
    return size


def test_the_runtime_is_small_and_has_no_compiler(
    runtime: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert size_of(runtime, capsys) <= MOST_RUNTIME_BYTES
    assert run_image(runtime, "sh", "-c", LOOK).stdout == ""


@pytest.mark.full
def test_the_builder_has_a_compiler_and_all_layers_of_the_runtime_but_the_last(
    runtime: str, builder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def layers(name: str) -> list[str]:
        return list(
            json.loads(
                docker("image", "inspect", "--format", "{{json .RootFS.Layers}}", name).stdout
            )
        )

    size_of(builder, capsys)
    found = run_image(builder, "sh", "-c", LOOK).stdout
    assert "/usr/bin/g++" in found
    assert "torch.h" in found
    *shared, _ours = layers(runtime)
    assert layers(builder)[: len(shared)] == shared


def test_labels_and_settings_are_those_that_hosts_read(runtime: str) -> None:
    config = json.loads(docker("image", "inspect", "--format", "{{json .Config}}", runtime).stdout)
    labels, environment = config["Labels"], config["Env"]
    assert labels["org.opencontainers.image.version"] == "0.1.0"
    revision = labels["org.opencontainers.image.revision"]
    assert re.fullmatch("[0-9a-f]{40}(-dirty)?", revision)
    assert "NVIDIA_VISIBLE_DEVICES=all" in environment
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in environment
    assert config["User"] == "10001:0"
    check, second = config["Healthcheck"], 1_000_000_000
    assert check["Test"][-1].endswith("exec shardline health")
    assert (check["Interval"], check["Timeout"]) == (10 * second, 8 * second)
    assert (check["StartPeriod"], check["Retries"]) == (1800 * second, 3)


def test_what_does_not_serve_is_not_called_unhealthy(runtime: str) -> None:
    served = Served(f"shardline-test-{uuid.uuid4().hex[:8]}", Path())
    options = ["--detach", "--name", served.name, "--health-interval", "1s", *CONTRACT]
    try:
        docker("run", *options, runtime, "sh", "-c", "sleep 60")
        served.wait_for_health("healthy", timeout_s=60)
    finally:
        docker("rm", "--force", "--volumes", served.name)


def test_any_uid_has_a_line_in_passwd(runtime: str) -> None:
    ask = "import os, pwd; print(pwd.getpwuid(os.getuid()).pw_dir, pwd.getpwuid(0).pw_name)"
    for user in ("12345:0", "777:888", "0:0"):
        options = [*without("--user"), "--user", user]
        done = run_image(runtime, "python", "-c", ask, options=options)
        assert done.stdout.split() == ["/root" if user == "0:0" else "/cache/home", "root"]


def test_the_first_process_reaps_those_that_lost_their_parent(runtime: str) -> None:
    # Of a child that dies after its parent, nobody but the first process can be told.
    orphan = "(sleep 0.2 & exec true) & sleep 1; cat /proc/[0-9]*/stat"
    stats = run_image(runtime, "sh", "-c", orphan).stdout.splitlines()
    assert any("(dumb-init)" in stat for stat in stats)
    assert [stat for stat in stats if stat.rpartition(")")[2].split()[0] == "Z"] == []


def test_doctor_and_plan(runtime: str, tiny: Path) -> None:
    done = run_image(runtime, "doctor", "--json")
    assert done.returncode == 0, done.stderr
    findings = {f["check"]: f for f in json.loads(done.stdout)["findings"]}
    assert findings["container"]["detail"] == "Docker"
    assert findings["loopback"]["status"] == "ok"
    assert findings["passwd"]["status"] == "ok"

    planned = run_image(
        *(runtime, "plan", "--model", "/models/tiny", "-pp", "2", "--json"),
        mounts=[f"{tiny.parent}:/models:ro"],
    )
    assert planned.returncode == 0, planned.stderr
    assert len(json.loads(planned.stdout)["plan"]["ranks"]) == 2


def test_generate_with_smollm2_on_three_ranks(runtime: str, smollm2: Path) -> None:
    readable(smollm2.parent)
    cut = (
        'parallel.stages=[{modules: ["model.embed_tokens", "model.layers.{0..24}"], '
        'tensor_parallel_size: 2}, {modules: ["model.layers.{25..29}", "model.norm", "lm_head"]}]'
    )
    done = run_image(
        *(runtime, "generate", "--model", "/models/model", "--set", cut, "--max-model-len", "256"),
        *("--device", "cpu", "--chat", "--prompt", "What is the capital of France?"),
        *("--temperature", "0", "--max-tokens", "12", "--network-guard", "strict"),
        mounts=[f"{smollm2.parent}:/models:ro"],
        timeout_s=600,
    )
    assert done.returncode == 0, done.stderr
    assert "3 ranks" in done.stderr
    assert "Paris" in done.stdout


def test_run_over_prompts_and_over_tensors(runtime: str, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "prompts.jsonl").write_text('{"prompt": "Hello", "max_tokens": 4}\n' * 3)
    np.save(tmp_path / "in" / "scan.npy", np.ones((4, 4096), np.float32))
    (tmp_path / "out").mkdir()
    readable(tmp_path)
    writable(tmp_path / "out")
    examples = Path(__file__).parents[2] / "examples"
    mounts = [
        *(f"{tiny.parent}:/models:ro", f"{tmp_path}/in:/in:ro", f"{tmp_path}/out:/out"),
        f"{examples}:/cache/examples:ro",
    ]
    prompts = run_image(
        *(runtime, "run", "--model", "/models/tiny", "-pp", "2", "--device", "cpu"),
        *("/in/prompts.jsonl", "--output", "/out/answers"),
        mounts=mounts,
    )
    assert prompts.returncode == 0, prompts.stderr
    answers = (tmp_path / "out" / "answers" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in answers] == [1, 2, 3]

    scans = run_image(
        *(
            runtime,
            "run",
            "--config",
            "examples/lidar/plan.yaml",
            "--device",
            "cpu",
            "/in/scan.npy",
        ),
        *("--output", "/out/logits", "--set", "scheduler.max_batch_size=1"),
        mounts=mounts,
    )
    assert scans.returncode == 0, scans.stderr
    assert list((tmp_path / "out" / "logits").rglob("scan*.npz"))


def test_the_root_is_read_only_and_nothing_may_be_raised(runtime: str) -> None:
    tries = "touch /opt/x 2>&1; touch /etc/x 2>&1; grep -E 'CapEff|NoNewPrivs' /proc/self/status"
    said = run_image(runtime, "sh", "-c", tries, options=CONTRACT).stdout
    assert said.count("Read-only file system") == 2
    assert "CapEff:\t0000000000000000" in said
    assert "NoNewPrivs:\t1" in said
