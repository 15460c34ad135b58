"""`shardline import`: a GGUF file of the Llama family becomes a Hugging Face folder, a TensorFlow
SavedModel an ONNX file.

Not here: the conversion itself; see runner.importer.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from runner.importer.gguf_import import ImportReport


def import_model(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="A GGUF file of the Llama family, or a SavedModel."),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The folder, or the .onnx file, to write.")
    ],
    dtype: Annotated[
        str, typer.Option(help="Type of the weights written: float32, bfloat16 or float16.")
    ] = "bfloat16",
    shard_mb: Annotated[
        int, typer.Option(help="Largest safetensors file, in MB; a larger tensor has its own.")
    ] = 2000,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it is a model folder.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Turn a GGUF file of the Llama family into a Hugging Face folder that `plan` can read, or the
    folder of a TensorFlow SavedModel into an ONNX file.

    A SavedModel is converted by tf2onnx in a virtual environment of its own, which the first call
    makes; that takes a package index. The other options are for GGUF files.
    """
    import json
    from dataclasses import asdict

    from runner.importer import import_gguf
    from runner.importer.saved_model import import_saved_model

    if model.is_dir():
        import_saved_model(model, out)
        typer.echo(json.dumps({"model": str(model), "out": str(out)}) if as_json else str(out))
        return

    report = import_gguf(
        model,
        out,
        dtype=dtype,
        max_file_bytes=shard_mb * 1_000_000,
        overwrite=overwrite,
    )
    typer.echo(json.dumps(asdict(report)) if as_json else _summary(report))


def _summary(report: ImportReport) -> str:
    types = ", ".join(f"{count} {name}" for name, count in report.quantization.items())
    num_files = sum(name.endswith(".safetensors") for name in report.files)
    return "\n".join(
        [
            f"{report.model} -> {report.out} in {report.elapsed_s:.1f} s",
            f"  {report.architecture}, {report.num_parameters / 1e6:,.1f} M parameters",
            f"  tensors in the GGUF: {types}",
            f"  weights written: {report.weight_bytes / 1e6:,.1f} MB as {report.dtype}, "
            f"{num_files} file{'s' if num_files > 1 else ''}",
            f"  tokenizer: {report.tokenizer}, {report.vocab_size} tokens",
        ]
    )
