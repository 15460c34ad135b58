"""`shardline bench serve`: load on a running server of OpenAI's API, and its latencies."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parallel.errors import ConfigError, PreflightError
from runner.cli.bench_output import AsJson, Output, check_writable, show

if TYPE_CHECKING:
    from runner.bench.load.arrivals import Loop
    from runner.bench.load.data import Data
    from runner.bench.load.run import Load
    from runner.bench.load.timeline import Timeline

_DEFAULT_REQUESTS = 100


class DataForm(StrEnum):
    """What prompts are read from."""

    RANDOM = "random"
    JSONL = "jsonl"
    SHAREGPT = "sharegpt"


def serve(
    *,
    url: Annotated[
        str, typer.Option("--url", help="Where the server listens.")
    ] = "http://127.0.0.1:8000",
    model: Annotated[
        str, typer.Option("--model", help="What the server calls the model; else its first one.")
    ] = "",
    key_file: Annotated[
        Path | None, typer.Option("--key-file", metavar="FILE", help="Holds the API key.")
    ] = None,
    request_rate: Annotated[
        float | None,
        typer.Option("--request-rate", help="Requests a second, at random times (open loop)."),
    ] = None,
    burstiness: Annotated[
        float | None,
        typer.Option(
            "--burstiness", help="Of --request-rate: 1 (default) is Poisson, less bursts."
        ),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option("--concurrency", min=1, help="Requests under way at a time (closed loop)."),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(
            "--requests",
            min=1,
            help=f"Most requests; without --duration {_DEFAULT_REQUESTS} unless given.",
        ),
    ] = None,
    duration: Annotated[
        float | None, typer.Option("--duration", help="Seconds in which requests are sent.")
    ] = None,
    warmup_requests: Annotated[
        int, typer.Option("--warmup-requests", min=0, help="First ones, which do not count.")
    ] = 1,
    data: Annotated[DataForm, typer.Option("--data", help="Where prompts come from.")] = (
        DataForm.RANDOM
    ),
    data_file: Annotated[
        Path | None, typer.Option("--data-file", metavar="FILE", help="Of jsonl and sharegpt.")
    ] = None,
    input_len: Annotated[
        str, typer.Option("--input-len", help="Tokens of a random prompt: 128, or 64:256.")
    ] = "128",
    output_len: Annotated[
        str, typer.Option("--output-len", help="max_tokens of a request: 128, or 64:256.")
    ] = "128",
    vocab_size: Annotated[
        int, typer.Option("--vocab-size", min=1, help="Random prompts have ids below this.")
    ] = 256,
    extra_body: Annotated[
        str, typer.Option("--extra-body", metavar="JSON", help="Keys of every request's body.")
    ] = "{}",
    slo: Annotated[
        list[str] | None,
        typer.Option("--slo", metavar="METRIC:MS", help="ttft, tpot or e2e; repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of prompts and times.")] = 0,
    timeout_s: Annotated[
        float, typer.Option("--timeout", help="Seconds without a byte from the server.")
    ] = 600.0,
    as_json: AsJson = False,
    output: Output = None,
) -> None:
    """Send requests to a running server, ours or another of OpenAI's API, and time the answers.

    Give --request-rate or --concurrency. Prompts are random token ids unless --data says otherwise.
    """
    try:
        from runner.bench.load.run import Load
    except ModuleNotFoundError as error:
        raise PreflightError(
            f"bench serve needs {error.name}; install the extra: pip install 'shardline[bench]'"
        ) from None
    from runner.bench.load.slo import Slo

    check_writable(output)
    _check_positive({"--duration": duration, "--timeout": timeout_s})
    load = Load(
        _loop(request_rate, burstiness, concurrency),
        _data(data, data_file, input_len, output_len, vocab_size),
        _DEFAULT_REQUESTS if requests is None and duration is None else requests,
        duration,
        warmup_requests,
        seed,
    )
    slos = [Slo.parse(text) for text in slo or ()]
    key = _key(key_file)
    served, timelines = _run(url, model, key, timeout_s, _extra(extra_body), load)

    from runner.bench.host import read_host, version
    from runner.bench.load.result import load_result
    from runner.cli.bench_serve_text import describe

    report = {
        "benchmark": "serve",
        "command": ["shardline", *sys.argv[1:]],
        "environment": read_host() | {"aiohttp": version("aiohttp")},
        "server": {"url": url, "model": served},
        "workload": {
            "request_rate": request_rate,
            "burstiness": (burstiness or 1.0) if request_rate else None,
            "concurrency": concurrency,
            "data": data.value,
            "data_file": str(data_file) if data_file else None,
            "input_len": input_len if data is DataForm.RANDOM else None,
            "output_len": output_len,
            "warmup_requests": warmup_requests,
            "seed": seed,
            "slo": slo or [],
        },
        "result": load_result(timelines, slos),
    }
    show(report, describe, as_json=as_json, output=output)


def _run(
    url: str, model: str, key: str | None, timeout_s: float, extra: dict[str, Any], load: "Load"
) -> "tuple[str, list[Timeline]]":
    """The model's name, and what came."""
    import asyncio

    from runner.bench.load.client import Client
    from runner.bench.load.run import run_load

    async def run() -> "tuple[str, list[Timeline]]":
        async with Client(url, model=model, key=key, timeout_s=timeout_s, extra=extra) as client:
            timelines = await run_load(client, load)
            return client.model, timelines

    return asyncio.run(run())


def _loop(request_rate: float | None, burstiness: float | None, concurrency: int | None) -> "Loop":
    from runner.bench.load.arrivals import ClosedLoop, OpenLoop

    if (request_rate is None) == (concurrency is None):
        raise ConfigError(
            "give either --request-rate (an open loop) or --concurrency (a closed one)"
        )
    if concurrency is not None:
        if burstiness is not None:
            raise ConfigError("--burstiness is of --request-rate; drop it, or --concurrency")
        return ClosedLoop(concurrency)
    assert request_rate is not None
    _check_positive({"--request-rate": request_rate, "--burstiness": burstiness})
    return OpenLoop(request_rate, 1.0 if burstiness is None else burstiness)


def _data(
    form: DataForm, file: Path | None, input_len: str, output_len: str, vocab_size: int
) -> "Data":
    from runner.bench.load.data import FileData, Lengths, RandomData, read_jsonl, read_sharegpt

    outputs = Lengths.parse(output_len, option="--output-len")
    if (file is None) != (form is DataForm.RANDOM):
        raise ConfigError("--data jsonl and --data sharegpt need --data-file, random takes none")
    if file is None:
        return RandomData(Lengths.parse(input_len, option="--input-len"), outputs, vocab_size)
    read = read_jsonl if form is DataForm.JSONL else read_sharegpt
    return FileData(read(file), outputs)


def _key(file: Path | None) -> str | None:
    from runner.config.json_file import read_text

    if file is None:
        return None
    key = read_text(file).strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigError(f"--key-file {file} holds no key; write it into the file, in one line")
    return key


def _extra(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ConfigError(
            f"--extra-body {text}: give a JSON object, such as '{{\"temperature\": 0}}'"
        )
    return values


def _check_positive(given: dict[str, float | None]) -> None:
    for option, value in given.items():
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{option} {value}: give a number above 0")
