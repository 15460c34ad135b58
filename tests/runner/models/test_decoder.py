"""One rank's decoder against transformers: old files, lower precision, norms, a cut into stages."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rank_jobs
import torch
from checkpoints import load_reference, reference_logits
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from parallel.context import ParallelContext
from parallel.launch import RankEnv
from parallel.topology import Topology
from runner.engine.batching import lay_out
from runner.engine.loading import load_stage
from runner.engine.request import Request
from runner.engine.scheduler import Scheduled
from runner.engine.sequence import Sequence
from runner.models.batch import Batch
from runner.models.norm import RMSNorm

# On both sides of the windows, and of the length at which longrope changes its frequencies.
PROMPTS = [[3 + (7 * i + n) % 120 for i in range(n)] for n in (5, 29)]

# What transformers 4 wrote where transformers 5 writes `rope_parameters` and `dtype`.
OLD_KEYS: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_theta": 20000.0,
        "rope_scaling": {
            "type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral": {"rope_theta": 20000.0, "sliding_window": None},
    "gemma3": {
        "rope_theta": 1e6,
        "rope_local_base_freq": 5000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 2,
    },
    "phi3": {
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 20,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "type": "su",
            "short_factor": [1.0, 1.1, 1.2],
            "long_factor": [1.5, 2.0, 4.0],
            "original_max_position_embeddings": 20,
        },
    },
}


@pytest.fixture(scope="module")
def alone() -> ParallelContext:
    """A job of one rank."""
    return ParallelContext.open(Topology.of([1]), RankEnv(0, 1), device_type="cpu")


def check_logits(context: ParallelContext, folder: Path) -> None:
    """Ours equal those of transformers on the same folder."""
    got = rank_jobs.logits(context, str(folder), PROMPTS, {})
    assert got is not None
    model = load_reference(folder)
    for prompt, ours in zip(PROMPTS, got, strict=True):
        theirs = reference_logits(model, prompt)
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("name", OLD_KEYS)
def test_a_folder_of_transformers_4(
    name: str, alone: ParallelContext, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint(name), tmp_path / name))
    values = json.loads((folder / "config.json").read_text())
    values["torch_dtype"] = values.pop("dtype")
    for key in ("rope_parameters", "layer_types", "_sliding_window_pattern"):
        values.pop(key, None)
    (folder / "config.json").write_text(json.dumps(values | OLD_KEYS[name]))
    check_logits(alone, folder)


def test_gpt_2_as_first_published(
    alone: ParallelContext, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Saved from the base model, with masks among the weights, and a short config."""
    folder = Path(shutil.copytree(checkpoint("gpt2"), tmp_path / "gpt2"))
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    tensors |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 90, 90).tril() for layer in range(3)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    sizes = ("n_embd", "n_head", "n_inner", "n_layer", "n_positions", "vocab_size")
    short = {key: values[key] for key in ("activation_function", "architectures", *sizes)}
    short |= {"model_type": "gpt2", "n_ctx": 90, "layer_norm_epsilon": 1e-5}
    (folder / "config.json").write_text(json.dumps(short))
    check_logits(alone, folder)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3", "phi3", "gpt2"])
def test_bfloat16_rounds_no_worse_than_transformers(
    name: str, alone: ParallelContext, checkpoint: Callable[[str], Path]
) -> None:
    """Norms, scales and rotations round where the original does."""
    folder = checkpoint(name)
    exact = reference_logits(load_reference(folder), PROMPTS[1])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    theirs = reference_logits(model, PROMPTS[1])
    got = rank_jobs.logits(alone, str(folder), PROMPTS[1:], {"model.dtype": "bfloat16"})
    assert got is not None
    assert got[0].dtype == torch.bfloat16
    assert (got[0].float() - exact).norm() <= 1.1 * (theirs - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norms_equal_to_the_last_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = 30 * torch.randn(7, 48).to(dtype), torch.randn(48).to(dtype)
    for theirs, offset in ((LlamaRMSNorm(48, 1e-5), 0.0), (Gemma3RMSNorm(48, 1e-5), 1.0)):
        ours = RMSNorm(48, 1e-5, offset=offset)
        theirs.weight.data, ours.weight.data = weight.clone(), weight.clone()
        assert_close(ours(x), theirs(x), rtol=0, atol=0)
        assert ours(x).dtype == dtype


def prefill(prompts: list[list[int]], block_size: int) -> Batch:
    """All prompts in one step, one behind the other in the cache."""
    scheduled, block = [], 0
    for index, prompt in enumerate(prompts):
        sequence = Sequence.of(Request(index, tuple(prompt), 1))
        sequence.blocks = list(range(block, block + -(-len(prompt) // block_size)))
        block += len(sequence.blocks)
        scheduled.append(Scheduled.of(sequence, len(prompt)))
    return lay_out(scheduled, block_size).to(torch.device("cpu"))


def test_stages_in_a_row_equal_the_whole(
    alone: ParallelContext, checkpoint: Callable[[str], Path]
) -> None:
    """Gemma's embedding is scaled in the first stage alone, and its tied head is in the last."""
    folder = str(checkpoint("gemma3"))
    batch = prefill(PROMPTS, 4)
    outputs = []
    for stages in ([1], [1, 1], [1, 1, 1]):
        job = rank_jobs.prepare(folder, stages, {})
        x: torch.Tensor | None = None
        for rank in range(len(stages)):
            context = replace(alone, topology=Topology.of(stages), rank=rank)
            runner = load_stage(job, context)
            runner.allocate(16, 4)
            assert set(runner.caches) == set(range(*job.plan.stages[rank].layers))
            x = runner.stage(batch, runner.caches, x)
        assert x is not None
        outputs.append(x)
    assert outputs[0].shape == (len(PROMPTS), 131)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
