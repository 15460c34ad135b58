"""The options that say how tokens are chosen and when a text ends; shared by the commands that
generate.
"""

from collections.abc import Callable
from typing import Annotated

import typer

from runner.cli.options import parameters_of, with_options
from runner.text.generation_options import DEFAULT_MAX_TOKENS, GenerationOptions


def _generation_options(
    *,
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
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after tokens that end a text.")
    ] = False,
) -> GenerationOptions:
    return GenerationOptions(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop) if stop else None,
        ignore_eos=ignore_eos or None,
    )


def with_generation_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command these options before its own; it gets them as `options`."""
    return with_options(
        command,
        name="options",
        make=_generation_options,
        shared=parameters_of(_generation_options),
    )
