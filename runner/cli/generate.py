"""`shardline generate`: complete prompts, streaming the text, on as many ranks as the plan has."""

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runner.cli.options import with_job_options
from runner.cli.ranks import run_job

if TYPE_CHECKING:
    from runner.engine.completion import BatchFront
    from runner.engine.request import SamplingParams
    from runner.planning import DecoderJob
    from runner.text.generation_config import GenerationDefaults
    from runner.text.tokenizer import Tokenizer


DEFAULT_MAX_TOKENS = 256


@with_job_options("decoder")
def generate(
    *,
    job: "DecoderJob",
    prompt: Annotated[
        list[str], typer.Option("--prompt", help="Text to continue; may be given several times.")
    ],
    chat: Annotated[
        bool, typer.Option("--chat", help="Each prompt is a user message of a chat.")
    ] = False,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            min=1,
            help=f"Most tokens to generate; else the model folder's, or {DEFAULT_MAX_TOKENS}.",
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Divides the logits; 0 is greedy.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Keep tokens up to this probability.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", help="Keep this many tokens; 0 is all.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option("--min-p", help="Drop tokens below this share of the best.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option("--repetition-penalty", help="1 is none.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Same seed, same text.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="Text that ends a completion; repeatable.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a prompt.")
    ] = False,
) -> None:
    """Complete prompts and stream the text.

    Sampling defaults to the model's generation_config.json, else it is greedy. Starts its own
    ranks, or joins those that torchrun started.
    """
    asked = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    run_job(job, lambda: _front(job, prompt, chat, max_tokens, asked, stop or [], as_json))


def _front(
    job: "DecoderJob",
    prompts: Sequence[str],
    chat: bool,
    max_tokens: int | None,
    asked: dict[str, Any],
    stops: Sequence[str],
    as_json: bool,
) -> "BatchFront":
    """Turn the prompts into requests, checked, and say where their text goes."""
    from runner.cli.generate_output import JsonOutput, TextOutput
    from runner.engine.completion import BatchFront, Completion, make_requests
    from runner.text.generation_config import GenerationDefaults
    from runner.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(job.spec.folder)
    defaults = GenerationDefaults.load(job.spec.folder)
    requests = make_requests(
        [_encode(job, tokenizer, prompt, chat) for prompt in prompts],
        vocab_size=job.spec.config.vocab_size,
        max_model_len=job.plan.max_model_len,
        max_tokens=max_tokens or defaults.max_new_tokens or DEFAULT_MAX_TOKENS,
        sampling=[_sampling(defaults, asked) for _ in prompts],
        stop_token_ids=defaults.stop_token_ids,
    )
    completions = [Completion(p, r) for p, r in zip(prompts, requests, strict=True)]
    output = JsonOutput(completions) if as_json else TextOutput(completions)
    return BatchFront(
        completions,
        tokenizer,
        stops=stops,
        max_num_seqs=job.config.scheduler.max_num_seqs,
        on_progress=output.show,
    )


def _encode(job: "DecoderJob", tokenizer: "Tokenizer", prompt: str, chat: bool) -> list[int]:
    if not chat:
        return tokenizer.encode(prompt)
    from runner.text.chat import ChatTemplate

    template = ChatTemplate.load(job.spec.folder, special_tokens=tokenizer.special_tokens)
    rendered = template.render([{"role": "user", "content": prompt}])
    return tokenizer.encode(rendered, add_special_tokens=False)


def _sampling(defaults: "GenerationDefaults", asked: dict[str, Any]) -> "SamplingParams":
    """What was asked for, else what the model's folder says; an own seed where none is given."""
    from runner.engine.request import SamplingParams

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    chosen = {name: getattr(defaults, name) for name in names}
    chosen["seed"] = secrets.randbits(63)
    return SamplingParams(**chosen | {k: v for k, v in asked.items() if v is not None})
