"""`shardline run` of a language model: JSONL files of prompts in, one of answers out."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from parallel.errors import IntegrityError
from runner.cli.ranks import run_job
from runner.drawing.words import plural

if TYPE_CHECKING:
    from runner.engine.offline import OfflineFront
    from runner.planning import DecoderJob
    from runner.prompts.reading import PromptFiles
    from runner.text.generation_options import GenerationOptions


def run_decoder(
    job: "DecoderJob",
    inputs: Sequence[Path],
    output: Path,
    options: "GenerationOptions",
    *,
    in_order: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Answer the prompts that have no answer yet, and say what came of it.

    Raises:
        IntegrityError: there were bad lines.
    """
    from runner.engine.offline import OfflineFront

    make_front = partial(_front, job, inputs, output, options, in_order, overwrite)
    front = run_job(job, make_front, hold=OfflineFront.hold)
    if front is None:
        return
    typer.echo(_to_json(front, output) if as_json else _to_text(front, output))
    if front.folder.num_failed:
        raise IntegrityError(
            f"{plural(front.folder.num_failed, 'line')} of {front.num_lines} failed, see "
            f"{output / 'errors.jsonl'}; the first: {front.folder.first_failure}"
        )


def _front(
    job: "DecoderJob",
    inputs: Sequence[Path],
    output: Path,
    options: "GenerationOptions",
    in_order: bool,
    overwrite: bool,
) -> "OfflineFront":
    """Look at the input, the model's text files and the folder, and leave the folder as it is."""
    from runner.config.output_folder import check_writable
    from runner.engine.offline import OfflineFront
    from runner.engine.request_maker import RequestMaker
    from runner.items.run_record import check_run_folder
    from runner.prompts.folder import open_prompt_folder
    from runner.prompts.reading import PromptFiles

    files = PromptFiles(inputs)
    maker = RequestMaker(job)
    maker.check(options)
    settings = cache(partial(_settings, job, files, options, in_order))
    check_run_folder(output, settings, overwrite=overwrite)
    check_writable(output)
    return OfflineFront(
        files,
        maker,
        options,
        open_folder=lambda: open_prompt_folder(output, settings(), overwrite=overwrite),
        in_order=in_order,
        model=_model_name(job),
        max_num_seqs=job.config.scheduler.max_num_seqs,
        max_model_len=job.plan.max_model_len,
    )


def _settings(
    job: "DecoderJob", files: "PromptFiles", options: "GenerationOptions", in_order: bool
) -> dict[str, Any]:
    """What decides an answer: another model or other settings must not go on in the same folder."""
    from runner.bundle.source import read_source

    weights = job.bundle.manifest.source if job.bundle else read_source(job.source_files)
    source = weights | read_source(job.spec.files)
    return {
        "model": job.plan.architecture,
        "load_format": job.config.model.load_format,
        "dtype": job.plan.dtype,
        "max_model_len": job.plan.max_model_len,
        "source": {name: file.sha256 for name, file in source.items()},
        "inputs": files.digests(),
        "options": asdict(options),
        "order": "input" if in_order else "completed",
    }


def _model_name(job: "DecoderJob") -> str:
    folder = job.bundle.path if job.bundle else job.spec.folder
    return folder.resolve().name


def _to_text(front: "OfflineFront", output: Path) -> str:
    counts = front.counts
    results = f"{plural(front.folder.num_finished, 'answer')} in {output}"
    failed = f", {plural(front.folder.num_failed, 'bad line')}" if front.folder.num_failed else ""
    if not counts.answers:
        left = "nothing was left to answer: every line was answered before, or is bad"
        return f"{results}{failed}; {left}"
    return (
        f"{results}{failed}; {plural(counts.answers, 'prompt')} of {counts.prompt_tokens:,} tokens "
        f"answered with {counts.completion_tokens:,} in {counts.seconds:.1f} s "
        f"({counts.tokens_per_s:.1f} tokens/s)"
    )


def _to_json(front: "OfflineFront", output: Path) -> str:
    """One object; what is not of this run alone is `requests`, `finished` and `failed`."""
    values = {
        "output": str(output),
        "requests": front.num_lines,
        "finished": front.folder.num_finished,
        "failed": front.folder.num_failed,
        **asdict(front.counts),
        "tokens_per_s": front.counts.tokens_per_s,
    }
    return json.dumps(values)
