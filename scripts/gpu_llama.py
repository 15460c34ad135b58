"""Llama's shapes with random weights, on one GPU and over several: steps of `gpu_check`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_report import ROOT, Check
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(ROOT))

from parallel.errors import ParityError

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LLAMA_70B = LLAMA | {
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
}
LLAMA_70B_RANK = LLAMA | {
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 64128,
}
"""What one of two tensor-parallel ranks holds: half of the heads, of the MLP and of the head."""

CONFIGS = {"llama-8b": LLAMA, "llama-70b": LLAMA_70B, "llama-70b-rank": LLAMA_70B_RANK}

SIZES = {
    "llama-8b": ("[1,8,32,128,256,2048,8192]", 8192, 256),
    "llama-70b": ("[1,8,32,128,2048]", 2048, 128),
    "llama-70b-rank": ("[1,32,2048]", 2048, 32),
}
"""Buckets, the most tokens of a step, and the most sequences."""

GIB = 2**30


@dataclass(frozen=True)
class Cut:
    """How a model is divided.

    Attributes:
        tensor, pipeline: ranks of a stage, and stages.
    """

    tensor: int = 1
    pipeline: int = 1

    @property
    def num_ranks(self) -> int:
        return self.tensor * self.pipeline

    @property
    def suffix(self) -> str:
        return f" tp{self.tensor} pp{self.pipeline}".replace(" ", "-") if self.num_ranks > 1 else ""

    @property
    def options(self) -> list[str]:
        return ["-tp", str(self.tensor), "-pp", str(self.pipeline)]


ONE_RANK = Cut()


def cuts(num_gpus: int) -> list[Cut]:
    """The ways to use all of them with stages of one size."""
    return [Cut(num_gpus // pp, pp) for pp in range(1, num_gpus + 1) if num_gpus % pp == 0]


def write_tokenizer(folder: Path, size: int) -> None:
    """One as fast as a real one, in which every id has a text, so that every token is sent."""
    vocabulary = {f"Ġw{number}": number for number in range(size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def compile_llama(
    check: Check, name: str, backend: str, cut: Cut = ONE_RANK
) -> tuple[Path | None, float]:
    """A bundle with random weights, None if there is none, and how long it took to make. Of one
    that failed its comparison it is said: random weights tell near ties apart by chance.
    """
    model, bundle = check.out / name, check.out / f"{name}-{backend}{cut.suffix}"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(CONFIGS[name]))
    write_tokenizer(model, CONFIGS[name]["vocab_size"])
    buckets, max_num_tokens, max_num_seqs = SIZES[name]
    settings = {
        "compile.backend": backend,
        "compile.buckets": buckets,
        "scheduler.max_num_batched_tokens": max_num_tokens,
        "scheduler.max_num_seqs": max_num_seqs,
    }
    command = ["compile", "--model", str(model), "--load-format", "dummy", "--output", str(bundle)]
    command += ["--overwrite", *cut.options]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    code, seconds = check.python("-P", "-m", "runner", *command, log=f"compile-{bundle.name}")
    if code == ParityError.exit_code:
        check.row(bundle.name, "comparison FAILED, exit code", code)
    return (bundle if code in (0, ParityError.exit_code) else None), seconds


def llama_8b(check: Check, backends: list[str]) -> None:
    """Compile, start, decode and prefill with each backend."""
    for backend in backends:
        bundle, seconds = compile_llama(check, "llama-8b", backend)
        if bundle is None:
            check.row(backend, "compile FAILED, s", seconds)
            continue
        check.row(backend, "compile, s", seconds)
        artefacts = sum(f.stat().st_size for f in (bundle / "artefacts").rglob("*") if f.is_file())
        check.row(backend, "artefacts, MB", artefacts / 1e6)
        measure_language(check, bundle, backend, "8b")
        check.save()


def measure_language(
    check: Check, bundle: Path, subject: str, which: str, cut: Cut = ONE_RANK, *settings: str
) -> None:
    log = f"measure-{bundle.name}{''.join(f'-{setting}' for setting in settings)}"
    result = check.out / f"{log}.json"
    arguments = ["scripts/gpu_language.py", str(bundle), which, str(result), *settings]
    check.python(*arguments, log=log, num_ranks=cut.num_ranks)
    if not result.exists():
        check.row(subject, "measuring FAILED, see its log", 1)
        return
    found = json.loads(result.read_text())
    check.found[log] = found
    for what, value in found["figures"].items():
        check.row(subject, what, value)


def llama_of_ranks(check: Check, name: str, cut: Cut, backends: Sequence[str]) -> None:
    """Over several GPUs, with each backend and each way to add up."""
    which = "8b" if name == "llama-8b" else "70b"
    for backend in backends:
        subject = f"{backend}{cut.suffix}"
        bundle, seconds = compile_llama(check, name, backend, cut)
        if bundle is None:
            check.row(subject, "compile FAILED, s", seconds)
            continue
        check.row(subject, "compile, s", seconds)
        measure_language(check, bundle, subject, which, cut)
        if cut.tensor > 1:
            for way in ("nccl", "low_latency"):
                setting = f"distributed.all_reduce={way}"
                measure_language(check, bundle, f"{subject} {way}", which, cut, setting)
        check.save()


def startup(check: Check, backends: list[str]) -> None:
    """From the start of a process to its first token."""
    for backend in backends:
        bundle = check.out / f"llama-8b-{backend}"
        if not bundle.exists():
            continue
        result = check.out / f"startup-{backend}.json"
        command = ["bench", "startup", "--bundle", str(bundle), "--starts", "2"]
        check.python("-P", "-m", "runner", *command, "--output", str(result), log=result.stem)
        if result.exists():
            later = json.loads(result.read_text())["result"]["later_s"]["median"]
            check.row(backend, "start to first token, s", later)


def llama_70b_rank(check: Check) -> None:
    """One of two ranks: compile, load, decode; without the other's all-reduces."""
    memory = torch.cuda.get_device_properties(0).total_memory
    if memory < 90 * GIB:
        print(f"  left out: 71 GB of weights, and this GPU has {memory / 1e9:.0f} GB")
        return
    bundle, seconds = compile_llama(check, "llama-70b-rank", "tensorrt")
    check.row("tensorrt", "compile of a 70B rank, s", seconds)
    if bundle:
        measure_language(check, bundle, "tensorrt", "70b")
