"""`shardline run`: a tensor model over files, each result written once."""

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parallel.errors import IntegrityError
from runner.cli.options import with_job_options
from runner.cli.ranks import run_graph_job
from runner.cli.table import plural

if TYPE_CHECKING:
    from runner.graph_planning import GraphJob
    from runner.items.writing import Summary
    from runner.pipeline.batch_metrics import BatchSnapshot
    from runner.pipeline.pipeline import Pipeline
    from runner.pipeline.rank import PipelineReport


class OutputFormat(StrEnum):
    """What results are written as."""

    NPZ = "npz"
    NPY = "npy"
    JSON = "json"


@with_job_options("graph")
def run(
    *,
    job: "GraphJob",
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUTS...",
            help="Folders, files (.npy .npz, pictures, .nii .nii.gz), or .txt lists of files.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Where results are written.")
    ],
    output_format: Annotated[
        OutputFormat, typer.Option("--format", help="npz, npy (one output), or json (small ones).")
    ] = OutputFormat.NPZ,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Drop the results of another run first.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compute files with a tensor model; a run that was stopped goes on where it was.

    An item that cannot be read or computed is recorded in errors.jsonl and does not stop the rest;
    the command then ends with 4. Starts its own ranks, or joins those that torchrun started.
    """
    from runner.items.extras import require_extras
    from runner.items.formats import check_format
    from runner.items.listing import list_items
    from runner.items.writing import open_output_folder
    from runner.pipeline.offline import Inputs, OfflineRun, outputs_of

    Inputs.of(job.config, job.plan)
    items = list_items(inputs, output=output)
    require_extras(items)
    specs = outputs_of(job.plan)
    check_format(output_format.value, specs)

    told: dict[str, Any] = {}

    def use(pipeline: "Pipeline") -> None:
        with open_output_folder(
            output,
            specs,
            chosen=output_format.value,
            settings=_settings(job),
            overwrite=overwrite,
        ) as folder:
            work = OfflineRun(job.config, job.plan, items, folder)
            work.use(pipeline)
            told.update(summary=folder.summary(items), metrics=work.metrics())

    report = run_graph_job(job, use)
    if report is None:
        return
    summary: Summary = told["summary"]
    show = _as_json if as_json else _as_text
    typer.echo(show(job, output, summary, told["metrics"], report))
    if summary.failed:
        first = next(iter(summary.failed.values()))
        raise IntegrityError(
            f"{plural(len(summary.failed), 'item')} of {len(items)} failed, see "
            f"{output / 'errors.jsonl'}; the first: {first}"
        )


def _settings(job: "GraphJob") -> dict[str, Any]:
    """What decides a result: another model or other settings must not go on in the same folder."""
    from dataclasses import asdict

    from runner.bundle.source import read_source
    from runner.pipeline.offline import preprocess_of

    source = job.bundle.manifest.source if job.bundle else read_source(job.source_files)
    config = job.config
    return {
        "model": job.plan.architecture,
        "dtype": job.plan.dtype,
        "factory_args": config.model.factory_args,
        "source": {name: file.sha256 for name, file in source.items()},
        "preprocess": asdict(preprocess_of(config)),
        "tiling": config.tiling.model_dump() if config.tiling else None,
    }


def _as_text(
    job: "GraphJob",
    output: Path,
    summary: "Summary",
    metrics: "BatchSnapshot",
    report: "PipelineReport",
) -> str:
    lines = [
        f"{plural(summary.finished, 'result')} in {output}; {metrics.completed} samples in "
        f"{report.seconds:.1f} s ({_rate(metrics, report):.1f} a second), "
        f"{metrics.mean_batch_size:.1f} a batch; batches by what cut them: {_reasons(metrics)}"
    ]
    if len(job.plan.stages) > 1:
        lines.append(
            f"pipeline bubble: {report.bubble:.1%} measured over {report.num_batches} batches; "
            f"{job.plan.bubble:.1%} predicted for {job.plan.num_microbatches}"
        )
    return "\n".join(lines)


def _as_json(
    job: "GraphJob",
    output: Path,
    summary: "Summary",
    metrics: "BatchSnapshot",
    report: "PipelineReport",
) -> str:
    values = {
        "output": str(output),
        "finished": summary.finished,
        "failed": summary.failed,
        "samples": metrics.completed,
        "seconds": report.seconds,
        "samples_per_s": _rate(metrics, report),
        "batches": metrics.batches,
        "mean_batch_size": metrics.mean_batch_size,
        "batches_by_reason": metrics.by_reason,
        "busy_s": report.busy_s,
        "bubble_measured": report.bubble,
        "bubble_predicted": job.plan.bubble,
    }
    return json.dumps(values)


def _rate(metrics: "BatchSnapshot", report: "PipelineReport") -> float:
    return metrics.completed / report.seconds if report.seconds else 0.0


def _reasons(metrics: "BatchSnapshot") -> str:
    counts = [f"{reason} {count}" for reason, count in metrics.by_reason.items() if count]
    return ", ".join(counts) or "nothing"
