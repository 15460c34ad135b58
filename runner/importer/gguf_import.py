"""`import` of a GGUF file: one call from the file to a Hugging Face model folder.

Not here: what any key, tensor or token means.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.errors import ConfigError
from parallel.plan import DTYPE_BYTES
from runner.importer.gguf_config import check_architecture, generation_config, model_config
from runner.importer.gguf_file import GgufFile
from runner.importer.gguf_tokenizer import build_tokenizer, tokenizer_config
from runner.importer.gguf_vocabulary import Vocabulary
from runner.importer.gguf_weights import (
    WeightSource,
    check_tensors,
    read_weight,
    weight_sources,
)
from runner.importer.model_folder import (
    check_target,
    staged_folder,
    write_json,
    write_weights,
)

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class ImportReport:
    """What an import wrote."""

    model: str
    out: str
    architecture: str
    num_parameters: int
    """Elements of the tensors written; tied embeddings count once."""
    quantization: dict[str, int]
    """Name of a ggml type -> number of tensors of that type in the GGUF."""
    dtype: str
    weight_bytes: int
    files: list[str]
    tokenizer: str
    vocab_size: int
    elapsed_s: float


def import_gguf(
    model: Path,
    out: Path,
    *,
    dtype: str = "bfloat16",
    max_file_bytes: int = 2_000_000_000,
    overwrite: bool = False,
) -> ImportReport:
    """Write the model of a GGUF file as a Hugging Face folder that transformers and we load.

    Everything is checked before the first byte is written. The folder is made beside `out` and
    renamed at the end. Host memory holds one tensor at a time, at most twice as float32, whatever
    the size of the files; the GGUF itself is mapped, not read.

    Args:
        dtype: of the weights written: float32, bfloat16 or float16.
        max_file_bytes: most bytes of weights in one safetensors file, unless one tensor has more.
        overwrite: replace `out` if it is a model folder.

    Raises:
        ConfigError: bad arguments, or a model that cannot be expressed as LlamaForCausalLM.
        IntegrityError: the GGUF is absent, truncated or contradicts itself.
        PreflightError: no `gguf` package, no room on the disk, `out` cannot be written.
    """
    started = time.monotonic()
    _check_arguments(dtype, max_file_bytes)
    check_target(out, source=model, overwrite=overwrite)
    conversion = _read_and_check(model, dtype)
    shapes = conversion.weight_shapes()
    num_parameters = sum(map(math.prod, shapes.values()))
    weight_bytes = num_parameters * DTYPE_BYTES[dtype]
    with staged_folder(out, num_bytes=weight_bytes) as folder:
        _write_descriptions(folder, conversion)
        write_weights(folder, shapes, conversion.weight, dtype=dtype, max_bytes=max_file_bytes)
        files = sorted(path.name for path in folder.iterdir())
    vocabulary = conversion.vocabulary
    return ImportReport(
        model=str(model),
        out=str(out),
        architecture=conversion.config["architectures"][0],
        num_parameters=num_parameters,
        quantization=conversion.file.quantization,
        dtype=dtype,
        weight_bytes=weight_bytes,
        files=files,
        tokenizer=vocabulary.kind if vocabulary.kind == "llama" else f"gpt2/{vocabulary.pre}",
        vocab_size=conversion.config["vocab_size"],
        elapsed_s=round(time.monotonic() - started, 2),
    )


@dataclass(frozen=True)
class _Conversion:
    """A checked GGUF with all that is written of it, but for the weights."""

    file: GgufFile
    config: dict[str, Any]
    sources: dict[str, WeightSource]
    vocabulary: Vocabulary
    tokenizer: Tokenizer

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name of each weight -> its shape, in the order of the output."""
        return {name: source.shape for name, source in self.sources.items()}

    def weight(self, name: str) -> torch.Tensor:
        import torch

        return read_weight(self.file, self.sources[name], getattr(torch, self.config["dtype"]))


def _read_and_check(model: Path, dtype: str) -> _Conversion:
    file = GgufFile(model)
    check_architecture(file)
    config = model_config(file, dtype=dtype)
    sources = weight_sources(config)
    check_tensors(file, sources)
    vocabulary = Vocabulary.read(file)
    return _Conversion(file, config, sources, vocabulary, build_tokenizer(vocabulary))


def _write_descriptions(folder: Path, conversion: _Conversion) -> None:
    config, tokenizer_json = conversion.config, conversion.tokenizer.to_str(pretty=True)
    max_length = config["max_position_embeddings"]
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation_config(conversion.file))
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        tokenizer_config(conversion.vocabulary, max_length=max_length),
    )


def _check_arguments(dtype: str, max_file_bytes: int) -> None:
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"--dtype {dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
    if max_file_bytes < 1:
        raise ConfigError("--shard-mb must be at least 1")
