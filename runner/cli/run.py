"""`shardline run`: a model over files, each result written once; a tensor model over arrays and
pictures, a language model over prompts.
"""

from collections.abc import Mapping
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parallel.errors import ConfigError
from runner.cli.generation_options import with_generation_options
from runner.cli.options import with_job_options
from runner.cli.run_decoder import run_decoder
from runner.cli.run_graph import run_graph
from runner.text.generation_options import GenerationOptions

if TYPE_CHECKING:
    from runner.graph_planning import GraphJob
    from runner.planning import DecoderJob


class OutputFormat(StrEnum):
    """What results of a tensor model are written as."""

    NPZ = "npz"
    NPY = "npy"
    JSON = "json"


class Order(StrEnum):
    """In which order answers of a language model are written."""

    INPUT = "input"
    COMPLETED = "completed"


@with_job_options("decoder", "graph")
@with_generation_options
def run(
    *,
    job: "DecoderJob | GraphJob",
    options: GenerationOptions,
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUTS...",
            help="Of a language model JSONL files of prompts; of a tensor model folders, files "
            "(.npy .npz, pictures, .nii .nii.gz), or .txt lists of files.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Where results are written.")
    ],
    output_format: Annotated[
        OutputFormat | None,
        typer.Option(
            "--format", help="Of a tensor model: npz (default), npy (one output), json (small)."
        ),
    ] = None,
    order: Annotated[
        Order | None,
        typer.Option(
            "--order",
            help="Of a language model: input (default) holds answers back until those before them "
            "are written, and begins no more prompts while 16 x scheduler.max_num_seqs wait; "
            "completed writes them as they come.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Drop the results of another run first.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compute files with a tensor model, or answer files of prompts with a language model.

    A run that was stopped goes on where it was. An item or a line that cannot be read or computed
    is recorded in errors.jsonl and does not stop the rest; the command then ends with 4. Starts its
    own ranks, or joins those that torchrun started.

    A line of prompts is {"prompt": "..."} or {"messages": [...]}, with an id and any of the options
    of sampling below; or one of OpenAI's batch format. Answers are lines of results.jsonl.
    """
    from runner.planning import DecoderJob

    if isinstance(job, DecoderJob):
        _refuse(job, {"--format": output_format})
        in_order = order is not Order.COMPLETED
        run_decoder(
            job, inputs, output, options, in_order=in_order, overwrite=overwrite, as_json=as_json
        )
    else:
        given = {f"--{name.replace('_', '-')}": value for name, value in asdict(options).items()}
        _refuse(job, {"--order": order, **given})
        chosen = output_format or OutputFormat.NPZ
        run_graph(job, inputs, output, chosen=chosen.value, overwrite=overwrite, as_json=as_json)


def _refuse(job: "DecoderJob | GraphJob", options: Mapping[str, object]) -> None:
    """Raises ConfigError: an option is given that would do nothing for this kind of model."""
    this, other = "a language model", "tensor models"
    if job.plan.kind == "graph":
        this, other = "a tensor model", "language models"
    for name, value in options.items():
        if value is not None:
            raise ConfigError(
                f"{name} is for {other}, and {job.plan.architecture} is {this}; leave it out"
            )
