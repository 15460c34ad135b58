"""`shardline generate`: complete prompts, streaming the text, on as many ranks as the plan has."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from runner.cli.generation_options import with_generation_options
from runner.cli.options import with_job_options
from runner.cli.ranks import run_job

if TYPE_CHECKING:
    from runner.engine.completion import BatchFront
    from runner.planning import DecoderJob
    from runner.text.generation_options import GenerationOptions


@with_job_options("decoder")
@with_generation_options
def generate(
    *,
    job: "DecoderJob",
    options: "GenerationOptions",
    prompt: Annotated[
        list[str], typer.Option("--prompt", help="Text to continue; may be given several times.")
    ],
    chat: Annotated[
        bool, typer.Option("--chat", help="Each prompt is a user message of a chat.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a prompt.")
    ] = False,
) -> None:
    """Complete prompts and stream the text.

    Sampling defaults to the model's generation_config.json, else it is greedy. Starts its own
    ranks, or joins those that torchrun started.
    """
    run_job(job, lambda: _front(job, prompt, chat, options, as_json))


def _front(
    job: "DecoderJob",
    prompts: Sequence[str],
    chat: bool,
    options: "GenerationOptions",
    as_json: bool,
) -> "BatchFront":
    """Turn the prompts into requests, checked, and say where their text goes."""
    from runner.cli.generate_output import JsonOutput, TextOutput
    from runner.engine.completion import BatchFront, Completion
    from runner.engine.request_maker import RequestMaker

    maker = RequestMaker(job)
    completions = []
    for index, prompt in enumerate(prompts):
        ids = maker.encode([{"role": "user", "content": prompt}] if chat else prompt)
        request = maker.make(index, ids, options, name=f"prompt {index}")
        completions.append(Completion(prompt, request))
    output = JsonOutput(completions) if as_json else TextOutput(completions)
    return BatchFront(
        completions,
        maker.tokenizer,
        stops=options.stop or (),
        max_num_seqs=job.config.scheduler.max_num_seqs,
        on_progress=output.show,
    )
