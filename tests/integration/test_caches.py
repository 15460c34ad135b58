"""What loading engines has made is in the bundle, and need not be made again."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import rank_jobs
import torch
from checkpoints import add_tokenizer, make_checkpoint
from processes import run_command

from parallel.context import ParallelContext
from parallel.launch import RankEnv
from parallel.topology import Topology
from runner.build.compile import Destination, compile_on_rank
from runner.bundle.bundle import Bundle
from runner.bundled import open_job
from runner.compiler.backends import Backends
from runner.compiler.tensorrt import KERNELS_FILE
from runner.engine.loading import load_artefacts, load_stage, uses_of

SIZES = {
    "scheduler.max_num_batched_tokens": 4,
    "scheduler.max_num_seqs": 1,
    "compile.buckets": [1, 4],
}


def compile_here(
    name: str, checkpoint: Callable[[str], Path], out: Path, device: str, backend: str
) -> Bundle:
    settings = SIZES | {"parallel.device": device, "compile.backend": backend}
    job = rank_jobs.prepare(str(checkpoint(name)), [1], settings)
    compile_on_rank(job, RankEnv(0, 1), Destination(out))
    return Bundle.open(out)


def test_backends_that_complete_nothing_on_loading_keep_nothing(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle = compile_here("llama", checkpoint, tmp_path / "bundle", "cpu", "eager")
    assert bundle.caches(0) is None
    backends = Backends(torch.device("cpu"))
    backends.read_caches(tmp_path)
    assert backends["eager"].name == "eager"
    backends.write_caches(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_kernels_are_compiled_once(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    bundle = compile_here("llama", checkpoint, tmp_path / "bundle", "cuda", "tensorrt")
    caches, cuda = bundle.caches(0), torch.device("cuda", 0)
    assert caches is not None
    # Beside it Triton's, unless this process had them before it compiled.
    assert [file.name for file in caches.iterdir() if file.name != "triton"] == [KERNELS_FILE]
    context = ParallelContext.open(Topology.of([1]), RankEnv(0, 1), device_type="cuda")
    stage = load_stage(open_job(bundle.path, accept_parity=True), context).stage
    seconds = {}
    for folder in (caches, None):
        backends = Backends(cuda)
        if folder:
            backends.read_caches(folder)
        started = time.monotonic()
        artefacts = load_artefacts(uses_of(bundle, 0), bundle.artefact, stage, backends)
        for kind, part in stage.parts_by_kind().items():
            for num_rows, run in artefacts[kind].items():
                run(*(spec.empty(cuda) for spec in part.segment(num_rows).inputs))
        torch.cuda.synchronize()
        seconds[folder] = time.monotonic() - started
        if folder:
            # Nothing came to the kernels that the bundle holds.
            backends.write_caches(tmp_path)
            kept = (tmp_path / KERNELS_FILE, folder / KERNELS_FILE)
            assert kept[0].stat().st_size == kept[1].stat().st_size > 0
    assert seconds[caches] < seconds[None] / 2


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_a_start_from_a_bundle_compiles_no_kernel(tmp_path: Path) -> None:
    """On a host where Triton has compiled nothing yet, and that has no compiler."""
    model, bundle = tmp_path / "tiny", tmp_path / "bundle"
    model.mkdir()
    make_checkpoint("llama", model, vocab_size=259, eos_token_id=None)
    add_tokenizer(model)

    def run(cache: str, *arguments: str, compiler: str | None = None) -> str:
        environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / cache)}
        if compiler is not None:
            environment["CC"] = compiler
        done = run_command(*arguments, environment=environment, timeout_s=250)
        assert done.returncode == 0, done.stderr
        assert "FlashAttention" not in done.stderr
        return done.stdout

    common = ["--model", str(model), "--device", "cuda", "--dtype", "bfloat16"]
    settings = ["--set", "compile.backend=eager", "--set", "compile.buckets=[1,16]"]
    settings += ["--set", "scheduler.max_num_batched_tokens=16"]
    run("builder's", "compile", *common, *settings, "--output", str(bundle))
    asked = ["--prompt", "hello", "--max-tokens", "12", "--temperature", "0"]
    expected = run("builder's", "generate", *common, *settings, *asked)
    found = run("own", "generate", "--bundle", str(bundle), *asked, compiler=str(tmp_path / "none"))
    assert found == expected
    own = [file for file in (tmp_path / "own").rglob("*") if file.is_file()]
    assert own == []
