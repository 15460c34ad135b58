"""`shardline run` of a tensor model: items in, a file for each out."""

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from parallel.errors import IntegrityError
from runner.cli.ranks import run_graph_job
from runner.drawing.words import plural

if TYPE_CHECKING:
    from runner.graph_planning import GraphJob
    from runner.items.formats import Format
    from runner.items.writing import Summary
    from runner.pipeline.batch_metrics import BatchSnapshot
    from runner.pipeline.pipeline import Pipeline
    from runner.pipeline.rank import Use


def run_graph(
    job: "GraphJob",
    inputs: Sequence[Path],
    output: Path,
    *,
    chosen: "Format",
    overwrite: bool,
    as_json: bool,
) -> None:
    """Compute what has no result yet, and say what came of it.

    Raises:
        IntegrityError: items failed.
    """
    from runner.cli.run_graph_text import RunReport
    from runner.items.extras import require_extras
    from runner.items.listing import list_items
    from runner.items.writing import check_output_folder, open_output_folder
    from runner.pipeline.offline import OfflineRun, outputs_of

    items = list_items(inputs, output=output)
    told: list[tuple[Summary, BatchSnapshot]] = []

    def make_use() -> "Use":
        require_extras(items)
        work = OfflineRun(job.config, job.plan, items)
        specs = outputs_of(job.plan)
        settings = cache(partial(_settings, job))
        check_output_folder(output, specs, chosen=chosen, settings=settings, overwrite=overwrite)

        def use(pipeline: "Pipeline") -> None:
            with open_output_folder(
                output, specs, chosen=chosen, settings=settings(), overwrite=overwrite
            ) as folder:
                work.use(pipeline, folder)
                told.append((folder.summary(items), work.metrics()))

        return use

    ran = run_graph_job(job, make_use)
    if ran is None:
        return
    summary, metrics = told[0]
    report = RunReport(job.plan, output, summary, metrics, ran)
    typer.echo(report.to_json() if as_json else report.to_text())
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
        "load_format": config.model.load_format,
        "dtype": job.plan.dtype,
        "factory_args": config.model.factory_args,
        "source": {name: file.sha256 for name, file in source.items()},
        "preprocess": asdict(preprocess_of(config)),
        "tiling": config.tiling.model_dump() if config.tiling else None,
    }
